"""The loop that pooling is timed against does the same."""

import pytest
import torch

import layers
from bapnal import BackgroundAwarePooling


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("bins", [1, 2])
def test_the_loop_is_the_layer(bins, products):
    features = torch.randn(3, 8, 41, 41, dtype=torch.float64, requires_grad=True)
    boxes = layers.draw_boxes(3, 2.5, "cpu")
    loop, background = layers.pool_by_loop(features, boxes, layers.IMAGE, 4, bins, products)
    out = BackgroundAwarePooling(grid_size=4, output_size=bins)(features, boxes, layers.IMAGE)
    assert torch.allclose(loop, out.foreground.flatten(0, 1))
    assert torch.allclose(background, out.background[out.background_valid])
    gradients = [torch.randn_like(loop), torch.randn_like(background)]
    theirs = torch.autograd.grad([loop, background], features, gradients)
    ours = torch.autograd.grad(
        [out.foreground.flatten(0, 1), out.background[out.background_valid]], features, gradients
    )
    assert torch.allclose(theirs[0], ours[0])
