"""The verbs: functions that dispatch on the type of a node, open for registration.

>>> import torch, vivit_linop as vl
>>> vl.linalg.logdet(2 * vl.Identity(3))
tensor(2.0794, dtype=torch.float64)
"""

from vivit_linop.linalg import (  # noqa: F401  (register)
    diagonal_damping,
    eigen,
    explanations,
    inverse,
    iterative,
    logdets,
    reductions,
    restrictions,
    roots,
    sandwiches,
    traces,
    tracking,
)
from vivit_linop.linalg.estimates import (
    DiagonalEstimate,
    TraceEstimate,
    estimate_diagonal,
    estimate_trace,
)
from vivit_linop.linalg.iterative import IterativeInverse
from vivit_linop.linalg.leading import led
from vivit_linop.operators.eigenpairs import Eigendecomposition, Eigenpairs
from vivit_linop.operators.verbs import (
    column_norms_squared,
    diagonal,
    diagonal_blocks,
    eigendecomposition,
    eigh,
    eigvalsh,
    inv,
    logdet,
    pinv,
    restrict,
    row_norms_squared,
    sample,
    sqrt,
    to_dense,
    trace,
)

__all__ = [
    "DiagonalEstimate",
    "Eigendecomposition",
    "Eigenpairs",
    "IterativeInverse",
    "TraceEstimate",
    "column_norms_squared",
    "diagonal",
    "diagonal_blocks",
    "eigendecomposition",
    "eigh",
    "eigvalsh",
    "estimate_diagonal",
    "estimate_trace",
    "inv",
    "led",
    "logdet",
    "pinv",
    "restrict",
    "row_norms_squared",
    "sample",
    "sqrt",
    "to_dense",
    "trace",
]
