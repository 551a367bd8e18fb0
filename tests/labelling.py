"""What the tests of pseudo labels share: scenes, weights, stand-ins for the CRF, the oracle."""

import torch
from hypothesis import strategies as st

import reference
import reference_labels
from bapnal import pseudo_labels
from strategies import Scene, seeded

# Eq. 5 and 7 as they stand, for the tests that work out unaries by hand.
EQUATIONS = {
    "grid_size": 1,
    "attention_reduction": "mean",
    "background": "attention",
    "background_minmax": False,
    "background_otsu": False,
    "background_prior": 0.0,
    "foreground": "cam",
    "unary_softmax": 1.0,
}

options = st.fixed_dictionaries(
    {
        "grid_size": st.integers(1, 3),
        "attention_reduction": st.sampled_from(["mean", "max"]),
        "background": st.sampled_from(["attention", "cam", "both"]),
        "background_threshold": st.sampled_from([None, 0.5, 0.99]),
        "background_minmax": st.booleans(),
        "background_otsu": st.booleans(),
        "background_prior": st.sampled_from([0, 4.0, 64]),
        "foreground": st.sampled_from(["cam", "complement"]),
        "cam_normalization": st.sampled_from(["class", "box"]),
        "overlaps": st.sampled_from(["smaller", "equal"]),
        "unary_softmax": st.sampled_from([1.0, 3.0, 5]),
        "align_corners": st.booleans(),
    }
)
weights = st.sampled_from(["plain", "bias", "unseen", None])


def images_of(scene):
    shape = (scene.batch, 3, *scene.image_size)
    return torch.randint(256, shape, generator=seeded(1), dtype=torch.uint8)


def weight_of(scene, kind="plain"):
    """Random weights; with a bias, or with a class of zeros besides; or None."""
    if kind is None:
        return None
    channels = scene.features.shape[1] + (kind != "plain")
    shape = (scene.classes + 1, channels)
    weight = torch.randn(shape, generator=seeded(2), dtype=torch.float64)
    if kind == "unseen":
        weight[2] = 0
    return weight


def labels_of(scene, weight="plain", crf=None, **kwargs):
    weight = weight_of(scene, weight) if isinstance(weight, str) else weight
    return pseudo_labels(
        images_of(scene),
        scene.features,
        weight,
        scene.boxes,
        scene.labels,
        crf=crf,
        valid=scene.valid,
        **kwargs,
    )


def blurring(images, probabilities, valid=None):
    """Stands in for a CRF: mixes neighbours, as far as the red of the image says."""
    mix = images[:, :1].to(probabilities.dtype) / 255
    return (1 - mix) * probabilities + mix * probabilities.roll(1, dims=3)


def oracle_blurring(image, p):  # image: [3][H][W], p: [H][W] of {class: probability}
    size = reference.size_of(p)

    def value(i, j):
        mix, left = image[0][i][j] / 255, p[i][j - 1]
        classes = set(p[i][j]) | set(left)
        return {c: (1 - mix) * p[i][j].get(c, 0.0) + mix * left.get(c, 0.0) for c in classes}

    return reference.plane_of(size, value)


def oracle_of(scene, b, weight, kwargs):
    """u_0, u_c and the probabilities of one image."""
    features, boxes, valid = scene.image(b)
    return reference_labels.unaries(
        features,
        None if weight is None else weight.tolist(),
        boxes,
        scene.labels[b].tolist(),
        scene.image_size,
        scene.classes,
        {**reference_labels.DEFAULTS, **kwargs},
        valid,
    )


def fixed(seed=0, batch=2, channels=4, map_size=(6, 6), image_size=(24, 24), **changes) -> Scene:
    generator = seeded(seed)
    boxes = [
        # Odd, so that no border passes through the centre of a cell of 4 x 4 pixels.
        torch.tensor([[3.0, 3, 15, 17], [9, 1, 21, 13], [5, 11, 21, 23]], dtype=torch.float64),
        torch.tensor([[5.0, 5, 19, 21]], dtype=torch.float64),
        torch.zeros(0, 4, dtype=torch.float64),
    ]
    labels = [torch.tensor([3, 1, 3]), torch.tensor([2]), torch.zeros(0, dtype=torch.long)]
    features = torch.randn(batch, channels, *map_size, generator=generator, dtype=torch.float64)
    scene = Scene(
        features=features + 0.5,
        boxes=boxes[:batch],
        labels=labels[:batch],
        image_size=image_size,
        valid=None,
        classes=3,
        generator=generator,
    )
    return scene.replace(**changes)
