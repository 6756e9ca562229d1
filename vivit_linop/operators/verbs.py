"""The verbs of the algebra: functions that get their rules from the types of nodes.

A unary verb is a ``functools.singledispatch`` function. ``verb.register`` adds a rule
for a type, ``A.verb()`` and ``vl.linalg.verb(A)`` use it. A binary verb has a rule for
a pair of types, which ``verb.rule`` adds (:mod:`vivit_linop.operators.dispatch`). What
has no rule of its own takes the rule of its base class: that of ``TorchLinearOperator``
works by products, or says which closed form is missing.

>>> import torch, vivit_linop as vl
>>> from vivit_linop.operators import verbs
>>> class Flip(vl.TorchLinearOperator):
...     self_adjoint = True
...     def _multiply(self, X):
...         return X.flip(0)
>>> @verbs.inv.register
... def inverse_of_flip(op: Flip):
...     return op
>>> A = Flip((3, 3), torch.float64)
>>> (2 * A).inv() @ torch.tensor([2.0, 4.0, 6.0])
tensor([3., 2., 1.], dtype=torch.float64)

The methods of an operator check shapes before they call a verb; rules may rely on it.
Rules for a node's parts call the verb on the parts, so that rules of all parts count.
Rules stand in :mod:`vivit_linop.operators.rules` (products, sums, multiples) and in
:mod:`vivit_linop.linalg` (the rest). This module imports no node: nodes import it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import singledispatch
from typing import Any

from torch import Tensor

from vivit_linop.arguments import Scalar
from vivit_linop.operators.dispatch import (
    BinaryVerb,
    Operator,
    RoutedVerb,
    no_eigenpairs,
    no_inverse,
    no_root,
    no_rule,
)
from vivit_linop.operators.eigenpairs import Eigendecomposition, Eigenpairs, Select
from vivit_linop.ranks.alone import RankRows

# Expressions ------------------------------------------------------------------------

matmul = BinaryVerb("matmul")
"""``A @ B``: an operator of shape ``[m, n]`` for shapes ``[m, k]`` and ``[k, n]``."""

add = BinaryVerb("add")
"""``A + B``: an operator of the shape that both have."""


@singledispatch
def scale(op: Any, factor: Scalar) -> Operator:
    """Return ``factor * op``.

    Args:
        op: An operator.
        factor: A finite number; a tensor without axes where gradients flow to it.
    """
    raise no_rule("scale", op)


@singledispatch
def damp(op: Any, damping: Scalar) -> Operator:
    """Return ``op + damping * I`` for a square operator.

    What sums with multiples of the identity become. Without a rule, a damped node,
    whose inverses, roots and determinants are the business of ``op`` and its rules for
    ``damped_inv``, ``damped_sqrt`` and ``damped_logdet``.
    """
    raise no_rule("damp", op)


@singledispatch
def power(op: Any, times: int) -> Operator:
    """Return a square operator multiplied by itself; the identity for 0 times."""
    raise no_rule("power", op)


@singledispatch
def adjoint(op: Any) -> Operator:
    """Return the adjoint, ``A.T``; all operators are real, so it is the transpose.

    A rule returns a node whose own adjoint is ``op`` again, where it can: rules
    recognise A in ``A.T`` by identity.
    """
    raise no_rule("adjoint", op)


@singledispatch
def same(left: Any, right: Any) -> bool:
    """Whether operators are one: one node, or by a rule made twice of one thing."""
    return left is right


@singledispatch
def to_dense(op: Any) -> Tensor:
    """Return the matrix, ``[m, n]``, in memory of its own; see ``A.to_dense``.

    Without a rule, n products with columns of the identity.
    """
    raise no_rule("to_dense", op)


@singledispatch
def column_pieces(op: Any) -> Iterator[tuple[slice, Tensor]]:
    """Yield all columns in order, some at a time: their place, and ``[m, k]``.

    What computes with all columns but keeps few streams these. A piece of a pullback
    has all columns of its samples. Without a rule, products with columns of the
    identity.
    """
    raise no_rule("column_pieces", op)


# Factors: V of a low-rank V Vᵀ ------------------------------------------------------


@singledispatch
def gram(factor: Any) -> Operator:
    """Return ``V.T @ V`` as a node that computes its matrix once.

    Without a rule, a new node; a factor that keeps its Gram matrix returns a node that
    knows it.
    """
    raise no_rule("gram", factor)


@singledispatch
def gram_matrix(left: Any, right: Any) -> Tensor:
    """Return the matrix of ``left.T @ right``, ``[R, Q]``, exactly symmetric or nearly.

    All that is exact about V Vᵀ (spectrum, damped inverse, log-determinant) needs this
    verb alone. Dispatches on ``left``; a rule for some types of ``right`` only hands
    the others on. Without a rule, Q products with ``left.T``.
    """
    raise no_rule("gram_matrix", left)


@singledispatch
def gram_rows(left: Any, right: Any) -> RankRows | None:
    """Return ``left.T @ right`` in rows over processes, or None for the whole matrix.

    For factors of risks over the processes of a group: each gets the rows of its own
    samples, and none has to hold all.
    """
    return None


@singledispatch
def weighted_gram_matrix(left: Any, right: Any, weights: Tensor) -> Tensor:
    """Return the matrix of ``left.T @ diag(w) @ right``, ``[R, Q]``.

    Without a rule, from the columns of ``right``, some at a time.

    Args:
        left: ``[D, R]``.
        right: ``[D, Q]``.
        weights: w, ``[D]``.
    """
    raise no_rule("weighted_gram_matrix", left)


@singledispatch
def as_factor(op: Any) -> Operator | None:
    """Return an operator that ``gram_matrix`` has a rule for, and None for others.

    For what stands at both ends of a sandwich AᵀS B, ``[D, R]``: by a rule here, a
    factor of one's own makes sandwiches that are computed on their small side.
    """
    return None


@singledispatch
def gram_blocks(
    left: Any, right: Any, size: int, weights: Tensor | None = None
) -> Tensor:
    """Return the diagonal blocks of ``left.T @ right``, ``[R/size, size, size]``.

    Without a rule, from columns, some of them at a time.

    Args:
        left: ``[D, R]``.
        right: ``[D, R]``.
        size: Of a block.
        weights: w of ``left.T @ diag(w) @ right``, or None for ones.
    """
    raise no_rule("gram_blocks", left)


@singledispatch
def outer_matrix(factor: Any) -> Tensor:
    """Return the matrix of ``V @ V.T``, ``[D, D]``: the smaller side for R > D."""
    raise no_rule("outer_matrix", factor)


@singledispatch
def outer_product(factor: Any, X: Tensor) -> Tensor:
    """Return ``V @ V.T @ X`` for columns ``[D, K]``, in memory of its own.

    What a product with V Vᵀ calls. Without a rule, a product with Vᵀ and one with V.
    """
    raise no_rule("outer_product", factor)


@singledispatch
def inner_product(factor: Any, X: Tensor) -> Tensor:
    """Return ``V.T @ V @ X`` for columns ``[R, K]``.

    What a product with VᵀV calls while its matrix is not known. Without a rule, a
    product with V and one with Vᵀ.
    """
    raise no_rule("inner_product", factor)


@singledispatch
def row_norms_squared(op: Any) -> Tensor:
    """Return the squared norms of the rows, ``[m]``: the diagonal of ``op @ op.T``.

    Without a rule, n products, some columns at a time.

    >>> import torch, vivit_linop as vl
    >>> vl.linalg.row_norms_squared(vl.Dense(torch.tensor([[3.0, 4.0], [1.0, 0.0]])))
    tensor([25.,  1.])
    """
    raise no_rule("row_norms_squared", op)


@singledispatch
def column_norms_squared(op: Any) -> Tensor:
    """Return the squared norms of the columns, ``[n]``: the diagonal of ``op.T @ op``.

    Without a rule, n products, some columns at a time.

    >>> import torch, vivit_linop as vl
    >>> vl.linalg.column_norms_squared(vl.Dense(torch.tensor([[3.0, 1.0], [4.0, 0.0]])))
    tensor([25.,  1.])
    """
    raise no_rule("column_norms_squared", op)


@singledispatch
def centered_row_norms_squared(op: Any) -> Tensor:
    """Return the squared norms of the rows less their mean, ``[m]``.

    That is n times the variance of the columns, entry by entry. Without a rule, n
    products and one with the mean.
    """
    raise no_rule("centered_row_norms_squared", op)


# Inverses and roots -----------------------------------------------------------------


@RoutedVerb
def inv(op: Any) -> Operator:
    """Return the inverse of a square operator, as an operator; see ``A.inv``.

    Raises:
        TypeError: If there is no closed form.
        ValueError: If the operator is numerically singular.
    """
    raise no_inverse(op)


@singledispatch
def solver(op: Any, rtol: float | None = None, M: Any = None) -> Operator:
    """Return what ``A.solve(b)`` multiplies b by; see there for the arguments.

    Without a rule, ``inv`` where that has one, else an inverse by iteration.
    """
    raise no_rule("solve", op)


@singledispatch
def damped_inv(op: Any, damping: Scalar) -> Operator:
    """Return the inverse of ``op + damping * I``, as an operator.

    What ``inv`` of a damped node calls, with the node inside of it; it raises the
    errors of ``inv``.
    """
    raise no_inverse(op, "a damped ")


@singledispatch
def sqrt(op: Any) -> Operator:
    """Return an R with ``op = R @ R.T``, as an operator ``[n, k]``; see ``A.sqrt``.

    R is unique up to an orthogonal mixing of its columns, and need not be square.

    Raises:
        TypeError: If there is no closed form, or the operator is not self-adjoint.
        ValueError: If it is not positive semi-definite.
    """
    raise no_root(op)


@singledispatch
def damped_sqrt(op: Any, damping: Scalar) -> Operator:
    """Return an R with ``op + damping * I = R @ R.T``, as an operator.

    What ``sqrt`` of a damped node calls, with the node inside of it; it raises the
    errors of ``sqrt``.
    """
    raise no_root(op, "a damped ")


@singledispatch
def sample(op: Any, num: int, generator: Any = None) -> Tensor:
    """Return samples of N(0, op) as columns, ``[n, num]``; see ``A.sample``.

    Without a rule, a root times standard normal noise.
    """
    raise no_rule("sample", op)


@singledispatch
def pinv(op: Any, rcond: float | None = None) -> Operator:
    """Return the Moore–Penrose inverse, as an operator; see ``A.pinv``.

    Without a rule, from ``eigh`` for self-adjoint operators, and for others from the
    Gram matrix of their smaller side.
    """
    raise no_rule("pinv", op)


@singledispatch
def restrict(op: Any, index: Tensor) -> Operator:
    """Return the principal submatrix of rows and columns; see ``A.restrict``.

    Without a rule, a node that multiplies vectors which are zero elsewhere.

    Args:
        op: A square operator.
        index: Distinct row numbers, int64, on its device.
    """
    raise no_rule("restrict", op)


# Diagonals, traces, determinants ----------------------------------------------------


@singledispatch
def diagonal(op: Any) -> Tensor:
    """Return the diagonal of a square operator, ``[n]``; see ``A.diagonal``.

    Without a rule, n products, some columns at a time.
    """
    raise no_rule("diagonal", op)


@singledispatch
def diagonal_blocks(op: Any, size: int) -> Tensor:
    """Return the blocks on the diagonal of a square operator, ``[n/size, size, size]``.

    Without a rule, by n products, some columns at a time. Those of AᵀS B for the
    columns of two factors need nothing beside the blocks: covariances of predictions,
    sample by sample.

    >>> import torch, vivit_linop as vl
    >>> A = vl.Dense(torch.arange(16.0).reshape(4, 4))
    >>> vl.linalg.diagonal_blocks(A, 2)[1]
    tensor([[10., 11.],
            [14., 15.]])
    """
    raise no_rule("diagonal_blocks", op)


@singledispatch
def trace(op: Any) -> Tensor:
    """Return the trace of a square operator, without axes; see ``A.trace``.

    Without a rule, the sum of its diagonal.
    """
    raise no_rule("trace", op)


@singledispatch
def logdet(op: Any) -> Tensor:
    """Return ``log |det A|`` of a square operator, without axes; see ``A.logdet``.

    −∞ for a singular one. Without a rule, from ``eigvalsh``.
    """
    raise no_rule("logdet", op)


@singledispatch
def damped_logdet(op: Any, damping: Scalar) -> Tensor:
    """Return ``log |det(A + δ I)|``, what ``logdet`` of a damped node calls.

    Without a rule, from ``eigvalsh``.
    """
    raise no_rule("logdet", op)


@singledispatch
def damped_logdets(op: Any, dampings: Tensor) -> Tensor:
    """Return ``log |det(A + δ I)|`` for each of T dampings, ``[T]``.

    Without a rule, one after the other.

    Args:
        op: A square operator.
        dampings: ``[T]``, float64.
    """
    raise no_rule("logdet", op)


# Eigenvalues ------------------------------------------------------------------------


@RoutedVerb
def eigvalsh(op: Any) -> Tensor:
    """Return eigenvalues of a self-adjoint operator, ascending; see ``A.eigvalsh``.

    All n, but of c V Vᵀ with V ``[D, R]`` the min(D, R) of the smaller side: the others
    are zero. Without a rule, from ``eigendecomposition``.
    """
    raise no_rule("eigvalsh", op)


@singledispatch
def eigendecomposition(op: Any) -> Eigendecomposition:
    """Return all eigenvalues of a self-adjoint operator and the way to its vectors.

    A rule for it returns an object of a subclass of ``vl.linalg.Eigendecomposition``,
    with ``count``, ``eigenvalues`` and ``pairs``, and gives ``eigh`` and ``eigvalsh``
    with all their arguments; see ``A.eigh``, which costs what the decomposition does.

    Raises:
        TypeError: If there is no closed form.
    """
    raise no_eigenpairs(op)


@RoutedVerb
def eigh(
    op: Any,
    k: int | None = None,
    select: Select = None,
    rcond: float | None = None,
) -> Eigenpairs:
    """Return eigenpairs of a self-adjoint operator; see ``A.eigh`` for the arguments.

    Without a rule, those that ``eigendecomposition(op).choose(k, select, rcond)`` says.
    """
    raise no_rule("eigh", op)


# Routes to k eigenpairs of every operator: on the host, and where the operator is.
ITERATIONS = ("ARPACK", "Lanczos")


@singledispatch
def extreme_eigenpairs(
    op: Any,
    k: int,
    which: str = "LA",
    tol: float | None = None,
    v0: Any = None,
    route: str | None = None,
) -> Eigenpairs:
    """Return k eigenpairs at an end of the spectrum; see ``A.eigh(k, which=…)``.

    Without a rule, those of ``eigendecomposition``, or by an iteration where that has
    none: ARPACK, on a GPU Lanczos.
    """
    raise no_rule("extreme_eigenpairs", op)


@singledispatch
def eigh_near(op: Any, k: int, start: Eigenpairs, tol: float) -> Eigenpairs:
    """Return the k largest pairs from those of a near one; see ``A.eigh(start=…)``."""
    raise TypeError(
        f"start: the {type(op).__name__} has no factor V with A = c V Vᵀ, so it cannot "
        "start from other pairs; leave it out."
    )


@singledispatch
def few_products(factor: Any) -> AbstractContextManager[Operator]:
    """Give a factor in the form that is cheapest for some products only.

    In the context these are certified by who takes them; an exception says that they
    were not.
    """
    return contextlib.nullcontext(factor)


@singledispatch
def explain(op: Any, k: int | None = None) -> Any:
    """Print and return which ways an operator takes, and what they cost."""
    raise no_rule("explain", op)


@singledispatch
def to_curvlinops(op: Any) -> Any:
    """Return the operator with the interface that curvlinops' estimators use."""
    raise no_rule("to_curvlinops", op)
