"""Operators: nodes that know one torch kernel each, and the rules that combine them."""

from vivit_linop.operators import (
    grams,  # noqa: F401  (registers)
    laws,  # noqa: F401  (registers)
    outlines,  # noqa: F401  (registers)
    rules,  # noqa: F401  (registers)
    verbs,
)
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.damped import (
    Damped,
    DampedDense,
    DampedInverse,
    DiagonallyDamped,
    DiagonalWoodbury,
    WeightedRows,
)
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.elementary import (
    Adjoint,
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
    Sum,
)
from vivit_linop.operators.kronecker import (
    BlockDiagonal,
    CorrectedKronecker,
    KhatriRao,
    Kronecker,
)
from vivit_linop.operators.lowrank import Centered, DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.parts import HStack, Restricted, Rows, hstack, vstack
from vivit_linop.operators.random_projection import RandomProjection
from vivit_linop.operators.sandwich import Sandwich

__all__ = [
    "Adjoint",
    "BlockDiagonal",
    "Centered",
    "CorrectedKronecker",
    "Damped",
    "DampedDense",
    "DampedInverse",
    "DampedRoot",
    "Dense",
    "DenseInverse",
    "Diagonal",
    "DiagonalWoodbury",
    "DiagonallyDamped",
    "Eigenpairs",
    "Gram",
    "HStack",
    "Identity",
    "KhatriRao",
    "Kronecker",
    "LowRank",
    "Product",
    "RandomProjection",
    "Restricted",
    "Rows",
    "Sandwich",
    "Scaled",
    "Sum",
    "TorchLinearOperator",
    "WeightedRows",
    "Woodbury",
    "hstack",
    "verbs",
    "vstack",
]
