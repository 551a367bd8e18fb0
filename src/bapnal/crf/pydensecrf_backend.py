"""The same mean field through pydensecrf, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bapnal.crf.terms import PairwiseTerm


def pydensecrf_marginals(
    terms: Sequence[PairwiseTerm], points: Sequence[Tensor], logits: Tensor, iterations: int
) -> Tensor:
    """Marginals ``(n, C)`` of one image by pydensecrf: float32, on the CPU, without gradients.

    Args:
        terms: The pairwise terms.
        points: The features of each term, ``(n, d)``.
        logits: -U; ``(n, C)``.
        iterations: Mean-field steps.

    Raises:
        ImportError: If pydensecrf is not installed.
    """
    try:
        from pydensecrf.densecrf import DIAG_KERNEL, NORMALIZE_SYMMETRIC, DenseCRF
    except ImportError as error:
        raise ImportError(
            'backend="pydensecrf" needs pydensecrf: pip install "bapnal[crf]"'
        ) from error
    if logits.shape[0] == 0:
        return logits.detach()
    model = DenseCRF(*logits.shape)
    model.setUnaryEnergy((-logits.detach()).T.contiguous().cpu().float().numpy())
    for term, features in zip(terms, points, strict=True):
        compatibility: Any = term.weight
        if isinstance(term.weight, Tensor) and term.weight.dim() == 0:
            compatibility = float(term.weight)
        elif isinstance(term.weight, Tensor):
            compatibility = term.weight.detach().cpu().float().contiguous().numpy()
            if compatibility.ndim == 1:
                compatibility = -compatibility  # pydensecrf takes a penalty here
        model.addPairwiseEnergy(
            features.T.contiguous().cpu().float().numpy(),
            compat=compatibility,
            kernel=DIAG_KERNEL,
            normalization=NORMALIZE_SYMMETRIC,
        )
    marginals = torch.from_numpy(np.array(model.inference(iterations))).reshape(logits.T.shape)
    return marginals.T.to(logits)
