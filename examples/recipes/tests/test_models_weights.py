"""Networks with weights from files: the image that they see, wrong files, frozen layers, groups."""

import functools

import pytest
import torch
from model_inputs import learned, photo
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet101
from torchvision.models import vgg16 as torchvision_vgg16

from bapnal.label.backbone import TimmFeatures
from bapnal_recipes.models import weights
from bapnal_recipes.models.backbones import Resnet101Features, Vgg16Features
from bapnal_recipes.models.deeplab import build_features, build_segmenter

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
CAFFE_BGR = torch.tensor([104.008, 116.669, 122.675])[:, None, None]
ENDS = (2, 4, 7, 10, 13)  # of VGG's stages


def numbers(shape, seed, scale=1.0):
    """Random numbers of any shape out of little storage: whole networks are small files."""
    strides = (13, 7, 3, 1)[-len(shape) :] if shape else ()
    length = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    base = torch.randn(length, generator=torch.Generator().manual_seed(seed)) * scale
    return base.as_strided(shape, strides)


def weights_of(network_of, seed=0):
    """A state dict with the shapes of torchvision's network and batch norm within reason."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in network_of().state_dict().items()}
    found = {}
    for i, (name, shape) in enumerate(shapes.items()):
        if name.endswith("num_batches_tracked"):
            found[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            found[name] = 1 + numbers(shape, seed + i).abs()
        elif name.endswith("bn3.weight"):
            found[name] = numbers(shape, seed + i, 0.2)  # or 33 blocks add up to infinity
        elif len(shape) == 1:
            found[name] = numbers(shape, seed + i, 0.2)
        else:
            found[name] = numbers(shape, seed + i, (2 / shape[1:].numel()) ** 0.5)
    return found


@functools.cache
def torchvision_vgg():
    return weights_of(torchvision_vgg16)


@functools.cache
def caffe_vgg():
    found = {}
    inputs = 3
    for i, stage in enumerate(((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3), 1):
        for j, outputs in enumerate(stage, 1):
            fan_in = 9 * inputs
            found[f"conv{i}_{j}.weight"] = numbers(
                (outputs, inputs, 3, 3), 10 * i + j, (2 / fan_in) ** 0.5
            )
            found[f"conv{i}_{j}.bias"] = numbers((outputs,), 100 + 10 * i + j)
            inputs = outputs
    found["fc6.weight"] = numbers((1024, 512, 3, 3), 61, 0.02)
    found["fc7.weight"] = numbers((1024, 1024, 1, 1), 71, 0.04)
    for name in ("fc6", "fc7"):
        found[f"{name}.bias"] = numbers((1024,), 62)
    found["fc8.weight"] = numbers((1000, 1024, 1, 1), 81)
    return found


@functools.cache
def resnet():
    return weights_of(resnet101)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    caffe = {f"Scale.{name}": v for name, v in resnet().items() if not name.startswith("fc.")}
    caffe = {name: v for name, v in caffe.items() if "num_batches" not in name}
    caffe["Scale.layer5.conv2d_list.0.weight"] = torch.zeros(21, 2048, 3, 3)
    backbone = {f"module.backbone.{k}": v for k, v in resnet().items() if k[:3] != "fc."}
    for name, content in {
        "vgg_torchvision": torchvision_vgg(),
        "vgg_caffe": caffe_vgg(),
        "resnet_torchvision": resnet(),
        "resnet_caffe": caffe,
        "resnet_wrapped": {"state_dict": {**backbone, "classifier.4.bias": torch.zeros(21)}},
    }.items():
        torch.save(content, folder / f"{name}.pth")
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Leave weights as memory has them where a file fills all: drawing 40 million takes long."""
    monkeypatch.setattr(nn.Conv2d, "reset_parameters", lambda self: None)
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda weight, **_: weight)


def published_vgg(x, state, fifth_pooling=False, fc6_dilation=1):
    """VGG-16 at stride 8, written down layer by layer, on images that are normalised."""
    layers = [name for name in state if name.startswith("conv") and name.endswith("weight")]
    assert len(layers) == 13
    for i, name in enumerate(layers, start=1):
        dilation = 2 if i > 10 else 1
        bias = state[name.replace("weight", "bias")]
        x = F.relu(F.conv2d(x, state[name], bias, padding=dilation, dilation=dilation))
        if i in ENDS[:3]:
            x = F.max_pool2d(x, 3, 2, 1)
        elif i == ENDS[3]:
            x = F.max_pool2d(x, 3, 1, 1)
    if fifth_pooling:
        x = F.avg_pool2d(F.max_pool2d(x, 3, 1, 1), 3, 1, 1)
    padding = {"padding": fc6_dilation, "dilation": fc6_dilation}
    x = F.relu(F.conv2d(x, state["fc6.weight"], state["fc6.bias"], **padding))
    return F.relu(F.conv2d(x, state["fc7.weight"], state["fc7.bias"]))


@pytest.mark.parametrize("options", [{}, {"fifth_pooling": True, "fc6_dilation": 12}])
def test_caffe_weights_want_bgr_with_their_mean_taken_off(files, options, undrawn):
    network = Vgg16Features(files / "vgg_caffe.pth", **options).eval()
    assert network.pretrained
    image = photo(33)
    with torch.no_grad():
        expected = published_vgg(image.flip(1).float() - CAFFE_BGR, caffe_vgg(), **options)
        torch.testing.assert_close(network(image), expected, rtol=1e-3, atol=1e-2)
        assert expected.std() > 1
        torch.testing.assert_close(network(image / 255), network(image), rtol=1e-3, atol=1e-2)


def test_torchvision_weights_are_cut_down_and_want_imagenet_statistics(files, undrawn):
    network = Vgg16Features(files / "vgg_torchvision.pth").eval()
    given = torchvision_vgg()
    names = [name.removesuffix(".weight") for name in given if name.endswith("weight")]
    state = {}
    for i, name in enumerate(names[:13]):
        state[f"conv_{i}.weight"] = given[f"{name}.weight"]
        state[f"conv_{i}.bias"] = given[f"{name}.bias"]
    state["fc6.weight"], state["fc6.bias"] = network.fc6.weight, network.fc6.bias
    state["fc7.weight"], state["fc7.bias"] = network.fc7.weight, network.fc7.bias
    image = photo(33)
    with torch.no_grad():
        expected = published_vgg((image / 255 - MEAN) / STD, state)
        torch.testing.assert_close(network(image), expected, rtol=1e-3, atol=1e-3)
        assert expected.std() > 0.01
    for output, channel, row, column in ((0, 0, 0, 0), (1, 2, 1, 0), (1023, 511, 2, 1)):
        place = channel * 49 + 3 * row * 7 + 3 * column
        theirs = given["classifier.0.weight"][4 * output, place]
        assert network.fc6.weight[output, channel, row, column] == theirs
    for output, channel in ((0, 0), (1, 2), (1023, 1022)):
        theirs = given["classifier.3.weight"][4 * output, 4 * channel]
        assert network.fc7.weight[output, channel, 0, 0] == theirs
    assert torch.equal(network.fc6.bias, given["classifier.0.bias"][::4])
    assert torch.equal(network.fc7.bias, given["classifier.3.bias"][::4])


def strided_resnet(caffe):
    """ResNet-101 at stride 32, as it was trained, without its classifier."""
    with torch.device("meta"):
        whole = resnet101()
    state = dict(resnet())
    if caffe:
        for layer in (whole.layer2, whole.layer3, whole.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
        whole.maxpool.ceil_mode = True
    whole.load_state_dict(state, assign=True)
    return nn.Sequential(*list(whole.children())[:-2]).eval()


@pytest.mark.parametrize("kind", ["torchvision", "wrapped", "caffe"])
def test_resnet_sees_what_its_weights_were_trained_on(files, kind, undrawn):
    """Dilation gives the values of the strided network at its positions, and more between."""
    caffe = kind == "caffe"
    network = Resnet101Features(files / f"resnet_{kind}.pth").eval()
    image = photo(68 if caffe else 65)  # at 68 it shows how pooling rounds
    given = image.flip(1).float() - CAFFE_BGR if caffe else (image / 255 - MEAN) / STD
    with torch.no_grad():
        found, expected = network(image), strided_resnet(caffe)(given)
    assert found.shape[2:] == (9, 9)
    assert expected.isfinite().all()
    assert expected.std() > 0.01
    torch.testing.assert_close(found[:, :, ::4, ::4], expected, rtol=1e-4, atol=1e-4)


def test_state_dicts_bring_normalisation_and_strides_along(files, undrawn):
    given = build_segmenter("deeplab_v2", 3, weights=files / "resnet_caffe.pth").eval()
    again = build_segmenter("deeplab_v2", 3, weights="random").eval()
    again.load_state_dict(given.state_dict())
    with torch.no_grad():
        assert torch.equal(again(photo(40))[0], given(photo(40))[0])
    given = Vgg16Features(files / "vgg_caffe.pth").eval()
    again = Vgg16Features("random").eval()
    again.load_state_dict(given.state_dict())
    with torch.no_grad():
        assert torch.equal(again(photo(17)), given(photo(17)))


def test_none_asks_torchvision(monkeypatch):
    asked = []

    def fetch(entry, **_):
        asked.append(entry.url)
        return torchvision_vgg() if "vgg16" in entry.url else resnet()

    monkeypatch.setattr("torchvision.models.WeightsEnum.get_state_dict", fetch)
    found = weights.read_vgg16(None).state
    assert torch.equal(found["conv1_1.weight"], torchvision_vgg()["features.0.weight"])
    found = weights.read_resnet101(None).state
    assert torch.equal(found["layer4.2.conv3.weight"], resnet()["layer4.2.conv3.weight"])
    assert [url.rsplit("/", 1)[-1].split("-")[0] for url in asked] == ["vgg16", "resnet101"]


def broken(given, **changes):
    return {name: v for name, v in {**given, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("build", "content", "message"),
    [
        (Vgg16Features, {"a": torch.zeros(1)}, "must hold a VGG-16, .* first of all a$"),
        (Vgg16Features, {}, "must hold a VGG-16, .* first of all nothing$"),
        (Vgg16Features, [1, 2], "must hold a state dict, names with tensors$"),
        (
            Vgg16Features,
            lambda: broken(torchvision_vgg(), **{"classifier.3.bias": None}),
            "must hold classifier.3.bias, lacks it$",
        ),
        (
            Vgg16Features,
            lambda: broken(caffe_vgg(), **{"fc6.weight": torch.zeros(2, 512, 7, 7)}),
            "13 convolutions of 3 x 3, fc6 and fc7, got 13, 0 and 1, and first of all conv1_1",
        ),
        (
            Vgg16Features,
            lambda: broken(
                torchvision_vgg(), **{"classifier.0.bias": torch.full((4096,), torch.nan)}
            ),
            "must hold all of VGG-16, got NaN for fc6.bias$",
        ),
        (Resnet101Features, caffe_vgg, "must hold conv1.weight, lacks it$"),
        (
            functools.partial(TimmFeatures, "test_efficientnet"),
            {"a": torch.zeros(1)},
            "must hold .* tensors, got 1$",
        ),
    ],
)
def test_a_wrong_file_is_named_in_one_line(build, content, message, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(content() if callable(content) else content, path)
    with pytest.raises(ValueError, match=message) as caught:
        build(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 but not really"])
def test_a_file_of_another_kind(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth must be a state dict saved by"):
        Vgg16Features(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["vgg16", "test_efficientnet"])
def test_no_file(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist$"):
        build_features(name, tmp_path / "nothing.pth")


@pytest.mark.parametrize(
    ("name", "frozen_stages", "kept", "first"),
    [
        ("vgg16", 2, ("conv1_", "conv2_"), "conv3_1."),
        ("test_efficientnet", 2, ("conv_stem", "bn1", "blocks.0.", "blocks.1."), "blocks.2."),
        ("test_resnet", 1, ("conv1", "bn1", "layer1."), "layer2."),
        ("test_convnext", 2, ("stem_", "stages_0", "stages_1"), "stages_2"),
    ],
)
def test_frozen_blocks_are_not_learned_and_keep_no_graph(name, frozen_stages, kept, first):
    network = build_features(name, "random", frozen_stages=frozen_stages).train()
    inner = getattr(network, "network", network)
    names = dict(inner.named_parameters())
    expected = {key for key in names if not key.startswith(kept)}
    assert learned(inner) == expected
    assert any(key.startswith(first) for key in expected)
    assert len(expected) < len(names)
    graphs = {}

    def keep(module_name, _module, _inputs, output):
        graphs[module_name] = output.requires_grad

    for module_name, module in inner.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(functools.partial(keep, module_name))
    network(photo(33, 2)).square().mean().backward()
    assert {n for n, graph in graphs.items() if not graph} == {
        n for n in graphs if n.startswith(kept)
    }
    assert {key for key, p in names.items() if p.grad is not None} <= expected
    assert any(names[key].grad.any() for key in expected if names[key].grad is not None)


def test_nothing_is_frozen_unless_asked():
    for name in ("vgg16", "test_efficientnet"):
        network = build_features(name, "random")
        assert learned(network) == {key for key, _ in network.named_parameters()}


def test_frozen_resnet_keeps_batch_normalisation(files, undrawn):
    network = build_segmenter(
        "deeplab_v2", 3, weights=files / "resnet_torchvision.pth", frozen_stages=2
    ).train()
    before = {key: v.clone() for key, v in network.features.named_buffers()}
    kept = ("conv1", "layer1", "layer2")
    assert learned(network.features) == {
        key
        for key, p in network.features.named_parameters()
        if p.ndim == 4 and not key.startswith(kept)
    }
    with torch.no_grad():
        network(photo(17))
    for key, values in network.features.named_buffers():
        assert torch.equal(values, before[key]), key
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert network.head.training


def test_random_weights_learn_batch_normalisation():
    for network in (build_features("test_efficientnet", "random"), Resnet101Features("random")):
        norms = [m for m in network.train().modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert all(m.training and m.weight.requires_grad for m in norms)


@pytest.mark.parametrize("classifier", ["cosine", "dot"])
def test_rates_of_pretrained_and_new_parameters(classifier):
    for name in ("deeplab_v1", "deeplab_v2", "test_efficientnet"):
        with torch.device("meta"):
            network = build_segmenter(
                name, 4, weights="random", classifier=classifier, frozen_stages=1
            )
        groups = [*network.pretrained_parameters(), *network.new_parameters()]
        assert len(groups) == len({id(p) for p in groups})
        wanted = {id(p) for p in network.parameters() if p.requires_grad}
        assert {id(p) for p in groups} == wanted
        assert id(network.classifier.weight) in {id(p) for p in network.new_parameters()}
