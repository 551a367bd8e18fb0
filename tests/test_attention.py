"""Grid prototypes (Eq. 1) and background attention (Eq. 2-3) against the oracle, and their laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from assertions import close, close_gradients, finite, finite_gradients
from attention_inputs import drawn, grids, reductions, shares
from bapnal import BackgroundAttention, background_attention, grid_prototypes
from strategies import seeded, seeds, sizes


@given(seed=seeds, map_size=sizes, n=grids, share=shares, reduction=reductions)
def test_values_agree_with_the_oracle(seed, map_size, n, share, reduction):
    features, background, _ = drawn(seed, map_size, share=share)
    found = background_attention(features, background, grid_size=n, reduction=reduction)
    assert found.map.shape == background.shape
    assert found.prototypes.shape == (2, n * n, 3)
    assert found.valid.dtype == torch.bool
    for b in range(2):
        a, q, valid = reference.background_attention(
            features[b].tolist(), background[b, 0].tolist(), n, reduction
        )
        close(found.map[b, 0], a)
        close(found.prototypes[b], q)
        assert found.valid[b].tolist() == valid


@given(seed=seeds, map_size=sizes, n=grids, share=shares)
def test_prototypes_agree_with_the_oracle(seed, map_size, n, share):
    features, background, _ = drawn(seed, map_size, share=share)
    prototypes, valid = grid_prototypes(features, background, n)
    for b in range(2):
        q, ok = reference.grid_prototypes(features[b].tolist(), background[b, 0].tolist(), n)
        close(prototypes[b], q)
        assert valid[b].tolist() == ok


@settings(max_examples=10)
@given(seed=seeds, map_size=sizes, n=grids, share=shares, reduction=reductions)
def test_gradients_agree_with_differences_of_the_oracle(seed, map_size, n, share, reduction):
    features, background, generator = drawn(seed, map_size, batch=1, share=share)
    mix = torch.randn(1, 1, *map_size, generator=generator, dtype=torch.float64)
    pull = torch.randn(1, n * n, 3, generator=generator, dtype=torch.float64)

    def function(x):
        found = background_attention(x, background, grid_size=n, reduction=reduction)
        return (found.map * mix).sum() + (found.prototypes * pull).sum()

    def oracle(x):
        lists = x[0].tolist(), background[0, 0].tolist()
        a, q, _ = reference.background_attention(*lists, n, reduction)
        total = (torch.tensor(a, dtype=torch.float64) * mix[0, 0]).sum()
        return (total + (torch.tensor(q, dtype=torch.float64) * pull[0]).sum()).item()

    close_gradients(function, oracle, [features], generator, entries=4)


def test_gradcheck():
    features, background, _ = drawn(3, (3, 4), batch=1)
    features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: background_attention(x, background, grid_size=2)[:2], [features]
    )


def test_one_worked_image():
    """Two background cells with known directions: the mean of two cosines, one of them cut at 0."""
    features = torch.tensor([[[[1.0, 0.0, 3.0, -2.0]], [[0.0, 2.0, 4.0, 0.0]]]])
    background = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]]]])
    found = background_attention(features, background, grid_size=4)
    # q = (1, 0) and (0, 2); f = (3, 4): cosines 0.6 and 0.8; f = (-2, 0): -1 -> 0 and 0.
    close(found.map, [[[[1.0, 1.0, 0.7, 0.0]]]], tolerance=1e-6)
    # The grid has four rows for one row of features: row 0 of the map is row 0 of the grid.
    assert found.valid[0].nonzero().flatten().tolist() == [0, 1]


@given(seed=seeds, map_size=sizes, n=grids, share=shares)
def test_attention_is_in_the_unit_interval_and_one_on_the_background(seed, map_size, n, share):
    for dtype in (torch.float32, torch.float64):
        features, background, _ = drawn(seed, map_size, share=share)
        mean, most = (
            background_attention(features.to(dtype), background, grid_size=n, reduction=name).map
            for name in ("mean", "max")
        )
        for found in (mean, most):
            assert found.min() >= 0
            assert found.max() <= 1
            assert (found[background.bool()] == 1).all()
        assert (most >= mean - 1e-6).all()


def test_the_maximum_is_like_some_background_the_mean_like_all_of_it():
    """Two kinds of background: a pixel of the first has cosines 1 and 0."""
    features = torch.eye(2)[torch.tensor([0, 1, 0])].T.reshape(1, 2, 1, 3)
    background = torch.tensor([[[[1.0, 1.0, 0.0]]]])
    for reduction, expected in [("mean", 0.5), ("max", 1.0)]:
        found = background_attention(features, background, grid_size=3, reduction=reduction)
        assert found.map[0, 0, 0, 2] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_does_not_pass_one(dtype):
    """Equal features have cosines of 1 up to rounding."""
    generator = seeded(0)
    for _ in range(30):
        vector = torch.rand(1, 37, 1, 1, generator=generator).to(dtype)
        features = vector.expand(1, 37, 3, 3) * torch.rand(3, 3, generator=generator).to(dtype)
        background = torch.ones(1, 1, 3, 3)
        background[..., 1:, 1:] = 0
        assert background_attention(features, background, grid_size=1).map.max() <= 1


@given(seed=seeds, map_size=sizes, n=grids)
def test_without_a_valid_cell_attention_is_zero(seed, map_size, n):
    features, background, _ = drawn(seed, map_size, share=0.0)
    found = background_attention(features, background, grid_size=n)
    assert not found.valid.any()
    assert (found.prototypes == 0).all()
    assert (found.map == 0).all()


@given(seed=seeds, map_size=sizes, n=grids, power=st.integers(-3, 3))
def test_scaling_features_leaves_attention(seed, map_size, n, power):
    features, background, _ = drawn(seed, map_size)
    plain = background_attention(features, background, grid_size=n)
    scaled = background_attention(10.0**power * features, background, grid_size=n)
    close(scaled.map, plain.map)
    close(scaled.prototypes, 10.0**power * plain.prototypes)


@given(seed=seeds, map_size=sizes)
def test_scaling_one_position_in_a_box_leaves_attention(seed, map_size):
    """The cosine forgets the length of every single feature inside the boxes."""
    features, background, generator = drawn(seed, map_size)
    lengths = torch.rand(2, 1, *map_size, generator=generator, dtype=torch.float64) + 0.1
    lengths = torch.where(background.bool(), 1.0, lengths)
    plain = background_attention(features, background, grid_size=2).map
    close(background_attention(lengths * features, background, grid_size=2).map, plain)


@given(seed=seeds, map_size=sizes, n=grids)
def test_duplicate_queries_change_nothing(seed, map_size, n):
    """An image tiled 2 x 2 under a grid twice as fine has every query four times."""
    features, background, _ = drawn(seed, map_size)
    once = background_attention(features, background, grid_size=n)
    tiled = background_attention(
        features.tile(1, 1, 2, 2), background.tile(1, 1, 2, 2), grid_size=2 * n
    )
    close(tiled.map, once.map.tile(1, 1, 2, 2))
    close(tiled.valid.sum(1), 4 * once.valid.sum(1))


@given(seed=seeds, map_size=sizes)
def test_attention_is_the_mean_over_valid_cells_only(seed, map_size):
    """With every position a grid cell of its own, A is the mean over background positions."""
    features, background, _ = drawn(seed, map_size)
    n = max(map_size)
    found = background_attention(features, background, grid_size=n)
    assert torch.equal(found.valid.sum(1), background.flatten(1).sum(1).long())
    directions = torch.nn.functional.normalize(features.flatten(2), dim=1)
    scores = (directions.mT @ directions).relu()
    count = background.flatten(1).sum(1).clamp(min=1)
    mean = (scores * background.flatten(2)).sum(2) / count[:, None]
    mean = torch.where(background.flatten(1) == 1, 1.0, mean)
    close(found.map.flatten(1), mean)


@given(seed=seeds, map_size=sizes, n=grids)
def test_grid_cells_partition_the_map(seed, map_size, n):
    """Counting with a constant feature: all positions are in one grid cell each."""
    h, w = map_size
    position = torch.arange(h * w, dtype=torch.float64).reshape(1, 1, h, w)
    one_hot = torch.eye(h * w, dtype=torch.float64).reshape(1, h * w, h, w)
    q, valid = grid_prototypes(one_hot, torch.ones_like(position), n)
    assert torch.equal((q[0] > 0).sum(0), torch.ones(h * w, dtype=torch.long))
    close(q[0].sum(1), valid[0])
    rows = {i: i * n // h for i in range(h)}
    columns = {j: j * n // w for j in range(w)}
    for p in range(h * w):
        assert q[0, rows[p // w] * n + columns[p % w], p] > 0


@given(seed=seeds, map_size=sizes, n=grids, share=shares, reduction=reductions)
def test_a_grid_over_what_is_shown_is_that_of_the_image_alone(seed, map_size, n, share, reduction):
    """Images of different sizes at different places of one map, and one that is not shown."""
    features, background, generator = drawn(seed, (9, 8), batch=4, share=share)
    shown = torch.zeros(4, 9, 8, dtype=torch.bool)
    places = [(0, 0), (9 - map_size[0], 8 - map_size[1]), (1, 2)]
    windows = [(slice(y, y + map_size[0]), slice(x, x + map_size[1])) for y, x in places]
    for b, window in enumerate(windows):
        shown[(b, *window)] = True
        if torch.rand((), generator=generator) < 0.5:  # a hole moves no border
            shown[b, places[b][0] + map_size[0] // 2, places[b][1] + map_size[1] // 2] = True
    background = background * shown[:, None]
    options = {"grid_size": n, "reduction": reduction}
    found = background_attention(features, background, shown=shown, **options)
    for b, window in enumerate(windows):
        here = (slice(b, b + 1), slice(None), *window)
        alone = background_attention(features[here], background[here], **options)
        close(found.map[here], alone.map)
        close(found.prototypes[b], alone.prototypes[0])
        assert torch.equal(found.valid[b], alone.valid[0])
    finite(found.map, found.prototypes)
    assert not found.valid[3].any()
    q, valid = grid_prototypes(features, background, n, shown=shown)
    assert torch.equal(q, found.prototypes)
    assert torch.equal(valid, found.valid)
    whole = background_attention(features, background, shown=torch.ones_like(shown), **options)
    assert torch.equal(whole.map, background_attention(features, background, **options).map)
    module = BackgroundAttention(n, reduction=reduction)
    assert torch.equal(module(features, background, shown).map, found.map)


@given(seed=seeds, map_size=sizes, n=grids)
def test_inside_features_do_not_reach_the_prototypes(seed, map_size, n):
    features, background, _ = drawn(seed, map_size)
    other = torch.where(background.bool(), features, 100 + features)
    close(
        background_attention(other, background, grid_size=n).prototypes,
        background_attention(features, background, grid_size=n).prototypes,
    )


@given(seed=seeds, map_size=sizes, n=grids, share=shares)
def test_flipping_the_image_flips_attention(seed, map_size, n, share):
    """Where N divides the map, the grid is symmetric."""
    size = (map_size[0] * n, map_size[1] * n)
    features, background, _ = drawn(seed, size, share=share)
    plain = background_attention(features, background, grid_size=n).map
    flipped = background_attention(features.flip(3), background.flip(3), grid_size=n).map
    close(flipped.flip(3), plain)
    turned = background_attention(features.mT, background.mT, grid_size=n).map
    close(turned.mT, plain)


@given(seed=seeds, map_size=sizes, n=grids)
def test_images_do_not_see_each_other(seed, map_size, n):
    features, background, _ = drawn(seed, map_size, batch=3)
    together = background_attention(features, background, grid_size=n)
    for b in range(3):
        alone = background_attention(features[b : b + 1], background[b : b + 1], grid_size=n)
        for part, whole in zip(alone, together, strict=True):
            close(part[0], whole[b])


def test_corners_are_finite():
    zero = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    generic, background, _ = drawn(0, (4, 4), batch=1)
    some = generic * (torch.arange(16).reshape(4, 4) % 3 > 0)  # zero vectors in and off the boxes
    masks = [background, torch.zeros_like(background), torch.ones_like(background)]
    for features in (zero, generic, some, 1e-30 * generic, 1e30 * generic):
        for mask in masks:
            for dtype in (torch.float64, torch.float32):
                for part in (0, 1):
                    gradients = finite_gradients(
                        lambda x, m=mask, k=part: background_attention(x, m, grid_size=2)[k],
                        features.to(dtype),
                    )
                    if features is zero and part == 0:
                        assert (gradients[0] == 0).all()


def test_a_zero_vector_looks_like_nothing():
    features = torch.ones(1, 2, 1, 3)
    features[..., 1] = 0
    background = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    found = background_attention(features, background, grid_size=1).map
    close(found, [[[[1.0, 0.0, 1.0]]]], tolerance=1e-6)
    opposite = background_attention(features * 0, background, grid_size=1)
    assert opposite.valid.all()
    assert opposite.map.tolist() == [[[[1.0, 0.0, 0.0]]]]
