"""Eigenpairs at the ends of a spectrum, for every self-adjoint operator."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError
from torch import Tensor

from vivit_linop.arguments import as_numbers, check_real
from vivit_linop.linalg.decompositions import DenseDecomposition
from vivit_linop.linalg.krylov import (
    SOLVERS,
    by_arpack,
    by_lanczos,
    solver_on,
    start_of,
    too_few,
)
from vivit_linop.linalg.lanczos import NotConverged
from vivit_linop.linalg.leading import led
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.damped import Damped
from vivit_linop.operators.dispatch import NoClosedForm
from vivit_linop.operators.eigenpairs import Eigendecomposition, Eigenpairs
from vivit_linop.operators.verbs import (
    eigendecomposition,
    extreme_eigenpairs,
    to_dense,
)

WHICH = ("LA", "SA", "LM")
# Solvers take some 20 + 4 k products (measured); of fewer rows the matrix is cheaper.
PRODUCTS, PRODUCTS_A_PAIR = 20, 4
# Up to so many rows the matrix is formed where they fail.
DENSE_ROWS = 2000
# Restarts after which the spectrum is shifted, and how well its norm is to be known.
_FIRST_RESTARTS, _ROUGHLY = 50, 0.1


@extreme_eigenpairs.register
def extreme_eigenpairs_of_operator(
    op: TorchLinearOperator,
    k: int,
    which: str = "LA",
    tol: float | None = None,
    v0: Any = None,
    route: str | None = None,
) -> Eigenpairs:
    """By the decomposition where there is one and nothing is said of iterations."""
    k = _checked(op, k, which, tol)
    if tol is None and v0 is None and route is None:
        try:
            decomposition = eigendecomposition(op)
        except NoClosedForm:
            pass
        else:
            return decomposition.pairs(_chosen(decomposition, k, which))
    if op.requires_grad:
        raise TypeError(
            f"eigh: a tensor of this {type(op).__name__} requires grad, which an "
            "iteration does not pass. Take .detach()ed tensors."
        )
    n, start = op.shape[0], _start(op, v0)
    pairs: Eigenpairs | None = None
    if n > PRODUCTS + PRODUCTS_A_PAIR * k:
        solver = route or solver_on(op.device)
        pairs = _by_iteration(op, k, which, tol or 0.0, start, solver)
    if pairs is None:
        matrix = to_dense(op)
        dense = DenseDecomposition((matrix + matrix.T) / 2)
        pairs = dense.pairs(_chosen(dense, k, which))
    return pairs


def _by_iteration(
    op: TorchLinearOperator,
    k: int,
    which: str,
    tol: float,
    v0: Tensor,
    solver: str,
) -> Eigenpairs | None:
    """None where few rows have a spectrum that no iteration separates."""

    def solved(A: TorchLinearOperator) -> tuple[Tensor, Tensor] | None:
        with contextlib.suppress(NotConverged):
            return SOLVERS[solver](A, k, v0, which, tol, _FIRST_RESTARTS)
        if A.shape[0] <= DENSE_ROWS:
            return None
        return _PATIENT[solver](A, k, v0, which, tol)

    name = f"{solver} on {type(op).__name__}"
    try:
        found = led(solved, op)
    except NotConverged as error:
        raise too_few(error, k, op, solver) from error
    except ArpackError as error:
        raise RuntimeError(
            f"eigh: {solver} has failed on this {type(op).__name__}: {error}. Give "
            "another start vector v0=, or take Dense(op.to_dense()).eigh()."
        ) from error
    if found is None:
        return None
    values, vectors = found
    pairs = Eigenpairs(
        values.to(op.device, op.torch_dtype), vectors.to(op.device, op.torch_dtype)
    )
    pairs.route = name
    return pairs


def _patient_arpack(
    A: TorchLinearOperator, k: int, v0: Tensor, which: str, tol: float
) -> tuple[Tensor, Tensor]:
    """ARPACK on a shifted spectrum.

    ARPACK compares residuals with eigenvalues, and of small ones nothing is enough.
    Shifted by their norm, all are compared with that; up to what ARPACK itself takes
    for zero.
    """
    if which == "LM":
        return by_arpack(A, k, v0, which, tol)
    size = float(by_arpack(A, 1, v0, "LM", _ROUGHLY)[0].abs())
    shift = size if which == "LA" else -size
    values, vectors = by_arpack(Damped(A, shift), k, v0, "LM", _enough(A, tol))
    return values - shift, vectors


def _patient_lanczos(
    A: TorchLinearOperator, k: int, v0: Tensor, which: str, tol: float
) -> tuple[Tensor, Tensor]:
    """Lanczos with residuals as large as ARPACK lets them be then."""
    return by_lanczos(A, k, v0, which, tol, hidden=_enough(A, tol))


_PATIENT = {"ARPACK": _patient_arpack, "Lanczos": _patient_lanczos}


def _enough(A: TorchLinearOperator, tol: float) -> float:
    return max(tol, torch.finfo(A.torch_dtype).eps ** (2 / 3))


def _chosen(decomposition: Eigendecomposition, k: int, which: str) -> Tensor:
    """The indices of the pairs, ascending; an error where some have no vectors."""
    evals, rest = decomposition.eigenvalues, decomposition.rest
    if which == "LA":
        return decomposition.choose(k, None, None)
    decomposition.check_k(k)
    keys = evals if which == "SA" else -evals.abs()
    chosen = keys.argsort()[:k].sort().values
    if rest is not None:
        # As floats: a damping may be a tensor with a gradient.
        key = float(rest) if which == "SA" else -abs(float(rest))
        last = keys.detach()[chosen].max().item()
        error = 100 * torch.finfo(evals.dtype).eps * evals.detach().abs().max().item()
        if key < last - error:
            raise ValueError(
                f"k: the {k} eigenvalues at this end include {float(rest):.3g}, which "
                "a low-rank operator has no vectors for. Give tol= for an iteration."
            )
    return chosen


def _checked(op: TorchLinearOperator, k: Any, which: str, tol: float | None) -> int:
    if which not in WHICH:
        listed = ", ".join(map(repr, WHICH))
        raise ValueError(f"which: one of {listed}, got {which!r}.")
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"k: an integer, got {k!r}.")
    if not 1 <= k <= op.shape[0]:
        raise ValueError(f"k: between 1 and the {op.shape[0]} rows, got {k}.")
    if tol is not None:
        check_real(tol, "tol")
    if tol is not None and not tol >= 0.0:
        raise ValueError(f"tol: a number of at least 0, got {tol!r}.")
    return int(k)


def _start(op: TorchLinearOperator, v0: Any) -> Tensor:
    """The vector that the iteration begins with; the same for each call."""
    if v0 is None:
        return start_of(op)
    start, n = as_numbers(v0, "v0").detach(), op.shape[0]
    if start.shape != (n,) or not start.isfinite().all() or not start.any():
        raise ValueError(
            f"v0: a vector of {n} finite numbers, not all 0, got shape "
            f"{list(start.shape)}."
        )
    return start.to(op.torch_dtype)
