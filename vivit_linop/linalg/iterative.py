"""Inverses by iteration, for operators without a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce, singledispatch
from typing import Any

import numpy as np
import torch
from scipy.sparse import linalg as sparse
from torch import Tensor

from vivit_linop.arguments import check_real
from vivit_linop.linalg.leading import led
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op, TorchLinearOperator
from vivit_linop.operators.damped import Damped, DampedInverse
from vivit_linop.operators.damped_solver import needs_refinement
from vivit_linop.operators.dispatch import NoClosedForm
from vivit_linop.operators.elementary import Diagonal, Scaled, Sum
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.lowrank import Woodbury

Solve = Callable[[np.ndarray, float], tuple[np.ndarray, int]]

# Krylov vectors that GMRES keeps.
_GMRES_VECTORS = 50
# After so many steps the residual is looked at, and the iteration begins again with it.
_STEPS = 5000
# How many roundings of a product a residual may have, times the condition number.
_ROUNDINGS = 10.0


class IterativeInverse(TorchLinearOperator):
    """The inverse of an operator by Krylov iterations, up to a relative residual.

    SciPy's conjugate gradients while all directions have positive curvature, else
    MINRES (Paige & Saunders 1975), which takes indefinite operators; GMRES for what is
    not self-adjoint. A solution x of A x = b is looked at, ‖b − A x‖ ≤ rtol ‖b‖, and
    solved for again with what is left of b; where that does not help, there is an
    error. Each iteration is one product with A, and one with M.

    Args:
        operator: A, square.
        rtol: The relative residual; by default the root of machine epsilon.
        M: An approximation of A⁻¹, self-adjoint and positive definite for
            self-adjoint A: a preconditioner.

    Raises:
        TypeError: If a tensor of A requires grad, which gradients would not reach, or
            has a tangent.
        ValueError: If ``rtol`` is not positive, or M has another shape.
    """

    def __init__(
        self,
        operator: Op,
        rtol: float | None = None,
        M: sparse.LinearOperator | None = None,
    ) -> None:
        if operator.requires_grad or operator._is_followed:
            raise TypeError(
                f"solve: a tensor of this {type(operator).__name__} requires grad or "
                "has a tangent, and an iteration passes no derivatives to it. Take "
                ".detach()ed tensors."
            )
        if rtol is not None:
            check_real(rtol, "rtol")
        eps = torch.finfo(operator.torch_dtype).eps
        self.rtol = eps**0.5 if rtol is None else float(rtol)
        if not self.rtol > 0.0:
            raise ValueError(f"rtol: a positive number, got {rtol!r}.")
        if M is not None and tuple(getattr(M, "shape", ())) != tuple(operator.shape):
            raise ValueError(
                f"M: an approximation of the inverse of shape {tuple(operator.shape)}, "
                f"got {M!r}."
            )
        self.operator, self.M = operator, M
        super().__init__(operator.shape, operator._own_dtype, operator._own_device)

    @property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether A is."""
        return self.operator.self_adjoint

    def _multiply(self, X: Tensor) -> Tensor:
        return self._solved(X, self.operator, self.M)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        M = self.M if self.M is None else self.M.T
        return self._solved(X, self.operator.T, M)

    def _solved(self, X: Tensor, A: Op, M: Any) -> Tensor:
        B = X.detach().to("cpu", self.torch_dtype).numpy()
        columns = [self._column(b, A, M) for b in B.T]
        return torch.as_tensor(np.stack(columns, axis=1)).to(X)

    def _column(self, b: np.ndarray, A: Op, M: Any) -> np.ndarray:
        """Solve for a vector and an operator of size one: SciPy's know eps alone."""
        if not b.any():
            return np.zeros_like(b)
        largest = np.abs(b).max()
        b = b / largest
        size = float(np.abs(A @ b).max()) if M is None else 1.0
        if np.finfo(b.dtype).tiny < size < math.inf:
            A = Scaled(1.0 / size, A)
        else:
            size = 1.0
        return self._of_size_one(b, A, M) / size * largest

    def _of_size_one(self, b: np.ndarray, A: Op, M: Any) -> np.ndarray:
        if not self.self_adjoint:
            return self._refined(b, A, lambda r, tol: _gmres(A, r, tol, M))
        try:
            definite = _PositiveCurvature(A)
            return self._refined(
                b,
                A,
                lambda r, tol: sparse.cg(definite, r, rtol=tol, maxiter=_STEPS, M=M),
            )
        except _IndefiniteError:
            return self._refined(b, A, lambda r, tol: _minres(A, r, tol, M))

    def _refined(self, b: np.ndarray, A: Op, solve: Solve) -> np.ndarray:
        """Solve again for the residual, as long as that at least halves it."""
        x, residual = np.zeros_like(b), b
        size = whole = float(np.linalg.norm(b))
        while True:
            part, _ = solve(residual / size, 0.5 * self.rtol * whole / size)
            x = x + size * part.astype(b.dtype)
            residual = b - A @ x
            before, size = size, float(np.linalg.norm(residual))
            if size <= self.rtol * whole:
                return x
            if not size < 0.5 * before:
                raise ArithmeticError(
                    f"solve: a relative residual of {self.rtol:.1e} is not reached, "
                    f"only {size / whole:.1e} in {self.torch_dtype}. Give a larger "
                    "rtol or a preconditioner M, or add damping: A + delta * "
                    "Identity(n)."
                )


class IterativeWoodbury(Woodbury):
    """Woodbury's inverse over processes none of which has room for K: by iteration.

    Each has its rows of K, (δ I + c K) y = b is solved by conjugate gradients on one of
    them, and all take part in its products. For δ = λ_max/100 that takes some 100 of
    these, for λ_max/10⁴ some 1,000.
    """

    def _prepared(self) -> tuple[float, bool]:
        inner = self.operator
        rows = inner.gram.rows
        assert rows is not None
        self._damped = verbs.damp(verbs.scale(inner.gram, inner.scale), self.damping)
        norm = inner.scale * rows.norm()
        # A residual cannot be smaller than rounding in a product leaves it.
        condition = 1.0 + norm / self.damping
        self._rtol = _ROUNDINGS * torch.finfo(inner.torch_dtype).eps * condition
        return norm, needs_refinement(condition, inner.torch_dtype)

    def solve_small(self, X: Tensor) -> Tensor:
        """(δ I + c K)⁻¹ times columns of the smaller side, ``[R, K]``."""
        return led(lambda A: IterativeInverse(A, self._rtol).apply(X), self._damped)

    @property
    def small_logdet(self) -> Tensor:
        """Refuse: it takes a factorisation."""
        raise self._without_factor("logdet")

    def root_columns(self) -> Iterator[Tensor]:
        """Refuse: a root takes a factorisation."""
        raise self._without_factor("diagonal, trace")

    def _without_factor(self, what: str) -> MemoryError:
        return MemoryError(
            f"{what}: of this inverse it takes a factor of the Gram matrix, for which "
            "no process has room. Take fewer samples, risk.subset(…), or mc_samples=; "
            "products with the inverse are possible."
        )


class _IndefiniteError(ArithmeticError):
    """A direction has a curvature that is not positive."""


class _PositiveCurvature(sparse.LinearOperator):
    """An operator that only multiplies directions of positive curvature."""

    def __init__(self, operator: Op) -> None:
        self._operator = operator
        super().__init__(operator.dtype, operator.shape)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        product = self._operator @ x
        if not x.reshape(-1) @ product.reshape(-1) > 0.0:
            raise _IndefiniteError
        return product


def _minres(A: Any, r: np.ndarray, rtol: float, M: Any) -> tuple[np.ndarray, int]:
    """MINRES measures residuals by ‖A‖ ‖x‖, so that it stops too early by itself."""
    eps = float(np.finfo(r.dtype).eps)
    return sparse.minres(A, r, rtol=max(eps, 1e-2 * rtol), maxiter=_STEPS, M=M)


def _gmres(A: Any, r: np.ndarray, rtol: float, M: Any) -> tuple[np.ndarray, int]:
    restart = min(len(r), _GMRES_VECTORS)
    times = _STEPS // _GMRES_VECTORS
    return sparse.gmres(A, r, rtol=rtol, restart=restart, maxiter=times, M=M)


# What solves ------------------------------------------------------------------------


@verbs.solver.register
def solver_of_operator(op: Op, rtol: float | None = None, M: Any = None) -> Op:
    """The closed form if there is one, and nothing else was asked for."""
    if rtol is None and M is None:
        try:
            return verbs.inv(op)
        except NoClosedForm:
            pass
        except TypeError:
            if op.requires_grad:
                raise
    return IterativeInverse(op, rtol, preconditioner(op) if M is None else M)


@verbs.solver.register
def solver_of_damped(op: Damped, rtol: float | None = None, M: Any = None) -> Op:
    """Derivatives in δ go around what solves, also around an iteration."""
    A, damping = op.operator, op.damping
    if not isinstance(damping, Tensor) or A.requires_grad:
        return solver_of_operator(op, rtol, M)
    return DampedInverse(
        A, damping, verbs.solver(verbs.damp(A, damping.item()), rtol, M)
    )


@verbs.solver.register
def solver_of_block_diagonal(
    op: BlockDiagonal, rtol: float | None = None, M: Any = None
) -> Op:
    """Block by block."""
    if M is not None or not op.has_square_blocks:
        return solver_of_operator(op, rtol, M)
    return op.like([verbs.solver(block, rtol) for block in op.blocks])


@singledispatch
def preconditioner(op: Op) -> Op | None:
    """Return an approximation of the inverse that iterations take if none is given."""
    return None


@preconditioner.register
def preconditioner_of_sum(op: Sum) -> Op | None:
    """Of A + P with a positive diagonal P: (A + p̄ I)⁻¹ where that has a closed form.

    A Kronecker-factored A and a prior by entry: the condition is that of P then.
    """
    diagonals = [term for term in op.terms if isinstance(term, Diagonal)]
    others = [term for term in op.terms if not isinstance(term, Diagonal)]
    if not diagonals or not others or op.requires_grad:
        return None
    entries = torch.stack([term.entries for term in diagonals]).sum(0)
    if not (entries > 0.0).all():
        return None
    try:
        M = verbs.inv(verbs.damp(reduce(verbs.add, others), entries.mean().item()))
        # Iterations for symmetric operators take no other.
        return M if not op.self_adjoint or verbs.eigvalsh(M).min() > 0.0 else None
    except (TypeError, ValueError):
        return None
