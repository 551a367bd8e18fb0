"""Networks of the VOC experiments against the published architectures, and their weights."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet101
from torchvision.models import vgg16 as torchvision_vgg16

from bapnal import CosineClassifier, cosine_similarity
from bapnal.label.backbone import TimmFeatures
from bapnal_recipes.models import weights
from bapnal_recipes.models.backbones import Resnet101Features, Vgg16Features
from bapnal_recipes.models.deeplab import Aspp, LargeFov, Segmenter, build_features, build_segmenter
from bapnal_recipes.models.small import SmallFeatures

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


def photo(size, batch=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)


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


def count(module):
    return sum(p.numel() for p in module.parameters())


def convolution(inputs, outputs, kernel, bias=True):
    return inputs * outputs * kernel**2 + (outputs if bias else 0)


# Sizes


def test_vgg_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = build_features("vgg16", "random")
    layers = [m for name, m in network.named_children() if name.startswith("conv")]
    assert len(layers) == 13
    assert sum(count(layer) for layer in layers) == 14_714_688
    assert count(network.fc6) == convolution(512, 1024, 3) == 4_719_616
    assert count(network.fc7) == convolution(1024, 1024, 1) == 1_049_600


def test_deeplab_v1_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = build_segmenter("deeplab_v1", 21, weights="random")
    plan = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    convolutions = sum(convolution(a, b, 3) for a, b in itertools.pairwise(plan))
    body = convolutions + convolution(512, 1024, 3) + convolution(1024, 1024, 1)
    # 20.5 million; the published classifier has 21 biases more.
    assert count(network) == body + convolution(1024, 21, 1, bias=False) == 20_505_408


def test_resnet_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = Resnet101Features("random")
    total = convolution(3, 64, 7, bias=False) + 2 * 64
    inputs = 64
    for blocks, width in ((3, 64), (4, 128), (23, 256), (3, 512)):
        total += convolution(inputs, 4 * width, 1, bias=False) + 2 * 4 * width
        for _ in range(blocks):
            total += convolution(inputs, width, 1, bias=False)
            total += convolution(width, width, 3, bias=False)
            total += convolution(width, 4 * width, 1, bias=False)
            total += 2 * (width + width + 4 * width)
            inputs = 4 * width
    assert count(network) == total == 42_500_160


def test_deeplab_v2_adds_four_branches_and_a_classifier():
    with torch.device("meta"):
        network = build_segmenter("deeplab_v2", 21, weights="random")
    assert count(network) == 42_500_160 + 4 * convolution(2048, 256, 3) + 256 * 21
    # The published branches give scores themselves.
    assert count(Aspp(2048, 21)) == 4 * convolution(2048, 21, 3) == 1_548_372


@pytest.mark.parametrize(
    ("name", "options", "side", "channels"),
    [
        ("deeplab_v1", {}, 41, 1024),
        ("deeplab_v2", {}, 41, 256),
        ("small", {}, 81, 256),
        ("small", {"head": "linear"}, 81, 96),
        ("test_efficientnet", {"stride": 8}, 41, 256),
        ("test_efficientnet", {"stride": 16, "head": "aspp"}, 21, 256),
        ("test_efficientnet", {"stride": 32, "head": "linear", "classifier": "dot"}, 11, 144),
    ],
)
def test_a_crop_of_321_gives_this_many_positions(name, options, side, channels):
    with torch.device("meta"):
        network = build_segmenter(name, 21, weights="random", **options)
        features = network.head(network.features(torch.empty(20, 3, 321, 321)))
        logits, similarity = network(torch.empty(20, 3, 321, 321, dtype=torch.uint8))
    assert features.shape == (20, channels, side, side)
    assert logits.shape == similarity.shape == (20, 21, side, side)


def test_vgg_features_have_stride_8():
    with torch.device("meta"):
        network = build_features("vgg16", "random")
        assert network(torch.empty(2, 3, 321, 321)).shape == (2, 1024, 41, 41)
        assert network(torch.empty(2, 3, 375, 500)).shape == (2, 1024, 47, 63)


# Receptive fields


def receptive_field(layers):
    """Pixels that an output sees: a list of kernel, stride and dilation."""
    size, jump = 1, 1
    for kernel, stride, dilation in layers:
        size += (kernel - 1) * dilation * jump
        jump *= stride
    assert jump == 8
    return size


def vgg_layers(fc6_dilation, fifth_pooling):
    layers = []
    for convolutions, stride, dilation in ((2, 2, 1), (2, 2, 1), (3, 2, 1), (3, 1, 1)):
        layers += [(3, 1, dilation)] * convolutions + [(3, stride, 1)]
    return layers + [(3, 1, 2)] * 3 + [(3, 1, 1)] * 2 * fifth_pooling + [(3, 1, fc6_dilation)]


def resnet_layers(caffe):
    layers = [(7, 2, 1), (3, 2, 1)] + [(3, 1, 1)] * 3
    layers += [(1, 2, 1), (3, 1, 1)] if caffe else [(3, 2, 1)]
    layers += [(3, 1, 1)] * 3
    layers += [(3, 1, 2 if caffe else 1)] + [(3, 1, 2)] * 22
    return layers + [(3, 1, 4 if caffe else 2)] + [(3, 1, 4)] * 2 + [(3, 1, 24)]


def all_positive(network):
    """Give a network on the meta device weights that pass on whatever is not 0."""
    network = network.to_empty(device="cpu").eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / (module.in_channels * module.kernel_size[1]))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.reset_parameters()
        elif hasattr(module, "scale"):
            module.mean.zero_()
            module.scale.fill_(1)
    return network


def check_receptive_field(network, field):
    """Give a network lines of pixels, black but for one, and see which positions see that."""
    width = 8 * (2 * (field // 16) + 4) + 1
    bright = [width // 2 + phase for phase in range(8)]
    images = torch.zeros(8, 3, 1, width)
    for i, x in enumerate(bright):
        images[i, :, 0, x] = 1
    with torch.no_grad():
        seen = network(images).amax(1)[:, 0] > 0
    for line, x in zip(seen, bright, strict=True):
        expected = [abs(8 * i - x) <= (field - 1) // 2 for i in range(len(line))]
        assert not all(expected)
        assert line.tolist() == expected


@pytest.mark.parametrize(("dilation", "pooling", "field"), [(1, False, 227), (12, True, 435)])
def test_receptive_field_of_vgg(dilation, pooling, field):
    assert receptive_field(vgg_layers(dilation, pooling)) == field
    with torch.device("meta"):
        network = Vgg16Features("random", fc6_dilation=dilation, fifth_pooling=pooling)
    check_receptive_field(all_positive(network), field)


def test_which_vgg_stage_1_and_deeplab_v1_take():
    with torch.device("meta"):
        first = build_features("vgg16", "random")
        third = build_segmenter("deeplab_v1", 21, weights="random").features
        released = build_features("vgg16", "random", fifth_pooling=True)
    assert (first.fc6.dilation, first.fifth_pooling) == ((1, 1), False)
    assert (released.fc6.dilation, released.fifth_pooling) == ((1, 1), True)
    assert (third.fc6.dilation, third.fifth_pooling) == ((12, 12), True)
    for network in (first, released):
        assert isinstance(network.dropout, nn.Dropout2d)


def test_receptive_field_of_deeplab_v2():
    with torch.device("meta"):
        segmenter = build_segmenter("deeplab_v2", 2, weights="random")
    network = all_positive(nn.Sequential(segmenter.features, segmenter.head))
    for caffe, field in ((False, 1355), (True, 1411)):
        assert receptive_field(resnet_layers(caffe)) == field
        network[0].load_state_dict({"caffe": torch.tensor(caffe)}, strict=False)
        check_receptive_field(network, field)


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_heads_reach_as_many_pixels_at_any_stride(stride):
    with torch.device("meta"):
        largefov, aspp = LargeFov(8, stride=stride), Aspp(8, stride=stride)
    assert largefov.fc6.dilation[0] * stride == 96
    assert [b.dilation[0] * stride for b in aspp.branches] == [48, 96, 144, 192]


# Weights


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

    def fetch(url, **_):
        asked.append(url)
        return torchvision_vgg() if "vgg16" in url else resnet()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
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
            "must hold classifier.3.bias, is without it$",
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
        (Resnet101Features, caffe_vgg, "must hold conv1.weight, is without it$"),
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
    with pytest.raises(ValueError, match=r"weights\.pth must be a state dict kept by"):
        Vgg16Features(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["vgg16", "test_efficientnet"])
def test_no_file(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist$"):
        build_features(name, tmp_path / "nothing.pth")


# What is learned


def learned(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


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


# Heads and classifiers


def test_cosine_classifier_has_scale_20():
    network = build_segmenter("small", 4).eval()
    assert isinstance(network.classifier, CosineClassifier)
    logits, similarity = network(photo(16))
    torch.testing.assert_close(logits, 20 * similarity)
    phi = network.head(network.features(photo(16)))
    torch.testing.assert_close(similarity, cosine_similarity(phi, network.classifier.weight))


def test_dot_classifier_gives_products_and_cosines():
    network = build_segmenter("small", 4, classifier="dot").eval()
    logits, similarity = network(photo(16))
    phi = network.head(network.features(photo(16)))
    weight = network.classifier.weight[:, :, 0, 0]
    torch.testing.assert_close(logits, torch.einsum("cd,bdhw->bchw", weight, phi))
    lengths = phi.norm(dim=1, keepdim=True) * weight.norm(dim=1)[:, None, None]
    torch.testing.assert_close(similarity * lengths, logits)
    assert network.classifier.bias is None


def test_aspp_and_dot_products_are_the_published_scores():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 9, 9)
    # Published branches, given to the form here with a unit vector for each class.
    branches = [nn.Conv2d(8, 3, 3, padding=r, dilation=r) for r in (6, 12, 18, 24)]
    published = sum(branch(x) for branch in branches)
    aspp = Aspp(8, channels=5)
    for branch, theirs in zip(aspp.branches, branches, strict=True):
        branch.weight.data[:3], branch.bias.data[:3] = theirs.weight.data, theirs.bias.data
    dot = nn.Conv2d(5, 3, 1, bias=False)
    dot.weight.data[:] = torch.eye(3, 5)[:, :, None, None]
    network = Segmenter(nn.Identity(), aspp, dot)
    torch.testing.assert_close(network(x)[0], published)
    # Any classifier multiplied into the branches: the published form again.
    nn.init.normal_(dot.weight)
    folded = sum(
        F.conv2d(
            x,
            torch.einsum("cd,dikl->cikl", dot.weight[:, :, 0, 0], branch.weight),
            dot.weight[:, :, 0, 0] @ branch.bias,
            padding=branch.padding,
            dilation=branch.dilation,
        )
        for branch in aspp.branches
    )
    torch.testing.assert_close(network(x)[0], folded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spatial", [False, True])
def test_dropout_of_one_half_follows_both_layers(spatial):
    with torch.device("meta"):
        segmenter = build_segmenter("deeplab_v1", 21, weights="random", spatial_dropout=spatial)
    assert type(segmenter.features.dropout) is (nn.Dropout2d if spatial else nn.Dropout)
    assert segmenter.features.dropout.p == 0.5
    torch.manual_seed(0)
    network = Vgg16Features("random", spatial_dropout=spatial).train()
    for layer in (network.fc6, network.fc7):  # which give what is nowhere 0
        nn.init.constant_(layer.weight, 1e-6)
        nn.init.ones_(layer.bias)
    seen = []
    network.fc7.register_forward_hook(lambda layer, inputs, _: seen.append(inputs[0]))
    with torch.no_grad():
        seen.append(network(torch.rand(1, 3, 32, 32)))
    for x in seen:
        dropped = x == 0
        assert 0.4 < dropped.float().mean() < 0.6
        whole = dropped.flatten(2).all(2) | ~dropped.flatten(2).any(2)
        assert whole.all() == spatial


def test_the_sum_of_branches_may_be_cut_at_zero():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 9, 9)
    signed, cut = Aspp(4, 8), Aspp(4, 8, relu=True)
    cut.load_state_dict({k: v for k, v in signed.state_dict().items() if k.endswith("weight")})
    with torch.no_grad():
        assert torch.equal(cut(x), signed(x).relu())  # whose biases begin at 0
        assert (signed(x) < 0).any()


def test_dropout_follows_both_layers_of_other_backbones():
    head = LargeFov(4, 64).train()
    torch.manual_seed(0)
    assert 0.6 < (head(torch.rand(1, 4, 8, 8)) == 0).float().mean() < 0.9


@pytest.mark.parametrize("name", ["deeplab_v1", "test_efficientnet"])
def test_one_step_changes_what_is_learned(name):
    torch.manual_seed(0)
    network = build_segmenter(name, 3, weights="random", frozen_stages=1).train()
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    optimizer = torch.optim.SGD(
        [
            {"params": network.pretrained_parameters(), "lr": 0.1},
            {"params": network.new_parameters(), "lr": 1.0},
        ]
    )
    logits, _ = network(photo(33, 2))
    F.cross_entropy(logits, torch.ones(2, *logits.shape[2:], dtype=torch.long)).backward()
    optimizer.step()
    changed = {key for key, p in network.named_parameters() if not torch.equal(p, before[key])}
    assert changed <= learned(network)
    assert "classifier.weight" in changed
    assert len(changed) > 0.8 * len(learned(network))


# timm


def test_dilation_replaces_resampling():
    plain = TimmFeatures("test_efficientnet", "random", stride=8)
    dilated = TimmFeatures("test_efficientnet", "random", stride=8, output_stride=8)
    dilated.load_state_dict(plain.state_dict())
    image = photo(65)
    with torch.no_grad():
        stages = dilated.eval().network(image.float())
        assert [x.shape[-1] for x in stages][-3:] == [9, 9, 9]
        assert [x.shape[-1] for x in plain.eval().network(image.float())][-3:] == [9, 5, 3]
        assert plain(image).shape == dilated(image).shape
        assert not torch.allclose(plain(image), dilated(image))


def test_segmenters_and_dilated_features_dilate_where_they_must():
    def sides(network):
        with torch.no_grad():
            return [x.shape[-1] for x in network.eval().network(torch.zeros(1, 3, 65, 65))][-3:]

    name = "test_efficientnet"
    assert sides(build_segmenter(name, 3, weights="random", stride=16).features) == [9, 5, 5]
    assert sides(build_segmenter(name, 3, weights="random", stride=32).features) == [9, 5, 3]
    assert sides(build_features(name, "random", 16, dilated=True)) == [9, 5, 5]
    assert sides(build_features(name, "random", 16)) == [9, 5, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_features("vgg61"), "timm must have the network by name, got 'vgg61'"),
        (lambda: build_features("vgg16", stride=16), "stride must be 8 for vgg16, got 16"),
        (
            lambda: build_features("vgg16", frozen_stages=6),
            "frozen_stages must be 0..5, the stages",
        ),
        (lambda: Resnet101Features(frozen_stages=-1), "frozen_stages must be 0..4, the stages"),
        (
            lambda: build_features("test_resnet", "random", frozen_stages=5),
            "frozen_stages must be 0..4, the blocks",
        ),
        (
            lambda: build_features("densenet121", "random", frozen_stages=1),
            "frozen_stages must be 0 for densenet121",
        ),
        (lambda: build_features("small", frozen_stages=1), "frozen_stages must be 0 for small"),
        (lambda: build_features("small", "a.pth"), "weights must be None or 'random' for small"),
        (lambda: build_features("test_resnet", stride=0), "stride must be at least 1, got 0"),
        (
            lambda: build_features("densenet121", "random", dilated=True),
            "densenet121 cannot be dilated to output_stride 8",
        ),
        (lambda: build_segmenter("deeplab_v1", 21, head="fcn"), "head must be one of 'largefov'"),
        (lambda: build_segmenter("small", 21, classifier="l2"), "classifier must be 'cosine' or"),
        (lambda: build_segmenter("small", 1), "num_classes must be at least 2, .* got 1"),
        (lambda: build_segmenter("deeplab_v2", 21, stride=16), "stride must be 8 for deeplab_v2"),
    ],
)
def test_arguments_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_small_is_the_small_network():
    assert isinstance(build_features("small"), SmallFeatures)
    assert not build_features("small").pretrained
