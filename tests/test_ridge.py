"""Targets from boxes and the classifier in closed form against the oracle, and their laws."""

import datetime
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode

import reference
from assertions import Largest, close, finite
from bapnal import (
    DenseCRF,
    RidgeBoxClassifier,
    box_coverage,
    box_targets,
    pseudo_labels,
    ridge_weights,
)
from strategies import Scene, random_boxes, scenes, seeded, seeds, sizes

CLASSES = 4  # with the background
NONE = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))

# ------------------------------------------------------------------------------------- coverage


@given(seed=seeds, image_size=st.tuples(st.integers(1, 13), st.integers(1, 13)), map_size=sizes)
def test_coverage_agrees_with_the_oracle(seed, image_size, map_size):
    boxes = random_boxes(seeded(seed), 6, image_size)
    found = box_coverage(boxes, image_size, map_size)
    assert found.shape == (6, *map_size)
    for row, box in zip(found, boxes.tolist(), strict=True):
        close(row, reference.box_coverage(box, image_size, map_size))
    low = box_coverage(boxes.float().reshape(2, 3, 4), image_size, map_size)
    assert low.dtype == torch.float32
    close(low.flatten(0, 1), found.float(), tolerance=1e-5)


@given(seed=seeds, map_size=sizes)
def test_coverage_adds_up_to_the_area_of_the_box(seed, map_size):
    boxes = random_boxes(seeded(seed), 6, (12, 9), outside=0.0)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    cell = 12 * 9 / (map_size[0] * map_size[1])
    close(box_coverage(boxes, (12, 9), map_size).sum((1, 2)) * cell, area)


def test_coverage_of_boxes_that_lie_in_no_cell():
    boxes = torch.tensor([[2.0, 2, 2, 5], [-9, -9, -1, -1], [50, 0, 60, 8], [3, 3, 3, 3]])
    assert (box_coverage(boxes, (8, 8), (4, 4)) == 0).all()
    assert (box_coverage(torch.tensor([-9.0, -9, 50, 50]), (8, 8), (4, 4)) == 1).all()
    assert box_coverage(torch.zeros(0, 4), (8, 8), (4, 4)).shape == (0, 4, 4)
    half = box_coverage(boxes.half(), (8, 8), (4, 4))
    assert half.dtype == torch.float32
    for wrong, kind in [(torch.zeros(3, 5), ValueError), (torch.zeros(4).bool(), TypeError)]:
        with pytest.raises(kind, match="corners"):
            box_coverage(wrong, (8, 8), (4, 4))


# --------------------------------------------------------------------------------------- targets


def targets_of(scene, n=4, **kwargs):
    return box_targets(
        scene.features,
        scene.boxes,
        scene.labels,
        scene.image_size,
        CLASSES,
        valid=scene.valid,
        grid_size=n,
        **kwargs,
    )


def oracle_targets(scene, b, n=4):
    features, boxes, valid = scene.image(b)
    labels = scene.labels[b].tolist()
    return reference.box_targets(features, boxes, labels, scene.image_size, CLASSES, n, valid)


@settings(max_examples=80)
@given(scene=scenes(), n=st.integers(1, 4))
def test_targets_agree_with_the_oracle(scene, n):
    y, known = targets_of(scene, n)
    assert known.dtype == torch.bool
    for b in range(scene.batch):
        expected, cells = oracle_targets(scene, b, n)
        close(y[b], expected, tolerance=1e-8)
        assert known[b].tolist() == cells


@given(scene=scenes())
def test_targets_are_shares(scene):
    y, known = targets_of(scene)
    close(y.sum(1), torch.ones_like(y[:, 0]))
    assert y.min() >= 0
    assert y.max() <= 1
    for b in range(scene.batch):
        for c in range(1, CLASSES):
            boxes = scene.boxes[b][scene.labels[b] == c]
            covered = box_coverage(boxes, scene.image_size, scene.map_size).sum(0) > 0
            assert (y[b, c][~covered] == 0).all()
        if scene.boxes[b].shape[0] == 0:
            assert (y[b, 0] == 1).all()
            assert known[b].all() or scene.valid is not None


def test_an_image_that_its_box_covers_tells_nothing():
    features = torch.rand(2, 3, 4, 4)
    boxes = [torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[0.0, 0, 8, 4]])]
    y, known = box_targets(features, boxes, [torch.tensor([1])] * 2, (8, 8), CLASSES)
    assert not known[0].any()
    assert known[1].all()
    finite(y)
    ridge = RidgeBoxClassifier(3, CLASSES)
    ridge.update(features[:1], boxes[:1], torch.tensor([1]), (8, 8))
    assert (ridge.gram == 0).all()
    assert (ridge.moment == 0).all()


# ---------------------------------------------------------------------------------------- weights


def fixed(seed=0, channels=3):
    """Six images, of which one has no box and one no background; class 3 has no box at all."""
    generator = seeded(seed)
    boxes = [random_boxes(generator, k, (12, 14), 0.0) for k in (2, 1, 3, 0, 2, 1)]
    boxes[5] = torch.tensor([[-1.0, -1, 20, 20]], dtype=torch.float64)
    labels = [torch.randint(1, 3, (len(x),), generator=generator) for x in boxes]
    labels[0] = torch.tensor([1, 2])
    features = torch.randn(6, channels, 5, 6, generator=generator, dtype=torch.float64) + 0.5
    return Scene(
        features=features,
        boxes=boxes,
        labels=labels,
        image_size=(12, 14),
        valid=None,
        classes=3,
        generator=generator,
    )


def update(ridge, scene, rows=slice(None)):
    valid = None if scene.valid is None else scene.valid[rows]
    boxes, labels = scene.boxes[rows], scene.labels[rows]
    ridge.update(scene.features[rows], boxes, labels, scene.image_size, valid)


def collected(scene, *parts, **kwargs):
    ridge = RidgeBoxClassifier(scene.features.shape[1], CLASSES, **kwargs)
    for rows in parts or [slice(None)]:
        update(ridge, scene, rows)
    return ridge


def cells_of(scene):  # -> of (x: [D], y: [C]), those that tell something
    found = []
    for b in range(scene.batch):
        y, known = oracle_targets(scene, b)
        features = scene.features[b].tolist()
        for i, j in reference.positions(scene.map_size):
            if known[i][j]:
                found.append((reference.vector_at(features, i, j), [p[i][j] for p in y]))
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sums_and_weights_agree_with_the_oracle(seed, padded):
    scene = fixed(seed)
    if padded:
        scene = scene.replace(valid=torch.rand(6, 12, 14, generator=seeded(seed)) < 0.8)
    ridge = collected(scene, penalty=0.3)
    gram, moment = reference.ridge_sums(cells_of(scene))
    close(ridge.gram, gram)
    close(ridge.moment, moment)
    expected = torch.tensor(reference.ridge_weights(gram, moment, 0.3), dtype=torch.float64)
    close(ridge_weights(ridge.gram, ridge.moment, 0.3), expected)
    weight = ridge.solve()
    assert weight.dtype == torch.float32
    assert weight.shape == (CLASSES, 4)
    close(weight[:3], expected[:3].float(), tolerance=1e-6)
    assert (weight[3] == 0).all()


@given(seed=seeds, penalty=st.sampled_from([1e-6, 0.01, 1.0, 100.0]))
def test_the_ridge_agrees_with_elimination(seed, penalty):
    x = torch.randn(20, 4, generator=seeded(seed), dtype=torch.float64) * 3 + 1
    y = torch.randn(20, 2, generator=seeded(seed + 1), dtype=torch.float64)
    gram, moment = reference.ridge_sums(list(zip(x.tolist(), y.tolist(), strict=True)))
    weight = ridge_weights(torch.tensor(gram).double(), torch.tensor(moment).double(), penalty)
    float64 = [torch.tensor(part, dtype=torch.float64) for part in (gram, moment)]
    close(ridge_weights(*float64, penalty), reference.ridge_weights(gram, moment, penalty))
    assert weight.shape == (2, 5)


def test_a_small_penalty_is_least_squares_and_a_large_one_the_mean():
    x = torch.randn(30, 4, generator=seeded(1), dtype=torch.float64) + 2
    ones = torch.cat([x, torch.ones(30, 1)], dim=1)
    y = torch.randn(30, 2, generator=seeded(2), dtype=torch.float64)
    gram, moment = ones.T @ ones, ones.T @ y
    close(ridge_weights(gram, moment, 1e-12), torch.linalg.lstsq(ones, y)[0].T, tolerance=1e-6)
    flat = ridge_weights(gram, moment, 1e12)
    close(flat[:, :-1], torch.zeros(2, 4), tolerance=1e-9)
    close(flat[:, -1], y.mean(0), tolerance=1e-9)


@given(seed=seeds)
def test_scores_of_all_classes_sum_to_one(seed):
    """Targets do; where every class is seen, no row is left out."""
    scene = fixed(seed % 1000)
    scene = scene.replace(labels=[torch.arange(len(x)) % 3 + 1 for x in scene.boxes])
    scene.labels[0][:] = 3
    ridge = collected(scene)
    if not (ridge.moment[-1] > 0).all():
        return
    x = torch.randn(50, 3, generator=seeded(seed)) * 10
    scores = x @ ridge.solve()[:, :-1].T + ridge.solve()[:, -1]
    close(scores.sum(1), torch.ones(50), tolerance=1e-4)


# ------------------------------------------------------------------------- sums, in parts and ranks

HALVES = (slice(0, 3), slice(3, 6))
ONE_BY_ONE = [slice(b, b + 1) for b in range(6)]


@pytest.mark.parametrize("parts", [HALVES, HALVES[::-1], ONE_BY_ONE, ONE_BY_ONE[::-1]])
def test_images_may_come_in_any_order_and_in_any_batches(parts):
    scene = fixed()
    whole, other = collected(scene), collected(scene, *parts)
    close(other.gram, whole.gram)
    close(other.moment, whole.moment)
    close(other.solve(), whole.solve(), tolerance=1e-6)


def test_two_halves_added_are_the_whole():
    scene = fixed()
    first, second = (collected(scene, part) for part in HALVES)
    kept = second.gram.clone()
    first.add(second)
    whole = collected(scene)
    close(first.gram, whole.gram)
    close(first.moment, whole.moment)
    assert torch.equal(second.gram, kept)
    close(first.solve(), whole.solve(), tolerance=1e-6)
    wrong = RidgeBoxClassifier(4, CLASSES)
    with pytest.raises(ValueError, match=r"other.gram must have shape \(4, 4\), got \(5, 5\)"):
        first.add(wrong)
    with pytest.raises(ValueError, match=r"other.moment must have shape \(4, 4\), got \(4, 9\)"):
        first.add(RidgeBoxClassifier(3, 9))


@pytest.mark.parametrize("move", [pickle.dumps, "state"])
def test_collecting_goes_on_after_a_round_trip(move, tmp_path):
    scene = fixed()
    first = collected(scene, HALVES[0])
    if move == "state":
        torch.save(first.state_dict(), tmp_path / "sums.pt")
        copy = RidgeBoxClassifier(3, CLASSES)
        copy.load_state_dict(torch.load(tmp_path / "sums.pt", weights_only=True))
    else:
        copy = pickle.loads(move(first))
    assert set(first.state_dict()) == {"gram", "moment"}
    assert not list(first.parameters())
    update(copy, scene, HALVES[1])
    close(copy.gram, collected(scene).gram)
    close(copy.solve(), collected(scene).solve(), tolerance=1e-6)


def one_of_two(rank, folder):
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    ridge = collected(fixed(), (slice(0, 4), slice(4, 6))[rank])
    ridge.all_reduce()
    torch.save({**ridge.state_dict(), "weight": ridge.solve()}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_are_one_with_all_images(tmp_path):
    torch.multiprocessing.spawn(one_of_two, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    whole = collected(fixed())
    for name, value in {**whole.state_dict(), "weight": whole.solve()}.items():
        assert torch.equal(first[name], second[name])
        close(first[name], value, tolerance=1e-6 if name == "weight" else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_in_float64_whatever_the_features(dtype):
    """A cell more counts after ten million of them, as it would not in float32."""
    scene = fixed()
    low = scene.replace(features=scene.features.to(dtype))
    ridge = collected(low)
    assert ridge.gram.dtype == ridge.moment.dtype == torch.float64
    exact = collected(low.replace(features=low.features.double()))
    close(ridge.gram, exact.gram, tolerance=1e-12)  # no rounding of products
    close(ridge.moment, exact.moment, tolerance=1e-4)  # targets are computed in float32
    ridge.gram += 2.0**26
    before = ridge.gram.clone()
    update(ridge, low)
    close(ridge.gram - before, exact.gram, tolerance=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = collected(low)
    assert torch.equal(cast.gram, collected(low).gram)
    assert torch.equal(cast.moment, collected(low).moment)


def test_memory_does_not_grow():
    scene = fixed(channels=16)
    ridge = collected(scene)
    size = len(pickle.dumps(ridge))
    address = ridge.gram.data_ptr()
    for _ in range(5):
        update(ridge, scene)
    assert len(pickle.dumps(ridge)) == size
    assert ridge.gram.data_ptr() == address
    assert sum(x.numel() for x in ridge.state_dict().values()) == 17 * (17 + CLASSES)


def test_no_tensor_has_all_channels_of_all_boxes():
    scene = fixed(channels=64)
    with Largest() as largest:
        collected(scene)
    assert largest.elements <= 6 * 65 * 5 * 6


def test_no_gradient_is_kept():
    scene = fixed()
    scene = scene.replace(features=scene.features.requires_grad_())
    ridge = collected(scene)
    assert not ridge.gram.requires_grad
    assert not ridge.solve().requires_grad
    assert not targets_of(scene)[0].requires_grad


# ------------------------------------------------------------------------------------------ laws


def test_flipped_images_give_the_same_sums():
    """The grid must be symmetric on the map, as 2 is on 6 columns."""
    scene = fixed()
    # Off the centres of cells, of which a half open box holds one end only.
    aside = torch.tensor([0.1, 0, 0.1, 0], dtype=torch.float64)
    scene = scene.replace(boxes=[x + aside for x in scene.boxes])

    def reflect(boxes):
        return torch.stack([14 - boxes[:, 2], boxes[:, 1], 14 - boxes[:, 0], boxes[:, 3]], 1)

    flipped = scene.replace(
        features=scene.features.flip(3), boxes=[reflect(x) for x in scene.boxes]
    )
    plain, other = collected(scene, grid_size=2), collected(flipped, grid_size=2)
    close(other.gram, plain.gram)
    close(other.moment, plain.moment)


def test_classes_may_be_renumbered_and_channels_permuted():
    scene = fixed()
    weight = collected(scene).solve()
    table = torch.tensor([0, 3, 1, 2])
    other = collected(scene.replace(labels=[table[x] for x in scene.labels])).solve()
    close(other[table], weight, tolerance=1e-6)
    order = torch.tensor([2, 0, 1])
    other = collected(scene.replace(features=scene.features[:, order])).solve()
    close(other[:, :3], weight[:, order], tolerance=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e15])
def test_the_size_of_features_does_not_matter(scale):
    """The penalty is a share of their variance, so that scores are the same."""
    scene = fixed()
    if scale < 1e-11:  # shorter than counts as a vector
        scene = scene.replace(features=scene.features * 100)
    weight = collected(scene).solve()
    other = collected(scene.replace(features=scale * scene.features)).solve()
    close(other[:, :-1] * scale, weight[:, :-1], tolerance=1e-5)
    close(other[:, -1], weight[:, -1], tolerance=1e-5)


@pytest.mark.parametrize("shift", [10.0, 1e3])
def test_a_large_mean_of_features_does_not_cost_digits(shift):
    x = torch.randn(200, 4, generator=seeded(1), dtype=torch.float64)
    y = torch.randn(200, 2, generator=seeded(2), dtype=torch.float64)

    def solved(x):
        x = torch.cat([x, torch.ones(200, 1)], dim=1)
        return ridge_weights(x.T @ x, x.T @ y, 0.01)

    plain, moved = solved(x), solved(x + shift)
    close(moved[:, :-1], plain[:, :-1], tolerance=1e-8)


def test_the_weights_find_the_object_on_a_new_image():
    """Halves of boxes are background in each image; the classifier learns which."""
    generator = seeded(3)
    kinds = torch.zeros(9, 8, 8, dtype=torch.long)
    kinds[:, 2:6, 2:4] = 1
    kinds[4:8, 2:6, 2:4] = 2
    noise = 0.1 * torch.randn(9, 4, 8, 8, generator=generator)
    features = torch.eye(4)[kinds].permute(0, 3, 1, 2) + noise
    boxes = [torch.tensor([[8.0, 8, 24, 24]])] * 9
    labels = [torch.tensor([1 + (4 <= b < 8)]) for b in range(9)]
    ridge = RidgeBoxClassifier(4, 3)
    ridge.update(features[:8], boxes[:8], labels[:8], (32, 32))
    # A new image that its box covers: nothing but the weights can tell.
    everything = [torch.tensor([[0.0, 0, 32, 32]])]
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    args = (features[8:], ridge.solve(), everything, labels[8:])
    y = pseudo_labels(images, *args, crf=None)
    expected = kinds[8].repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (y.crf[0] == expected).float().mean() > 0.95
    images[:, 0] = 200 * (expected == 0)
    images[:, 2] = 200 * (expected == 1)
    y = pseudo_labels(images, *args, crf=DenseCRF())
    assert (y.crf[0] == expected).float().mean() > 0.99


# --------------------------------------------------------------------------------------- corners


def test_images_without_boxes_are_background():
    ridge = RidgeBoxClassifier(3, CLASSES)
    ridge.update(torch.rand(2, 3, 4, 5), [NONE[0]] * 2, [NONE[1]] * 2, (8, 10))
    assert ridge.moment[-1].tolist() == [40.0, 0.0, 0.0, 0.0]
    ridge.update(torch.rand(0, 3, 4, 5), [], [], (8, 10))
    ridge.update(torch.rand(1, 3, 4, 5), torch.zeros(0, 5), NONE[1], (8, 10))
    assert ridge.gram[-1, -1] == 60


def test_solving_needs_a_box_beside_background():
    text = "update must have seen a box beside background, got none"
    ridge = RidgeBoxClassifier(3, CLASSES)
    covered = [torch.tensor([[0.0, 0, 8, 8]])]
    for step in (
        lambda: None,
        lambda: ridge.update(torch.rand(1, 3, 4, 4), *([x] for x in NONE), (8, 8)),
        lambda: ridge.update(torch.rand(1, 3, 4, 4), covered, torch.tensor([1]), (8, 8)),
    ):
        step()
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            ridge.solve()
        assert str(caught.value) == text
    ridge.update(
        torch.rand(1, 3, 4, 4), [torch.tensor([[2.0, 2, 6, 6]])], torch.tensor([1]), (8, 8)
    )
    assert ridge.solve()[:2].any(1).all()


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float16, (0.0, 1.0, -3.0, 1e-7, 6e4)),
        (torch.float32, (0.0, 1.0, -3.0, 1e-38, 1e30, 3e38)),
        (torch.float64, (0.0, 1.0, -3.0, 1e-38, 1e30, 3e38)),
    ],
)
def test_constant_features_give_the_mean_of_the_targets(values, dtype):
    """Up to the rounding of a mean, which must not be taken for a direction."""
    scene = fixed()
    for value in values:
        cells = torch.full_like(scene.features, value).to(dtype)
        ridge = collected(scene.replace(features=cells))
        weight = ridge.solve()
        finite(weight)
        mean = ridge.moment[-1] / ridge.gram[-1, -1]
        score = weight[:, :-1].double() @ cells[0, :, 0, 0].double() + weight[:, -1].double()
        close(score, mean, tolerance=1e-5)
        assert weight.abs()[:, :-1].max() * abs(value) < 10


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-20, 1e20, 3.4e38])
def test_features_of_any_size_give_finite_weights(size):
    scene = fixed()
    unit = scene.features / scene.features.abs().max()
    ridge = collected(scene.replace(features=(unit * size).float()))
    finite(ridge.gram, ridge.moment, ridge.solve())
    zeros = collected(scene.replace(features=unit * 0))
    finite(zeros.solve())
    dead = unit.clone()
    dead[:, 1] = 0
    weight = collected(scene.replace(features=dead * size)).solve()
    finite(weight)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e160])
def test_features_whose_squares_have_no_sum_are_refused_and_leave_the_sums_alone(wrong):
    scene = fixed()
    ridge = collected(scene)
    before = ridge.gram.clone(), ridge.moment.clone()
    x = scene.features.clone()
    x[1, 2, 3, 4] = wrong
    with pytest.raises(ValueError, match=r"^features must be finite, and so must the sums"):
        update(ridge, scene.replace(features=x))
    assert torch.equal(ridge.gram, before[0])
    assert torch.equal(ridge.moment, before[1])
    ridge.gram[0, 0] = wrong * wrong  # as on a GPU, where nobody looks until the end
    with pytest.raises(ValueError, match=r"^update must have seen finite features"):
        ridge.solve()


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "to", "parent"])
def test_sums_stay_in_float64_when_a_network_around_them_is_converted(convert):
    ridge = collected(fixed(), HALVES[0])
    before = ridge.gram.clone(), ridge.moment.clone()
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), ridge)
    if convert == "to":
        network.to(torch.float16)
    elif convert == "parent":
        network.half().float()
    else:
        getattr(network, convert)()
    assert network[0].weight.dtype != torch.float64
    assert torch.equal(ridge.gram, before[0])
    assert torch.equal(ridge.moment, before[1])
    update(ridge, fixed(), HALVES[1])
    close(ridge.solve(), collected(fixed()).solve(), tolerance=1e-6)
    assert ridge.to("meta").gram.device.type == "meta"
    assert ridge.to_empty(device="cpu").gram.dtype == torch.float64


def test_what_is_no_sum_of_finite_vectors_is_refused():
    for gram in (torch.full((3, 3), math.nan), torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])):
        with pytest.raises(ValueError, match=r"^gram must be a sum of x x\^T of finite vectors"):
            ridge_weights(gram, torch.ones(3, 2), 1.0)


def test_no_vectors_give_no_weights():
    assert (ridge_weights(torch.zeros(4, 4), torch.zeros(4, 2), 0.1) == 0).all()


def test_one_cell_is_enough():
    ridge = RidgeBoxClassifier(3, 2)
    boxes = [torch.tensor([[0.0, 0, 3, 4]])]
    ridge.update(torch.rand(1, 3, 1, 1), boxes, torch.tensor([1]), (8, 8), None)
    with pytest.raises(ValueError, match="must have seen a box beside background"):
        ridge.solve()  # the only cell is boxed
    ridge.update(torch.rand(1, 3, 1, 2), boxes, torch.tensor([1]), (8, 8))
    finite(ridge.solve())


# ------------------------------------------------------------------------- devices, module, errors


def test_everything_stays_on_a_cuda_device():
    """No value is looked at before solving, so nothing waits for the device."""
    with FakeTensorMode():
        features = torch.empty(2, 3, 4, 4, device="cuda")
        boxes = [torch.empty(2, 4, device="cuda"), torch.empty(1, 4, device="cuda")]
        labels = [torch.empty(2, dtype=torch.long, device="cuda") for _ in range(1)]
        labels.append(torch.empty(1, dtype=torch.long, device="cuda"))
        valid = torch.empty(2, 8, 8, dtype=torch.bool, device="cuda")
        y, known = box_targets(features, boxes, labels, (8, 8), CLASSES, valid=valid)
        assert y.device.type == known.device.type == "cuda"
        ridge = RidgeBoxClassifier(3, CLASSES).cuda()
        ridge.update(features, boxes, labels, (8, 8), valid)
        assert ridge.gram.device.type == ridge.moment.device.type == "cuda"
        weight = ridge_weights(ridge.gram, ridge.moment, 0.01)
        assert weight.device.type == "cuda"


@pytest.mark.cuda
def test_cuda():
    scene = fixed()
    ridge = RidgeBoxClassifier(3, CLASSES).cuda()
    boxes, labels = [x.cuda() for x in scene.boxes], [x.cuda() for x in scene.labels]
    ridge.update(scene.features.cuda(), boxes, labels, scene.image_size)
    expected = collected(scene)
    close(ridge.gram.cpu(), expected.gram)
    close(ridge.solve().cpu(), expected.solve(), tolerance=1e-5)
    expected.add(ridge)
    close(expected.gram, 2 * ridge.gram.cpu())


def test_the_module_names_its_settings():
    ridge = RidgeBoxClassifier(3, 4, penalty=0.5, grid_size=2)
    text = "RidgeBoxClassifier(in_channels=3, num_classes=4, penalty=0.5, grid_size=2)"
    assert repr(ridge) == text
    scene = fixed()
    update(ridge, scene)
    y, known = targets_of(scene, n=2)
    x = torch.cat([scene.features, torch.ones_like(scene.features[:, :1])], dim=1)
    x = x.movedim(1, -1)[known]
    close(ridge.gram, x.T @ x)
    close(ridge.moment, x.T @ y.movedim(1, -1)[known])
    close(ridge.solve()[0], ridge_weights(ridge.gram, ridge.moment, 0.5)[0].float(), tolerance=1e-6)
    default = RidgeBoxClassifier(3, 4)
    assert (default.penalty, default.grid_size) == (0.01, 4)


def test_errors_of_settings():
    for wrong, kind, text in [
        ({"in_channels": 0}, ValueError, "in_channels must be >= 1, got 0"),
        ({"in_channels": 3.0}, TypeError, "in_channels must be an int, got float"),
        ({"num_classes": 1}, ValueError, "num_classes must be >= 2, got 1"),
        ({"penalty": 0}, ValueError, "penalty must be > 0, got 0"),
        ({"penalty": None}, TypeError, "penalty must be a number, got NoneType"),
        ({"grid_size": 0}, ValueError, "grid_size must be >= 1, got 0"),
    ]:
        with pytest.raises(kind) as caught:
            RidgeBoxClassifier(**{"in_channels": 3, "num_classes": 4, **wrong})
        assert str(caught.value) == text


def test_errors_of_an_update_leave_the_sums_alone():
    scene = fixed()
    ridge = collected(scene)
    before = ridge.gram.clone(), ridge.moment.clone()
    good = {
        "features": scene.features,
        "boxes": scene.boxes,
        "labels": scene.labels,
        "image_size": (12, 14),
    }
    mixed = [scene.labels[0][:1], torch.cat([scene.labels[1], scene.labels[0][:1]])]
    for wrong, kind, text in [
        (
            {"features": scene.features[:, :2]},
            ValueError,
            "features must have shape (B, 3, h, w), got (6, 2, 5, 6)",
        ),
        (
            {"features": scene.features.long()},
            TypeError,
            "features must have a floating-point dtype, got torch.int64",
        ),
        (
            {"features": scene.features.numpy()},
            TypeError,
            "features must be a Tensor, got ndarray",
        ),
        (
            {"boxes": scene.boxes[:1]},
            ValueError,
            "boxes must have one entry per image (6), got 1 entries",
        ),
        (
            {"labels": [*mixed, *scene.labels[2:]]},
            ValueError,
            "labels[0] must have shape (2,), got (1,)",
        ),
        ({"labels": torch.tensor([1])}, ValueError, "labels must have shape (9,), got (1,)"),
        ({"labels": torch.full((9,), 4)}, ValueError, "labels must be in 1..3, got 4"),
        ({"labels": torch.zeros(9).long()}, ValueError, "labels must be in 1..3, got 0"),
        (
            {"labels": torch.ones(9)},
            TypeError,
            "labels must have an integer dtype, got torch.float32",
        ),
        ({"image_size": 12}, ValueError, "image_size must be (height, width), got 12"),
        (
            {"valid": torch.ones(6, 5, 6, dtype=torch.bool)},
            ValueError,
            "valid must have shape (6, 12, 14), got (6, 5, 6)",
        ),
        (
            {"valid": torch.ones(6, 12, 14)},
            TypeError,
            "valid must have dtype torch.bool, got torch.float32",
        ),
        (
            {"features": scene.features.to("meta")},
            ValueError,
            "features, gram must be on one device, got features on meta, gram on cpu",
        ),
    ]:
        with pytest.raises(kind) as caught:
            ridge.update(**{**good, **wrong})
        assert str(caught.value) == text
    assert torch.equal(ridge.gram, before[0])
    assert torch.equal(ridge.moment, before[1])


def test_errors_of_functions():
    gram, moment = torch.eye(4), torch.zeros(4, 2)
    for args, kind, text in [
        ((gram[:3], moment, 1.0), ValueError, "gram must have shape (3, 3), got (3, 4)"),
        ((gram, moment[:3], 1.0), ValueError, "moment must have shape (4, C), got (3, 2)"),
        (
            (gram.long(), moment, 1.0),
            TypeError,
            "gram must have a floating-point dtype, got torch.int64",
        ),
        ((gram, moment, -1.0), ValueError, "penalty must be > 0, got -1.0"),
    ]:
        with pytest.raises(kind) as caught:
            ridge_weights(*args)
        assert str(caught.value) == text
    features, boxes, labels = torch.rand(1, 3, 4, 4), [NONE[0]], [NONE[1]]
    for wrong, kind, text in [
        ({"num_classes": 1}, ValueError, "num_classes must be >= 2, got 1"),
        ({"grid_size": 0}, ValueError, "grid_size must be >= 1, got 0"),
    ]:
        with pytest.raises(kind) as caught:
            box_targets(
                features, boxes, labels, **{"image_size": (8, 8), "num_classes": 3, **wrong}
            )
        assert str(caught.value) == text


@pytest.mark.parametrize("kind", ["rois", "list"])
def test_boxes_come_in_either_form_and_order(kind):
    scene = fixed()
    plain = collected(scene)
    if kind == "rois":
        rows = [torch.cat([torch.full((len(x), 1), b), x], 1) for b, x in enumerate(scene.boxes)]
        order = torch.tensor([8, 3, 1, 0, 2, 5, 4, 7, 6])
        boxes, labels = torch.cat(rows)[order], torch.cat(scene.labels)[order]
    else:
        boxes, labels = ([x.flip(0) for x in part] for part in (scene.boxes, scene.labels))
    other = RidgeBoxClassifier(3, CLASSES)
    other.update(scene.features, boxes, labels, scene.image_size)
    close(other.gram, plain.gram)
    close(other.moment, plain.moment)


def test_every_update_counts_the_cells_that_tell_something():
    scene = fixed()
    seen = 0
    ridge = RidgeBoxClassifier(3, CLASSES)
    for b in itertools.chain(range(6), range(6)):
        update(ridge, scene, slice(b, b + 1))
        seen += int(targets_of(scene)[1][b].sum())
        assert ridge.gram[-1, -1] == seen
        close(ridge.moment[-1].sum(), torch.tensor(float(seen)))
