"""Networks of the VOC experiments against the published architectures."""

import itertools

import pytest
import torch
from model_inputs import learned, photo
from torch import nn
from torch.nn import functional as F

from bapnal import CosineClassifier, cosine_similarity
from bapnal.label.backbone import TimmFeatures
from bapnal_recipes.models.backbones import Resnet101Features, Vgg16Features
from bapnal_recipes.models.deeplab import Aspp, LargeFov, Segmenter, build_features, build_segmenter
from bapnal_recipes.models.small import SmallFeatures


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
