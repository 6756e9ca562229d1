"""Laws that many verbs obey, each written once: linearity, adjoints, blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from vivit_linop.arguments import as_float
from vivit_linop.operators import verbs
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.elementary import Adjoint, Scaled, Sum
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.parts import HStack


def _rule(verb: Any, function: Callable[..., Any]) -> None:
    """Register a rule under the name that it would have if it stood alone."""
    function.__name__ = f"{verb.__name__}_{function.__name__}"
    verb.register(function)


def _additive(verb: Any) -> None:
    """f(A + B) = f(A) + f(B)."""

    def of_sum(op: Sum, *given: Any) -> Any:
        return reduce(add, (verb(term, *given) for term in op.terms))

    _rule(verb, of_sum)


def _homogeneous(verb: Any) -> None:
    """f(c A) = c f(A)."""

    def of_scaled(op: Scaled, *given: Any) -> Any:
        return verb(op.operator, *given) * op.factor

    _rule(verb, of_scaled)


def _quadratic(verb: Any) -> None:
    """f(c A) = c² f(A), where c² may be no number; of a far c f(A) may be none."""

    def of_scaled(op: Scaled, *given: Any) -> Tensor:
        eps = torch.finfo(op.torch_dtype).eps
        if not eps <= abs(as_float(op.factor)) <= 1.0 / eps:
            return verb.dispatch(TorchLinearOperator)(op, *given)
        return op.factor * (op.factor * verb(op.operator, *given))

    _rule(verb, of_scaled)


def _outer(verb: Any) -> None:
    """f([A B]) = f(A) + f(B) for what is a function of A Aᵀ."""

    def of_stack(op: HStack, *given: Any) -> Tensor:
        return reduce(add, (verb(part, *given) for part in op.parts))

    _rule(verb, of_stack)


def _of_adjoints(verb: Any, transposes: bool) -> None:
    """f(Aᵀ) = f(A)ᵀ, or f(Aᵀ) = f(A)."""

    def of_adjoint(op: Adjoint, *given: Any) -> Any:
        found = verb(op.parent, *given)
        return found.T if transposes else found

    _rule(verb, of_adjoint)


def _by_blocks(verb: Any) -> None:
    """f(diag(A, B)) = diag(f(A), f(B))."""

    def of_block_diagonal(op: BlockDiagonal, *given: Any) -> BlockDiagonal:
        return op.like([verb(block, *given) for block in op.blocks])

    _rule(verb, of_block_diagonal)


_LINEAR = verbs.to_dense, verbs.diagonal, verbs.diagonal_blocks, verbs.trace
verb: Any
for verb in (*_LINEAR, verbs.restrict):
    _additive(verb)
    _homogeneous(verb)
_additive(verbs.sample)  # of independent ones
for verb in (verbs.row_norms_squared, verbs.outer_matrix, verbs.outer_product):
    _quadratic(verb)
    _outer(verb)
for verb in (verbs.column_norms_squared, verbs.inner_product):
    _quadratic(verb)
for verb in (verbs.inv, verbs.damped_inv, verbs.pinv, verbs.restrict, verbs.to_dense):
    _of_adjoints(verb, transposes=True)
for verb in (verbs.diagonal, verbs.trace, verbs.logdet, verbs.damped_logdet):
    _of_adjoints(verb, transposes=False)
for verb in (verbs.scale, verbs.pinv):
    _by_blocks(verb)
