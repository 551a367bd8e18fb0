"""Files of weights in the layouts in circulation: names and shapes as they are, random numbers."""

import functools
import struct

import pytest
import torch
from torchvision.models import resnet101
from torchvision.models import vgg16 as torchvision_vgg16
from torchvision.models.segmentation import deeplabv3_resnet101

from bapnal_recipes.data.voc import VOC_CLASSES
from bapnal_recipes.models.backbones import Resnet101Features, Vgg16Features
from bapnal_recipes.models.caffe import read_caffemodel
from bapnal_recipes.models.classifier import load_classifier
from bapnal_recipes.models.deeplab import build_features, known_weights, origin
from bapnal_recipes.models.segmenter import load_segmenter
from bapnal_recipes.models.weights import (
    CAFFE,
    TORCHVISION,
    read_resnet101,
    read_vgg16,
    resnet101_weights,
    vgg16_weights,
)

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def numbers(*shape):
    """Random numbers of any shape out of little storage."""
    return torch.randn(shape[0], *(1 for _ in shape[1:])).expand(shape)


@functools.cache
def vgg(whole=False):
    """Weights of VGG-16 by Caffe's names; cut down as in ``vgg16_20M`` or whole."""
    found, inputs = {}, 3
    for i, stage in enumerate(STAGES, start=1):
        for j, outputs in enumerate(stage, start=1):
            found[f"conv{i}_{j}.weight"] = torch.randn(outputs, inputs, 1, 1).expand(-1, -1, 3, 3)
            found[f"conv{i}_{j}.bias"] = torch.randn(outputs)
            inputs = outputs
    shapes = {"fc6": (4096, 25088), "fc7": (4096, 4096), "fc8": (1000, 4096)}
    if not whole:
        shapes = {"fc6": (1024, 512, 3, 3), "fc7": (1024, 1024, 1, 1)}
    for name, shape in shapes.items():
        found |= {f"{name}.weight": numbers(*shape), f"{name}.bias": torch.randn(shape[0])}
    return found


PLACES = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # of torchvision's convolutions


def renamed(given, **names):
    """Give a VGG-16 other names; convolutions that are not told become ``features.N``."""
    convolutions = [x.removesuffix(".weight") for x in given if x[:4] == "conv" and "weight" in x]
    own = dict(zip(convolutions, (f"features.{n}" for n in PLACES), strict=True)) | names
    return {
        f"{own.get(s, s)}.{k}": v for (s, _, k), v in ((x.rpartition("."), given[x]) for x in given)
    }


def check_vgg(found, given, caffe):
    """Compare what was read with what was written."""
    first = found.state["conv1_1.weight"]
    torch.testing.assert_close(first.flip(1) if caffe else first, given["conv1_1.weight"])
    torch.testing.assert_close(found.state["conv5_3.bias"], given["conv5_3.bias"])
    for name in ("fc6", "fc7"):
        step = 1 if len(given[f"{name}.bias"]) == 1024 else 4
        torch.testing.assert_close(found.state[f"{name}.bias"], given[f"{name}.bias"][::step])
    mean = torch.tensor((CAFFE if caffe else TORCHVISION)[0])
    assert torch.equal(found.state["mean"].flatten(), mean)
    with torch.device("meta"):
        network = Vgg16Features("random")
    network.load_state_dict(found.state, assign=True)


VGG_FILES = {
    "AffinityNet's names": lambda: vgg(),
    "features.N, fc6 and fc7": lambda: renamed(vgg()),
    "all in one list": lambda: renamed(vgg(), fc6="features.33", fc7="features.36"),
    "classifier.N": lambda: renamed(vgg(), fc6="classifier.0", fc7="classifier.3"),
    "wrapped": lambda: {f"module.backbone.{x}": v for x, v in vgg().items()},
    "out of order": lambda: dict(sorted(renamed(vgg()).items())),
}


@pytest.mark.parametrize("layout", VGG_FILES)
def test_vgg16_20m_under_the_names_in_circulation(layout, tmp_path):
    torch.save(VGG_FILES[layout](), tmp_path / "weights.pth")
    found = read_vgg16(tmp_path / "weights.pth")
    check_vgg(found, vgg(), caffe=True)
    assert "Caffe's VGG-16, BGR with its mean taken off" in found.source
    assert "(vgg16_20M)" in found.source
    assert str(tmp_path / "weights.pth") in found.source
    assert "\n" not in found.source


def test_whole_vgg_files_are_torchvisions_unless_told():
    given = renamed(vgg(whole=True), fc6="classifier.0", fc7="classifier.3", fc8="classifier.6")
    with torch.device("meta"):
        names = torchvision_vgg16().state_dict()
    assert {x: v.shape for x, v in given.items()} == {x: v.shape for x, v in names.items()}
    found = vgg16_weights(given, "a file")
    check_vgg(found, vgg(whole=True), caffe=False)
    assert "torchvision's VGG-16, whole" in found.source
    assert found.trained_on == "imagenet"
    check_vgg(vgg16_weights(given, "a file", caffe=True), vgg(whole=True), caffe=True)
    # Caffe's names tell it.
    check_vgg(vgg16_weights(vgg(whole=True), "a file"), vgg(whole=True), caffe=True)


# .caffemodel


def varint(value):
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def count(number, value):
    return varint(number << 3) + varint(value)


def blob(tensor, old):
    data = field(5, tensor.float().contiguous().numpy().tobytes())
    if old:  # four numbers, the fully connected layers' and the biases' with leading ones
        four = [1] * (4 - tensor.ndim) + list(tensor.shape)
        return b"".join(count(i, n) for i, n in enumerate(four, start=1)) + data
    return field(7, field(1, b"".join(map(varint, tensor.shape)))) + data


def caffemodel(given, old):
    """A file of what Caffe writes now, or of what it wrote in 2014."""
    layer, name, blobs = (2, 4, 6) if old else (100, 1, 7)
    found = field(1, b"VGG") + field(layer, field(name, b"data") + count(50, 7))
    for stem in dict.fromkeys(x.rpartition(".")[0] for x in given):
        pair = (given[f"{stem}.weight"], given[f"{stem}.bias"])
        content = field(name, stem.encode()) + b"".join(field(blobs, blob(t, old)) for t in pair)
        found += field(layer, content + varint(51 << 3 | 5) + struct.pack("<f", 1.0))
    return found


@pytest.mark.parametrize("old", [False, True])
def test_a_caffemodel_is_read_without_caffe(old, tmp_path):
    path = tmp_path / "vgg.caffemodel"
    given = {
        "conv1_1.weight": torch.randn(4, 3, 3, 3),
        "conv1_1.bias": torch.randn(4),
        "fc6.weight": torch.randn(2, 300),
        "fc6.bias": torch.randn(2),
    }
    path.write_bytes(caffemodel(given, old))
    found = read_caffemodel(path)
    assert found.keys() == given.keys()
    for name, values in given.items():
        assert torch.equal(found[name], values)


def test_vgg16_20m_as_a_caffemodel(tmp_path):
    path = tmp_path / "vgg16_20M.caffemodel"
    path.write_bytes(caffemodel(vgg(), old=True))
    found = read_vgg16(path, trained_on="imagenet")
    check_vgg(found, vgg(), caffe=True)
    assert found.trained_on == "imagenet"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a .caffemodel with weights, has none"),
        (b"\x0b no protobuf", "must be a .caffemodel: byte 1 has the unknown wire type 3"),
        (varint(100 << 3 | 2) + varint(99) + b"cut", "a field of 99 bytes ends after the file"),
        (b"\x80", "must be a .caffemodel"),
    ],
)
def test_a_broken_caffemodel_is_named(content, message, tmp_path):
    path = tmp_path / "broken.caffemodel"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_caffemodel(path)
    assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_caffemodel(tmp_path / "nothing.caffemodel")


# ResNet-101


@functools.cache
def resnet(network=resnet101):
    with torch.device("meta"):
        shapes = {x: v.shape for x, v in network().state_dict().items()}
    return {x: numbers(*shape) if shape else torch.tensor(0) for x, shape in shapes.items()}


def caffe_resnet(prefix):
    found = {f"{prefix}{x}": v for x, v in resnet().items() if "fc." not in x}
    found = {x: v for x, v in found.items() if "num_batches" not in x}
    for i in range(4):
        found[f"{prefix}layer5.conv2d_list.{i}.weight"] = torch.zeros(21, 2048, 3, 3)
        found[f"{prefix}layer5.conv2d_list.{i}.bias"] = torch.zeros(21)
    return found


def deeplab_pytorch(prefix="", shortcut="shortcut"):
    """``layer1.conv1.conv.weight``, ``layer2.block1.reduce.bn.weight``, ..., ``fc.weight``."""
    parts = {"1": "reduce", "2": "conv3x3", "3": "increase"}
    found = {}
    for name, values in resnet().items():
        kind = name.rpartition(".")[2]
        if name.startswith(("conv1.", "bn1.")):
            found[f"layer1.conv1.{'bn' if name[0] == 'b' else 'conv'}.{kind}"] = values
        elif name.startswith("layer"):
            layer, block, *rest = name.split(".")
            if rest[0] == "downsample":
                part, own = shortcut, ("conv", "bn")[int(rest[1])]
            else:
                part, own = parts[rest[0][-1]], rest[0][:-1]
            found[f"layer{int(layer[5:]) + 1}.block{int(block) + 1}.{part}.{own}.{kind}"] = values
    found |= {"fc.weight": torch.zeros(91, 2048, 1, 1), "fc.bias": torch.zeros(91)}
    return {f"{prefix}{x}": v for x, v in found.items()}


RESNET_FILES = {
    "resnet101": (resnet, False, "imagenet", "torchvision's ResNet-101"),
    "deeplabv3_resnet101": (
        lambda: resnet(functools.partial(deeplabv3_resnet101, weights=None, weights_backbone=None)),
        *(False, "coco", "torchvision's DeepLabV3 on ResNet-101"),
    ),
    "deeplabv1_resnet101-coco": (deeplab_pytorch, True, "coco", "deeplab-pytorch's ResNet-101"),
    "several scales": (
        lambda: deeplab_pytorch("base.", "proj"),
        *(True, "coco", "deeplab-pytorch's ResNet-101"),
    ),
    "MS_DeepLab_resnet_pretrained_init": (
        lambda: caffe_resnet("Scale."),
        *(True, "coco", "DeepLab-V2 on ResNet-101"),
    ),
    "resnet101COCO": (lambda: caffe_resnet(""), True, "coco", "DeepLab-V2 on ResNet-101"),
    "a backbone alone": (
        lambda: {x: v for x, v in resnet().items() if "fc." not in x},
        *(False, "unknown", "does not tell what it was trained on"),
    ),
}


@pytest.mark.parametrize("layout", RESNET_FILES)
def test_resnet101_in_the_layouts_in_circulation(layout):
    content, caffe, trained_on, text = RESNET_FILES[layout]
    given = content()
    found = resnet101_weights(given, "a file")
    assert text in found.source
    assert found.source.startswith("a file: ")
    assert found.trained_on == trained_on
    assert bool(found.state["caffe"]) == caffe
    first = found.state["conv1.weight"]
    prefix = "backbone." if layout == "deeplabv3_resnet101" else ""
    source = given if prefix else resnet()
    torch.testing.assert_close(first.flip(1) if caffe else first, source[f"{prefix}conv1.weight"])
    for name in (
        "layer3.22.bn2.running_var",
        "layer1.0.downsample.1.weight",
        "layer4.2.conv3.weight",
    ):
        torch.testing.assert_close(found.state[name], source[f"{prefix}{name}"])
    with torch.device("meta"):
        network = Resnet101Features("random")
    network.load_state_dict(found.state, assign=True)


def test_the_name_of_a_file_says_nothing(tmp_path):
    torch.save(resnet(), tmp_path / "resnet101_coco.pth")
    assert read_resnet101(tmp_path / "resnet101_coco.pth").trained_on == "imagenet"
    alone = {x: v for x, v in resnet().items() if "fc." not in x}
    assert resnet101_weights(alone, "imagenet.pth").trained_on == "unknown"
    assert resnet101_weights(alone, "a file", trained_on="coco").trained_on == "coco"


def test_an_option_must_not_contradict_the_layout():
    with pytest.raises(ValueError, match="trained_on must be 'coco' for a file, as its layout"):
        resnet101_weights(caffe_resnet(""), "a file", trained_on="imagenet")
    with pytest.raises(ValueError, match="trained_on must be one of imagenet, coco, got 'voc'"):
        resnet101_weights(resnet(), "a file", trained_on="voc")
    with pytest.raises(ValueError, match="caffe_weights must be off for deeplab_v2"):
        known_weights("deeplab_v2", None, caffe=True)


def test_a_network_says_where_its_weights_are_from(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda weight, **_: weight)
    torch.save(vgg(), tmp_path / "vgg.pth")
    weights = known_weights("vgg16", str(tmp_path / "vgg.pth"), trained_on="imagenet")
    told = origin(build_features("vgg16", weights), None, None)
    assert told == {"source": weights.source, "trained_on": "imagenet", "from_caffe": True}
    small = origin(build_features("small"), None, None)
    assert small == {"source": "random", "trained_on": "random"}


# What the authors publish


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Write a VGG-16 with one more layer, as in the authors' ClsNet.pt and SegNet_VGG.pt."""
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda weight, **_: weight)

    def write(**more):
        path = tmp_path / "published.pt"
        torch.save({**renamed(vgg(), fc6="fc6.0", fc7="fc7.0"), **more}, path)
        return path

    return write


def test_the_authors_classifier_labels(published, capsys):
    head = torch.randn(21, 1024)
    path = published(**{"classifier.weight": head[..., None, None]})
    found = load_classifier(path)
    assert torch.equal(found.weight, head)
    assert found.classes == VOC_CLASSES
    assert (found.features.fifth_pooling, found.features.fc6.dilation) == (True, (1, 1))
    assert found.settings["sampling"] == "roi_align"
    assert not found.features.training
    torch.testing.assert_close(found.features.conv1_1.weight.flip(1), vgg()["conv1_1.weight"])
    assert "Caffe's VGG-16" in capsys.readouterr().out


def test_the_authors_segmenter_predicts(published):
    head = torch.randn(21, 1024)
    network, classes, settings = load_segmenter(published(classifier=head))
    assert torch.equal(network.classifier.weight, head)
    assert classes == VOC_CLASSES
    assert network.features.fc6.dilation == (12, 12)
    assert settings["align_corners"]
    with torch.no_grad():
        logits, similarity = network(torch.zeros(1, 3, 17, 17, dtype=torch.uint8))
    assert logits.shape == (1, 21, 3, 3)
    torch.testing.assert_close(logits, 20 * similarity)


def test_a_published_file_must_have_a_classifier_of_vocs_classes(published):
    with pytest.raises(ValueError, match=r"one classifier of shape \(21, 1024\), got None"):
        load_classifier(published())
    with pytest.raises(ValueError, match=r"got \(81, 1024\)"):
        load_segmenter(published(**{"classifier.weight": torch.zeros(81, 1024)}))
