"""Parts of operators, and operators of parts: rows, submatrices, stacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from vivit_linop.operators.base import Op, TorchLinearOperator, in_common, settled
from vivit_linop.operators.elementary import OfOperator
from vivit_linop.operators.kronecker import as_operators

Parts = Sequence[Op | Tensor | np.ndarray]


# Operators side by side --------------------------------------------------------------


class HStack(TorchLinearOperator):
    """Operators side by side, [A B …].

    Its Gram matrix has the blocks AᵀA, AᵀB, …, and [A B][A B]ᵀ = A Aᵀ + B Bᵀ.

    Args:
        parts: At least one, with as many rows each.
    """

    def __init__(self, *parts: Op) -> None:
        self.parts = parts
        super().__init__(
            (parts[0].shape[0], sum(part.shape[1] for part in parts)),
            *in_common(*parts),
        )

    def split(self, X: Tensor) -> list[Tensor]:
        """Cut the rows of a matrix into what each part multiplies."""
        return list(X.split([part.shape[1] for part in self.parts]))

    def _made_of(self) -> Sequence[Op]:
        return self.parts

    def _multiply(self, X: Tensor) -> Tensor:
        pairs = zip(self.parts, self.split(X), strict=True)
        return reduce(torch.add, (part.apply(x) for part, x in pairs))

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return torch.cat([part.T.apply(X) for part in self.parts])


def hstack(parts: Parts) -> TorchLinearOperator:
    """Return operators side by side, [A B …], ``[m, n₁ + n₂ + …]``.

    A product costs one with each part. The closed forms of low-rank operators know the
    blocks: ``W = hstack([V1, V2])`` has ``W @ W.T`` for V₁V₁ᵀ + V₂V₂ᵀ.

    Args:
        parts: Operators or matrices with as many rows each, at least one.

    Raises:
        ValueError: If there is none, or they differ in their numbers of rows.

    Example:
        >>> import torch, vivit_linop as vl
        >>> vl.hstack([torch.eye(2), 2 * vl.Identity(2)]) @ torch.ones(4)
        tensor([3., 3.])
    """
    operators = _checked(parts, axis=0)
    return operators[0] if len(operators) == 1 else HStack(*operators)


def vstack(parts: Parts) -> TorchLinearOperator:
    """Return operators one above the other, [A; B; …], ``[m₁ + m₂ + …, n]``.

    The adjoint of :func:`hstack` of the adjoints. A product costs one with each part.

    Args:
        parts: Operators or matrices with as many columns each, at least one.

    Raises:
        ValueError: If there is none, or they differ in their numbers of columns.

    Example:
        >>> import torch, vivit_linop as vl
        >>> vl.vstack([torch.eye(2), 2 * vl.Identity(2)]) @ torch.ones(2)
        tensor([1., 1., 2., 2.])
    """
    return hstack([part.T for part in _checked(parts, axis=1)]).T


def _checked(parts: Parts, axis: int) -> list[Op]:
    """Return the parts as operators of one height, or one width."""
    operators = settled(as_operators(parts, "parts"))
    sizes = {part.shape[axis] for part in operators}
    if len(sizes) != 1:
        side = ("rows", "columns")[axis]
        shapes = [tuple(part.shape) for part in operators]
        raise ValueError(f"parts: need as many {side} each, got shapes {shapes}.")
    return operators


# Rows, and rows and columns ----------------------------------------------------------


def padded(X: Tensor, index: Tensor, rows: int) -> Tensor:
    """Return a matrix with these rows, and zeros elsewhere."""
    result = X.new_zeros(rows, X.shape[1])
    result[index] = X
    return result


class Rows(TorchLinearOperator):
    """Some rows of an operator, ``[k, n]``.

    Args:
        operator: A, ``[m, n]``.
        index: Distinct numbers of its rows, ``[k]``, on its device.
    """

    def __init__(self, operator: Op, index: Tensor) -> None:
        self.operator, self.index = operator, index
        shape = len(index), operator.shape[1]
        super().__init__(shape, operator._own_dtype, operator._own_device)

    def _made_of(self) -> tuple[Op]:
        return (self.operator,)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.operator.apply(X)[self.index]

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        X = padded(X, self.index, self.operator.shape[0])
        return self.operator.T.apply(X)


class Restricted(OfOperator):
    """A principal submatrix of an operator, ``[k, k]``.

    Args:
        operator: A, ``[n, n]``.
        index: Distinct numbers of its rows, ``[k]``, on its device.
    """

    def __init__(self, operator: Op, index: Tensor) -> None:
        self.operator, self.index = operator, index
        shape = len(index), len(index)
        super().__init__(shape, operator._own_dtype, operator._own_device)

    def _multiply(self, X: Tensor) -> Tensor:
        X = padded(X, self.index, self.operator.shape[0])
        return self.operator.apply(X)[self.index]

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        X = padded(X, self.index, self.operator.shape[0])
        return self.operator.T.apply(X)[self.index]
