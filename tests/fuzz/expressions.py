"""Random expressions of the algebra, written as a program of a line a node.

A node is an operator ``a3``, its matrix ``A3`` and a bound ``e3`` on how far rounding
may have brought them apart. Leaves are those of the market of operators.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.operator_market import MARKET

from .checks import Finding, problem_of

Step = tuple[str, str, tuple[int, ...]]  # operator and matrix with {0}, {1}; its parts

LARGEST = 60
# Of a node, and of its matrix; {0} and {1} are numbers of parts.
BINARY = {
    "a{0} + a{1}": "A{0} + A{1}",
    "a{0} - 0.5 * a{1}": "A{0} - 0.5 * A{1}",
    "a{0} @ a{1}": "A{0} @ A{1}",
    "a{0}.T @ a{1}": "A{0}.T @ A{1}",
    "a{0} @ a{1} @ a{0}.T": "A{0} @ A{1} @ A{0}.T",
    "vl.Kronecker(a{0}, a{1})": "torch.kron(A{0}.contiguous(), A{1}.contiguous())",
    "vl.BlockDiagonal([a{0}, a{1}])": "torch.block_diag(A{0}, A{1})",
}
UNARY = {
    "a{0}.T": "A{0}.T",
    "-2.0 * a{0}": "-2.0 * A{0}",
    "a{0} / 3": "A{0} / 3",
    "a{0} @ a{0}.T": "A{0} @ A{0}.T",
    "a{0}.T @ a{0}": "A{0}.T @ A{0}",
    "a{0} + a{0}": "A{0} + A{0}",
}
SQUARE = {
    "a{0} + 0.5 * vl.Identity(a{0}.shape[0])": "A{0} + 0.5 * torch.eye(len(A{0}))",
    "vl.Identity(a{0}.shape[0]) - a{0}": "torch.eye(len(A{0})) - A{0}",
    "a{0} ** 2": "A{0} @ A{0}",
    "a{0}.inv()": "torch.linalg.inv(A{0})",
}
@dataclass(frozen=True)
class Expression:
    """The seeds of the leaves, and what is made of them."""

    seed: int
    dtype: str
    steps: tuple[Step, ...]
