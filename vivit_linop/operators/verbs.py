"""The verbs of the algebra, as names to register rules on.

A unary verb is a ``functools.singledispatch`` function: it picks its rule by the type
of the node. A binary verb picks the newest rule that matches the types of both. The
rules stand elsewhere: products, sums and scalings in
:mod:`vivit_linop.operators.rules`, the rest in :mod:`vivit_linop.linalg`. This module
imports no node, so that the base class can import it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from vivit_linop.linalg.decompositions import Eigendecomposition, Eigenpairs
    from vivit_linop.operators.base import Scalar, TorchLinearOperator
    from vivit_linop.operators.lowrank import Gram

BinaryRule = Callable[[Any, Any], Any]


class BinaryVerb:
    """A function of two operators that is given by rules on their types.

    Rules are tried from the newest to the oldest, so that a more special one is
    registered after the general one. A rule that does not apply after all returns
    ``NotImplemented``.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rules: list[tuple[type, type, BinaryRule]] = []

    def rule(self, left: type, right: type) -> Callable[[BinaryRule], BinaryRule]:
        """Register the decorated function for operands of these types."""

        def register(function: BinaryRule) -> BinaryRule:
            self._rules.append((left, right, function))
            return function

        return register

    def __call__(
        self, left: TorchLinearOperator, right: TorchLinearOperator
    ) -> TorchLinearOperator:
        """Return the node of the newest rule that applies."""
        for left_type, right_type, function in reversed(self._rules):
            if isinstance(left, left_type) and isinstance(right, right_type):
                result = function(left, right)
                if result is not NotImplemented:
                    node: TorchLinearOperator = result
                    return node
        raise _no_rule(self._name, left)


matmul = BinaryVerb("matmul")
"""The product of two operators."""

add = BinaryVerb("add")
"""The sum of two operators."""


@singledispatch
def scale(op: Any, factor: Scalar) -> TorchLinearOperator:
    """Return ``factor * op``."""
    raise _no_rule("scale", op)


@singledispatch
def power(op: Any, times: int) -> TorchLinearOperator:
    """Return ``op`` multiplied by itself; the identity for 0 times."""
    raise _no_rule("power", op)


@singledispatch
def adjoint(op: Any) -> TorchLinearOperator:
    """Return the adjoint (all operators are real: the transpose)."""
    raise _no_rule("adjoint", op)


@singledispatch
def to_dense(op: Any) -> Tensor:
    """Return the matrix as a torch tensor ``[m, n]``.

    Without a rule of its own, a node is multiplied by the columns of the identity.
    """
    raise _no_rule("to_dense", op)


@singledispatch
def gram(factor: Any) -> Gram:
    """Return the operator ``factor.T @ factor``; some factors keep its matrix."""
    raise _no_rule("gram", factor)


@singledispatch
def gram_matrix(left: Any, right: Any) -> Tensor:
    """Return the matrix of ``left.T @ right``, ``[m, n]``."""
    raise _no_rule("gram_matrix", left)


@singledispatch
def row_norms_squared(op: Any) -> Tensor:
    """Return the squared norms of the rows, ``[m]``: the diagonal of ``op @ op.T``."""
    raise _no_rule("row_norms_squared", op)


@singledispatch
def outer_matrix(factor: Any) -> Tensor:
    """Return the matrix of ``factor @ factor.T``."""
    raise _no_rule("outer_matrix", factor)


@singledispatch
def outer_product(factor: Any, X: Tensor) -> Tensor:
    """Return ``factor @ factor.T @ X`` for columns ``X``."""
    raise _no_rule("outer_product", factor)


@singledispatch
def inv(op: Any) -> TorchLinearOperator:
    """Return the inverse as an operator."""
    raise TypeError(
        f"inv: no closed form for {type(op).__name__}. Solve with "
        "scipy.sparse.linalg.cg(op, b), or invert Dense(op.to_dense()) if it is small."
    )


@singledispatch
def damped_inv(op: Any, damping: Scalar) -> TorchLinearOperator:
    """Return the inverse of ``op + damping * I`` as an operator."""
    raise TypeError(
        f"inv: no closed form for a damped {type(op).__name__}. Solve with "
        "scipy.sparse.linalg.cg(op, b), or invert Dense(op.to_dense()) if it is small."
    )


@singledispatch
def sqrt(op: Any) -> TorchLinearOperator:
    """Return an operator R with ``op = R @ R.T``."""
    raise TypeError(
        f"sqrt: no closed form for {type(op).__name__}. Take "
        "Dense(op.to_dense()).sqrt() if it is small."
    )


@singledispatch
def damped_sqrt(op: Any, damping: Scalar) -> TorchLinearOperator:
    """Return an R with ``op + damping * I = R @ R.T``."""
    raise TypeError(
        f"sqrt: no closed form for a damped {type(op).__name__}. Take "
        "Dense(op.to_dense()).sqrt() if it is small."
    )


@singledispatch
def diagonal(op: Any) -> Tensor:
    """Return the diagonal of a square operator."""
    raise _no_rule("diagonal", op)


@singledispatch
def trace(op: Any) -> Tensor:
    """Return the trace of a square operator."""
    raise _no_rule("trace", op)


@singledispatch
def logdet(op: Any) -> Tensor:
    """Return the logarithm of the absolute determinant."""
    raise _no_rule("logdet", op)


@singledispatch
def damped_logdet(op: Any, damping: Scalar) -> Tensor:
    """Return the log-determinant of ``op + damping * I``."""
    raise _no_rule("logdet", op)


@singledispatch
def eigvalsh(op: Any) -> Tensor:
    """Return the eigenvalues of a self-adjoint operator, ascending."""
    raise _no_rule("eigvalsh", op)


@singledispatch
def eigendecomposition(op: Any) -> Eigendecomposition:
    """Return all eigenvalues of an operator and the way to its eigenvectors."""
    raise TypeError(
        f"eigh: no closed form for {type(op).__name__}. Use "
        "scipy.sparse.linalg.eigsh(op, k), or Dense(op.to_dense()).eigh() if it is "
        "small."
    )


@singledispatch
def eigh(
    op: Any,
    k: int | None = None,
    select: Callable[[Tensor], Sequence[int] | Tensor] | None = None,
    rcond: float | None = None,
) -> Eigenpairs:
    """Return eigenpairs of a self-adjoint operator."""
    raise _no_rule("eigh", op)


def _no_rule(verb: str, op: Any) -> TypeError:
    return TypeError(f"{verb}: no rule for an operand of type {type(op).__name__}.")
