"""A market of problems, and their matrices computed densely by ``torch.func``.

``CASES`` maps names to functions that build a :class:`Problem` in float64, one file a
subject. All numbers in it are representable in float32, so that one reference serves
both precisions. ``dense(name)`` computes J, H, G and the rest without the package under
test.
"""

import torch

# Each registers its own.
from . import architectures, data, losses, samples, uses  # noqa: F401
from .market import (
    CASES,
    Lambda,
    Problem,
    binary,
    case,
    classes,
    converted,
    features,
    map_tensors,
    mlp,
    parameter,
    samples_of,
    tensors_of,
    variants,
)
from .reference import Dense, call, dense, dense_of, fast_path, problem

# All problems are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

NAMES = list(CASES)
CONVEX = [name for name in NAMES if name != "nonconvex_loss"]

__all__ = [
    "CASES",
    "CONVEX",
    "NAMES",
    "Dense",
    "Lambda",
    "Problem",
    "binary",
    "call",
    "case",
    "classes",
    "converted",
    "dense",
    "dense_of",
    "fast_path",
    "features",
    "map_tensors",
    "mlp",
    "parameter",
    "problem",
    "samples_of",
    "tensors_of",
    "variants",
]
