"""The classifier in closed form against the oracle, and its laws."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import reference_labels
from assertions import Largest, close
from bapnal import DenseCRF, RidgeBoxClassifier, pseudo_labels, ridge_weights
from ridge_inputs import CLASSES, HALVES, collected, fixed, oracle_targets, targets_of, update
from strategies import seeded, seeds
from two_ranks import run_two


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
    gram, moment = reference_labels.ridge_sums(cells_of(scene))
    close(ridge.gram, gram)
    close(ridge.moment, moment)
    expected = torch.tensor(reference_labels.ridge_weights(gram, moment, 0.3), dtype=torch.float64)
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
    gram, moment = reference_labels.ridge_sums(list(zip(x.tolist(), y.tolist(), strict=True)))
    weight = ridge_weights(torch.tensor(gram).double(), torch.tensor(moment).double(), penalty)
    float64 = [torch.tensor(part, dtype=torch.float64) for part in (gram, moment)]
    close(ridge_weights(*float64, penalty), reference_labels.ridge_weights(gram, moment, penalty))
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
    ridge = collected(fixed(), (slice(0, 4), slice(4, 6))[rank])
    ridge.all_reduce()
    torch.save({**ridge.state_dict(), "weight": ridge.solve()}, folder / f"{rank}.pt")


def test_two_ranks_are_one_with_all_images(tmp_path):
    run_two(one_of_two, tmp_path)
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
    y = pseudo_labels(images, *args, crf=None, background_prior=0.0)
    expected = kinds[8].repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (y.crf[0] == expected).float().mean() > 0.95
    images[:, 0] = 200 * (expected == 0)
    images[:, 2] = 200 * (expected == 1)
    y = pseudo_labels(images, *args, crf=DenseCRF(), background_prior=0.0)
    assert (y.crf[0] == expected).float().mean() > 0.99
