"""Unaries and probabilities (Eq. 5-7) against the oracle, what the CRF can do, and the presets."""

import itertools

import pytest
import torch
from hypothesis import given, settings

import reference
import reference_labels
from assertions import close
from bapnal import PRESETS, DenseCRF, PseudoLabelGenerator, pseudo_labels
from labelling import blurring, fixed, images_of, labels_of, options, oracle_of, weight_of, weights
from strategies import scenes, seeded

# ---------------------------------------------------------------------------- against the oracle


@settings(max_examples=120)
@given(scene=scenes(max_batch=2, max_image=9), kwargs=options, kind=weights)
def test_unaries_agree_with_the_oracle(scene, kwargs, kind):
    if kind is None and kwargs["background"] == "cam":
        kwargs["background"] = "both"
    weight = weight_of(scene, kind)
    y = labels_of(scene, weight, **kwargs)
    for b in range(scene.batch):
        u_0, u, _ = oracle_of(scene, b, weight, kwargs)
        named = sorted(set(scene.labels[b].tolist()))
        assert y.classes[b].tolist() == named + [0] * (y.classes.shape[1] - len(named))
        close(y.background_unary[b], u_0, tolerance=1e-8)
        for slot, c in enumerate(y.classes[b].tolist()):
            expected = u[c] if c else torch.zeros(scene.image_size)
            close(y.foreground_unary[b, slot], expected, tolerance=1e-8)


@settings(max_examples=80)
@given(scene=scenes(max_batch=2, max_image=9), kwargs=options, kind=weights)
def test_the_crf_sees_the_probabilities_of_the_oracle(scene, kwargs, kind):
    if kind is None and kwargs["background"] == "cam":
        kwargs["background"] = "both"
    weight = weight_of(scene, kind)
    calls = []

    def crf(images, probabilities, valid=None):
        calls.append((images, probabilities, valid))
        return probabilities

    y = labels_of(scene, weight, crf=crf, **kwargs)
    plain = labels_of(scene, weight, crf=None, **kwargs)
    for a, b in zip(y, plain, strict=True):
        assert torch.equal(a, b)
    seen = 0
    for images, probabilities, valid in calls:
        assert not probabilities.requires_grad
        close(probabilities.sum(1), torch.ones(()).expand(probabilities[:, 0].shape))
        for row in range(len(images)):
            same = (images_of(scene) == images[row]).flatten(1).all(1)
            if same.sum() != 1:
                continue  # one-pixel images may be alike
            b = same.nonzero().item()
            named = sorted(set(scene.labels[b].tolist()))
            assert probabilities.shape[1] == 1 + len(named)
            if scene.valid is not None:
                assert torch.equal(valid[row], scene.valid[b])
            else:
                assert valid is None
            _, _, p = oracle_of(scene, b, weight, kwargs)
            for channel, c in enumerate([0, *named]):
                expected = reference.plane_of(
                    scene.image_size, lambda i, j, p=p, c=c: p[i][j].get(c, 0.0)
                )
                close(probabilities[row, channel], expected, tolerance=1e-8)
        seen += len(images)
    assert seen == sum(len(row) > 0 for row in scene.labels)


# ----------------------------------------------------------------------------- what the CRF can do

SPLIT_IMAGE = 32  # pixels along each side, in cells of 4
LAW = {
    "grid_size": (1, 4),
    "attention_reduction": ("mean", "max"),
    "background": ("attention", "cam", "both"),
    "background_threshold": (None, 0.99),
    "background_minmax": (False, True),
    "background_otsu": (False, True),
    "background_prior": (0.0, 4.0),
    "foreground": ("cam", "complement"),
    "unary_softmax": (1.0, 3.0),
    "align_corners": (False, True),
}
ALIKE_FOR_ONE_BOX = {"cam_normalization": ("class", "box"), "overlaps": ("smaller", "equal")}


def split_image():
    """A box half red as all around it, half blue; features agree, but for a patch on each side."""
    side, cells = SPLIT_IMAGE, SPLIT_IMAGE // 4
    image = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    image[:, 0] = 220
    image[:, :, 4 : side - 4, side // 2 : side - 4] = torch.tensor([0, 0, 220])[:, None, None]
    image += torch.randint(8, image.shape, generator=seeded(1), dtype=torch.uint8)
    kind = torch.zeros(cells, cells, dtype=torch.long)
    kind[1:-1, cells // 2 : -1] = 1
    kind[2:4, 2:4] = 1  # background that looks like the object
    kind[4:6, 5:7] = 0  # object that looks like background
    features = torch.eye(3)[kind].permute(2, 0, 1)[None]
    features = features + 0.02 * torch.randn(features.shape, generator=seeded(2))
    box = torch.tensor([[4.0, 4.0, side - 4.0, side - 4.0]])
    return image, features, [box], [torch.tensor([1])]


def moved(before, after):
    """How many boxed pixels went from the object to the background, and the other way."""
    box = (slice(4, SPLIT_IMAGE - 4), slice(4, SPLIT_IMAGE - 4))
    before, after = before[box], after[box]
    return int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())


def without_effect(kwargs, weight):
    """Whether an option is not the first of its values, and the others leave it no meaning."""
    first = {name: values[0] for name, values in LAW.items()}
    idle = set()
    if weight is None:
        idle |= {"foreground"}
        if kwargs["background"] != "attention":
            return True  # "cam" is refused, "both" the same
    if kwargs["background"] == "cam":
        idle |= {"grid_size", "attention_reduction", "background_threshold"}
    return any(kwargs[name] != first[name] for name in idle)


@pytest.mark.parametrize("weight", [torch.eye(3)[:2], None], ids=["weighted", "agnostic"])
def test_the_crf_can_move_a_boxed_pixel_either_way_whatever_the_options(weight):
    """A box is half background; colours are right, features wrong in a patch on each side."""
    image, features, boxes, labels = split_image()
    real, known, before = DenseCRF(), {}, []

    def crf(images, probabilities):
        before[:] = probabilities.argmax(1)
        key = probabilities.numpy().tobytes()  # many options make no difference here
        if key not in known:
            known[key] = real(images, probabilities)
        return known[key]

    stuck = []
    for values in itertools.product(*LAW.values()):
        kwargs = dict(zip(LAW, values, strict=True))
        if without_effect(kwargs, weight):
            continue
        args = (image, features, weight, boxes, labels)
        after = pseudo_labels(*args, crf=crf, **kwargs)
        if min(moved(before[0], after.crf[0])) < 16:
            stuck.append((kwargs, moved(before[0], after.crf[0])))
    assert not stuck, f"{len(stuck)} combinations, the first: {stuck[0]}"
    assert len(known) > 8


@pytest.mark.parametrize("foreground", LAW["foreground"])
def test_how_boxes_are_told_apart_does_not_matter_to_a_single_one(foreground):
    """Which is why the test above need not try these options, too."""
    image, features, boxes, labels = split_image()
    found = []

    def crf(images, probabilities):
        found.append(probabilities)
        return probabilities

    for values in itertools.product(*ALIKE_FOR_ONE_BOX.values()):
        kwargs = dict(zip(ALIKE_FOR_ONE_BOX, values, strict=True), foreground=foreground)
        pseudo_labels(image, features, torch.eye(3)[:2], boxes, labels, crf=crf, **kwargs)
    assert len(found) == 4
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


def test_divided_by_their_sum_unaries_could_not_be_moved():
    """Else the test above would see nothing: a thresholded u_0 of 0 is a certainty to the CRF."""
    image, features, boxes, labels = split_image()
    y = pseudo_labels(
        image, features, torch.eye(3)[:2], boxes, labels, crf=None, **PRESETS["paper"]
    )
    unary = torch.cat([y.background_unary[:, None], y.foreground_unary + 1e-6], dim=1)
    divided = unary / unary.sum(1, keepdim=True)
    after = DenseCRF()(image, divided).argmax(1)[0]
    before = divided.argmax(1)[0]
    assert moved(before, after)[0] == 0


# ---------------------------------------------------------------------------------------- presets


def test_presets_are_the_settings_of_the_paper_and_of_the_released_code():
    """N = 1 and A thresholded with 0.99 (Sec. 4.1); the rest is Eq. 2, 5 and 7 as they stand."""
    paper = {
        "grid_size": 1,
        "attention_reduction": "mean",  # Eq. 2
        "background": "attention",  # Eq. 7
        "background_threshold": 0.99,
        "background_minmax": False,
        "background_otsu": False,
        "background_prior": 0.0,
        "foreground": "cam",  # Eq. 5-6
        "cam_normalization": "class",  # max over p of CAM_c
        "overlaps": "equal",  # of no meaning for Eq. 5
        "unary_softmax": 1.0,
        "align_corners": True,
    }
    assert dict(PRESETS["paper"]) == paper
    assert dict(PRESETS["released"]) == {**paper, "cam_normalization": "box"}
    assert set(PRESETS) == {"paper", "released"}


@pytest.mark.parametrize("name", ["paper", "released"])
def test_a_preset_names_every_option_and_the_generator_takes_it(name):
    generate = PseudoLabelGenerator(blurring, **PRESETS[name])
    assert set(PRESETS[name]) == set(reference_labels.DEFAULTS)
    for option, value in PRESETS[name].items():
        assert getattr(generate, option) == value
        assert f"{option}={value!r}" in repr(generate)
    scene = fixed()
    args = (images_of(scene), scene.features, weight_of(scene), scene.boxes, scene.labels)
    expected = labels_of(scene, crf=blurring, **PRESETS[name])
    for a, b in zip(generate(*args), expected, strict=True):
        assert torch.equal(a, b)


def test_presets_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        PRESETS["paper"]["grid_size"] = 2
    with pytest.raises(TypeError):
        PRESETS["mine"] = {}
