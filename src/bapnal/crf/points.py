"""Pixels as points of lattices: positions, guidance, and which image they are in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bapnal.crf.lattice import PermutohedralLattice, build_lattices
from bapnal.crf.terms import PairwiseTerm, point_dtype, term_features

# Lattices over positions alone, by image size: they are the same for all images of one size.
Cache = dict[tuple[object, ...], PermutohedralLattice]
CACHED_SIZES = 4


class Points:
    """The points of images of one size.

    Args:
        guidance: ``(B, G, H, W)``.
        valid: ``(B, H, W)`` bool, which pixels show the image, or None.
        drop: Leave the other pixels out, which takes their number, so that the host has to wait
            for a device; False sets them aside in a group of their own.

    Attributes:
        keep: Which pixels take part, by number, where not all do and the others are left out.
    """

    def __init__(self, guidance: Tensor, valid: Tensor | None, drop: bool) -> None:
        batch, channels, self.height, self.width = guidance.shape
        device, kind = guidance.device, point_dtype(guidance)
        y, x = torch.meshgrid(
            torch.arange(self.height, device=device, dtype=kind),
            torch.arange(self.width, device=device, dtype=kind),
            indexing="ij",
        )
        self.batch, self.all = batch, valid is None
        self.positions = torch.stack([x, y], dim=-1).reshape(-1, 2).repeat(batch, 1)
        rows = self.positions.shape[0]
        self.guidance = guidance.detach().movedim(1, -1).reshape(rows, channels).to(kind)
        pixels = torch.arange(rows, device=device)
        groups = pixels // max(self.height * self.width, 1)
        self.groups: Tensor | None = groups if batch > 1 else None
        self.keep: Tensor | None = None
        if valid is not None and drop:
            self.keep = valid.flatten().nonzero()[:, 0]
            self.positions, self.guidance = self.positions[self.keep], self.guidance[self.keep]
            self.groups = None if self.groups is None else self.groups[self.keep]
        elif valid is not None:
            outside = ~valid.flatten()
            self.positions = self.positions.masked_fill(outside[:, None], 0)
            self.guidance = self.guidance.masked_fill(outside[:, None], 0)
            self.groups = groups.masked_fill(outside, batch)

    def features(self, term: PairwiseTerm) -> Tensor:
        """The points of a term's lattice, ``(n, d)``."""
        return term_features(term, self.positions, self.guidance)

    @torch.no_grad()
    def kernels(
        self,
        terms: Sequence[PairwiseTerm],
        names: Sequence[str],
        dtype: torch.dtype,
        cache: Cache,
        most: Tensor | None = None,
    ) -> tuple[list[PermutohedralLattice], int | None]:
        """The normalised lattices of some terms, from the cache where only positions matter.

        ``most`` is a number on the device that is copied to the host along with them.
        """
        keys = [self._key(term, dtype) for term in terms]
        found = [None if key is None else cache.get(key) for key in keys]
        new = [i for i, lattice in enumerate(found) if lattice is None]
        kernels = {i: lattice for i, lattice in enumerate(found) if lattice is not None}
        also = [] if most is None else [most]
        number = None
        # On a GPU all at once, so that the host waits as rarely as possible; on a CPU one after
        # another, which takes less memory.
        on_cpu = self.positions.device.type == "cpu"
        for part in [[i] for i in new] if on_cpu else [new] if new else []:
            built, numbers = build_lattices(
                [self.features(terms[i]) for i in part],
                self.groups,
                [names[i] for i in part],
                also,
            )
            number = numbers[0][0] if numbers else None
            for i, lattice in zip(part, built, strict=True):
                kernels[i] = lattice.normalized(dtype)
                self._remember(keys[i], kernels[i], cache)
        if most is not None and number is None:
            number = int(most)
        return [kernels[i] for i in range(len(terms))], number

    def _key(self, term: PairwiseTerm, dtype: torch.dtype) -> tuple[object, ...] | None:
        if term.guidance is not None or not self.all:
            return None
        device, kind = self.positions.device, self.positions.dtype
        return (self.batch, self.height, self.width, term.xy, device, kind, dtype)

    @staticmethod
    def _remember(
        key: tuple[object, ...] | None, lattice: PermutohedralLattice, cache: Cache
    ) -> None:
        if key is None:
            return
        for oldest in list(cache)[: max(len(cache) + 1 - CACHED_SIZES, 0)]:
            cache.pop(oldest, None)
        cache[key] = lattice
