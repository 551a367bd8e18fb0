"""The Snakemake workflow from synthetic images to every table, and what it does on failure."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import coco_files
import pytest
import yaml

import shapes

pytest.importorskip("snakemake", reason="Snakemake is not installed (extra workflow)")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

RECIPES = Path(__file__).parents[1]
PREFORK = Path(__file__).with_name("prefork.py")
COMMON = "--accelerator cpu --workers 0"
TRAINING = f"{COMMON} --no-tensorboard --batch-size 4 --iterations 2 --weights random"
TARGETS = (
    *("table1", "table3", "table4", "table5", "figure1b", "all"),
    *("supplement_table1", "supplement_table2", "test_set"),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A process that runs modules in its forks, as the interpreter of the workflow's jobs."""
    path = tmp_path_factory.mktemp("prefork") / "socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BAPNAL_PREFORK": str(path)}
    process = subprocess.Popen([sys.executable, PREFORK, "serve", path], env=environment)
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.05)
    yield environment
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with 12 images, and the settings of a workflow of small networks on them."""
    folder = tmp_path_factory.mktemp("workflow")
    root = shapes.write_shapes(folder / "a devkit", 12, 4, 64, seed=0)
    lists = root / "ImageSets/Segmentation"
    (lists / "train_aug.txt").write_text((lists / "train.txt").read_text())
    photo = next((root / "JPEGImages").iterdir())  # the test set has images alone
    shutil.copy(photo, photo.with_stem("test_0"))
    (lists / "test.txt").write_text("test_0\n")
    config = {
        "data": str(root),
        "runs": "runs",
        "classes": " ".join(shapes.CLASSES),
        "python": f"{sys.executable} -I -S {PREFORK}",
        "threads": 1,
        "gammas": "1 7",
        "balances": "0.1",
        "stage1": f"--backbone small --stride 4 --crop 64 {TRAINING}",
        "stage2": COMMON,
        "stage3": f"--network small --stride 4 --head linear --crop 48 {TRAINING}",
        "evaluation": "--accelerator cpu",
        "runtime": "--images 2 --warm-up 0",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def snakemake(folder, environment, *arguments):
    command = [sys.executable, "-m", "snakemake", "-s", RECIPES / "Snakefile", "-d", folder]
    command += ["--configfile", folder / "config.yaml", "--resources", "gpu=2", *arguments]
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(workplace, server):
    code, log = snakemake(workplace, server, "-j2", *TARGETS)
    assert code == 0, log[-6000:]
    return workplace


def test_every_table_has_its_page(finished):
    pages = {path.parent.name for path in finished.glob("runs/pages/*/tables.md")}
    assert set(TARGETS) - {"all"} <= pages
    text = (finished / "runs/pages/table1/tables.md").read_text()
    scores = json.loads((finished / "runs/scores/labels/bap-0-val.json").read_text())["scores"]
    assert f"{scores['crf']['miou']:.1f}" in text


def test_each_row_comes_from_what_its_table_says(finished):
    def settings(path):
        return json.loads((finished / "runs" / path).read_text())["settings"]

    assert settings("stage1/gap-0/result.json")["pool"] == "gap"
    assert [settings(f"stage1/bap_n{n}-0/result.json")["grid_size"] for n in (1, 2, 3, 5)] == [
        *(1, 2, 3, 5)
    ]
    labels = settings("labels/bap_n2_m3-0/train_aug/result.json")
    assert labels["generator"]["grid_size"] == 3
    assert Path(labels["classifier"]).parts[-2] == "bap_n2-0"
    cam = settings("labels/bap_cam-0/val/result.json")
    assert cam["generator"]["background"] == "cam"
    assert settings("stage3/v1_ret-0/result.json")["loss"] == "ret"
    assert settings("stage3/v1_semi-0/result.json")["ground_truth"].endswith("train.txt")
    assert settings("stage3/v1_gamma1_lambda0.1-0/result.json")["gamma"] == 1
    assert settings("stage3/v1_nal_gap-0/result.json")["labels"] == "runs/labels/gap-0/train_aug"


def test_archives_for_the_test_server_are_packed(finished):
    with tarfile.open(finished / "runs/test/v2_semi-0.tgz") as archive:
        names = archive.getnames()
    assert names == ["results/VOC2012/Segmentation/comp6_test_cls/test_0.png"]


def test_what_is_finished_is_not_run_again(finished, server):
    code, log = snakemake(finished, server, "-n", *TARGETS)
    assert code == 0
    assert "Nothing to be done" in log
    for path in ("scores/labels/box-0-val.json", "pages/table1/tables.md"):
        (finished / "runs" / path).unlink()
    _, log = snakemake(finished, server, "-n", "table1")
    jobs = log[log.index("Job stats:") :].split("Reasons:")[0]
    assert "label_scores" in jobs
    assert "classifier" not in jobs


def test_a_failed_stage_names_its_log(workplace, server):
    code, log = snakemake(
        *(workplace, server, "-j1", "runs/stage1/gap-9/result.json"),
        *("--config", "stage1=--backbone small --crop 0"),
    )
    assert code == 1
    assert "runs/stage1/gap-9.log" in log
    assert "crop must be at least 1, got 0" in (workplace / "runs/stage1/gap-9.log").read_text()


def test_the_released_preset_asks_for_its_weights(workplace, server):
    options = ("--config", "preset=released", "stage1=")
    code, log = snakemake(workplace, server, "-n", "table1", *options)
    assert code == 1
    assert "weights must be a folder with vgg16_20M" in log


def test_weights_are_taken_by_what_they_are_for(workplace, server):
    folder = workplace / "weights"
    folder.mkdir()
    for name in ("vgg16.caffemodel", "resnet101_coco.pth"):
        (folder / name).touch()
    options = ("--config", f"weights={folder}", "runs=others")
    _, log = snakemake(workplace, server, "-n", "table5", *options)
    assert f"--weights {folder}/vgg16.caffemodel --trained-on imagenet" in log
    assert f"--weights {folder}/resnet101_coco.pth --trained-on coco" in log
    _, log = snakemake(workplace, server, "-n", "supplement_table6", *options)
    assert "resnet101_imagenet" not in log


def test_a_search_serves_its_labels_and_its_images_do_not_count(workplace, server):
    _, log = snakemake(workplace, server, "-n", "table1", "--config", "search=true", "runs=others")
    commands = [line for line in log.splitlines() if "Shell command" in line]

    def command(*parts):
        found = [line for line in commands if all(part in line for part in parts)]
        assert len(found) == 1, parts
        return found[0]

    assert "--search others/search/gap-0/result.json" in command("--out others/labels/gap-0/val")
    assert "--search" not in command("--out others/labels/bap_cam-0/val")
    for name in ("bap", "box"):
        exclude = " --exclude others/search/bap-0/images.txt "
        assert exclude in command(f"scores/labels/{name}-0-val.json", "evaluate")
        assert exclude not in command(f"scores/labels/{name}-0-train.json", "evaluate")


def test_the_tables_on_coco_take_a_classifier_of_each_data_set(workplace, server):
    root = coco_files.write_coco(workplace / "coco", train=3, val=2)
    options = ("--config", f"coco={root}", "coco_runs=coco_runs", "runs=others", "seeds=2")
    code, log = snakemake(workplace, server, "-n", "coco_table2", "coco_table6", *options)
    assert code == 0, log[-6000:]
    commands = [line for line in log.splitlines() if "Shell command" in line]

    def command(*parts):
        found = [line for line in commands if all(part in line for part in parts)]
        assert len(found) == 1, parts
        return found[0]

    own = command("coco.generate_labels", "--out coco_runs/labels/coco-1 ")
    assert "--classifier coco_runs/stage1/bap-1/classifier.pt" in own
    other = command("coco.generate_labels", "--out coco_runs/labels/voc-0 ")
    assert "--classifier others/stage1/bap-0/classifier.pt" in other
    assert "--method truth" in command("coco.generate_labels", "--out coco_runs/labels/truth-0 ")
    detector = command("coco.train_detector", "--out coco_runs/stage3/voc_ret-1 ")
    assert "--labels coco_runs/labels/voc-1 --supervision ret" in detector
    for seed in (0, 1):  # the ground truth is one, whatever the seed of the detector
        full = command("coco.train_detector", f"--out coco_runs/stage3/truth-{seed} ")
        assert "--labels coco_runs/labels/truth-0 --supervision masks" in full
    assert "--split train" in own
    assert "--method grabcut" in command("coco.generate_labels", "labels/grabcut-0 ")
