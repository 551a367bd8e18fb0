"""The numbers of the paper's tables, and which of our results belong beside each of them.

Every number is mIoU or precision in percent unless its table says otherwise. A rule is a
dictionary from facts, as the module results names them, to the value that one of our results must
have; a tuple lists values of which any will do. Tables on MS-COCO (2 and 6, supplement 9) are not
here: these scripts are about PASCAL VOC 2012.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bapnal_recipes.data.voc import VOC_CLASSES

Rule = Mapping[str, Any]

IMAGES = {"train": 1464, "train_aug": 10582, "val": 1449, "test": 1456}  # of VOC 2012
DATA = "VOC 2012 with its masks"
VGG = "ImageNet weights of VGG-16"
RESNET = "ImageNet or MS-COCO weights of ResNet-101"
GPU = "a GPU"
SERVER = "the test server (evaluate.py segmentation --archive writes what it accepts)"
NOT_OURS = "other authors' method, not part of these scripts"


class Column(NamedTuple):
    """Numbers of ours that stand in one column.

    Attributes:
        name: Heading.
        rule: What holds for all of them besides the rules of table and row.
        quotient: None, or the columns whose quotient in percent stands here instead.
        needs: What no run of these scripts can give; empty where they can.
    """

    name: str
    rule: Rule
    quotient: tuple[int, int] | None = None
    needs: str = ""


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        name: The method, or whatever the line is about.
        paper: The paper's numbers, one a column of the paper; None where it has none.
        rule: Which results of ours belong here; None where the line is not ours to run.
        score: Name of the number in a result, or one for each of our columns, None where a column
            has none.
        needs: What a run takes besides what the table needs; or why there is none.
        group: Heading that the line stands under.
    """

    name: str
    paper: tuple[float | None, ...]
    rule: Rule | None = None
    score: str | tuple[str | None, ...] = "miou"
    needs: str = ""
    group: str = ""


class PaperTable(NamedTuple):
    """One table of the paper.

    Attributes:
        number: As in the paper.
        title: What it compares, in our words.
        columns: Of the paper's numbers.
        ours: Of our numbers.
        rule: What holds for all our numbers in it.
        setting: What one of our results must say besides for being the paper's experiment.
        rows: The lines.
        needs: What a run takes.
        note: What a reader has to know.
        head: Heading of the first column.
        decimals: Of the paper's numbers and of ours.
    """

    number: str
    title: str
    columns: tuple[str, ...]
    ours: tuple[Column, ...]
    rule: Rule
    setting: Rule
    rows: tuple[Row, ...]
    needs: tuple[str, ...]
    note: str = ""
    head: str = "method"
    decimals: tuple[int, int] = (1, 1)


class PaperFigure(NamedTuple):
    """One figure of the paper that figures.py draws from our results.

    Attributes:
        number: As in the paper.
        name: Of the file.
        title: What it shows, in our words.
        needs: What it is drawn from.
    """

    number: str
    name: str
    title: str
    needs: str


NETWORK: Rule = {"labels.method": "network"}
N_OF_PAPER: Rule = {
    "stage1.grid_size": 4,
    "labels.generator.grid_size": (1, "searched"),
    "stage1.leave_out": "",
}
BAP: Rule = {**NETWORK, **N_OF_PAPER, "stage1.pool": "bap"}
GAP: Rule = {**NETWORK, **N_OF_PAPER, "stage1.pool": "gap"}
WITH_U0: Rule = {"u_0": ("attention", "both", "searched")}
COSINE: Rule = {"stage3.supervision": "boxes", "stage3.classifier": "cosine"}
FROM_BOXES: Rule = {**BAP, **WITH_U0, **COSINE}
NAL: Rule = {"stage3.loss": "nal", "stage3.gamma": 7.0, "stage3.balance": 0.1}
ONE_SCALE = Column("val, one scale + CRF", {"split": "val", "test": "single+crf"})
SCALES = Column("val, scales and flips + CRF", {"split": "val", "test": "multi+crf"})
CRF_TESTS = (ONE_SCALE, SCALES)
ON_TEST = Column("test", {"split": "test", "test": "server"}, needs=SERVER)
VGG_16: Rule = {"stage1.backbone": "vgg16", "stage1.initial": "imagenet"}
V1: Rule = {**VGG_16, "stage3.network": "deeplab_v1", "stage3.initial": "imagenet"}
COCO_V2: Rule = {**VGG_16, "stage3.network": "deeplab_v2", "stage3.initial": "coco"}


def _map(name: str) -> Rule:
    return {"labels.map": name}


def _seen(name: str, *numbers: float | None, group: str) -> Row:
    """Return a line of other authors' numbers."""
    return Row(name, numbers, needs=NOT_OURS, group=group)


IMAGE_TAGS = "supervision: image tags"
BOXES = "supervision: boxes"
SALIENCY = "supervision: image tags (10K) and saliency (3K)"
SEMI = "supervision: boxes (9K) and masks (1K)"

TABLE_1 = PaperTable(
    "Table 1",
    "Pseudo labels, mIoU on the train and val splits",
    ("train", "val"),
    (Column("train", {"split": "train"}), Column("val", {"split": "val"})),
    {"what": "labels", "labels.margin": 0.0},
    {key: (value, None) for key, value in VGG_16.items()},
    (
        _seen("AffinityNet", 59.7, None, group=IMAGE_TAGS),
        Row("Box", (65.4, 62.2), {"labels.method": "box"}, group=BOXES),
        Row("GrabCut", (65.7, 66.1), {"labels.method": "grabcut"}, group=BOXES),
        Row(
            "MCG (best proposal of each box)",
            (66.2, 66.9),
            {"labels.method": "mcg"},
            needs="MCG proposals",
            group=BOXES,
        ),
        Row("WSSL", (69.7, 71.1), {"labels.method": "wssl"}, group=BOXES),
        Row(
            "SDI (partly unlabelled)",
            (79.7, 60.5),
            {"labels.method": "sdi"},
            needs="MCG proposals",
            group=BOXES,
        ),
        Row(
            "GAP", (75.5, 76.1), {**GAP, **_map("crf")}, needs=f"{VGG}; {GPU}", group="this method"
        ),
        Row(
            "BAP: Y_crf without u_0",
            (77.0, 77.8),
            {**BAP, **_map("crf"), "u_0": "cam"},
            needs=f"{VGG}; {GPU}",
            group="this method",
        ),
        *(
            Row(
                f"BAP: {name}",
                numbers,
                {**BAP, **WITH_U0, **_map(key)},
                needs=f"{VGG}; {GPU}",
                group="this method",
            )
            for name, numbers, key in (
                ("Y_crf", (78.7, 79.2), "crf"),
                ("Y_ret", (70.8, 69.9), "ret"),
                ("Y_crf & Y_ret (partly unlabelled)", (85.3, 68.2), "both"),
            )
        ),
    ),
    (DATA,),
    "Partly unlabelled: ours leaves pixels without a label out; how many there are, and the mIoU "
    "that counts them as wrong, is among our own tables.",
)

TABLE_3 = PaperTable(
    "Table 3",
    "What is done with the pixels on which Y_crf and Y_ret differ: DeepLab-V1, mIoU on val",
    ("before CRF", "after CRF"),
    (
        Column("val, one scale", {"split": "val", "test": "single"}),
        ONE_SCALE,
        Column("val, scales and flips", {"split": "val", "test": "multi"}),
        SCALES,
    ),
    {"what": "segmentation", **FROM_BOXES},
    V1,
    (
        Row("left out", (61.8, 67.5), {"stage3.loss": "ignore"}),
        Row("entropy regularisation", (61.4, 67.3), {"stage3.loss": "entropy"}),
        Row("bootstrapping", (61.9, 67.6), {"stage3.loss": "bootstrap"}),
        Row("weighted by confidence (NAL)", (62.4, 68.1), NAL),
    ),
    (DATA, VGG, GPU),
)


def _segmentation_table(
    number: str, network: str, setting: Rule, weights: str, rows: tuple[Row, ...], note: str = ""
) -> PaperTable:
    return PaperTable(
        number,
        f"{network} trained on pseudo labels, mIoU on val and test",
        ("val", "test"),
        (*CRF_TESTS, ON_TEST),
        {"what": "segmentation"},
        setting,
        rows,
        (DATA, weights, GPU),
        "Numbers on test come from the test server, which takes archives of predictions only "
        "(evaluate.py segmentation --archive). " + note,
    )


def _ours_in_4_and_5(
    crf: float, ret: float, nal: tuple[float, float], semi: tuple[float, float]
) -> tuple[Row, ...]:
    group = f"{BOXES} (10K), this method"
    return (
        Row("Y_crf", (crf, None), {**FROM_BOXES, "stage3.loss": "crf"}, group=group),
        Row("Y_ret", (ret, None), {**FROM_BOXES, "stage3.loss": "ret"}, group=group),
        Row("NAL", nal, {**FROM_BOXES, **NAL}, group=group),
        Row(
            "NAL, with the masks of train",
            semi,
            {**FROM_BOXES, **NAL, "stage3.supervision": "some masks"},
            group=f"{SEMI}, this method",
        ),
    )


TABLE_4 = _segmentation_table(
    "Table 4",
    "DeepLab-V1 (VGG-16)",
    V1,
    VGG,
    (
        _seen("SeeNet", 61.1, 60.7, group=SALIENCY),
        _seen("FickleNet", 61.2, 61.9, group=SALIENCY),
        _seen("OAA", 63.1, 62.8, group=SALIENCY),
        _seen("ICD", 64.0, 63.9, group=SALIENCY),
        _seen("BoxSup", 62.0, 64.6, group=f"{BOXES} (10K)"),
        _seen("WSSL", 60.6, 62.2, group=f"{BOXES} (10K)"),
        _seen("SDI", 65.7, 67.5, group=f"{BOXES} (10K)"),
        _seen("BCM", 66.8, None, group=f"{BOXES} (10K)"),
        *_ours_in_4_and_5(67.8, 66.1, (68.1, 69.4), (70.5, 71.5))[:3],
        _seen("BoxSup", 63.5, 66.2, group=SEMI),
        _seen("WSSL", 65.1, 66.6, group=SEMI),
        _seen("SDI", 65.8, 66.9, group=SEMI),
        _seen("BCM", 67.5, None, group=SEMI),
        *_ours_in_4_and_5(67.8, 66.1, (68.1, 69.4), (70.5, 71.5))[3:],
    ),
)

TABLE_5 = _segmentation_table(
    "Table 5",
    "DeepLab-V2 (ResNet-101)",
    COCO_V2,
    RESNET,
    (
        _seen("SeeNet", 63.1, 62.8, group=SALIENCY),
        _seen("FickleNet", 64.9, 65.3, group=SALIENCY),
        _seen("OAA", 65.2, 66.4, group=SALIENCY),
        _seen("ICD", 67.8, 68.0, group=SALIENCY),
        _seen("SDI", 74.2, None, group=f"{BOXES} (10K)"),
        _seen("BCM", 70.2, None, group=f"{BOXES} (10K)"),
        _seen("Box2Seg (UPerNet)", 76.4, None, group=f"{BOXES} (10K)"),
        *_ours_in_4_and_5(74.0, 72.4, (74.6, 76.1), (78.7, 79.4))[:3],
        _seen("BCM", 71.6, None, group=SEMI),
        _seen("Box2Seg (UPerNet)", 83.1, None, group=SEMI),
        *_ours_in_4_and_5(74.0, 72.4, (74.6, 76.1), (78.7, 79.4))[3:],
    ),
    "The paper's own rows start from weights trained on MS-COCO.",
)


def _grid(
    part: str, title: str, what: Rule, setting: Rule, numbers: tuple[tuple[float, ...], ...]
) -> PaperTable:
    return PaperTable(
        f"Supplement, Table 1{part}",
        title,
        ("generating 1", "generating 2", "generating 3"),
        tuple(Column(f"generating {n}", {"labels.generator.grid_size": n}) for n in (1, 2, 3)),
        {
            **what,
            **WITH_U0,
            "labels.method": "network",
            "stage1.pool": "bap",
            "stage1.leave_out": "",
        },
        setting,
        tuple(
            Row(f"training {n}", row, {"stage1.grid_size": n})
            for n, row in enumerate(numbers, start=1)
        ),
        (DATA, VGG, GPU),
        head="N",
        decimals=(2, 2),
    )


SUPPLEMENT_1A = _grid(
    "a",
    "Grid size N when training the classifier and when generating labels: Y_crf, mIoU on train",
    {"what": "labels", "split": "train", **_map("crf")},
    VGG_16,
    (
        (75.26, 75.28, 75.24),
        (76.68, 76.63, 76.57),
        (78.36, 78.24, 78.18),
        (78.70, 78.50, 78.48),
        (78.30, 78.10, 78.12),
    ),
)
SUPPLEMENT_1B = _grid(
    "b",
    "DeepLab-V1 with cross-entropy on the labels of Table 1a, mIoU on val (one scale + CRF)",
    {
        "what": "segmentation",
        "split": "val",
        "test": "single+crf",
        "stage3.loss": "crf",
        "stage3.supervision": "boxes",
    },
    V1,
    (
        (64.88, 64.81, 64.83),
        (65.90, 65.88, 65.87),
        (67.66, 67.67, 67.69),
        (67.82, 67.79, 67.74),
        (67.73, 67.65, 67.66),
    ),
)

CAM_PRECISION = {
    "GAP": (
        *(62.7, 27.3, 68.4, 59.1, 86.2, 91.4, 86.7, 83.3, 51.5, 82.6, 74.6, 81.6, 74.7, 69.7, 67.2),
        *(68.2, 79.0, 69.5, 84.1, 92.1, 73.0),
    ),
    "BAP": (
        *(69.9, 68.2, 71.9, 70.7, 84.2, 93.5, 87.5, 88.3, 57.2, 84.7, 66.4, 85.0, 75.8, 79.1, 71.5),
        *(79.0, 83.1, 66.0, 88.8, 87.1, 77.9),
    ),
}
SUPPLEMENT_2 = PaperTable(
    "Supplement, Table 2",
    "Precision of the activation maps by pooling, on train",
    ("GAP", "BAP"),
    (
        Column("GAP, train", {"stage1.pool": "gap", "split": "train"}),
        Column("BAP, train", {"stage1.pool": "bap", "split": "train"}),
        Column("GAP, val", {"stage1.pool": "gap", "split": "val"}),
        Column("BAP, val", {"stage1.pool": "bap", "split": "val"}),
    ),
    {"what": "cams", "stage1.grid_size": 4, "stage1.leave_out": ""},
    VGG_16,
    tuple(
        Row(name, numbers, {}, f"precision/{key}")
        for name, key, numbers in zip(
            (*VOC_CLASSES, "mean"),
            (*(f"per_class/{name}" for name in VOC_CLASSES), "mean"),
            zip(CAM_PRECISION["GAP"], CAM_PRECISION["BAP"], strict=True),
            strict=True,
        )
    ),
    (DATA, VGG, GPU),
    "The paper does not say from which value on a pixel counts as activated, so ours compares GAP "
    "with BAP, not with the paper.",
    head="class",
)

ACCURACY = PaperTable(
    "Supplement, Section 2",
    "True boxes classified right, in percent, on val",
    ("val",),
    (
        Column("val, whole boxes", {"split": "val", "evaluation.background": False}),
        Column("val, pooled by Eq. 4", {"split": "val", "evaluation.background": True}),
    ),
    {"what": "boxes", "stage1.grid_size": 4, "stage1.leave_out": ""},
    VGG_16,
    (
        Row("GAP", (80.3,), {"stage1.pool": "gap"}, "accuracy"),
        Row("BAP", (82.3,), {"stage1.pool": "bap"}, "accuracy"),
    ),
    (DATA, VGG, GPU),
)


def _by_pooling(
    network: str, setting: Rule, weights: str, others: tuple[float, float], gap: float, bap: float
) -> PaperTable:
    return PaperTable(
        f"Supplement, Table 3 ({network})",
        "Segmentation with NAL from labels by either pooling, mIoU on val",
        ("val",),
        CRF_TESTS,
        {"what": "segmentation", **COSINE, **NAL},
        setting,
        (
            Row("SDI", others[:1], needs=NOT_OURS),
            Row("BCM", others[1:], needs=NOT_OURS),
            Row("GAP, NAL", (gap,), GAP),
            Row("BAP, NAL", (bap,), {**BAP, **WITH_U0}),
        ),
        (DATA, VGG, GPU) if weights == VGG else (DATA, VGG, weights, GPU),
    )


SUPPLEMENT_3 = (
    _by_pooling("DeepLab-V1", V1, VGG, (65.7, 66.8), 66.3, 68.1),
    _by_pooling("DeepLab-V2", COCO_V2, RESNET, (74.2, 70.2), 72.6, 74.6),
)

SUPPLEMENT_4 = PaperTable(
    "Supplement, Table 4",
    "Seconds to label one image, mean over val",
    ("CPU", "GPU", "total"),
    (Column("features", {}), Column("unaries, CRF, Y_ret", {}), Column("total", {})),
    {"what": "runtime", "split": "val", "stage1.pool": "bap"},
    VGG_16,
    (
        Row("GrabCut", (1.9, None, 1.9), {}, (None, None, "grabcut")),
        Row("MCG", (25.5, None, 25.5), needs="MCG's program, in MATLAB"),
        Row("WSSL", (0.4, None, 0.4), {}, (None, None, "wssl")),
        Row("BAP", (0.4, 0.1, 0.5), {}, ("features", "labels", "total")),
    ),
    (DATA, VGG, GPU),
    "The paper's machine is a Titan RTX with a Core i5 at 3.7 GHz, the features on the former, the "
    "CRF on the latter; ours is named beside the numbers.",
    decimals=(1, 2),
)

SUPPLEMENT_5 = PaperTable(
    "Supplement, Table 5",
    "Which classifier stands on the features, DeepLab-V1 with NAL, mIoU on val",
    ("val",),
    CRF_TESTS,
    {"what": "segmentation", **BAP, **WITH_U0, **NAL, "stage3.supervision": "boxes"},
    V1,
    (
        Row("SDI", (65.7,), needs=NOT_OURS),
        Row("BCM", (66.8,), needs=NOT_OURS),
        Row("dot product", (67.8,), {"stage3.classifier": "dot"}),
        Row("cosine, scale 20", (68.1,), {"stage3.classifier": "cosine"}),
    ),
    (DATA, VGG, GPU),
)

SUPPLEMENT_6 = PaperTable(
    "Supplement, Table 6",
    "DeepLab-V2 by its first weights, against training on true masks, mIoU on val",
    ("from boxes", "true masks", "quotient"),
    (
        Column("NAL", {**BAP, **WITH_U0, **NAL, "stage3.supervision": "boxes"}),
        Column("true masks", {"stage3.supervision": "masks"}),
        Column("quotient", {}, (0, 1)),
    ),
    {"what": "segmentation", "split": "val", "test": "single+crf", "stage3.classifier": "cosine"},
    {"stage3.network": "deeplab_v2"},
    (
        Row("SDI", (69.4, 74.5, 93.2), needs=NOT_OURS, group="ImageNet"),
        Row("NAL", (70.9, 73.4, 96.6), {"stage3.initial": "imagenet"}, group="ImageNet"),
        Row("SDI", (74.2, 77.7, 95.5), needs=NOT_OURS, group="MS-COCO"),
        Row("BCM", (70.2, 74.5, 94.2), needs=NOT_OURS, group="MS-COCO"),
        Row("NAL", (74.6, 77.5, 96.3), {"stage3.initial": "coco"}, group="MS-COCO"),
    ),
    (DATA, VGG, RESNET, GPU),
    "Ours is at one scale with the CRF. DeepLab-V1 on true masks has 69.5 in the paper.",
)


def _per_class(
    part: str,
    network: str,
    setting: Rule,
    weights: str,
    columns: tuple[str, ...],
    numbers: tuple[tuple[float | None, ...], ...],
) -> PaperTable:
    return PaperTable(
        f"Supplement, Table {part}",
        f"{network} with NAL, IoU of each class on val and test",
        columns,
        (*CRF_TESTS, ON_TEST),
        {"what": "segmentation", **FROM_BOXES, **NAL},
        setting,
        tuple(
            Row(name, paper, {}, "miou" if name == "mean" else f"per_class/{name}")
            for name, paper in zip(
                ("background", *VOC_CLASSES, "mean"), zip(*numbers, strict=True), strict=True
            )
        ),
        (DATA, VGG, GPU) if weights == VGG else (DATA, VGG, weights, GPU),
        "Numbers on test come from the test server.",
        head="class",
    )


SUPPLEMENT_7 = _per_class(
    "7",
    "DeepLab-V1",
    V1,
    VGG,
    ("BCM, val", "NAL, val", "SDI, test", "NAL, test"),
    (
        (
            *(89.8, 68.3, 27.1, 73.7, 56.4, 72.6, 84.2, 75.6, 79.9, 35.2, 78.3, 53.2, 77.6, 66.4),
            *(68.1, 73.1, 56.8, 80.1, 45.1, 74.7, 54.6, 66.8),
        ),
        (
            *(91.0, 78.1, 30.8, 83.1, 62.4, 67.7, 85.9, 78.4, 83.2, 34.8, 77.3, 52.7, 76.2, 73.6),
            *(70.3, 74.0, 49.9, 77.7, 40.5, 79.3, 64.6, 68.1),
        ),
        (
            *(None, 78.1, 31.1, 72.4, 61.0, 67.2, 84.2, 78.2, 81.7, 27.6, 68.5, 62.1, 76.9, 70.8),
            *(78.2, 76.3, 51.7, 78.3, 48.3, 74.2, 58.6, 67.5),
        ),
        (
            *(91.7, 80.5, 32.5, 80.5, 61.1, 66.2, 86.6, 79.2, 85.4, 28.6, 73.6, 60.8, 79.4, 71.5),
            *(78.2, 73.9, 57.5, 81.1, 48.2, 78.7, 62.8, 69.4),
        ),
    ),
)
SUPPLEMENT_8 = _per_class(
    "8",
    "DeepLab-V2",
    COCO_V2,
    RESNET,
    ("NAL, val", "NAL, test"),
    (
        (
            *(93.1, 83.8, 33.1, 87.4, 64.1, 78.3, 93.2, 84.4, 89.3, 39.3, 84.2, 61.9, 85.2, 80.1),
            *(76.9, 79.4, 57.5, 84.6, 51.9, 85.8, 74.7, 74.6),
        ),
        (
            *(93.6, 85.0, 34.5, 90.4, 65.2, 75.9, 92.0, 85.2, 91.3, 38.4, 84.9, 67.6, 86.6, 85.8),
            *(82.3, 79.3, 62.3, 87.7, 60.0, 81.8, 69.2, 76.1),
        ),
    ),
)

TABLES: tuple[PaperTable, ...] = (
    *(TABLE_1, TABLE_3, TABLE_4, TABLE_5, SUPPLEMENT_1A, SUPPLEMENT_1B, SUPPLEMENT_2, ACCURACY),
    *(*SUPPLEMENT_3, SUPPLEMENT_4, SUPPLEMENT_5, SUPPLEMENT_6, SUPPLEMENT_7, SUPPLEMENT_8),
)
OUT_OF_SCOPE = (
    ("Table 2", "pseudo labels on MS-COCO"),
    ("Table 6", "instance segmentation on MS-COCO"),
    ("Supplement, Table 9", "instance segmentation on MS-COCO from either label map"),
)

FIGURES: tuple[PaperFigure, ...] = (
    PaperFigure(
        "Figure 1",
        "figure_1_labels",
        "Pseudo labels beside the baselines' and the truth; white is where Y_crf and Y_ret differ",
        "label folders of generate_labels.py and the devkit, on this machine",
    ),
    PaperFigure(
        "Figure 4a",
        "figure_4a_cams",
        "Activation maps after training with either pooling",
        "a classifier.pt of each pooling and the devkit, on this machine",
    ),
    PaperFigure(
        "Figure 4b",
        "figure_4b_filling",
        "Share of each box that its class fills, by the labels and in truth",
        "evaluate.py filling",
    ),
    PaperFigure(
        "Figure 5",
        "figure_5_confidence",
        "Confidence in the labels on which Y_crf and Y_ret differ, as training goes on",
        "the confidence maps that train_segmentation.py keeps with loss nal",
    ),
    PaperFigure(
        "Supplement, Figure 1a",
        "supplement_1a_damping",
        "Confidence against the quotient of the cosines, by the damping gamma",
        "nothing",
    ),
    PaperFigure(
        "Supplement, Figure 1b",
        "supplement_1b_gamma_lambda",
        "mIoU of segmentation with NAL by gamma and lambda",
        "evaluate.py segmentation for several gamma and lambda",
    ),
    PaperFigure(
        "Supplement, Figure 2",
        "supplement_2_unaries",
        "u_c, u_0 and the labels that come of them",
        "labels made with --unaries and the devkit, on this machine",
    ),
    PaperFigure(
        "Supplement, Figures 3 and 4",
        "supplement_3_predictions",
        "Predictions of segmentation networks",
        "a segmenter.pt and the devkit, on this machine",
    ),
)
