"""The cosine classifier (suppl. Eq. 3) against the oracle, and its laws."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from assertions import close, close_gradients, compiles, finite_gradients
from bapnal import CosineClassifier, cosine_similarity
from strategies import seeded, seeds, sizes

channels = st.integers(1, 5)


def drawn(seed, map_size=(3, 4), d=3, batch=2, classes=4):
    generator = seeded(seed)
    features = torch.randn(batch, d, *map_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    return features, weight, generator


@given(seed=seeds, map_size=sizes, d=channels)
def test_values_agree_with_the_oracle(seed, map_size, d):
    features, weight, _ = drawn(seed, map_size, d)
    found = cosine_similarity(features, weight)
    assert found.shape == (2, 4, *map_size)
    for b in range(2):
        close(found[b], reference.cosine_similarity(features[b].tolist(), weight.tolist()))


@settings(max_examples=10)
@given(seed=seeds, map_size=sizes, d=channels)
def test_gradients_agree_with_differences_of_the_oracle(seed, map_size, d):
    features, weight, generator = drawn(seed, map_size, d, batch=1)
    mix = torch.randn(4, *map_size, generator=generator, dtype=torch.float64)

    def oracle(x, w):
        cosines = reference.cosine_similarity(x[0].tolist(), w.tolist())
        return (torch.tensor(cosines, dtype=torch.float64) * mix).sum().item()

    close_gradients(
        lambda x, w: (cosine_similarity(x, w)[0] * mix).sum(),
        oracle,
        [features, weight],
        generator,
    )


def test_gradcheck():
    features, weight, _ = drawn(0, (2, 2), batch=1)
    assert torch.autograd.gradcheck(
        cosine_similarity, [features.requires_grad_(), weight.requires_grad_()]
    )


@given(seed=seeds, d=channels, power=st.integers(-3, 3))
def test_length_does_not_matter(seed, d, power):
    features, weight, generator = drawn(seed, d=d)
    plain = cosine_similarity(features, weight)
    lengths = torch.rand(2, 1, 3, 4, generator=generator, dtype=torch.float64) + 0.1
    close(cosine_similarity(features * lengths * 10.0**power, weight), plain)
    close(cosine_similarity(features, weight * 10.0**power), plain)
    close(cosine_similarity(-features, weight), -plain)


@given(seed=seeds, d=channels)
def test_bounds_and_self_similarity(seed, d):
    features, weight, _ = drawn(seed, d=d)
    assert cosine_similarity(features, weight).abs().max() <= 1 + 1e-12
    close(cosine_similarity(weight, weight).diagonal(), torch.ones(4))


def test_classes_may_be_permuted():
    features, weight, _ = drawn(1)
    order = torch.tensor([2, 0, 3, 1])
    close(cosine_similarity(features, weight[order]), cosine_similarity(features, weight)[:, order])


@pytest.mark.parametrize("rest", [(), (5,), (3, 4), (2, 3, 4), (0, 4)])
def test_any_number_of_dimensions(rest):
    generator = seeded(2)
    features = torch.randn(2, 3, *rest, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    found = cosine_similarity(features, weight)
    assert found.shape == (2, 4, *rest)
    flat = features.flatten(2) if rest else features[..., None]
    expected = [
        [[reference.cosine(v, w) for v in image.T.tolist()] for w in weight.tolist()]
        for image in flat
    ]
    close(found, expected)


def test_logits_are_scaled_cosines_without_a_bias():
    features, weight, _ = drawn(3)
    classifier = CosineClassifier(3, 4, scale=20.0).double()
    classifier.load_state_dict({"weight": weight})
    close(classifier.similarity(features), cosine_similarity(features, weight))
    close(classifier(features), 20 * cosine_similarity(features, weight))
    assert [name for name, _ in classifier.named_parameters()] == ["weight"]
    assert CosineClassifier(3, 4).scale == 20.0
    plain = classifier(features)
    classifier.scale = 5.0
    close(classifier(features), plain / 4)


def test_weight_is_drawn_as_in_the_paper():
    """A Gaussian with zero mean and standard deviation 1e-2 (Sec. 4.1)."""
    weight = CosineClassifier(200, 100).weight
    assert weight.shape == (100, 200)
    assert abs(weight.mean().item()) < 5e-4
    assert weight.std().item() == pytest.approx(0.01, rel=0.05)
    torch.manual_seed(1)
    first = CosineClassifier(3, 4)
    torch.manual_seed(1)
    assert torch.equal(CosineClassifier(3, 4).weight, first.weight)


def test_gradients_reach_features_and_weight():
    features, *_ = drawn(4)
    classifier = CosineClassifier(3, 4).double()
    leaf = features.clone().requires_grad_()
    classifier(leaf).square().sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert classifier.weight.grad.abs().sum() > 0
    # A cosine does not change along its own vector.
    close((leaf.grad * features).sum(1), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zero_vectors_have_no_similarity_and_no_gradient(dtype):
    features, weight, _ = drawn(5)
    features[:, :, 1] = 0
    weight[2] = 0
    features, weight = features.to(dtype), weight.to(dtype)
    found = cosine_similarity(features, weight)
    assert found.dtype == dtype
    assert (found[:, 2] == 0).all()
    assert (found[:, :, 1] == 0).all()
    x, w = finite_gradients(cosine_similarity, features, weight)
    assert (x[:, :, 1] == 0).all()
    assert (w[2] == 0).all()
    for scale in (1e-30, 1e30):
        if dtype in (torch.float32, torch.float64):
            finite_gradients(cosine_similarity, features * scale, weight * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    features, weight, _ = drawn(6, d=50)
    features, weight = (200 * features).to(dtype), weight.to(dtype)
    found = cosine_similarity(features, weight)
    torch.testing.assert_close(
        found.double(),
        cosine_similarity(features.double(), weight.double()),
        rtol=torch.finfo(dtype).eps,
        atol=1e-6,
    )
    # The weight of a model in float32 meets features from autocast, and keeps its precision.
    mixed = cosine_similarity(features, weight.float())
    assert mixed.dtype == dtype


def test_autocast_changes_nothing():
    features, _, _ = drawn(7)
    classifier = CosineClassifier(3, 4)
    plain = classifier(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(features.float()), plain)


def test_layouts():
    features, weight, _ = drawn(8, d=4)
    plain = cosine_similarity(features, weight)
    for other in (features.to(memory_format=torch.channels_last), features.mT.contiguous().mT):
        assert not other.is_contiguous()
        close(cosine_similarity(other, weight.T.contiguous().T), plain)


def test_a_dot_product_head_gives_its_similarity():
    """Suppl. Sec. 4: a bias-free 1x1 convolution, and the cosine to its weight."""
    conv = torch.nn.Conv2d(3, 4, 1, bias=False)
    features = drawn(9)[0].float()
    cosine = cosine_similarity(features, conv.weight.flatten(1))
    lengths = features.norm(dim=1, keepdim=True) * conv.weight.flatten(1).norm(dim=1)[:, None, None]
    close(cosine * lengths, conv(features), tolerance=1e-6)


def test_no_images():
    assert cosine_similarity(torch.zeros(0, 3, 2, 2), torch.ones(4, 3)).shape == (0, 4, 2, 2)
    assert cosine_similarity(torch.zeros(2, 3, 2), torch.ones(0, 3)).shape == (2, 0, 2)


def test_vmap_and_functional_call():
    features, weight, _ = drawn(10, batch=3)
    whole = cosine_similarity(features, weight)
    close(torch.func.vmap(lambda x: cosine_similarity(x[None], weight)[0])(features), whole)
    classifier = CosineClassifier(3, 4).double()

    def total(w, x):
        return torch.func.functional_call(classifier, {"weight": w}, (x,)).square().sum()

    leaf = weight.clone().requires_grad_()
    expected = torch.autograd.grad(total(leaf, features), leaf)[0]
    close(torch.func.grad(total)(weight, features), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # inductor: with the losses
@compiles
def test_compiles_without_a_graph_break(backend):
    torch.compiler.reset()
    features, _, _ = drawn(11)
    classifier = CosineClassifier(3, 4).double()
    compiled = torch.compile(classifier, fullgraph=True, backend=backend)
    found = compiled(features)
    close(found, classifier(features))
    (gradient,) = torch.autograd.grad(found.square().sum(), classifier.weight)
    (expected,) = torch.autograd.grad(classifier(features).square().sum(), classifier.weight)
    close(gradient, expected)


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # up to 2.5
def test_state_and_pickling():
    classifier = CosineClassifier(3, 4, scale=7.0)
    assert list(classifier.state_dict()) == ["weight"]
    copy = pickle.loads(pickle.dumps(classifier))
    assert torch.equal(copy.weight, classifier.weight)
    assert copy.scale == 7.0
    other = CosineClassifier(3, 4)
    other.load_state_dict(classifier.state_dict())
    assert torch.equal(other.weight, classifier.weight)
    assert repr(classifier) == "CosineClassifier(3, 4, scale=7.0)"


@pytest.mark.cuda
def test_cuda():
    features, weight, _ = drawn(12)
    close(
        cosine_similarity(features.cuda(), weight.cuda()).cpu(),
        cosine_similarity(features, weight),
    )


def raises(kind, text, function, *args, **kwargs):
    with pytest.raises(kind) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


def test_errors():
    x, w, run = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3), cosine_similarity
    raises(ValueError, "features must have shape (B, 3, *), got (2, 7, 4, 4)", run,
           torch.zeros(2, 7, 4, 4), w)  # fmt: skip
    raises(ValueError, "features must have shape (B, 3, *), got (3,)", run, x[0, :, 0, 0], w)
    raises(ValueError, "weight must have shape (C, D), got (5, 3, 1, 1)", run, x,
           w[..., None, None])  # fmt: skip
    raises(TypeError, "weight must be a Tensor, got list", run, x, [[1.0, 2.0, 3.0]])
    raises(TypeError, "features must be a Tensor, got NoneType", run, None, w)
    raises(TypeError, "features must have a floating-point dtype, got torch.uint8", run,
           x.byte(), w)  # fmt: skip
    raises(TypeError, "weight must have a floating-point dtype, got torch.int64", run, x, w.long())
    raises(
        ValueError,
        "features, weight must be on one device, got features on cpu, weight on meta",
        run,
        x,
        w.to("meta"),
    )
    raises(ValueError, "features must have shape (B, 3, *), got (2, 4)", CosineClassifier(3, 5),
           torch.zeros(2, 4))  # fmt: skip
    make = CosineClassifier
    raises(ValueError, "in_channels must be >= 1, got 0", make, 0, 4)
    raises(ValueError, "num_classes must be >= 1, got 0", make, 3, 0)
    raises(TypeError, "in_channels must be an int, got float", make, 3.0, 4)
    raises(TypeError, "num_classes must be an int, got str", make, 3, "4")
    raises(ValueError, "scale must be > 0, got 0", make, 3, 4, scale=0)
    raises(ValueError, "scale must be > 0, got nan", make, 3, 4, scale=float("nan"))
    raises(TypeError, "scale must be a number, got str", make, 3, 4, scale="20")
