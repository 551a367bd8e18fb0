"""The losses under transforms, as modules, and their errors."""

import pickle

import pytest
import torch

from assertions import close, compiles
from bapnal import (
    BootstrappingLoss,
    CosineClassifier,
    bootstrapping_loss,
    confidence_map,
    noise_aware_loss,
    poly_schedule,
)
from loss_inputs import ALL, MODULES, drawn

# --------------------------------------------------------------------- transforms and modules


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_vmap_and_func_grad(function, kwargs):
    logits, cosines, y_crf, y_ret, _ = drawn(25, batch=3)

    def one(z, s, a, b):
        return function(z[None], s[None], a[None], b[None], **kwargs)

    rows = list(zip(logits, cosines, y_crf, y_ret, strict=True))
    expected = torch.stack([one(*row) for row in rows])
    close(torch.func.vmap(one)(logits, cosines, y_crf, y_ret), expected)
    gradients = torch.func.vmap(torch.func.grad(one))(logits, cosines, y_crf, y_ret)
    for row, gradient in zip(rows, gradients, strict=True):
        leaf = row[0].clone().requires_grad_()
        close(gradient, torch.autograd.grad(one(leaf, *row[1:]), leaf)[0])


@pytest.mark.parametrize(("function", "kwargs"), ALL)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@compiles
def test_compiles_without_a_graph_break(function, kwargs, backend):
    torch.compiler.reset()
    logits, cosines, y_crf, y_ret, _ = drawn(26)
    low, low_s = logits[..., ::2, ::2].contiguous(), cosines[..., ::2, ::2].contiguous()
    compiled = torch.compile(MODULES[function](), fullgraph=True, backend=backend)
    leaf, twin = low.clone().requires_grad_(), low.clone().requires_grad_()
    loss = compiled(leaf, low_s, y_crf, y_ret, **kwargs)
    expected = function(twin, low_s, y_crf, y_ret, **kwargs)
    close(loss, expected)
    loss.backward()
    expected.backward()
    close(leaf.grad, twin.grad)


@compiles
def test_a_classifier_and_its_losses_compile_to_code():
    torch.compiler.reset()
    features, _, y_crf, y_ret, _ = drawn(26)
    classifier = CosineClassifier(features.shape[1], 4).double()

    def step(x):
        cosines = classifier.similarity(x)
        args = (20 * cosines, cosines, y_crf, y_ret)
        return torch.stack([p.values[0](*args, **p.values[1]) for p in ALL])

    leaf, twin = (features[..., ::2, ::2].clone().requires_grad_() for _ in range(2))
    losses, expected = torch.compile(step, fullgraph=True)(leaf), step(twin)
    close(losses, expected)
    gradients = torch.autograd.grad(losses.sum(), (leaf, classifier.weight))
    for a, b in zip(
        gradients, torch.autograd.grad(expected.sum(), (twin, classifier.weight)), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_the_module_is_the_function(function, kwargs):
    logits, cosines, y_crf, y_ret, _ = drawn(27)
    args = (logits[..., ::2], cosines[..., ::2], y_crf, y_ret)
    make = MODULES[function]
    options = [{}, {"balance": 0.7}, {"align_corners": True}, {"ignore_index": 2}]
    if function is noise_aware_loss:
        options += [{"gamma": 2.0}, {"detach_confidence": True, "gamma": 1.0}]
    results = []
    for option in options:
        if "ignore_index" in option:
            args = (*args[:2], args[2].clamp(max=2), args[3].clamp(max=2))
        module = make(**option)
        copy = pickle.loads(pickle.dumps(module))
        expected = function(*args, **kwargs, **option)
        assert torch.equal(module(*args, **kwargs), expected)
        assert torch.equal(copy(*args, **kwargs), expected)
        assert not module.state_dict()
        results.append(expected.item())
        for name, value in option.items():
            if name in ("gamma", "balance", "ignore_index"):
                assert f"{name}={value}" in repr(module)
    assert len({round(x, 9) for x in results}) >= 4  # no option without an effect
    if function is noise_aware_loss:
        assert (make().gamma, make(3.0, 0.2, 7).gamma) == (7.0, 3.0)
        leaf = args[1].clone().requires_grad_()
        make(detach_confidence=True, ignore_index=2)(args[0], leaf, *args[2:])
        stopped = make(detach_confidence=True, ignore_index=2)(
            args[0].clone().requires_grad_(), leaf, *args[2:]
        )
        (gradient,) = torch.autograd.grad(stopped, leaf, allow_unused=True)
        assert gradient is None or (gradient == 0).all()
    assert (make().balance, make().ignore_index) == (0.1, 255)


def test_beta_is_given_with_every_call():
    logits, cosines, y_crf, y_ret, _ = drawn(28)
    module = BootstrappingLoss()
    for beta in (1.0, 0.25):
        close(
            module(logits, cosines, y_crf, y_ret, beta),
            bootstrapping_loss(logits, cosines, y_crf, y_ret, beta),
        )
    with pytest.raises(TypeError, match="beta"):
        module(logits, cosines, y_crf, y_ret)


@pytest.mark.cuda
@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_cuda(function, kwargs):
    args = drawn(29)[:4]
    loss = function(*(x.cuda() for x in args), **kwargs)
    assert loss.is_cuda
    close(loss.cpu(), function(*args, **kwargs))


# --------------------------------------------------------------------------------------- errors


def raises(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


@pytest.mark.parametrize(("function", "kwargs"), ALL)
def test_errors(function, kwargs):
    logits, cosines, y, _, _ = drawn(30)

    def fails(kind, text, z=logits, s=cosines, a=y, b=y, **options):
        raises(kind, text, function, z, s, a, b, **{**kwargs, **options})

    fails(ValueError, "logits must have shape (B, C, h, w), got (3, 4, 5)", z=logits[0])
    fails(TypeError, "logits must be a Tensor, got list", z=[1.0])
    fails(TypeError, "logits must have a floating-point dtype, got torch.int64", z=logits.long())
    fails(ValueError, "similarity must have shape (2, 3, h, w), got (2, 2, 4, 5)",
          s=cosines[:, :2])  # fmt: skip
    fails(TypeError, "similarity must have a floating-point dtype, got torch.int64",
          s=cosines.long())  # fmt: skip
    fails(
        ValueError,
        "logits, similarity must be on one device, got logits on cpu, similarity on meta",
        s=cosines.to("meta"),
    )
    fails(ValueError, "y_crf must have shape (2, H, W), got (1, 4, 5)", a=y[:1])
    fails(ValueError, "y_crf must have shape (2, H, W), got (2, 1, 4, 5)", a=y[:, None])
    fails(TypeError, "y_crf must have an integer dtype, got torch.float32", a=y.float())
    fails(ValueError, "y_ret must have shape (2, 4, 5), got (2, 4, 4)", b=y[..., :4])
    fails(TypeError, "y_ret must have an integer dtype, got torch.bool", b=y.bool())
    wrong = y.clone()
    wrong[0, 0, 0] = 3
    fails(ValueError, "y_crf must be in 0..2 or 255, got 3", a=wrong)
    fails(ValueError, "y_ret must be in 0..2 or 255, got 3", b=wrong)
    wrong[0, 0, 0] = -1
    fails(ValueError, "y_crf must be in 0..2 or 255, got -1", a=wrong)
    fails(ValueError, "y_crf must be in 0..2 or 7, got 255", ignore_index=7)
    fails(ValueError, "balance must be >= 0, got -0.1", balance=-0.1)
    fails(TypeError, "balance must be a number, got str", balance="0.1")
    with pytest.raises(ValueError, match=r"y_crf.* on .*meta"):
        function(logits, cosines, y.to("meta"), y, **kwargs)
    with pytest.raises(ValueError, match=r"y_ret.* on .*meta"):
        function(logits, cosines, y, y.to("meta"), **kwargs)
    make = MODULES[function]
    raises(ValueError, "balance must be >= 0, got -1", make, balance=-1)
    if function is noise_aware_loss:
        fails(ValueError, "gamma must be >= 1, got 0.5", gamma=0.5)
        fails(ValueError, "gamma must be >= 1, got nan", gamma=float("nan"))
        fails(TypeError, "gamma must be a number, got NoneType", gamma=None)
        raises(ValueError, "gamma must be >= 1, got 0", make, gamma=0)
        fails(TypeError, "similarity must be a Tensor, got NoneType", s=None)
    if function is bootstrapping_loss:
        fails(ValueError, "beta must be >= 0 and <= 1, got 1.5", beta=1.5)
        fails(ValueError, "beta must be >= 0 and <= 1, got -0.5", beta=-0.5)


def test_errors_of_the_confidence_map():
    _, cosines, y, _, _ = drawn(31)
    run = confidence_map
    raises(ValueError, "similarity must have shape (B, C, H, W), got (3, 4, 5)", run, cosines[0], y)
    raises(TypeError, "similarity must have a floating-point dtype, got torch.int64", run,
           cosines.long(), y)  # fmt: skip
    raises(ValueError, "labels must have shape (2, 4, 5), got (2, 4, 4)", run, cosines, y[..., :4])
    raises(TypeError, "labels must have an integer dtype, got torch.float32", run, cosines,
           y.float())  # fmt: skip
    raises(ValueError, "labels must be in 0..2 or 255, got 9", run, cosines, y * 0 + 9)
    raises(ValueError, "gamma must be >= 1, got 0.9", run, cosines, y, gamma=0.9)
    raises(
        ValueError,
        "similarity, labels must be on one device, got similarity on cpu, labels on meta",
        run,
        cosines,
        y.to("meta"),
    )


def test_errors_of_the_schedule():
    raises(ValueError, "step must be >= 0, got -1", poly_schedule, -1, 5)
    raises(ValueError, "total_steps must be >= 1, got 0", poly_schedule, 0, 0)
    raises(TypeError, "step must be an int, got float", poly_schedule, 1.0, 5)
    raises(TypeError, "total_steps must be an int, got str", poly_schedule, 1, "5")
    raises(ValueError, "power must be > 0, got 0", poly_schedule, 1, 5, 0)
    raises(TypeError, "power must be a number, got str", poly_schedule, 1, 5, "1")
