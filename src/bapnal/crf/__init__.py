"""Fully connected conditional random field: mean field on the permutohedral lattice."""

from bapnal.crf.lattice import PermutohedralLattice
from bapnal.crf.mean_field import DenseCRF, dense_crf

__all__ = ["DenseCRF", "PermutohedralLattice", "dense_crf"]
