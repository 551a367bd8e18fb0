"""The conventions of the documentation, one test each."""

import pytest
import torch

from assertions import Largest, close
from bapnal import (
    background_attention,
    background_aware_pooling,
    bootstrapping_loss,
    box_bins,
    box_cells,
    box_classification_loss,
    confidence_map,
    cosine_similarity,
    definite_background,
    entropy_regularization_loss,
    grid_prototypes,
    noise_aware_loss,
    paint_boxes,
    pseudo_labels,
)
from strategies import seeded


def inside(*boxes, size=(6, 8)):
    """The pixels of boxes, as (row, column) pairs."""
    rows = [torch.tensor([box], dtype=torch.float32) for box in boxes]
    m = definite_background([torch.cat(rows)], size)[0, 0]
    return {(i, j) for i, j in (m == 0).nonzero().tolist()}


# ---------------------------------------------------------------------------------------- boxes


def test_boxes_are_x_first():
    assert inside([4.0, 1.0, 7.0, 3.0]) == {(i, j) for i in (1, 2) for j in (4, 5, 6)}


def test_boxes_are_half_open_in_pixels():
    assert inside([0.0, 0.0, 1.0, 1.0]) == {(0, 0)}
    assert inside([0.0, 0.0, 8.0, 6.0]) == {(i, j) for i in range(6) for j in range(8)}
    assert not inside([0.0, 0.0, 4.0, 6.0]) & inside([4.0, 0.0, 8.0, 6.0])


def test_a_voc_annotation_loses_one_from_its_minima():
    """VOC counts pixels from 1 and includes both: 3..5 is the third to the fifth."""
    xmin, ymin, xmax, ymax = 3, 2, 5, 2
    assert inside([xmin - 1.0, ymin - 1.0, xmax, ymax]) == {(1, 2), (1, 3), (1, 4)}


def test_rois_have_the_batch_index_first():
    rois = torch.tensor([[1.0, 4.0, 1.0, 7.0, 3.0]])
    m = definite_background(rois, (6, 8), batch_size=2)
    assert (m[0] == 1).all()
    assert torch.equal(m[1:], definite_background([rois[:, 1:]], (6, 8)))


def test_smaller_boxes_are_painted_over_larger_ones():
    """Of boxes of one size the later one is on top; pixels are those of ``box_cells``."""
    boxes = torch.tensor(
        [[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 6.0, 4.0], [2.0, 1.0, 4.0, 3.0], [7.2, 5.2, 7.3, 5.3]]
    )
    labels = torch.tensor([5, 6, 7, 8])
    expected = torch.zeros(6, 8, dtype=torch.long)
    for box in (1, 0, 2, 3):
        expected[box_cells(boxes[box], (6, 8), (6, 8))] = labels[box]
    assert torch.equal(paint_boxes(boxes, labels, (6, 8)), expected)
    assert expected[1:3].tolist() == [[6, 5, 7, 7, 6, 6, 0, 0]] * 2
    assert (expected == 8).sum() == 1  # no box is empty
    assert (paint_boxes(boxes[:0], labels[:0], (6, 8), background=255) == 255).all()


def test_image_size_is_height_then_width():
    boxes = [torch.tensor([[6.0, 0.0, 8.0, 2.0]])]
    assert definite_background(boxes, (2, 8)).shape == (1, 1, 2, 8)
    features = torch.arange(8.0).reshape(1, 1, 1, 8)
    out = background_aware_pooling(features, boxes, (2, 8), attention=False)
    assert out.foreground.item() == 6.5


def test_a_cell_belongs_to_a_box_by_its_centre():
    """Cells of 10 / 3 x 7 / 2 pixels: h and w need not divide H and W."""
    cells = box_cells(torch.tensor([1.75, 1.7, 5.0, 9.0]), (10, 7), (3, 2))
    assert cells.tolist() == [[False, False], [True, False], [True, False]]


def test_a_box_owns_at_least_the_cell_under_its_centre():
    cells = box_cells(torch.tensor([5.0, 5.0, 6.0, 6.0]), (16, 16), (2, 2))
    assert cells.tolist() == [[True, False], [False, False]]


def test_bins_are_row_major():
    bins = box_bins(torch.tensor([0.0, 0.0, 6.0, 4.0]), 2)
    assert bins.tolist() == [[0, 0, 3, 2], [3, 0, 6, 2], [0, 2, 3, 4], [3, 2, 6, 4]]


def test_results_of_boxes_come_in_the_order_of_torch_cat():
    features = torch.arange(8.0).reshape(2, 1, 1, 4)
    boxes = [
        torch.tensor([[3.0, 0.0, 4.0, 1.0], [0.0, 0.0, 1.0, 1.0]]),
        torch.tensor([[1.0, 0.0, 2.0, 1.0]]),
    ]
    out = background_aware_pooling(features, boxes, (1, 4), attention=False)
    assert out.foreground.flatten().tolist() == [3.0, 0.0, 5.0]


def test_padding_is_neither_box_nor_background():
    valid = torch.tensor([[[True, True, True, False]]])
    boxes = [torch.tensor([[2.0, 0.0, 4.0, 1.0]])]
    m = definite_background(boxes, (1, 4), valid=valid)
    assert m.tolist() == [[[[1.0, 1.0, 0.0, 0.0]]]]
    features = torch.tensor([1.0, 2.0, 4.0, 50.0]).reshape(1, 1, 1, 4)
    out = background_aware_pooling(features, boxes, (1, 4), valid=valid, attention=False)
    assert out.foreground.item() == 4.0
    assert out.background[out.background_valid].flatten().tolist() == [1.0, 2.0]


def test_padding_is_looked_up_under_the_centre_of_a_cell():
    valid = torch.tensor([[[False, True, False, True, False, True, False, False]]])
    m = definite_background([torch.zeros(0, 4)], (1, 8), (1, 2), valid=valid)
    assert m.tolist() == [[[[0.0, 0.0]]]]  # pixels 2 and 6
    m = definite_background([torch.zeros(0, 4)], (1, 8), (1, 4), valid=valid)
    assert m.tolist() == [[[[1.0, 1.0, 1.0, 0.0]]]]  # pixels 1, 3, 5 and 7


# ----------------------------------------------------------------------------------------- grid


def test_grid_cells_are_row_major():
    features = torch.arange(6.0).reshape(1, 1, 2, 3)
    q, valid = grid_prototypes(features, torch.ones(1, 1, 2, 3), 2)
    # Columns 0 and 1 of three are in the first of two: floor(j * 2 / 3).
    assert q.flatten().tolist() == [0.5, 2.0, 3.5, 5.0]
    assert valid.all()


def test_a_finer_grid_than_the_map_has_empty_cells():
    q, valid = grid_prototypes(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 3)
    assert valid.tolist() == [[True, True, False] + [False] * 6]
    assert (q[~valid] == 0).all()


def test_attention_is_one_where_the_mask_is_one():
    m = torch.tensor([[[[1.0, 0.0]]]])
    found = background_attention(torch.tensor([[[[1.0, -1.0]]]]), m)
    assert found.map.tolist() == [[[[1.0, 0.0]]]]


def test_gradients_flow_through_attention_and_queries():
    features = torch.randn(1, 3, 4, 4, generator=seeded(0)).requires_grad_()
    boxes = [torch.tensor([[4.0, 4.0, 12.0, 12.0]])]
    out = background_aware_pooling(features, boxes, (16, 16))
    (gradient,) = torch.autograd.grad(out.foreground.sum(), features)
    outside = definite_background(boxes, (16, 16), (4, 4))[0, 0].bool()
    assert (gradient[0][:, outside] != 0).any()  # through the queries
    assert (gradient[0][:, ~outside] != 0).all()


# --------------------------------------------------------------------------------------- labels


def test_box_labels_count_from_one_and_the_background_is_zero():
    out = background_aware_pooling(
        torch.ones(1, 2, 1, 2), [torch.tensor([[1.0, 0.0, 2.0, 1.0]])], (1, 2), attention=False
    )
    weight = torch.tensor([[100.0, 0.0], [0.0, 0.0], [0.0, 100.0]])
    # Background (1, 1) against class 0, the box (1, 1) against class 2: a tie of two each time.
    loss = box_classification_loss(out, weight, [torch.tensor([2])])
    close(loss, torch.tensor(2.0).log(), tolerance=1e-6)


def ends(values):
    """Logits (1, 2, 1, W) whose difference is ``values``."""
    x = torch.tensor(values)
    return torch.stack([x, torch.zeros_like(x)])[None, :, None]


def test_ignored_in_y_crf_leaves_a_pixel_out():
    y = torch.tensor([[[0, 255]]])
    close(noise_aware_loss(ends([0.0, 50.0]), ends([0.0, 0.0]), y, y), torch.tensor(2.0).log())


def test_ignored_in_y_ret_alone_is_unreliable():
    y_crf, y_ret = torch.tensor([[[0]]]), torch.tensor([[[255]]])
    loss = noise_aware_loss(ends([0.0]), ends([0.0]), y_crf, y_ret, balance=0.5)
    close(loss, 0.5 * torch.tensor(2.0).log(), tolerance=1e-6)


@pytest.mark.parametrize("align", [None, False, True])
def test_scores_are_upsampled_with_corners_not_aligned_unless_asked(align):
    """From two columns to four: 0, 1/4, 3/4, 1, or 0, 1/3, 2/3, 1."""
    scores = ends([0.0, 1.0])
    weight = [0.0, 1 / 3, 2 / 3, 1.0] if align else [0.0, 0.25, 0.75, 1.0]
    y = torch.zeros(1, 1, 4, dtype=torch.long)
    kwargs = {} if align is None else {"align_corners": align}
    expected = torch.nn.functional.cross_entropy(ends(weight), y)
    for function, extra in [
        (noise_aware_loss, {}),
        (entropy_regularization_loss, {}),
        (bootstrapping_loss, {"beta": 0.5}),
    ]:
        close(function(scores, scores, y, y, **extra, **kwargs), expected, tolerance=1e-6)


@pytest.mark.parametrize("align", [None, False, True])
def test_maps_are_upsampled_with_corners_not_aligned_unless_asked(align):
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
    y = pseudo_labels(
        torch.zeros(1, 3, 1, 4, dtype=torch.uint8),
        features,
        torch.eye(2),
        [torch.tensor([[0.0, 0.0, 4.0, 1.0]])],
        [torch.tensor([1])],
        crf=None,
        background_prior=0.0,
        **({} if align is None else {"align_corners": align}),
    )
    expected = [0.0, 1 / 3, 2 / 3, 1.0] if align else [0.0, 0.25, 0.75, 1.0]
    close(y.foreground_unary.flatten(), torch.tensor(expected), tolerance=1e-6)


def test_boxes_of_labels_are_exact_to_the_pixel():
    """Not to the cell of the features."""
    y = pseudo_labels(
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.ones(1, 1, 2, 2),
        torch.tensor([[0.0], [1.0]]),
        [torch.tensor([[1.0, 2.0, 6.0, 7.0]])],
        [torch.tensor([1])],
        crf=None,
        background="cam",
        background_prior=0.0,
    )
    expected = torch.zeros(8, 8, dtype=torch.long)
    expected[2:7, 1:6] = 1
    assert torch.equal(y.crf[0], expected)


# ------------------------------------------------------------------------------ dtype and device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_features_and_losses_at_least_float32(dtype):
    x = torch.rand(1, 3, 4, 4).to(dtype)
    boxes, labels = [torch.tensor([[4.0, 4.0, 12.0, 12.0]])], [torch.tensor([1])]
    out = background_aware_pooling(x, boxes, (16, 16))
    assert [part.dtype for part in out] == [dtype, dtype, torch.bool, dtype]
    found = background_attention(x, torch.ones(1, 1, 4, 4))
    assert [part.dtype for part in found] == [dtype, dtype, torch.bool]
    weight = torch.rand(3, 3).to(dtype)
    assert cosine_similarity(x, weight).dtype == dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    assert box_classification_loss(out, weight, labels).dtype == wide
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    assert confidence_map(x, y).dtype == wide
    assert noise_aware_loss(x, x, y, y).dtype == wide
    assert entropy_regularization_loss(x, None, y, y).dtype == wide
    assert bootstrapping_loss(x, None, y, y, 0.5).dtype == wide
    image = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    maps = pseudo_labels(image, x, weight, boxes, labels, crf=None)
    assert maps.background_unary.dtype == maps.foreground_unary.dtype == dtype


def test_nothing_depends_on_values_or_leaves_the_device():
    """On the meta device there are no values to look at, and no other device to go to."""

    def meta(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    x = meta(2, 3, 4, 4)
    boxes = [meta(2, 4).detach(), meta(0, 4).detach()]
    labels = [meta(2, dtype=torch.long), meta(0, dtype=torch.long)]
    valid = meta(2, 16, 16, dtype=torch.bool)
    y = meta(2, 8, 8, dtype=torch.long)
    parts = [*background_attention(x, meta(2, 1, 4, 4).detach())]
    for form, mine in [(boxes, labels), (meta(2, 5).detach(), labels[0])]:
        for bins in (1, 2):
            out = background_aware_pooling(
                x, form, (16, 16), output_size=bins, min_background=0.1, valid=valid
            )
            assert out.foreground.shape == (2, bins**2, 3)
            parts += [*out, box_classification_loss(out, meta(5, 3), mine)]
    parts += [cosine_similarity(x, meta(5, 3)), confidence_map(meta(2, 3, 8, 8), y)]
    parts += [noise_aware_loss(x, x, y, y), entropy_regularization_loss(x, None, y, y)]
    parts += [bootstrapping_loss(x, None, y, y, 0.5), definite_background(boxes, (16, 16))]
    assert all(part.device.type == "meta" for part in parts)
    sum(part.sum() for part in parts if part.requires_grad).backward()


# --------------------------------------------------------------------------------------- memory


def test_no_tensor_is_larger_than_the_features():
    """Neither (B, N*N, D, h, w) nor a feature map per box, forward or backward."""
    x = torch.randn(2, 64, 12, 12, generator=seeded(0)).requires_grad_()
    boxes = [torch.rand(20, 4, generator=seeded(i)) * 40 for i in range(2)]
    boxes = [torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], 1) for b in boxes]
    with Largest() as largest:
        out = background_aware_pooling(x, boxes, (96, 96), output_size=1)
        (out.foreground.sum() + out.background.sum() + out.attention.sum()).backward()
    assert largest.elements <= x.numel()


def test_the_noise_aware_loss_makes_few_tensors_of_the_size_of_its_scores():
    logits = torch.randn(2, 5, 8, 8, generator=seeded(0)).requires_grad_()
    y = torch.zeros(2, 8, 8, dtype=torch.long)
    with Largest() as largest:
        noise_aware_loss(logits, logits.tanh(), y, y).backward()
    assert largest.elements <= logits.numel()
