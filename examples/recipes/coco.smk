# The paper's tables on MS-COCO; included by Snakefile, see README.md.
#
#     snakemake -s examples/recipes/Snakefile -j1 coco_table2 coco_table6 --config coco=coco
#
# VOC-to-COCO labels COCO by the classifier that the tables on PASCAL VOC take, so it needs VOC too.

COCO = config.get("coco") or os.environ.get("BAPNAL_COCO_ROOT") or "coco"
COCO_RUNS = config.get("coco_runs", f"runs/coco/{PRESET}")
COCO_RUN = f"{config.get('python', sys.executable)} -m bapnal_recipes.coco"
COCO_OPTIONS = {x: config.get(f"coco_{x}", "") for x in ("stage1", "stage2", "stage3", "evaluation")}
COCO_PRESET = config.get("coco_detector", "paper")
COCO_FROM = f"--root {COCO} --prepared {COCO_RUNS}/prepare"

# Name: where its classifier is; or no classifier, and the method.
COCO_LABELS = {
    "coco": f"{COCO_RUNS}/stage1/bap-{{seed}}",
    "voc": f"{RUNS}/stage1/bap-{{seed}}",
}
COCO_METHODS = {"box": "box", "grabcut": "grabcut", "instances": "instances", "truth": "truth"}
# Name: labels and what of them Mask R-CNN is trained on.
COCO_DETECTORS = {
    f"{labels}_{kind}": (labels, kind) for labels in COCO_LABELS for kind in ("crf", "ret", "both")
} | {"truth": ("truth", "masks")}


def coco_scores(what, names, split):
    return [
        f"{COCO_RUNS}/scores/{what}/{x}-{seed}-{split}.json"
        for x in names
        for seed in (SEEDS if x not in COCO_METHODS or what == "detector" else [0])
    ]


COCO_TARGETS = {
    "coco_table2": coco_scores("labels", [*COCO_LABELS, "box", "grabcut", "instances"], "train"),
    "coco_table6": coco_scores("detector", COCO_DETECTORS, "val"),
}


for target in COCO_TARGETS:
    rule:
        name: target
        input: f"{COCO_RUNS}/pages/{target}/tables.md"


rule coco_table:
    input: lambda wildcards: COCO_TARGETS[wildcards.target]
    output: f"{COCO_RUNS}/pages/{{target}}/tables.md"
    log: f"{COCO_RUNS}/pages/{{target}}.log"
    params: f"--results {COCO_RUNS}/scores --out {COCO_RUNS}/pages/{{target}} --no-photographs"
    wildcard_constraints: target="|".join(COCO_TARGETS)
    shell: "{COCO_RUN}.tables {params} > {log} 2>&1"


rule coco_prepare:
    input: f"{COCO}/annotations/instances_train2017.json", f"{COCO}/annotations/instances_val2017.json"
    output: f"{COCO_RUNS}/prepare/result.json"
    log: f"{COCO_RUNS}/prepare.log"
    resources: mem_mb=12000, runtime=120
    shell: "{COCO_RUN}.prepare --root {COCO} --out {COCO_RUNS}/prepare > {log} 2>&1"


rule coco_classifier:
    input: f"{COCO_RUNS}/prepare/result.json"
    output: f"{COCO_RUNS}/stage1/bap-{{seed}}/result.json"
    log: f"{COCO_RUNS}/stage1/bap-{{seed}}.log"
    params:
        where=f"{COCO_FROM} --out {COCO_RUNS}/stage1/bap-{{seed}}",
        how=lambda w: f"{weights_of('vgg16')} {COCO_OPTIONS['stage1']}",
    threads: int(config.get("threads", 4))
    resources: gpu=1, mem_mb=16000, runtime=1440
    shell: "{COCO_RUN}.train_classifier {PRESET} {params} --seed {wildcards.seed} > {log} 2>&1"


def coco_made_from(wildcards):
    """What labels come from: images, and a classifier where there is one."""
    prepared = [f"{COCO_RUNS}/prepare/result.json"]
    if wildcards.labels in COCO_METHODS:
        return prepared
    return [*prepared, COCO_LABELS[wildcards.labels].format(seed=wildcards.seed) + "/result.json"]


def coco_labelling(wildcards):
    """The options that labels are made with."""
    if wildcards.labels in COCO_METHODS:
        return f"--method {COCO_METHODS[wildcards.labels]} --seed {wildcards.seed}"
    folder = COCO_LABELS[wildcards.labels].format(seed=wildcards.seed)
    return f"--classifier {folder}/classifier.pt"


rule coco_labels:
    input: coco_made_from
    output: f"{COCO_RUNS}/labels/{{labels}}-{{seed}}/result.json"
    log: f"{COCO_RUNS}/labels/{{labels}}-{{seed}}.log"
    params:
        where=f"{COCO_FROM} --split train --out {COCO_RUNS}/labels/{{labels}}-{{seed}}",
        how=lambda w: f"{coco_labelling(w)} {COCO_OPTIONS['stage2']}",
    wildcard_constraints: labels="|".join([*COCO_LABELS, *COCO_METHODS])
    threads: int(config.get("threads", 4))
    resources: gpu=1, mem_mb=16000, runtime=1440
    shell: "{COCO_RUN}.generate_labels {PRESET} {params} > {log} 2>&1"


rule coco_label_scores:
    input: f"{COCO_RUNS}/labels/{{labels}}-{{seed}}/result.json"
    output: f"{COCO_RUNS}/scores/labels/{{labels}}-{{seed}}-train.json"
    log: f"{COCO_RUNS}/scores/labels/{{labels}}-{{seed}}-train.log"
    params: f"{COCO_FROM} --folder {COCO_RUNS}/labels/{{labels}}-{{seed}} {COCO_OPTIONS['evaluation']}"
    resources: mem_mb=32000, runtime=240
    shell: "{COCO_RUN}.evaluate labels {params} --out {output} > {log} 2>&1"


def coco_labels_of(wildcards):
    """The folder of labels that a detector is trained on."""
    labels, _ = COCO_DETECTORS[wildcards.detector]
    return f"{COCO_RUNS}/labels/{labels}-{0 if labels in COCO_METHODS else wildcards.seed}"


rule coco_detector:
    input: lambda w: f"{coco_labels_of(w)}/result.json"
    output: f"{COCO_RUNS}/stage3/{{detector}}-{{seed}}/result.json"
    log: f"{COCO_RUNS}/stage3/{{detector}}-{{seed}}.log"
    params:
        where=f"{COCO_FROM} --out {COCO_RUNS}/stage3/{{detector}}-{{seed}}",
        labels=lambda w: f"--labels {coco_labels_of(w)}",
        how=lambda w: f"--supervision {COCO_DETECTORS[w.detector][1]} {COCO_OPTIONS['stage3']}",
    threads: int(config.get("threads", 4))
    resources: gpu=1, mem_mb=32000, runtime=2880
    shell: "{COCO_RUN}.train_detector {COCO_PRESET} {params} --seed {wildcards.seed} > {log} 2>&1"


rule coco_detector_scores:
    input: f"{COCO_RUNS}/stage3/{{detector}}-{{seed}}/result.json"
    output: f"{COCO_RUNS}/scores/detector/{{detector}}-{{seed}}-val.json"
    log: f"{COCO_RUNS}/scores/detector/{{detector}}-{{seed}}-val.log"
    params:
        f"{COCO_FROM} --detector {COCO_RUNS}/stage3/{{detector}}-{{seed}}/detector.pt",
        COCO_OPTIONS["evaluation"],
    threads: int(config.get("threads", 4))
    resources: gpu=1, mem_mb=16000, runtime=480
    shell: "{COCO_RUN}.evaluate detector {params} --out {output} > {log} 2>&1"
