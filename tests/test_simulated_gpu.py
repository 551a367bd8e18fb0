"""Every public function and module on a GPU that is not there.

``FakeTensorMode`` knows shapes, dtypes and devices but no values. An operation on tensors of two
devices is an error there, and so is reading a value; here each reading is answered with 1 instead
and noted with the line of the library that asked. On a GPU the host has to wait at such a line.
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bapnal
from bapnal import (
    PRESETS,
    BackgroundAttention,
    BackgroundAwarePooling,
    BootstrappingLoss,
    CosineClassifier,
    DenseCRF,
    EntropyRegularizationLoss,
    FeatureHead,
    MaskHead,
    NoiseAwareLoss,
    PairwiseTerm,
    PermutohedralLattice,
    PseudoLabelGenerator,
    RidgeBoxClassifier,
    ZoomedBoxes,
    background_attention,
    background_aware_pooling,
    bootstrapping_loss,
    box_bins,
    box_cells,
    box_classification_loss,
    box_coverage,
    box_log_odds,
    box_mask_loss,
    box_targets,
    confidence_map,
    cosine_similarity,
    definite_background,
    dense_crf,
    entropy_regularization_loss,
    grid_prototypes,
    instance_crf,
    noise_aware_loss,
    paint_boxes,
    poly_schedule,
    pseudo_labels,
    ridge_weights,
)

LIBRARY = str(Path(bapnal.__file__).parent)
# Where the host waits for the GPU, by function of the library, and why it has to. Not run here, and
# waiting more often: a lattice whose keys do not fit 64 bits (torch.unique numbers them), a
# callable in place of DenseCRF in the generator (it gets images of one class count at a time), and
# backend="pydensecrf" (it computes on the CPU).
LATTICE = {"_read": "the sizes of a lattice's tables: ranges of its keys, then its vertices"}
ALLOWED = {
    "lattice": LATTICE,
    "dense_crf": LATTICE,
    "pseudo_labels": LATTICE,
    "ridge": {"solve": "refuses to solve without a box; once per training"},
}


class Reads(TorchDispatchMode):
    """Answers 1 to whoever reads a value of a GPU, and notes who that was."""

    def __init__(self):
        super().__init__()
        self.places = []  # names of the functions of the library, one per synchronisation
        self.copies = []  # the same for copies from the host
        self._last = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].device.type == "cuda":
            self._note(self.places)
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if name in ("nonzero", "_unique2", "unique_dim", "masked_select", "bincount"):
            raise AssertionError(f"{name} waits for the GPU, in {self._who()[0]}")
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError(f"a mask as an index waits for the GPU, in {self._who()[0]}")
        out = func(*args, **kwargs)
        if (
            name in ("_to_copy", "copy_", "lift_fresh_copy")
            and isinstance(out, torch.Tensor)
            and out.device.type == "cuda"
            and any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args)
        ):
            self._note(self.copies)
        return out

    def _note(self, places):
        name, call = self._who()
        if call != self._last:  # all elements of a tolist are read at once
            places.append(name)
        self._last = call

    @staticmethod
    def _who():
        """The innermost function of the library, and which call of ``tolist`` it is in."""
        frame, call = sys._getframe(2), None
        while frame is not None:
            if frame.f_code.co_name == "tolist":
                call = id(frame)
            if frame.f_code.co_filename.startswith(LIBRARY):
                return frame.f_code.co_name, (call or object())
            frame = frame.f_back
        return "the test", (call or object())


@contextmanager
def gpu():
    with FakeTensorMode(), Reads() as reads:
        yield reads


def real(*shape, dtype=torch.float32, **kwargs):
    return torch.zeros(shape, dtype=dtype, device="cuda", **kwargs)


def whole(*shape):
    return real(*shape, dtype=torch.long)


BATCH, SIZE = 2, (16, 20)


def features():
    return real(BATCH, 3, 4, 5, requires_grad=True)


def both_forms():
    """Boxes and labels as lists and as single tensors."""
    yield [real(3, 4), real(0, 4)], [whole(3), whole(0)]
    yield real(3, 5), whole(3)


def masks():
    yield None
    yield torch.ones(BATCH, *SIZE, dtype=torch.bool, device="cuda")


def images():
    return real(BATCH, 3, *SIZE, dtype=torch.uint8)


def on_gpu(module, *args):
    with torch.device("cuda"):
        return module(*args)


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result for x in tensors(part)]


def check(reads, *results, allowed=(), at_most=0):
    """All results lie on the GPU; nobody waited but those who may; nothing was copied there."""
    for result in results:
        assert {x.device.type for x in tensors(result)} == {"cuda"}
    assert set(reads.places) <= set(allowed), reads.places
    assert len(reads.places) <= at_most, reads.places
    assert reads.copies == []
    reads.places.clear()


def test_a_synchronisation_is_seen():
    with gpu() as reads:
        x = real(3)
        x.tolist()
        int(x[0])
        assert reads.places == ["the test"] * 2
        torch.zeros(2).to("cuda")
        torch.tensor([1.0], device="cuda")
        assert reads.copies == ["the test"] * 2
        with pytest.raises(AssertionError, match="nonzero waits for the GPU"):
            x.nonzero()
        with pytest.raises(AssertionError, match="a mask as an index waits"):
            x[x > 0]
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(3)


def test_boxes():
    with gpu() as reads:
        for boxes, _ in both_forms():
            for valid in masks():
                found = definite_background(boxes, SIZE, (4, 5), batch_size=BATCH, valid=valid)
                check(reads, found)
        corners = real(3, 4)
        check(reads, box_cells(corners, SIZE, (4, 5)), box_bins(corners, 3))
        check(reads, paint_boxes(corners, whole(3), SIZE), box_coverage(corners, SIZE, (4, 5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_attention_and_classifier(dtype):
    with gpu() as reads:
        x, m = features().detach().to(dtype), real(BATCH, 1, 4, 5)
        for reduction in ("mean", "max"):
            found = background_attention(x, m, grid_size=3, reduction=reduction)
            check(reads, found)
        check(reads, BackgroundAttention(3)(x, m), grid_prototypes(x, m, 3))
        shown = torch.ones(BATCH, 4, 5, dtype=torch.bool, device="cuda")
        check(reads, BackgroundAttention(3)(x, m, shown))
        classifier = on_gpu(CosineClassifier, 3, 7)
        check(reads, classifier(x.float()), classifier.similarity(x.float()))
        check(reads, cosine_similarity(x, real(7, 3)))


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("output_size", [1, 2])
@pytest.mark.parametrize("sampling", ["cells", "roi_align"])
def test_pooling_and_its_loss(attention, output_size, sampling):
    if sampling == "roi_align":
        pytest.importorskip("torchvision", reason="torchvision is not installed")
    settings = {"output_size": output_size, "attention": attention, "sampling": sampling}
    with gpu() as reads:
        pool = BackgroundAwarePooling(min_background=0.1, **settings)
        alone = BackgroundAwarePooling(grid_padding=False, **settings)
        for boxes, labels in both_forms():
            for valid in masks():
                check(reads, alone(features(), boxes, SIZE, valid))
                out = pool(features(), boxes, SIZE, valid)
                loss = box_classification_loss(out, real(7, 3, requires_grad=True), labels)
                check(reads, out, loss)
            check(reads, background_aware_pooling(features(), boxes, SIZE, **settings))


def test_losses():
    with gpu() as reads:
        for scores in (real(BATCH, 7, 4, 5), real(BATCH, 7, *SIZE)):
            scores.requires_grad_()
            y = whole(BATCH, *SIZE)
            for module in (
                NoiseAwareLoss(detach_confidence=True),
                NoiseAwareLoss(balance=0.0, align_corners=True),
                EntropyRegularizationLoss(across_ranks=True),
                BootstrappingLoss(),
            ):
                extra = {"beta": 0.5} if isinstance(module, BootstrappingLoss) else {}
                loss = module(scores, scores, y, y, **extra)
                check(reads, loss)
            check(reads, noise_aware_loss(scores, scores, y, y))
            check(reads, entropy_regularization_loss(scores, y_crf=y, y_ret=y))
            check(reads, bootstrapping_loss(scores, y_crf=y, y_ret=y, beta=0.1))
        check(reads, confidence_map(scores, y))
    assert poly_schedule(1, 2) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_lattice(dtype):
    with gpu() as reads:
        for groups in (None, whole(50)):
            lattice = PermutohedralLattice(real(50, 4, dtype=dtype), groups)
            check(reads, allowed=ALLOWED["lattice"], at_most=2)
            check(reads, lattice.filter(real(50, 3, requires_grad=True)))


def crfs():
    learned = torch.nn.Parameter(real(7))
    terms = [
        PairwiseTerm(learned, 3.0, [1.0, 2.0, 3.0]),
        PairwiseTerm(real(7, 7), 2.0),
        PairwiseTerm(real(1), None, 2.0),
        PairwiseTerm(2.0, 5.0),
    ]
    yield DenseCRF(iterations=1)
    yield DenseCRF(iterations=0)
    yield DenseCRF(bilateral_weight=0, gaussian_weight=0)
    yield DenseCRF(bilateral_weight=real(), half_resolution=True, iterations=1)
    yield DenseCRF(terms=terms, iterations=1)


@pytest.mark.parametrize("batch", [1, 9])
def test_dense_crf(batch):
    """At most two synchronisations per call, whatever the batch."""
    with gpu() as reads:
        image = real(batch, 3, *SIZE, dtype=torch.uint8)
        p = real(batch, 7, *SIZE, requires_grad=True)
        valid = torch.ones(batch, *SIZE, dtype=torch.bool, device="cuda")
        for crf in crfs():
            for mask in (None, valid):
                for counts in (None, [3] * batch, whole(batch)):
                    x = p if counts is None else p.detach()
                    q = crf(image, x, mask, num_classes=counts)
                    check(reads, q, allowed=ALLOWED["dense_crf"], at_most=2)
                    assert q.shape == p.shape
        depth = real(batch, 2, *SIZE)
        q = dense_crf(depth, p, terms=[PairwiseTerm(1.0, 3.0, 2.0)], iterations=1)
        check(reads, q, allowed=ALLOWED["dense_crf"], at_most=2)
        q = dense_crf(image, p, valid, num_classes=whole(batch), iterations=1)
        check(reads, q, allowed=ALLOWED["dense_crf"], at_most=2)


OPTIONS = [
    {},
    PRESETS["paper"],
    PRESETS["released"],
    {"background": "attention", "background_minmax": False, "background_threshold": 0.5},
    {"background": "cam", "foreground": "cam", "cam_normalization": "box"},
    {"attention_reduction": "mean", "align_corners": True, "ignore_index": 7},
    {"overlaps": "equal", "background_prior": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weighted", [True, False])
def test_pseudo_labels(options, weighted):
    """None before the CRF, and the CRF's two."""
    if not weighted and options.get("background") == "cam":
        pytest.skip("there is no such map without weights")
    with gpu() as reads:
        weight = real(21, 3) if weighted else None
        for (boxes, labels), valid in zip(both_forms(), masks(), strict=True):
            arguments = images(), features().detach(), weight, boxes, labels
            y = PseudoLabelGenerator(None, **options)(*arguments, valid)
            check(reads, y)
            crf = DenseCRF(iterations=1)
            y = pseudo_labels(*arguments, crf=crf, valid=valid, **options)
            check(reads, y, allowed=ALLOWED["pseudo_labels"], at_most=2)


def test_a_closed_form_classifier():
    with gpu() as reads:
        for boxes, labels in both_forms():
            for valid in masks():
                arguments = features().detach(), boxes, labels, SIZE
                check(reads, box_targets(*arguments, 7, valid=valid))
                ridge = on_gpu(RidgeBoxClassifier, 3, 7)
                ridge.update(*arguments, valid)
                ridge.add(ridge)
                check(reads, ridge.gram)
                check(reads, ridge_weights(ridge.gram, ridge.moment, 0.1))
                check(reads, ridge.solve(), allowed=ALLOWED["ridge"], at_most=1)


def test_a_feature_head():
    """Not its training, which calls the generator with a callable; that waits, see above."""
    with gpu() as reads:
        head = on_gpu(FeatureHead, 3, 7)
        check(reads, head(features().detach()), head.weight)


def zoomed(n=2, h=12, w=10):
    inside = torch.ones(n, h, w, dtype=torch.bool, device="cuda")
    z, images = real(n, h, w), real(n, 3, h, w, dtype=torch.uint8)
    return ZoomedBoxes(images, real(n, 6, 4, 5), z, z, inside, real(n), z, z, real(n))


def test_zoomed_boxes_and_a_mask_head():
    """Nothing waits from zoomed boxes to marginals and losses, apart from the CRF."""
    with gpu() as reads:
        check(reads, box_log_odds(zoomed()))
        head = on_gpu(MaskHead, 6, 64, 2)
        found = head(zoomed())
        check(reads, found)
        logits = real(2, 28, 28, requires_grad=True)
        valid = torch.ones(2, 28, 28, dtype=torch.bool, device="cuda")
        check(reads, box_mask_loss(logits, real(2, 3, 28, 28), valid))
        q = instance_crf(iterations=1)(real(2, 5, 12, 10), real(2, 2, 12, 10))
        check(reads, q, allowed=ALLOWED["dense_crf"], at_most=2)


def test_every_public_name_is_here():
    files = (Path(__file__).with_name(x) for x in ("test_simulated_gpu.py", "test_host_reads.py"))
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    exempt = {"Attention", "PooledFeatures", "PseudoLabels", "InstanceLabels"}  # results
    missing = [x for x in bapnal.__all__ if x not in exempt and source.count(x) < 2]
    assert missing == []
