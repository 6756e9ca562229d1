"""Some rows of an operator, and some rows and columns of it."""

from __future__ import annotations

from torch import Tensor

from vivit_linop.operators.base import TorchLinearOperator


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

    Attributes:
        operator: A.
        index: The numbers.
    """

    def __init__(self, operator: TorchLinearOperator, index: Tensor) -> None:
        self.operator, self.index = operator, index
        shape = len(index), operator.shape[1]
        super().__init__(shape, operator._own_dtype, operator._own_device)

    def _made_of(self) -> tuple[TorchLinearOperator]:
        return (self.operator,)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.operator.apply(X)[self.index]

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        X = padded(X, self.index, self.operator.shape[0])
        return self.operator.T.apply(X)


class Restricted(TorchLinearOperator):
    """A principal submatrix of an operator, ``[k, k]``.

    Args:
        operator: A, ``[n, n]``.
        index: Distinct numbers of its rows, ``[k]``, on its device.

    Attributes:
        operator: A.
        index: The numbers.
    """

    def __init__(self, operator: TorchLinearOperator, index: Tensor) -> None:
        self.operator, self.index = operator, index
        shape = len(index), len(index)
        super().__init__(shape, operator._own_dtype, operator._own_device)

    @property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether A is."""
        return self.operator.self_adjoint

    def _made_of(self) -> tuple[TorchLinearOperator]:
        return (self.operator,)

    def _multiply(self, X: Tensor) -> Tensor:
        X = padded(X, self.index, self.operator.shape[0])
        return self.operator.apply(X)[self.index]

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        X = padded(X, self.index, self.operator.shape[0])
        return self.operator.T.apply(X)[self.index]
