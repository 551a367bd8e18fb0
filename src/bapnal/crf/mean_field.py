"""Mean field of the fully connected CRF of Krähenbühl and Koltun (2011), over batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bapnal import _checks
from bapnal._math import full_precision, widen
from bapnal.crf.lattice import PermutohedralLattice

BACKENDS = ("torch", "pydensecrf")


def dense_crf(
    images: Tensor,
    probabilities: Tensor,
    valid: Tensor | None = None,
    *,
    bilateral_weight: float = 4.0,
    bilateral_xy: float = 55.0,
    bilateral_rgb: float = 3.0,
    gaussian_weight: float = 3.0,
    gaussian_xy: float = 3.0,
    iterations: int = 10,
    backend: str = "torch",
) -> Tensor:
    r"""Sharpen class probabilities to the edges of their pictures, by a fully connected CRF.

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
        images: RGB, uint8; ``(B, 3, H, W)``.
        probabilities: p, non-negative, summing to 1 over the classes; ``(B, C, H, W)``, C >= 1.
        valid: ``(B, H, W)`` bool, which pixels are picture. Others take no part; they get their
            own clipped probabilities back.
        bilateral_weight: w of the kernel of position and colour.
        bilateral_xy: Its width over positions, in pixels.
        bilateral_rgb: Its width over colours, in grey levels of 0..255.
        gaussian_weight: w of the kernel of position alone.
        gaussian_xy: Its width, in pixels.
        iterations: Mean-field steps; 0 returns the clipped probabilities, normalised.
        backend: ``"torch"``, or ``"pydensecrf"`` for the same through that package.

    Returns:
        Marginals Q, ``(B, C, H, W)``, summing to 1; float32 for half inputs.

    Raises:
        TypeError: If ``images`` is not uint8, ``probabilities`` not floating, or ``valid`` not
            bool.
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
    _check_inputs(images, probabilities, valid)
    kernels = _check_settings(
        bilateral_weight, bilateral_xy, bilateral_rgb, gaussian_weight, gaussian_xy
    )
    _checks.integer("iterations", iterations, minimum=0)
    _checks.choice("backend", backend, BACKENDS)
    run = _torch_picture if backend == "torch" else _pydensecrf_picture
    with full_precision(probabilities):
        clipped = widen(probabilities).clamp(1e-5, 1)
        logits = clipped.log().flatten(2)  # -U, (B, C, H*W)
        marginals = torch.empty_like(logits)
        results = []
        for b in range(logits.shape[0]):
            keep = None if valid is None else valid[b].flatten().nonzero()[:, 0]
            features = _pixel_features(images[b], keep)
            own = logits[b].T if keep is None else logits[b].T[keep]
            q = run(features, own.contiguous(), kernels, iterations)
            if keep is not None:
                q = logits[b].T.softmax(1).index_copy(0, keep, q)
            results.append(q.T)
        marginals = torch.stack(results) if results else logits
        return marginals.reshape(probabilities.shape)


# weight, width over positions, width over colours (None: position alone)
Kernel = tuple[float, float, float | None]


def _pixel_features(image: Tensor, keep: Tensor | None) -> Tensor:
    """Columns x, y, r, g, b of the pixels ``keep``; ``(n, 5)``."""
    _, height, width = image.shape
    y, x = torch.meshgrid(
        torch.arange(height, device=image.device),
        torch.arange(width, device=image.device),
        indexing="ij",
    )
    columns = torch.stack([x, y, *image.unbind(0)], dim=-1).reshape(-1, 5).float()
    return columns if keep is None else columns[keep]


def _scaled(features: Tensor, kernel: Kernel) -> Tensor:
    """The features of one kernel, divided by its widths."""
    _, xy, rgb = kernel
    if rgb is None:
        return features[:, :2] / xy
    return torch.cat([features[:, :2] / xy, features[:, 2:] / rgb], dim=1)


def _torch_picture(
    features: Tensor, logits: Tensor, kernels: list[Kernel], iterations: int
) -> Tensor:
    """Marginals of one picture; features ``(n, 5)``, logits -U and result ``(n, C)``."""
    q = logits.softmax(1)
    if iterations == 0 or features.shape[0] == 0:
        return q
    terms = []
    for kernel in kernels:
        lattice = PermutohedralLattice(_scaled(features, kernel))
        total = lattice.filter(logits.new_ones(logits.shape[0], 1))
        terms.append((kernel[0], lattice, (total + 1e-20).rsqrt()))
    for _ in range(iterations):
        energy = logits
        for weight, lattice, norm in terms:
            energy = energy + weight * norm * lattice.filter(norm * q)
        q = energy.softmax(1)
    return q


def _pydensecrf_picture(
    features: Tensor, logits: Tensor, kernels: list[Kernel], iterations: int
) -> Tensor:
    """The same through pydensecrf, which knows no gradients and only float32 on the CPU."""
    try:
        from pydensecrf.densecrf import DIAG_KERNEL, NORMALIZE_SYMMETRIC, DenseCRF
    except ImportError as error:
        raise ImportError(
            'backend="pydensecrf" needs pydensecrf: pip install "bapnal[crf]"'
        ) from error
    if features.shape[0] == 0:
        return logits
    model = DenseCRF(*logits.shape)
    model.setUnaryEnergy((-logits.detach()).T.contiguous().cpu().float().numpy())
    for kernel in kernels:
        columns = _scaled(features, kernel).T.contiguous().cpu().numpy()
        model.addPairwiseEnergy(
            columns, compat=kernel[0], kernel=DIAG_KERNEL, normalization=NORMALIZE_SYMMETRIC
        )
    marginals = torch.tensor(model.inference(iterations)).reshape(logits.T.shape)
    return marginals.T.to(logits)


def _check_inputs(images: Tensor, probabilities: Tensor, valid: Tensor | None) -> None:
    _checks.floating("probabilities", _checks.shape("probabilities", probabilities, "BCHW"))
    batch, classes, height, width = probabilities.shape
    _checks.shape("images", images, (batch, 3, height, width))
    if images.dtype != torch.uint8:
        raise TypeError(f"images must have dtype torch.uint8, got {images.dtype}")
    _checks.same_device(images=images, probabilities=probabilities)
    if classes == 0 or height == 0 or width == 0:
        raise ValueError(
            "probabilities must have at least one class and one pixel, got "
            f"{_checks.shape_text(probabilities.shape)}"
        )
    if valid is not None:
        _checks.boolean("valid", _checks.shape("valid", valid, (batch, height, width)))
        _checks.same_device(valid=valid, probabilities=probabilities)
    if _checks.readable(probabilities):
        _check_distributions(probabilities.detach(), valid)


def _check_distributions(probabilities: Tensor, valid: Tensor | None) -> None:
    """Each pixel of the picture has non-negative probabilities that sum to 1."""
    half = probabilities.dtype in (torch.float16, torch.bfloat16)
    p = widen(probabilities)
    low, total = p.amin(1), p.sum(1)
    if valid is not None:
        low, total = low[valid], total[valid]
    if total.numel() == 0:
        return
    if not bool((low >= 0).all()):
        raise ValueError(f"probabilities must be >= 0, got {float(low.min())}")
    wrong = (total - 1).abs()
    if not bool((wrong <= (0.02 if half else 1e-3)).all()):
        worst = float(total.flatten()[wrong.argmax()])
        raise ValueError(f"probabilities must sum to 1 over dimension 1, got a sum of {worst}")


def _check_settings(
    bilateral_weight: float,
    bilateral_xy: float,
    bilateral_rgb: float,
    gaussian_weight: float,
    gaussian_xy: float,
) -> list[Kernel]:
    """The two kernels, those of weight 0 left out."""
    kernels: list[Kernel] = [
        (
            _checks.number("gaussian_weight", gaussian_weight),
            _checks.number("gaussian_xy", gaussian_xy, above=0),
            None,
        ),
        (
            _checks.number("bilateral_weight", bilateral_weight),
            _checks.number("bilateral_xy", bilateral_xy, above=0),
            _checks.number("bilateral_rgb", bilateral_rgb, above=0),
        ),
    ]
    return [kernel for kernel in kernels if kernel[0] != 0]


class DenseCRF(nn.Module):
    """Fully connected CRF as a module without parameters; see :func:`dense_crf`.

    Args:
        bilateral_weight: Strength of the kernel of position and colour.
        bilateral_xy: Its width over positions, in pixels.
        bilateral_rgb: Its width over colours, in grey levels of 0..255.
        gaussian_weight: Strength of the kernel of position alone.
        gaussian_xy: Its width, in pixels.
        iterations: Mean-field steps.
        backend: ``"torch"`` or ``"pydensecrf"``.

    Example:
        >>> crf = DenseCRF(bilateral_xy=67, iterations=5)
        >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        >>> crf(images, torch.full((2, 4, 8, 8), 0.25)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        bilateral_weight: float = 4.0,
        bilateral_xy: float = 55.0,
        bilateral_rgb: float = 3.0,
        gaussian_weight: float = 3.0,
        gaussian_xy: float = 3.0,
        iterations: int = 10,
        backend: str = "torch",
    ) -> None:
        super().__init__()
        _check_settings(bilateral_weight, bilateral_xy, bilateral_rgb, gaussian_weight, gaussian_xy)
        self.bilateral_weight = bilateral_weight
        self.bilateral_xy = bilateral_xy
        self.bilateral_rgb = bilateral_rgb
        self.gaussian_weight = gaussian_weight
        self.gaussian_xy = gaussian_xy
        self.iterations = _checks.integer("iterations", iterations, minimum=0)
        self.backend = _checks.choice("backend", backend, BACKENDS)

    def forward(self, images: Tensor, probabilities: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the marginals of ``probabilities`` on ``images``."""
        return dense_crf(
            images,
            probabilities,
            valid,
            bilateral_weight=self.bilateral_weight,
            bilateral_xy=self.bilateral_xy,
            bilateral_rgb=self.bilateral_rgb,
            gaussian_weight=self.gaussian_weight,
            gaussian_xy=self.gaussian_xy,
            iterations=self.iterations,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Name the settings in ``repr``."""
        return (
            f"bilateral_weight={self.bilateral_weight}, bilateral_xy={self.bilateral_xy}, "
            f"bilateral_rgb={self.bilateral_rgb}, gaussian_weight={self.gaussian_weight}, "
            f"gaussian_xy={self.gaussian_xy}, iterations={self.iterations}, "
            f"backend={self.backend!r}"
        )
