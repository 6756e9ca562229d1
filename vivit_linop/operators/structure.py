"""Elementary nodes, and the nodes that expressions over operators are made of."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vivit_linop.operators.base import (
    TorchLinearOperator,
    common_device,
    common_dtype,
)


class Identity(TorchLinearOperator):
    """The identity.

    Args:
        n: Its size.
        dtype: A torch dtype, or None to take that of what it is combined with.
        device: A torch device, or None likewise.

    Example:
        >>> import torch, vivit_linop as vl
        >>> (2 * vl.Identity(3)) @ torch.ones(3)
        tensor([2., 2., 2.])
    """

    self_adjoint = True

    def __init__(
        self,
        n: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(n, (int, np.integer)) or n < 1:
            raise ValueError(f"n: the size of an identity is at least 1, got {n!r}.")
        super().__init__((int(n), int(n)), dtype, device)

    def _settled(
        self, dtype: torch.dtype | None, device: torch.device | None
    ) -> Identity:
        return Identity(
            self.shape[0], self._own_dtype or dtype, self._own_device or device
        )

    def _multiply(self, X: Tensor) -> Tensor:
        return X.clone()  # never the caller's own memory


class Dense(TorchLinearOperator):
    """A matrix as an operator.

    Args:
        matrix: ``[m, n]``, a tensor or an array, float32 or float64; not copied.

    Attributes:
        matrix: The tensor.

    Example:
        >>> import torch, vivit_linop as vl
        >>> A = vl.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> A.eigvalsh()
        tensor([1., 3.])
    """

    def __init__(self, matrix: Tensor | np.ndarray) -> None:
        matrix = _as_tensor(matrix, "matrix", ndim=2)
        self.matrix = matrix
        super().__init__(
            (matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device
        )

    @cached_property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether the matrix is symmetric up to the rounding of its dtype."""
        A = self.matrix
        if A.shape[0] != A.shape[1]:
            return False
        tolerance = 10 * torch.finfo(A.dtype).eps * A.abs().max()
        return bool((A - A.T).abs().max() <= tolerance)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.matrix @ X

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.matrix.T @ X


class Diagonal(TorchLinearOperator):
    """A diagonal matrix as an operator.

    Args:
        entries: ``[n]``, a tensor or an array, float32 or float64; not copied.

    Attributes:
        entries: The tensor.

    Example:
        >>> import torch, vivit_linop as vl
        >>> vl.Diagonal(torch.tensor([1.0, 4.0])).inv() @ torch.ones(2)
        tensor([1.0000, 0.2500])
    """

    self_adjoint = True

    def __init__(self, entries: Tensor | np.ndarray) -> None:
        entries = _as_tensor(entries, "entries", ndim=1)
        self.entries = entries
        super().__init__((len(entries), len(entries)), entries.dtype, entries.device)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.entries[:, None] * X


class DenseInverse(TorchLinearOperator):
    """The inverse of a dense operator, through an LU factorisation.

    Args:
        operator: The operator to invert.

    Raises:
        ValueError: If it is singular.
    """

    def __init__(self, operator: Dense) -> None:
        lu, self._pivots, info = torch.linalg.lu_factor_ex(operator.matrix)
        if info.any():
            raise ValueError(
                "inv: the matrix is singular. Add damping: (A + delta * Identity(n))."
            )
        self.operator, self._lu = operator, lu
        super().__init__(operator.shape, operator.torch_dtype, operator.device)

    @property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether the inverted matrix is symmetric."""
        return self.operator.self_adjoint

    def _multiply(self, X: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self._lu, self._pivots, X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return torch.linalg.lu_solve(self._lu, self._pivots, X, adjoint=True)


class Adjoint(TorchLinearOperator):
    """The adjoint of an operator that is not self-adjoint.

    Args:
        parent: The operator; ``Adjoint(A).parent is A`` is how rules recognise A.
    """

    def __init__(self, parent: TorchLinearOperator) -> None:
        self.parent = parent
        rows, columns = parent.shape
        super().__init__((columns, rows), parent._own_dtype, parent._own_device)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.parent._multiply_adjoint(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.parent._multiply(X)


class Scaled(TorchLinearOperator):
    """A multiple of an operator.

    Args:
        factor: The number.
        operator: The operator.
    """

    def __init__(self, factor: float, operator: TorchLinearOperator) -> None:
        self.factor, self.operator = factor, operator
        super().__init__(operator.shape, operator._own_dtype, operator._own_device)

    @property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether the operator is."""
        return self.operator.self_adjoint

    def _settled(
        self, dtype: torch.dtype | None, device: torch.device | None
    ) -> Scaled:
        return Scaled(self.factor, self.operator._settled(dtype, device))

    def _multiply(self, X: Tensor) -> Tensor:
        return self.factor * self.operator.apply(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.factor * self.operator.T.apply(X)


class Sum(TorchLinearOperator):
    """A sum of operators of one shape.

    Args:
        terms: At least one.
    """

    def __init__(self, *terms: TorchLinearOperator) -> None:
        self.terms = terms
        super().__init__(terms[0].shape, common_dtype(*terms), common_device(*terms))

    @property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether all terms are."""
        return all(term.self_adjoint for term in self.terms)

    def _multiply(self, X: Tensor) -> Tensor:
        result = self.terms[0].apply(X)
        for term in self.terms[1:]:
            result = result + term.apply(X)
        return result

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return Sum(*(term.T for term in self.terms))._multiply(X)


class Product(TorchLinearOperator):
    """A product of operators.

    Args:
        factors: From left to right, at least one.
    """

    def __init__(self, *factors: TorchLinearOperator) -> None:
        self.factors = factors
        super().__init__(
            (factors[0].shape[0], factors[-1].shape[1]),
            common_dtype(*factors),
            common_device(*factors),
        )

    @property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether the product reads the same backwards, each factor transposed."""
        return all(
            left is right.T
            or (isinstance(right, Adjoint) and right.parent is left)
            or (isinstance(left, Adjoint) and left.parent is right)
            for left, right in zip(self.factors, reversed(self.factors), strict=True)
        )

    def _multiply(self, X: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            X = factor.apply(X)
        return X

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        for factor in self.factors:
            X = factor.T.apply(X)
        return X


def _as_tensor(array: Tensor | np.ndarray, name: str, ndim: int) -> Tensor:
    """Return a tensor of the given number of axes, or name the argument at fault."""
    if isinstance(array, np.ndarray):
        # torch takes neither negative strides nor foreign byte orders nor, without a
        # warning, read-only memory; a copy has none of these.
        native = array.dtype.newbyteorder("=")
        if (
            native != array.dtype
            or not array.flags.writeable
            or min(array.strides, default=0) < 0
        ):
            array = array.astype(native)
    tensor = torch.as_tensor(array).detach()
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: needs {ndim} axes, got shape {list(tensor.shape)}.")
    if not tensor.dtype.is_floating_point:
        raise TypeError(
            f"{name}: must be real floating point, got {tensor.dtype}. Convert with "
            ".to(torch.float64)."
        )
    if tensor.numel() == 0:
        raise ValueError(f"{name}: is empty, shape {list(tensor.shape)}.")
    return tensor
