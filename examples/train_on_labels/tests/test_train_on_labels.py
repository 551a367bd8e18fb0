"""What `bapnal label` writes is what trainers read; each example runs for a few steps."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import shapes
from bapnal import CosineClassifier
from bapnal.label import Labeler
from bapnal.label.dataset import label_dataset
from bapnal.label.export import decode
from bapnal.label.record import Options

# Of pycocotools, when it decodes.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Folder of images, and what is written for them."""
    root = shapes.write_shapes(tmp_path_factory.mktemp("shapes"), 5, 1, 96)
    out = tmp_path_factory.mktemp("out") / "masks"
    options = Options("test_efficientnet", "random", exports=("coco", "yolo", "voc"))
    label_dataset(root / "JPEGImages", root / "Annotations", out, workers=1, options=options)
    return root / "JPEGImages", out


def written(out):
    """Of each annotated image its file, and of each box class and mask."""
    content = json.loads((out / "instances.json").read_text())
    for image in content["images"]:
        boxes = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        size = (image["height"], image["width"])
        yield (
            image["file_name"],
            [(a["category_id"], decode(a["segmentation"]["counts"], size)) for a in boxes],
        )


def test_yolo_seg(labelled):
    from yolo_seg import YoloSegmentation

    _, out = labelled
    dataset = YoloSegmentation(out / "yolo/data.yaml")
    expected = list(written(out))
    assert [path.name for path in dataset.images] == [file for file, _ in expected]
    for (pixels, classes, masks), (_, boxes) in zip(dataset, expected, strict=True):
        assert (classes + 1).tolist() == [label for label, _ in boxes]
        assert masks.shape == (len(boxes), *pixels.shape[1:])
        for mask, (_, own) in zip(masks.numpy(), boxes, strict=True):
            # Pillow fills what a line touches: half a pixel more than the outline.
            assert (mask & own).sum() / (mask | own).sum() > 0.75
            assert (own & ~mask).sum() <= 0.03 * own.sum()
    assert dataset.names[0] == json.loads((out / "classes.json").read_text())[1]["name"]
    # Links to images are not followed on the way to the labels.
    assert all(path.parent == out.resolve() / "yolo/images" for path in dataset.images)


@pytest.mark.filterwarnings("ignore")  # of torchvision
def test_coco_detection(labelled):
    from coco_detection import train

    images, out = labelled
    torch.manual_seed(0)
    classes = len(json.loads((out / "classes.json").read_text()))
    small = {"weights": None, "weights_backbone": None, "min_size": 96, "max_size": 96}
    losses = train(images, out, classes, 2, rpn_post_nms_top_n_train=50, **small)
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_label_maps(labelled):
    from label_maps import LabelMaps, train

    images, out = labelled
    dataset = LabelMaps(images, out)
    assert len(dataset) == len(list(written(out)))
    pixels, labels, unreliable = dataset[0]
    assert pixels.shape[1:] == labels.shape
    assert bool((pixels <= 1).all())
    assert ((unreliable == labels) | (unreliable == 255)).all()
    torch.manual_seed(0)
    classes = len(json.loads((out / "classes.json").read_text()))
    backbone = nn.Sequential(nn.Conv2d(3, 16, 5, stride=4, padding=2), nn.ReLU())
    losses = train(dataset, backbone, CosineClassifier(16, classes), epochs=12)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_supervision():
    sv = pytest.importorskip("supervision", reason="supervision is not installed")
    from supervision_detections import add_masks

    image = np.full((64, 80, 3), 90, np.uint8)
    image[20:40, 30:60] = (0, 0, 255)  # red
    xyxy = np.array([[28.0, 18, 62, 42], [0, 0, 10, 10]])
    detections = sv.Detections(xyxy=xyxy, class_id=np.array([4, 0]))
    labeler = Labeler("test_efficientnet", "random")
    found = add_masks(labeler, image, detections)
    expected = labeler(torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1), xyxy, [5, 1])
    assert (found.mask == expected.masks.numpy()).all()
    assert (found.data["doubtful"] == expected.doubtful.numpy()).all()
    assert len(found[found.class_id == 4].mask) == 1  # fields are filtered together
