"""DenseCRF against pydensecrf: stored outputs everywhere, live ones where it is installed.

``python tests/test_crf_pydensecrf.py`` computes the stored outputs anew.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bapnal.crf import DenseCRF, PairwiseTerm, dense_crf

STORED = Path(__file__).parent / "data" / "crf_pydensecrf.npz"
DEFAULTS = {"xy": 55, "rgb": 3, "iterations": 10, "bilateral": 4, "gaussian": 3, "gaussian_xy": 3}
# name: kind of image, height, width, classes, settings that differ from the defaults
CASES = {
    "two labels": ("shapes", 20, 28, 2, {}),
    "four labels": ("shapes", 20, 28, 4, {"xy": 67}),
    "wide": ("shapes", 20, 28, 3, {"xy": 121, "rgb": 5}),
    "wider": ("shapes", 20, 28, 3, {"xy": 80, "rgb": 13}),
    "many labels": ("shapes", 10, 12, 21, {}),
    "deeplab": ("shapes", 20, 28, 3, {"xy": 67, "gaussian": 3, "gaussian_xy": 1}),
    "one step": ("shapes", 20, 28, 3, {"iterations": 1}),
    "no step": ("shapes", 20, 28, 3, {"iterations": 0}),
    "one class": ("shapes", 6, 7, 1, {}),
    "fine colours": ("shapes", 20, 28, 3, {"rgb": 1}),
    "noise": ("noise", 20, 28, 3, {}),
    "noise, fine colours": ("noise", 20, 28, 3, {"rgb": 1}),
    "constant": ("constant", 20, 28, 3, {}),
    "grey": ("grey", 20, 28, 3, {}),
    "column": ("shapes", 60, 1, 3, {}),
    "row": ("shapes", 1, 60, 3, {}),
    "one pixel": ("shapes", 1, 1, 2, {}),
    "hard unaries": ("hard", 20, 28, 3, {}),
}


def draw(kind, height, width, classes):
    """An image (3, H, W) uint8 and probabilities (C, H, W), by whole numbers: same everywhere."""
    y, x, c = np.mgrid[:height, :width, :3].astype(np.int64)
    noise = (x * 7919 + y * 104729 + c * 1299709 + x * y * 15485863) % 1009
    image = 40 + 30 * c + noise % 9
    image += 90 * ((x > width // 3) & (y < 2 * height // 3)) * (c != 1)
    image -= 35 * ((x - y) % 11 < 4) * (c == 1)
    image += (x * 2 + y) // 3
    if kind == "noise":
        image = noise % 256
    elif kind == "constant":
        image = np.full_like(image, 113)
    elif kind == "grey":
        image = np.repeat(image[..., :1], 3, axis=2)
    y, x, k = np.mgrid[:height, :width, :classes].astype(np.int64)
    scores = 1 + (x * 31 + y * 17 + k * 59 + (x // 5) * (y // 4) * (k + 1) * 23) % 97
    p = scores / scores.sum(2, keepdims=True)
    if kind == "hard":
        p = np.eye(classes)[p.argmax(2)]
    return (
        torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous(),
        torch.from_numpy(p).float().permute(2, 0, 1).contiguous(),
    )


def pydensecrf(image, p, settings):
    """Marginals by DenseCRF2D, called as everybody calls it."""
    densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed")
    s = {**DEFAULTS, **settings}
    classes, height, width = p.shape
    model = densecrf.DenseCRF2D(width, height, classes)
    unary = -np.log(np.clip(p.numpy(), 1e-5, 1))
    model.setUnaryEnergy(np.ascontiguousarray(unary.reshape(classes, -1)))
    model.addPairwiseGaussian(sxy=s["gaussian_xy"], compat=s["gaussian"])
    model.addPairwiseBilateral(
        sxy=s["xy"],
        srgb=s["rgb"],
        rgbim=np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
        compat=s["bilateral"],
    )
    return torch.tensor(np.array(model.inference(s["iterations"]))).reshape(p.shape)


def bapnal(image, p, settings, **more):
    s = {**DEFAULTS, **settings}
    return dense_crf(
        image[None],
        p[None],
        bilateral_weight=s["bilateral"],
        bilateral_xy=s["xy"],
        bilateral_rgb=s["rgb"],
        gaussian_weight=s["gaussian"],
        gaussian_xy=s["gaussian_xy"],
        iterations=s["iterations"],
        **more,
    )[0]


def same(actual, expected, agreement=0.9999):
    assert (actual - expected).abs().mean() <= 1e-6
    assert (actual.argmax(0) == expected.argmax(0)).double().mean() >= agreement


@pytest.mark.parametrize("name", CASES)
def test_stored_outputs(name):
    *drawing, settings = CASES[name]
    image, p = draw(*drawing)
    with np.load(STORED) as stored:
        expected = torch.from_numpy(stored[name])
    same(bapnal(image, p, settings), expected)
    if len(expected) > 1 and settings.get("iterations") != 0:
        assert (expected - p).abs().mean() > 1e-6  # it is not the input


@pytest.mark.parametrize("name", CASES)
def test_live(name):
    *drawing, settings = CASES[name]
    image, p = draw(*drawing)
    same(bapnal(image, p, settings), pydensecrf(image, p, settings))


@pytest.mark.parametrize("kind", ["shapes", "noise", "hard"])
@pytest.mark.parametrize(("xy", "rgb"), [(55, 3), (67, 3), (121, 5), (80, 13), (55, 1)])
def test_live_larger(kind, xy, rgb):
    image, p = draw(kind, 90, 120, 4)
    settings = {"xy": xy, "rgb": rgb}
    same(bapnal(image, p, settings), pydensecrf(image, p, settings))


@pytest.mark.parametrize("kind", ["constant", "grey"])
@pytest.mark.parametrize(("xy", "rgb"), [(55, 3), (121, 5), (80, 13), (55, 1)])
def test_live_where_rounding_shows(kind, xy, rgb):
    """Thousands of pixels share a few vertices: both sum them in float32, in another order."""
    image, p = draw(kind, 90, 120, 4)
    settings = {"xy": xy, "rgb": rgb}
    single, double = bapnal(image, p, settings), bapnal(image, p.double(), settings)
    other = pydensecrf(image, p, settings)
    ours, theirs = ((q - double).abs().mean() for q in (single, other))
    assert max(ours, theirs) < 5e-5
    assert ours < 1e-6 + 3 * theirs
    second, first = double.sort(dim=0).values[-2:]
    clear = first - second > 1e-3
    assert torch.equal(single.argmax(0)[clear], other.argmax(0)[clear])


@pytest.mark.parametrize("name", ["two labels", "one class", "no step", "row", "many labels"])
def test_backend_is_the_same_call(name):
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed")
    *drawing, settings = CASES[name]
    image, p = draw(*drawing)
    same(bapnal(image, p, settings), bapnal(image, p, settings, backend="pydensecrf"))


def test_backend_takes_batches_padding_classes_and_terms():
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf is not installed")
    pairs = [draw(kind, 12, 14, 3) for kind in ("shapes", "noise")]
    images, p = (torch.stack(x) for x in zip(*pairs, strict=True))
    valid = torch.ones(2, 12, 14, dtype=torch.bool)
    valid[0, 7:] = False
    valid[1] = False
    p[1, 2] = 0
    p /= p.sum(1, keepdim=True)
    terms = [
        PairwiseTerm(3, xy=3),
        PairwiseTerm(torch.tensor(1.5), xy=9, guidance=20),
        PairwiseTerm(torch.tensor([1.0, 2.0, 0.5]), guidance=(30, 40, 50)),
        PairwiseTerm(torch.tensor([[0, 1, 2.0], [3, 0, 1], [0, 1, 0]]), xy=4),
    ]
    for mask in (None, valid):
        for classes in (None, [3, 2]):
            both = [
                DenseCRF(terms=terms, backend=backend)(images, p, mask, num_classes=classes)
                for backend in ("torch", "pydensecrf")
            ]
            assert (both[0] - both[1]).abs().max() < 1e-4


def test_backend_that_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydensecrf.densecrf", None)
    image, p = draw("shapes", 4, 4, 2)
    with pytest.raises(ImportError, match=r"pip install \"bapnal\[crf\]\""):
        bapnal(image, p, {}, backend="pydensecrf")


def photographs(count):
    root = os.environ.get("BAPNAL_VOC_ROOT")
    if not root:
        pytest.skip("BAPNAL_VOC_ROOT does not name a VOCdevkit/VOC2012")
    image_module = pytest.importorskip("PIL.Image")
    for name in (Path(root) / "ImageSets/Segmentation/val.txt").read_text().split()[:count]:
        with image_module.open(Path(root) / "JPEGImages" / f"{name}.jpg") as image:
            yield torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def smooth_probabilities(seed, classes, size):
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(1, classes, 9, 9, generator=generator)
    return torch.nn.functional.interpolate(scores, size, mode="bicubic").softmax(1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("xy", "rgb"), [(55, 3), (67, 3), (121, 5), (80, 13)])
@pytest.mark.parametrize("classes", [2, 4, 8, 21])
def test_photographs(xy, rgb, classes):
    """On ``BAPNAL_VOC_IMAGES`` real images, 2 unless told otherwise."""
    count = int(os.environ.get("BAPNAL_VOC_IMAGES", "2"))
    for seed, image in enumerate(photographs(count)):
        p = smooth_probabilities(seed, classes, tuple(image.shape[1:]))
        settings = {"xy": xy, "rgb": rgb}
        expected = pydensecrf(image, p, settings)
        same(bapnal(image, p, settings), expected)


def store():
    """Write what pydensecrf gives for all cases."""
    outputs = {}
    for name, (*drawing, settings) in CASES.items():
        image, p = draw(*drawing)
        outputs[name] = pydensecrf(image, p, settings).numpy()
    np.savez_compressed(STORED, **outputs)


if __name__ == "__main__":
    store()
