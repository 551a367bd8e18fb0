"""How far the networks of the VOC experiments see, against the published architectures."""

import pytest
import torch
from torch import nn

from bapnal_recipes.models.backbones import Vgg16Features
from bapnal_recipes.models.deeplab import Aspp, LargeFov, build_features, build_segmenter


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
