"""Mean field of the fully connected CRF of Krähenbühl and Koltun (2011), over batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bapnal import _checks
from bapnal._math import full_precision, widen
from bapnal.crf.half_resolution import finish, halved
from bapnal.crf.lattice import Memory, PermutohedralLattice
from bapnal.crf.pydensecrf_backend import pydensecrf_marginals
from bapnal.crf.terms import (
    PairwiseTerm,
    check_term,
    check_term_fits,
    message,
    normalized,
    term_features,
    weight_of_classes,
)

BACKENDS = ("torch", "pydensecrf")
# Lattices over positions alone, by image size: they are the same for all images of one size.
Cache = dict[tuple[object, ...], PermutohedralLattice]
CACHED_SIZES = 4


def dense_crf(
    images: Tensor,
    probabilities: Tensor,
    valid: Tensor | None = None,
    *,
    bilateral_weight: float | Tensor = 4.0,
    bilateral_xy: float = 55.0,
    bilateral_rgb: float = 3.0,
    gaussian_weight: float | Tensor = 3.0,
    gaussian_xy: float = 3.0,
    iterations: int = 10,
    backend: str = "torch",
    terms: Sequence[PairwiseTerm] | None = None,
    classes: Sequence[int] | Tensor | None = None,
    half_resolution: bool = False,
) -> Tensor:
    r"""Sharpen class probabilities to the edges of their images, by a fully connected CRF.

    With positions :math:`x_i` and colours :math:`c_i` the two kernels are

    .. math::
        k_1(i, j) = \exp\left(-\frac{\lVert x_i - x_j \rVert^2}{2 \theta_{xy}^2}
            - \frac{\lVert c_i - c_j \rVert^2}{2 \theta_{rgb}^2}\right), \qquad
        k_2(i, j) = \exp\left(-\frac{\lVert x_i - x_j \rVert^2}{2 \theta_g^2}\right),

    each normalised on both sides, :math:`\tilde k(i, j) = k(i, j) / \sqrt{Z_i Z_j}` with
    :math:`Z_i = \sum_j k(i, j)`. With unaries :math:`U = -\log \mathrm{clip}(p, 10^{-5}, 1)` and
    Potts compatibilities, mean field starts from :math:`Q = \mathrm{softmax}(-U)` and repeats

    .. math::
        Q_i(l) \propto \exp\left(-U_i(l) + \sum_m w_m \sum_j \tilde k_m(i, j) Q_j(l)\right)

    (Krähenbühl and Koltun 2011, algorithm 1; the message of a pixel to itself is kept). The sums
    over all pixels are those of :class:`bapnal.crf.PermutohedralLattice`. All this is what
    pydensecrf's ``DenseCRF2D`` computes.

    Args:
        images: RGB, uint8; ``(B, 3, H, W)``. With ``terms``, any guidance, uint8 or floating;
            ``(B, G, H, W)``. It gets no gradient.
        probabilities: p, non-negative, summing to 1 over the classes; ``(B, C, H, W)``, C >= 1.
        valid: ``(B, H, W)`` bool, which pixels show the image. Others take no part; they get their
            own clipped probabilities back, normalised.
        bilateral_weight: w of the kernel of position and colour; see :class:`PairwiseTerm` for
            tensors.
        bilateral_xy: Its width over positions, in pixels.
        bilateral_rgb: Its width over colours, in grey levels of 0..255.
        gaussian_weight: w of the kernel of position alone.
        gaussian_xy: Its width, in pixels.
        iterations: Mean-field steps; 0 returns the clipped probabilities, normalised.
        backend: ``"torch"``, or ``"pydensecrf"`` for the same through that package, in float32
            on the CPU and without gradients.
        terms: Pairwise terms in place of the two above, whose five settings then do not count.
        classes: How many classes each image has, where they differ; ``(B,)``, each 1..C.
            Channels from there on take no part, and are 0 in the result.
        half_resolution: Fast and approximate: mean field on every second row and column, whose
            messages are interpolated; each pixel keeps its own unaries.

    Returns:
        Marginals Q, ``(B, C, H, W)``, summing to 1, differentiable in the probabilities and in
        weights that are tensors; float32 for half inputs.

    Raises:
        TypeError: If ``images`` is not uint8 (or floating, with ``terms``), ``probabilities`` not
            floating, ``valid`` not bool, or a setting not of its type.
        ValueError: If a shape or a setting does not fit, probabilities are negative, NaN or do not
            sum to 1 (on the CPU), or tensors lie on different devices.
        ImportError: If ``backend="pydensecrf"`` and pydensecrf is not installed.

    Example:
        >>> image = torch.zeros(1, 3, 2, 4, dtype=torch.uint8)
        >>> image[..., 2:] = 255  # two black columns, two white ones
        >>> p = torch.tensor([0.9, 0.9, 0.4, 0.1]).expand(1, 1, 2, 4)
        >>> dense_crf(image, torch.cat([p, 1 - p], 1), gaussian_weight=0)[0, 0, 0].round()
        tensor([1., 1., 0., 0.])
    """
    if terms is None:
        terms = common_terms(
            bilateral_weight, bilateral_xy, bilateral_rgb, gaussian_weight, gaussian_xy
        )
        _check_rgb(images)
    _check_settings(terms, iterations, backend)
    settings = _Settings(terms, iterations, backend, half_resolution)
    return _dense_crf(images, probabilities, valid, classes, settings, {})


def common_terms(
    bilateral_weight: float | Tensor,
    bilateral_xy: float,
    bilateral_rgb: float,
    gaussian_weight: float | Tensor,
    gaussian_xy: float,
) -> list[PairwiseTerm]:
    """The two terms that everybody uses, with errors that name their five settings."""
    for name, width in (
        ("bilateral_xy", bilateral_xy),
        ("bilateral_rgb", bilateral_rgb),
        ("gaussian_xy", gaussian_xy),
    ):
        _checks.number(name, width, above=0)
    for name, weight in (
        ("bilateral_weight", bilateral_weight),
        ("gaussian_weight", gaussian_weight),
    ):
        if not isinstance(weight, Tensor):
            _checks.number(name, weight)
    return [
        PairwiseTerm(gaussian_weight, gaussian_xy),
        PairwiseTerm(bilateral_weight, bilateral_xy, bilateral_rgb),
    ]


class _Settings(NamedTuple):
    """Settings after their check."""

    terms: Sequence[PairwiseTerm]
    iterations: int
    backend: str
    half_resolution: bool


def _dense_crf(
    images: Tensor,
    probabilities: Tensor,
    valid: Tensor | None,
    classes: Sequence[int] | Tensor | None,
    settings: _Settings,
    cache: Cache,
) -> Tensor:
    """:func:`dense_crf` after its settings are checked, with lattices remembered in ``cache``."""
    _check_inputs(images, probabilities, valid)
    batch, channels = probabilities.shape[:2]
    for i, term in enumerate(settings.terms):
        check_term_fits(f"terms[{i}]", term, images.shape[1], channels)
    counts = _check_counts(classes, batch, channels)
    with full_precision(probabilities):
        p = widen(probabilities)
        if counts is not None:
            there = torch.arange(channels) < torch.tensor(counts).view(batch, 1)
            absent = ~there.to(p.device)[..., None, None]
            p = p.masked_fill(absent, 0)
        if _checks.readable(p):
            _check_distributions(p.detach(), valid, probabilities.dtype)
        logits = p.clamp(1e-5, 1).log()  # -U
        if counts is not None:
            logits = logits.masked_fill(absent, -torch.inf)
        # A GPU wants the whole batch at once, a CPU one image after the other in its caches.
        size = batch if settings.backend == "torch" and logits.device.type != "cpu" else 1
        results = []
        for start in range(0, batch, max(size, 1)):
            part = slice(start, start + size)
            most = channels if counts is None else max(counts[part])
            mask = None if valid is None else valid[part]
            q = _same_class_count(images[part], logits[part, :most], mask, settings, cache)
            results.append(nn.functional.pad(q, (0, 0, 0, 0, 0, channels - most)))
        return torch.cat(results).contiguous() if results else p


def _same_class_count(
    images: Tensor, logits: Tensor, valid: Tensor | None, settings: _Settings, cache: Cache
) -> Tensor:
    """Marginals of images side by side; logits -U and result ``(b, C, H, W)``."""
    terms = [
        x._replace(weight=weight_of_classes(x.weight, logits.shape[1]))
        for x in settings.terms
        if isinstance(x.weight, Tensor) or x.weight != 0
    ]
    settings = settings._replace(terms=terms)
    if not settings.half_resolution:
        return _marginals(images, logits, valid, settings, cache)
    settings = settings._replace(terms=halved(terms))
    small = logits[..., ::2, ::2]
    mask = None if valid is None else valid[:, ::2, ::2]
    q = _marginals(images[..., ::2, ::2], small, mask, settings, cache)
    return finish(logits, small, q, valid)


def _marginals(
    guidance: Tensor, logits: Tensor, valid: Tensor | None, settings: _Settings, cache: Cache
) -> Tensor:
    """The same at the resolution of its arguments."""
    batch, classes, height, width = logits.shape
    rows = logits.movedim(1, -1).reshape(batch * height * width, classes).contiguous()
    keep = None if valid is None else valid.flatten().nonzero()[:, 0]
    own = rows if keep is None else rows[keep]
    pixels = _Points(guidance, keep)
    if settings.backend == "pydensecrf":
        points = [pixels.features(term) for term in settings.terms]
        q = pydensecrf_marginals(settings.terms, points, own, settings.iterations)
    elif settings.iterations == 0 or own.shape[0] == 0:
        q = short_softmax(own)
    else:
        kernels = [(x.weight, pixels.kernel(x, own.dtype, cache)) for x in settings.terms]
        q = _iterate(own, kernels, settings.iterations)
    if keep is not None:
        q = short_softmax(rows).index_copy(0, keep, q)
    return q.view(batch, height, width, classes).movedim(-1, 1)


def _iterate(
    logits: Tensor,
    kernels: Sequence[tuple[float | Tensor, PermutohedralLattice]],
    iterations: int,
) -> Tensor:
    """The mean-field steps; logits -U and result ``(n, C)``.

    Without gradients each step writes over what the last one left: see :class:`Memory`.
    """
    weights = [weight for weight, _ in kernels if isinstance(weight, Tensor)]
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (logits, *weights))
    memories = [None if graph else Memory() for _ in kernels]
    q = short_softmax(logits)
    for _ in range(iterations):
        energy = logits
        for (weight, kernel), memory in zip(kernels, memories, strict=True):
            filtered = kernel.apply(q, memory)
            if isinstance(weight, Tensor):
                energy = energy + message(weight, filtered)
            elif graph:
                energy = torch.add(energy, filtered, alpha=weight)
            else:
                energy = torch.add(energy, filtered, alpha=weight, out=filtered)
        q = short_softmax(energy, None if graph else q)
    return q


def short_softmax(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Softmax over the rows of ``(n, C)``, to ``out``; for few classes on the CPU much faster.

    There the sum is a matrix product, and nothing is subtracted unless exp could overflow.
    """
    if x.device.type != "cpu" or x.shape[1] >= 16 or x.numel() == 0:
        return torch.softmax(x, 1, out=out)
    least, most = torch.aminmax(x.detach())
    if float(least) < -60 or not float(most) < 60:
        return torch.softmax(x, 1, out=out)
    p = torch.exp(x, out=out)
    total = p @ p.new_ones(x.shape[1], 1)
    return p / total if p.requires_grad else p.div_(total)


class _Points:
    """The points of images of one size: positions, guidance, and which image they are in."""

    def __init__(self, guidance: Tensor, keep: Tensor | None) -> None:
        batch, channels, self.height, self.width = guidance.shape
        device = guidance.device
        kind = torch.float64 if guidance.dtype == torch.float64 else torch.float32
        y, x = torch.meshgrid(
            torch.arange(self.height, device=device, dtype=kind),
            torch.arange(self.width, device=device, dtype=kind),
            indexing="ij",
        )
        self.batch, self.keep = batch, keep
        self.positions = torch.stack([x, y], dim=-1).reshape(-1, 2).repeat(batch, 1)
        rows = self.positions.shape[0]
        self.guidance = guidance.detach().movedim(1, -1).reshape(rows, channels).to(kind)
        self.groups: Tensor | None = None
        if batch > 1:
            pixels = self.height * self.width
            self.groups = torch.arange(batch, device=device).repeat_interleave(pixels)
        if keep is not None:
            self.positions, self.guidance = self.positions[keep], self.guidance[keep]
            self.groups = None if self.groups is None else self.groups[keep]

    def features(self, term: PairwiseTerm) -> Tensor:
        """The points of a term's lattice, ``(n, d)``."""
        return term_features(term, self.positions, self.guidance)

    @torch.no_grad()
    def kernel(self, term: PairwiseTerm, dtype: torch.dtype, cache: Cache) -> PermutohedralLattice:
        """The normalised lattice of a term, from the cache where only positions matter."""
        if term.guidance is not None or self.keep is not None:
            return normalized(PermutohedralLattice(self.features(term), self.groups), dtype)
        device, kind = self.positions.device, self.positions.dtype
        key = (self.batch, self.height, self.width, term.xy, device, kind, dtype)
        known = cache.get(key)
        if known is None:
            known = normalized(PermutohedralLattice(self.features(term), self.groups), dtype)
            for oldest in list(cache)[: max(len(cache) + 1 - CACHED_SIZES, 0)]:
                cache.pop(oldest, None)
            cache[key] = known
        return known


def _check_rgb(images: Tensor) -> None:
    _checks.shape("images", images, ("B", 3, "H", "W"))
    if images.dtype != torch.uint8:
        raise TypeError(f"images must have dtype torch.uint8, got {images.dtype}")


def _check_settings(terms: Sequence[PairwiseTerm], iterations: int, backend: str) -> None:
    for i, term in enumerate(terms):
        check_term(f"terms[{i}]", term)
    _checks.integer("iterations", iterations, minimum=0)
    _checks.choice("backend", backend, BACKENDS)


def _check_inputs(images: Tensor, probabilities: Tensor, valid: Tensor | None) -> None:
    _checks.floating("probabilities", _checks.shape("probabilities", probabilities, "BCHW"))
    batch, classes, height, width = probabilities.shape
    _checks.shape("images", images, (batch, "G", height, width))
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must have dtype torch.uint8 or floating, got {images.dtype}")
    _checks.same_device(images=images, probabilities=probabilities)
    if classes == 0 or height == 0 or width == 0:
        raise ValueError(
            "probabilities must have at least one class and one pixel, got "
            f"{_checks.shape_text(probabilities.shape)}"
        )
    if valid is not None:
        _checks.boolean("valid", _checks.shape("valid", valid, (batch, height, width)))
        _checks.same_device(valid=valid, probabilities=probabilities)
    if images.is_floating_point() and _checks.readable(images):
        inside = images if valid is None else images.movedim(1, -1)[valid]
        if not bool(torch.isfinite(inside).all()):
            raise ValueError("images must be finite, got NaN or infinity")


def _check_counts(
    classes: Sequence[int] | Tensor | None, batch: int, channels: int
) -> list[int] | None:
    """The number of classes of each image as a list."""
    if classes is None:
        return None
    if isinstance(classes, Tensor):
        classes = _checks.integral("classes", classes).tolist()
    if not isinstance(classes, Sequence) or len(classes) != batch:
        raise ValueError(f"classes must have one number for each of {batch} images, got {classes}")
    counts = [_checks.integer(f"classes[{b}]", x, minimum=1) for b, x in enumerate(classes)]
    if counts and max(counts) > channels:
        raise ValueError(f"classes must be <= {channels} channels, got {max(counts)}")
    return counts


def _check_distributions(p: Tensor, valid: Tensor | None, dtype: torch.dtype) -> None:
    """Each pixel of the image has non-negative probabilities that sum to 1."""
    low, total = p.amin(1), p.sum(1)
    if valid is not None:
        low, total = low[valid], total[valid]
    if total.numel() == 0:
        return
    if not bool((low >= 0).all()):
        raise ValueError(f"probabilities must be >= 0, got {float(low.min())}")
    wrong = (total - 1).abs()
    if not bool((wrong <= (0.02 if dtype in (torch.float16, torch.bfloat16) else 1e-3)).all()):
        worst = float(total.flatten()[wrong.argmax()])
        raise ValueError(f"probabilities must sum to 1 over dimension 1, got a sum of {worst}")


class DenseCRF(nn.Module):
    """Fully connected CRF as a module; see :func:`dense_crf`.

    It has no parameters, unless weights are given as ``nn.Parameter``. It remembers the lattices
    over positions alone for the last few image sizes, which no result depends on. On a GPU sums
    are taken in no fixed order, unless ``torch.use_deterministic_algorithms(True)`` asks for one.

    Args:
        bilateral_weight: Strength of the kernel of position and colour.
        bilateral_xy: Its width over positions, in pixels.
        bilateral_rgb: Its width over colours, in grey levels of 0..255.
        gaussian_weight: Strength of the kernel of position alone.
        gaussian_xy: Its width, in pixels.
        iterations: Mean-field steps.
        backend: ``"torch"`` or ``"pydensecrf"``.
        terms: Pairwise terms in place of these two.
        half_resolution: Fast and approximate.

    Example:
        >>> crf = DenseCRF(bilateral_xy=67, iterations=5)
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> crf(images, torch.full((2, 4, 8, 8), 0.25)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        bilateral_weight: float | Tensor = 4.0,
        bilateral_xy: float = 55.0,
        bilateral_rgb: float = 3.0,
        gaussian_weight: float | Tensor = 3.0,
        gaussian_xy: float = 3.0,
        iterations: int = 10,
        backend: str = "torch",
        *,
        terms: Sequence[PairwiseTerm] | None = None,
        half_resolution: bool = False,
    ) -> None:
        super().__init__()
        self.bilateral_weight = bilateral_weight
        self.bilateral_xy = bilateral_xy
        self.bilateral_rgb = bilateral_rgb
        self.gaussian_weight = gaussian_weight
        self.gaussian_xy = gaussian_xy
        self.iterations = iterations
        self.backend = backend
        self.terms = terms
        self.half_resolution = half_resolution
        self._cache: Cache = {}
        _check_settings(self._terms(), iterations, backend)

    def _terms(self) -> Sequence[PairwiseTerm]:
        if self.terms is not None:
            return self.terms
        return common_terms(
            self.bilateral_weight,
            self.bilateral_xy,
            self.bilateral_rgb,
            self.gaussian_weight,
            self.gaussian_xy,
        )

    def forward(
        self,
        images: Tensor,
        probabilities: Tensor,
        valid: Tensor | None = None,
        *,
        classes: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Return the marginals of ``probabilities`` on ``images``."""
        if self.terms is None:
            _check_rgb(images)
        settings = _Settings(self._terms(), self.iterations, self.backend, self.half_resolution)
        return _dense_crf(images, probabilities, valid, classes, settings, self._cache)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the remembered lattices out of pickles and copies."""
        return {**self.__dict__, "_cache": {}}

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        pairwise = (
            f"terms={list(self.terms)}"
            if self.terms is not None
            else f"bilateral_weight={self.bilateral_weight}, bilateral_xy={self.bilateral_xy}, "
            f"bilateral_rgb={self.bilateral_rgb}, gaussian_weight={self.gaussian_weight}, "
            f"gaussian_xy={self.gaussian_xy}"
        )
        fast = ", half_resolution=True" if self.half_resolution else ""
        return f"{pairwise}, iterations={self.iterations}, backend={self.backend!r}{fast}"
