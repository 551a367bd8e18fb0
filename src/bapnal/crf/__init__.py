"""Fully connected conditional random field: mean field on the permutohedral lattice."""

from bapnal.crf.lattice import PermutohedralLattice
from bapnal.crf.mean_field import DenseCRF, dense_crf
from bapnal.crf.terms import PairwiseTerm

__all__ = ["DenseCRF", "PairwiseTerm", "PermutohedralLattice", "dense_crf"]
