"""The written-out backward of pooling: the definition's gradient, and where that serves itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from assertions import close, finite
from bapnal import background_aware_pooling
from strategies import random_boxes, scenes, seeded

SIZE = (24, 28)


def outputs(features, boxes, size=SIZE, valid=None, **kwargs):
    out = background_aware_pooling(features, boxes, size, valid=valid, **kwargs)
    return out.foreground, out.background, out.attention


def both_gradients(features, run):
    """By the written-out backward, and by the definition, which create_graph=True asks for."""
    found = run(features)
    generator = seeded(1)
    given = [torch.randn(x.shape, generator=generator).to(x) for x in found]
    (fast,) = torch.autograd.grad(found, features, given, retain_graph=True)
    (naive,) = torch.autograd.grad(found, features, given, create_graph=True)
    assert naive.grad_fn is not None
    return fast, naive.detach()


@given(
    scene=scenes(),
    grid_size=st.integers(1, 4),
    output_size=st.integers(1, 3),
    min_background=st.sampled_from([0.0, 0.3, 1.0]),
    grid_padding=st.booleans(),
)
def test_it_is_the_gradient_of_the_definition(scene, **options):
    x = scene.features.clone().requires_grad_()
    fast, naive = both_gradients(
        x, lambda f: outputs(f, scene.boxes, scene.image_size, scene.valid, **options)
    )
    close(fast, naive)


def fixed(batch=2, channels=3, size=(5, 6), dtype=torch.float64):
    generator = seeded(0)
    x = torch.randn(batch, channels, *size, generator=generator, dtype=dtype).requires_grad_()
    return x, [random_boxes(generator, 2, SIZE) for _ in range(batch)]


def test_each_output_alone_and_a_box_without_weight():
    x, boxes = fixed()
    boxes[0] = torch.tensor([[0.0, 0.0, 28.0, 24.0]])
    boxes[1] = torch.empty(0, 4)
    for k in range(3):
        fast, naive = both_gradients(x, lambda f, k=k: outputs(f, boxes)[k : k + 1])
        close(fast, naive)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_that_do_not_fit_the_cache_together(memory_format):
    x, boxes = fixed(batch=3, channels=96, size=(80, 90), dtype=torch.float32)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    fast, naive = both_gradients(x, lambda f: outputs(f, boxes, output_size=2))
    close(fast, naive, tolerance=1e-5)


def test_squares_that_overflow_and_vectors_that_are_zero():
    x, boxes = fixed(dtype=torch.float32)
    for factor in (1e25, 1e-25):
        scaled = (x.detach() * factor).requires_grad_()
        finite(*both_gradients(scaled, lambda f: outputs(f, boxes)))
    hollow = x.detach().clone()
    hollow[:, :, 2:4, 1:5] = 0
    fast, naive = both_gradients(hollow.requires_grad_(), lambda f: outputs(f, boxes))
    close(fast, naive, tolerance=1e-5)


def test_second_derivatives():
    x, boxes = fixed(batch=1, channels=2, size=(3, 4))
    assert torch.autograd.gradgradcheck(lambda f: outputs(f, boxes, grid_size=2), [x])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by forward mode itself
def test_transforms_and_forward_mode():
    x, boxes = fixed(size=(4, 4))

    def run(f):
        return outputs(f, boxes, grid_size=2)[0]

    jacobian = torch.func.jacfwd(run)(x.detach())
    close(torch.func.jacrev(run)(x.detach()), jacobian)
    found = run(x)
    every = torch.eye(found.numel(), dtype=x.dtype).reshape(-1, *found.shape)
    (batched,) = torch.autograd.grad(found, x, every, is_grads_batched=True)
    close(batched.reshape(jacobian.shape), jacobian)
    tangent = torch.randn(x.shape, generator=seeded(2), dtype=x.dtype)
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent
    close(moved.detach(), (jacobian * tangent).flatten(found.dim()).sum(-1))
