"""Elementary nodes, and the nodes that expressions over operators are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cached_property, reduce

import numpy as np
import torch
from torch import Tensor

from vivit_linop.arguments import Scalar, as_count, as_numbers
from vivit_linop.modes import is_followed
from vivit_linop.noise import Noise
from vivit_linop.operators import verbs
from vivit_linop.operators.base import (
    Op,
    TorchLinearOperator,
    in_common,
    settle,
    settled,
)
from vivit_linop.operators.lowrank import Gram, LowRank
from vivit_linop.operators.symmetric import symmetric_eigenvalues, without_noise
from vivit_linop.ranks.alone import Ranks


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
        n = as_count(n, "n")
        super().__init__((n, n), dtype, device)

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

    _shared: Ranks | None = None

    def __init__(self, matrix: Tensor | np.ndarray) -> None:
        matrix = _as_tensor(matrix, "matrix", ndim=2)
        self.matrix = matrix
        super().__init__(
            (matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device
        )

    @cached_property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether the matrix is symmetric up to the rounding of its dtype.

        Of a matrix that requires grad it is not known: its entries are independent.
        """
        A = self.matrix
        if A.shape[0] != A.shape[1] or A.requires_grad:
            return False
        tolerance = 10 * torch.finfo(A.dtype).eps * A.abs().max()
        return bool((A - A.T).abs().max() <= tolerance)

    @property
    def ranks(self) -> Ranks:
        """Those that have computed it, or what it is made of."""
        return self._shared or super().ranks

    def _made_of(self) -> tuple[Tensor]:
        return (self.matrix,)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.matrix @ X

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.matrix.T @ X

    def like(self, matrix: Tensor) -> Dense:
        """Return another matrix, which the same processes have."""
        return dense_over(self.ranks, matrix)


def dense_over(ranks: Ranks, matrix: Tensor) -> Dense:
    """Return a matrix that these processes have computed together, the same to the bit.

    What its bits do not decide, such as eigenvectors, one of them computes for all.
    """
    op = Dense(matrix)
    op._shared = ranks if ranks.is_many else None
    return op


def as_dense(op: Op) -> Dense:
    """Return the matrix of an operator as a node, which the same processes have."""
    matrix = op.matrix if isinstance(op, Gram) else verbs.to_dense(op)
    return dense_over(op.ranks, matrix)


def symmetric_over(ranks: Ranks, matrix: Tensor) -> Dense:
    """Return a matrix that these processes have, and that is known to be symmetric.

    Sums over several processes may round differently on the two sides of the diagonal,
    so of these it is (A + Aᵀ)/2.
    """
    op = dense_over(ranks, (matrix + matrix.T) / 2 if ranks.is_many else matrix)
    op.self_adjoint = True
    return op


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

    def _made_of(self) -> tuple[Tensor]:
        return (self.entries,)

    def _mirrors(self, other: Op) -> bool:
        return isinstance(other, Diagonal) and _one_place(self.entries, other.entries)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.entries[:, None] * X


class OfOperator(TorchLinearOperator):
    """What is made of an operator A, and self-adjoint where A is."""

    operator: Op

    @property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether A is."""
        return self.operator.self_adjoint

    def _made_of(self) -> Sequence[Scalar | Op]:
        return (self.operator,)


class DenseInverse(OfOperator):
    """The inverse of A + δ I for a dense A, through an LU factorisation in float64.

    Args:
        operator: A.
        damping: δ; added in float64, so that it counts also where it is small.

    Raises:
        ValueError: If A + δ I has NaN or Inf, or is singular, also if it is but for
            rounding in A, unless δ > 0 is what makes it regular; or if A is symmetric
            and δ > 0 is too small to make up for eigenvalues that rounding has made
            negative.
    """

    operator: Dense

    def __init__(self, operator: Dense, damping: float = 0.0) -> None:
        self.operator, self.damping = operator, damping
        matrix = operator.matrix.to(torch.float64, copy=True)
        matrix.diagonal().add_(damping)
        self._lu, self._pivots, info = torch.linalg.lu_factor_ex(matrix)
        faults = [~matrix.detach().isfinite().all(), info.any()]
        if damping > 0.0 and operator.self_adjoint:
            faults.append(torch.linalg.cholesky_ex(matrix).info.any())
        else:
            precision = torch.float64 if damping > 0.0 else operator.torch_dtype
            faults[1] |= self._is_ill_conditioned(matrix.detach(), precision)
        # The one wait.
        no_numbers, is_singular, *is_indefinite = torch.stack(faults).tolist()
        if no_numbers:
            raise ValueError("inv: the matrix, or its damping, has NaN or Inf.")
        if any(is_indefinite):
            _check_noise(matrix, damping, operator.torch_dtype)
            is_singular |= bool(self._is_ill_conditioned(matrix, operator.torch_dtype))
        if is_singular:
            raise ValueError(
                "inv: the matrix is singular, or but for rounding in "
                f"{operator.torch_dtype}. Add damping: (A + delta * Identity(n))."
            )
        super().__init__(operator.shape, operator.torch_dtype, operator.device)

    @torch.no_grad()
    def _is_ill_conditioned(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Whether solutions are rounding errors of a matrix A in a precision.

        By ‖|A⁻¹| |A|‖ for columns of one size, from two vectors: units of rows and of
        columns do not count.
        """
        scales = torch.linalg.vector_norm(matrix, float("inf"), dim=0)
        sizes = torch.cat(
            [rows.abs() @ scales.reciprocal() for rows in matrix.split(512)]
        )
        columns = Noise().like(matrix[:, :2]) * sizes[:, None]
        found = torch.linalg.lu_solve(self._lu.detach(), self._pivots, columns)
        accuracy = max(10.0, len(matrix) ** 0.5) * torch.finfo(dtype).eps
        # NaN is ill-conditioned too.
        return ~(found.abs() * scales[:, None] * accuracy <= 1.0).all()

    def log_abs_det(self) -> Tensor:
        """Return the logarithm of the absolute determinant."""
        return -self._lu.diagonal().abs().log().sum()

    def _multiply(self, X: Tensor) -> Tensor:
        solution = torch.linalg.lu_solve(self._lu, self._pivots, X.double())
        return solution.to(X.dtype)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        solution = torch.linalg.lu_solve(
            self._lu, self._pivots, X.double(), adjoint=True
        )
        return solution.to(X.dtype)


def _check_noise(damped: Tensor, damping: float, dtype: torch.dtype) -> None:
    """Raise an error if A + δ I, indefinite, is so by the rounding of A alone."""
    evals = symmetric_eigenvalues(damped) - damping
    if (without_noise(evals, dtype) >= 0.0).all():
        raise ValueError(
            f"damping: {damping:.3g} is below the rounding error of a matrix with norm "
            f"{evals.abs().max().item():.3g} in {dtype}. Use a larger damping, or "
            "float64."
        )


class Adjoint(TorchLinearOperator):
    """The adjoint of an operator that is not self-adjoint.

    Args:
        parent: The operator; ``Adjoint(A).parent is A`` is how rules recognise A.
    """

    def __init__(self, parent: Op) -> None:
        self.parent = parent
        rows, columns = parent.shape
        super().__init__((columns, rows), parent._own_dtype, parent._own_device)

    def _made_of(self) -> tuple[Op]:
        return (self.parent,)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.parent._multiply_adjoint(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.parent._multiply(X)


class Scaled(OfOperator):
    """A multiple of an operator.

    Args:
        factor: The number.
        operator: The operator.
    """

    def __init__(self, factor: Scalar, operator: Op) -> None:
        if isinstance(factor, Tensor) and factor.device.type != "cpu":
            # A number of the host goes with tensors anywhere, any other decides.
            operator = settle(operator, None, factor.device)
        self.factor, self.operator = factor, operator
        super().__init__(operator.shape, operator._own_dtype, operator._own_device)

    def _settled(
        self, dtype: torch.dtype | None, device: torch.device | None
    ) -> Scaled:
        return Scaled(self.factor, settle(self.operator, dtype, device))

    def _made_of(self) -> tuple[Scalar | Op, ...]:
        return (self.factor, self.operator)

    def _multiply(self, X: Tensor) -> Tensor:
        return self.factor * self.operator.apply(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.factor * self.operator.T.apply(X)


def as_multiple(op: Op) -> tuple[Op, Scalar]:
    """Return A and c of a multiple c A; an operator that is none, and 1."""
    return (op.operator, op.factor) if isinstance(op, Scaled) else (op, 1.0)


class Sum(TorchLinearOperator):
    """A sum of operators of one shape.

    Args:
        terms: At least one.
    """

    def __init__(self, *terms: Op) -> None:
        self.terms = tuple(settled(terms))
        super().__init__(terms[0].shape, *in_common(*terms))

    @cached_property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether all terms are, or what is not comes with its adjoint: A B + B A."""
        rest = [term for term in self.terms if not term.self_adjoint]
        return not rest or _is_mirrored(rest, rest)

    def _mirrors(self, other: Op) -> bool:
        return isinstance(other, Sum) and _is_mirrored(self.terms, other.terms)

    def _settled(self, dtype: torch.dtype | None, device: torch.device | None) -> Sum:
        return Sum(*(settle(term, dtype, device) for term in self.terms))

    def _made_of(self) -> tuple[Op, ...]:
        return self.terms

    def _multiply(self, X: Tensor) -> Tensor:
        return reduce(torch.add, (term.apply(X) for term in self.terms))

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return Sum(*(term.T for term in self.terms))._multiply(X)


class Product(TorchLinearOperator):
    """A product of operators.

    Args:
        factors: From left to right, at least one.
    """

    def __init__(self, *factors: Op) -> None:
        self.factors = factors
        super().__init__(
            (factors[0].shape[0], factors[-1].shape[1]), *in_common(*factors)
        )

    @cached_property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether the product reads the same backwards, each factor transposed."""
        pairs = zip(self.factors, reversed(self.factors), strict=True)
        return all(mirrored(left, right) for left, right in pairs)

    @cached_property
    def reduced(self) -> Dense | LowRank:
        """A self-adjoint product A B Aᵀ as a node that exact verbs have rules for.

        Dense where A has fewer rows than B; else R Rᵀ with R = A √B.

        Raises:
            TypeError: If B has no closed-form root.
            ValueError: If the product is not positive semi-definite.
        """
        if self.factors[len(self.factors) // 2].shape[0] > self.shape[0]:
            matrix = verbs.to_dense(self)
            return dense_over(self.ranks, (matrix + matrix.T) / 2)
        return LowRank(verbs.sqrt(self))

    def reduced_or(self, missing: TypeError) -> Dense | LowRank:
        """Return ``reduced``, or raise the error of a verb that has no closed form."""
        if self.self_adjoint:
            with contextlib.suppress(TypeError, ValueError):
                return self.reduced
        raise missing

    def _mirrors(self, other: Op) -> bool:
        if not isinstance(other, Product) or len(self.factors) != len(other.factors):
            return False
        return all(map(mirrored, self.factors, reversed(other.factors)))

    def _made_of(self) -> tuple[Op, ...]:
        return self.factors

    def _multiply(self, X: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            X = factor.apply(X)
        return X

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        for factor in self.factors:
            X = factor.T.apply(X)
        return X


def mirrored(left: Op, right: Op) -> bool:
    """Whether an operator is the adjoint of another, as far as nodes can tell."""
    if isinstance(left, Adjoint):
        return verbs.same(left.parent, right)
    if isinstance(right, Adjoint):
        return verbs.same(left, right.parent)
    return verbs.same(left, right.T) or left._mirrors(right)


def _is_mirrored(left: Sequence[Op], right: Sequence[Op]) -> bool:
    """Whether the adjoints of some terms are others, in any order."""
    rest = list(right)
    for term in left:
        places = (at for at, other in enumerate(rest) if mirrored(term, other))
        if (at := next(places, None)) is None:
            return False
        del rest[at]
    return not rest


@verbs.same.register
def same_dense(left: Dense, right: Op) -> bool:
    """Those of one matrix in memory."""
    return isinstance(right, Dense) and _one_place(left.matrix, right.matrix)


def _one_place(A: Tensor, B: Tensor) -> bool:
    """Whether tensors have the same entries in memory, and the same derivatives."""
    if A is B:
        return True
    if is_followed(A) or is_followed(B) or A.requires_grad or B.requires_grad:
        return False
    place, other = (
        (M.data_ptr(), M.stride(), M.shape, M.dtype, M.is_neg()) for M in (A, B)
    )
    return place == other


def _as_tensor(array: Tensor | np.ndarray, name: str, ndim: int) -> Tensor:
    """Return a tensor of the given number of axes, or name the argument at fault."""
    tensor = as_numbers(array, name)
    if not torch.is_grad_enabled():
        tensor = tensor.detach()
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
