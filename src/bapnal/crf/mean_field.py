"""Mean field of the fully connected CRF of Krähenbühl and Koltun (2011), over batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bapnal import _checks
from bapnal._math import full_precision, widen
from bapnal.crf.checks import (
    check_counts,
    check_distributions,
    check_guidance,
    check_inputs,
    check_rgb,
)
from bapnal.crf.filtering import Workspace
from bapnal.crf.half_resolution import finish, halved
from bapnal.crf.lattice import PermutohedralLattice
from bapnal.crf.points import Cache, Points
from bapnal.crf.pydensecrf_backend import pydensecrf_marginals
from bapnal.crf.terms import (
    PairwiseTerm,
    TermNames,
    check_term,
    check_term_fits,
    message,
    names_of,
    weight_of_classes,
)

BACKENDS = ("torch", "pydensecrf")


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
    num_classes: Sequence[int] | Tensor | None = None,
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
        num_classes: How many classes each image has, where they differ; ``(B,)``, each 1..C.
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
    common = terms is None
    if terms is None:
        terms = common_terms(
            bilateral_weight, bilateral_xy, bilateral_rgb, gaussian_weight, gaussian_xy
        )
        check_rgb(images)
    settings = checked_settings(terms, common, iterations, backend, half_resolution)
    return _dense_crf(images, probabilities, valid, num_classes, settings, {})


def common_terms(
    bilateral_weight: float | Tensor,
    bilateral_xy: float,
    bilateral_rgb: float,
    gaussian_weight: float | Tensor,
    gaussian_xy: float,
) -> list[PairwiseTerm]:
    """The two usual terms; :func:`names_of` knows their five settings."""
    return [
        PairwiseTerm(gaussian_weight, gaussian_xy),
        PairwiseTerm(bilateral_weight, bilateral_xy, bilateral_rgb),
    ]


class Settings(NamedTuple):
    """Settings after their check."""

    terms: Sequence[PairwiseTerm]
    names: Sequence[TermNames]
    iterations: int
    backend: str
    half_resolution: bool


def checked_settings(
    terms: Sequence[PairwiseTerm],
    common: bool,
    iterations: int,
    backend: str,
    half_resolution: bool,
) -> Settings:
    """Check what can be checked without an image."""
    if not isinstance(terms, Sequence):
        raise TypeError(f"terms must be a list of PairwiseTerm, got {type(terms).__name__}")
    names = [names_of(i, common) for i in range(len(terms))]
    for name, term in zip(names, terms, strict=True):
        check_term(name, term)
    _checks.integer("iterations", iterations, minimum=0)
    _checks.choice("backend", backend, BACKENDS)
    _checks.flag("half_resolution", half_resolution)
    return Settings(terms, names, iterations, backend, half_resolution)


def _dense_crf(
    images: Tensor,
    probabilities: Tensor,
    valid: Tensor | None,
    num_classes: Sequence[int] | Tensor | None,
    settings: Settings,
    cache: Cache,
) -> Tensor:
    """:func:`dense_crf` after its settings are checked, with lattices cached in ``cache``."""
    check_inputs(images, probabilities, valid)
    batch, channels = probabilities.shape[:2]
    for names, term in zip(settings.names, settings.terms, strict=True):
        check_term_fits(names, term, images, channels)
        if not _checks.readable(probabilities):
            continue
        check_guidance(names, term, images, valid)
    counts = check_counts(num_classes, batch, channels, probabilities.device)
    with full_precision(probabilities):
        p = widen(probabilities)
        if counts is not None:
            there = torch.arange(channels, device=p.device) < counts.on_device[:, None]
            absent = ~there[..., None, None]
            p = p.masked_fill(absent, 0)
        if _checks.readable(p):
            check_distributions(p.detach(), valid, probabilities.dtype)
        logits = p.clamp(1e-5, 1).log()  # -U
        if counts is not None:
            logits = logits.masked_fill(absent, -torch.inf)
        if settings.backend == "torch" and logits.device.type != "cpu":
            most = None if counts is None else counts.on_device.amax() if batch else None
            return side_by_side(images, logits, valid, settings, cache, most).contiguous()
        results = []
        for b in range(batch):
            part = slice(b, b + 1)
            own = channels if counts is None else counts.on_host()[b]
            mask = None if valid is None else valid[part]
            q = side_by_side(images[part], logits[part, :own], mask, settings, cache, drop=True)
            results.append(nn.functional.pad(q, (0, 0, 0, 0, 0, channels - own)))
        return torch.cat(results).contiguous() if results else p


def side_by_side(
    images: Tensor,
    logits: Tensor,
    valid: Tensor | None,
    settings: Settings,
    cache: Cache,
    most: Tensor | None = None,
    *,
    drop: bool = False,
) -> Tensor:
    """Marginals of a whole batch in one lattice, for a GPU; a CPU takes each image alone.

    Args:
        images: ``(b, G, H, W)``.
        logits: -U, minus infinity for classes that an image does not have; ``(b, C, H, W)``.
        valid: ``(b, H, W)`` bool, or None.
        settings: Terms of weight 0 are left out.
        cache: Lattices over positions alone.
        most: Largest number of classes of an image; a tensor of one. None: C.
        drop: See :class:`~bapnal.crf.points.Points`.
    """
    there = [isinstance(x.weight, Tensor) or x.weight != 0 for x in settings.terms]
    settings = settings._replace(
        terms=[x for x, kept in zip(settings.terms, there, strict=True) if kept],
        names=[x for x, kept in zip(settings.names, there, strict=True) if kept],
    )
    if not settings.half_resolution:
        return _marginals(images, logits, valid, settings, cache, most, drop)
    settings = settings._replace(terms=halved(settings.terms))
    small = logits[..., ::2, ::2]
    mask = None if valid is None else valid[:, ::2, ::2]
    q = _marginals(images[..., ::2, ::2], small, mask, settings, cache, most, drop)
    return finish(logits, small, q, valid)


def _marginals(
    guidance: Tensor,
    logits: Tensor,
    valid: Tensor | None,
    settings: Settings,
    cache: Cache,
    most: Tensor | None,
    drop: bool,
) -> Tensor:
    """The same at the resolution of its arguments."""
    batch, classes, height, width = logits.shape
    rows = logits.movedim(1, -1).reshape(batch * height * width, classes).contiguous()
    pixels = Points(guidance, valid, drop)
    own = rows if pixels.keep is None else rows[pixels.keep]
    if settings.backend == "pydensecrf":
        points = [pixels.features(term) for term in settings.terms]
        q = pydensecrf_marginals(settings.terms, points, own, settings.iterations)
    elif settings.iterations == 0 or own.shape[0] == 0 or not settings.terms:
        q = short_softmax(own)
    else:
        names = [x.term for x in settings.names]
        kernels, count = pixels.kernels(settings.terms, names, own.dtype, cache, most)
        count = classes if count is None else count
        weights = [weight_of_classes(x.weight, count) for x in settings.terms]
        own = own[:, :count].contiguous()
        q = _iterate(own, list(zip(weights, kernels, strict=True)), settings.iterations)
        q = nn.functional.pad(q, (0, classes - count))
    if pixels.keep is not None:
        q = short_softmax(rows).index_copy(0, pixels.keep, q)
    elif valid is not None:
        q = torch.where(valid.flatten()[:, None], q, short_softmax(rows))
    return q.view(batch, height, width, classes).movedim(-1, 1)


def _iterate(
    logits: Tensor,
    kernels: Sequence[tuple[float | Tensor, PermutohedralLattice]],
    iterations: int,
) -> Tensor:
    """The mean-field steps; logits -U and result ``(n, C)``.

    Without gradients each step reuses the memory of the last one: see :class:`Workspace`.
    """
    graph = _differentiated(logits, *(w for w, _ in kernels if isinstance(w, Tensor)))
    spaces = [None if graph else Workspace() for _ in kernels]
    q = short_softmax(logits)
    for _ in range(iterations):
        energy = logits
        for (weight, kernel), space in zip(kernels, spaces, strict=True):
            filtered = kernel.apply(q, space)
            if isinstance(weight, Tensor):
                energy = energy + message(weight, filtered)
            elif graph:
                energy = torch.add(energy, filtered, alpha=weight)
            else:
                energy = torch.add(energy, filtered, alpha=weight, out=filtered)
        q = short_softmax(energy, None if graph else q)
    return q


def _differentiated(*tensors: Tensor) -> bool:
    """Whether anything may differentiate or map these tensors: autograd, a tangent, a transform."""
    return any(
        (x.requires_grad and torch.is_grad_enabled())
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        for x in tensors
    )


def short_softmax(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Softmax over the rows of ``(n, C)``, to ``out``; for few classes on the CPU much faster.

    There the sum is a matrix product, and nothing is subtracted unless exp could overflow.
    """
    if not _checks.readable(x) or x.shape[1] >= 16 or x.numel() == 0:
        return torch.softmax(x, 1, out=out) if out is not None else torch.softmax(x, 1)
    least, most = torch.aminmax(x.detach())
    if float(least) < -60 or not float(most) < 60:
        return torch.softmax(x, 1, out=out) if out is not None else torch.softmax(x, 1)
    p = torch.exp(x, out=out) if out is not None else torch.exp(x)
    total = p @ p.new_ones(x.shape[1], 1)
    return p.div_(total) if out is not None else p / total


class DenseCRF(nn.Module):
    """Fully connected CRF as a module; see :func:`dense_crf`.

    It has no parameters, unless weights are given as ``nn.Parameter``, also in ``terms``; weights
    that are other tensors move with the module. It caches the lattices over positions alone for the
    last few image sizes, which changes no result. On a GPU sums are taken in no fixed order, unless
    ``torch.use_deterministic_algorithms(True)`` is set.

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

    bilateral_weight: float | Tensor
    gaussian_weight: float | Tensor

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
        self.bilateral_xy = bilateral_xy
        self.bilateral_rgb = bilateral_rgb
        self.gaussian_xy = gaussian_xy
        self.iterations = iterations
        self.backend = backend
        self.half_resolution = half_resolution
        self._cache: Cache = {}
        common = common_terms(
            bilateral_weight, bilateral_xy, bilateral_rgb, gaussian_weight, gaussian_xy
        )
        chosen = common if terms is None else terms
        checked_settings(chosen, terms is None, iterations, backend, half_resolution)
        self._set("bilateral_weight", bilateral_weight)
        self._set("gaussian_weight", gaussian_weight)
        self._terms = None if terms is None else [x._replace(weight=0.0) for x in terms]
        for i, term in enumerate(terms or []):
            self._set(f"terms_{i}_weight", term.weight)

    def _set(self, name: str, weight: float | Tensor) -> None:
        """Keep a weight; a tensor moves with the module, a parameter is learned and saved too."""
        if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
            self.register_buffer(name, weight, persistent=False)
        else:
            setattr(self, name, weight)

    @property
    def terms(self) -> list[PairwiseTerm] | None:
        """The pairwise terms, where they are not the two common ones."""
        if self._terms is None:
            return None
        return [
            x._replace(weight=getattr(self, f"terms_{i}_weight")) for i, x in enumerate(self._terms)
        ]

    def _settings(self) -> Settings:
        terms = self.terms
        chosen = terms
        if chosen is None:
            chosen = common_terms(
                self.bilateral_weight,
                self.bilateral_xy,
                self.bilateral_rgb,
                self.gaussian_weight,
                self.gaussian_xy,
            )
        return checked_settings(
            chosen, terms is None, self.iterations, self.backend, self.half_resolution
        )

    def forward(
        self,
        images: Tensor,
        probabilities: Tensor,
        valid: Tensor | None = None,
        *,
        num_classes: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Return the marginals of ``probabilities`` on ``images``."""
        settings = self._settings()
        if self._terms is None:
            check_rgb(images)
        return _dense_crf(images, probabilities, valid, num_classes, settings, self._cache)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cached lattices out of pickles and copies."""
        return {**self.__dict__, "_cache": {}}

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        pairwise = (
            f"terms={self.terms}"
            if self.terms is not None
            else f"bilateral_weight={self.bilateral_weight}, bilateral_xy={self.bilateral_xy}, "
            f"bilateral_rgb={self.bilateral_rgb}, gaussian_weight={self.gaussian_weight}, "
            f"gaussian_xy={self.gaussian_xy}"
        )
        return (
            f"{pairwise}, iterations={self.iterations}, backend={self.backend!r}, "
            f"half_resolution={self.half_resolution}"
        )
