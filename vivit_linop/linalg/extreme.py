"""Eigenpairs at the ends of a spectrum, for every self-adjoint operator."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh
from torch import Tensor

from vivit_linop.linalg.decompositions import DenseDecomposition
from vivit_linop.linalg.leading import led
from vivit_linop.modes import as_given
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
# ARPACK takes some 20 + 4 k products (measured); of fewer rows the matrix is cheaper.
_PRODUCTS, _PRODUCTS_A_PAIR = 20, 4
# Up to so many rows the matrix is formed where ARPACK fails.
_DENSE_ROWS = 2000
# Restarts after which the spectrum is shifted, and how well its norm is to be known.
_FIRST_RESTARTS, _ROUGHLY = 50, 0.1


@extreme_eigenpairs.register
def extreme_eigenpairs_of_operator(
    op: TorchLinearOperator,
    k: int,
    which: str = "LA",
    tol: float | None = None,
    v0: Any = None,
) -> Eigenpairs:
    """By the decomposition where there is one and nothing is said of iterations."""
    k = _checked(op, k, which, tol)
    if tol is None and v0 is None:
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
    n = op.shape[0]
    pairs: Eigenpairs | None = None
    if n > _PRODUCTS + _PRODUCTS_A_PAIR * k:
        pairs = _by_arpack(op, k, which, tol or 0.0, _start(op, v0))
    if pairs is None:
        matrix = to_dense(op)
        dense = DenseDecomposition((matrix + matrix.T) / 2)
        pairs = dense.pairs(_chosen(dense, k, which))
    return pairs


def arpack_name(op: TorchLinearOperator) -> str:
    """What the pairs call their route."""
    return f"ARPACK on {type(op).__name__}"


def _by_arpack(
    op: TorchLinearOperator, k: int, which: str, tol: float, v0: np.ndarray
) -> Eigenpairs | None:
    """None where few rows have a spectrum that ARPACK does not separate."""

    def solved(A: TorchLinearOperator) -> tuple[np.ndarray, np.ndarray] | None:
        with contextlib.suppress(ArpackNoConvergence):
            return _eigsh(A, k, which, tol, v0, maxiter=_FIRST_RESTARTS)
        if A.shape[0] <= _DENSE_ROWS:
            return None
        if which == "LM":
            return _eigsh(A, k, which, tol, v0)
        # ARPACK compares residuals with eigenvalues, and of small ones nothing is
        # enough. Shifted by their norm, all are compared with that; up to what ARPACK
        # itself takes for zero.
        size = float(abs(_eigsh(A, 1, "LM", _ROUGHLY, v0)[0][0]))
        shift = size if which == "LA" else -size
        enough = max(tol, float(np.finfo(A.dtype).eps) ** (2 / 3))
        evals, evecs = _eigsh(Damped(A, shift), k, "LM", enough, v0)
        return evals - np.asarray(shift, evals.dtype), evecs

    try:
        found = led(solved, op)
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"eigh: ARPACK has found {len(error.eigenvalues)} of {k} pairs of this "
            f"{type(op).__name__}. Eigenvalues that lie close need more vectors: ask "
            "for a larger k, or give a larger tol=."
        ) from error
    except ArpackError as error:
        raise RuntimeError(
            f"eigh: ARPACK has failed on this {type(op).__name__}: {error}. Give "
            "another start vector v0=, or take Dense(op.to_dense()).eigh()."
        ) from error
    if found is None:
        return None
    evals, evecs = found
    order = np.argsort(evals)
    pairs = Eigenpairs(
        torch.from_numpy(evals[order]).to(op.device, op.torch_dtype),
        torch.from_numpy(np.ascontiguousarray(evecs[:, order])).to(
            op.device, op.torch_dtype
        ),
    )
    pairs.route = arpack_name(op)
    return pairs


def _eigsh(
    A: TorchLinearOperator,
    k: int,
    which: str,
    tol: float,
    v0: np.ndarray,
    maxiter: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    evals, evecs = eigsh(A, k, which=which, tol=tol, v0=v0, maxiter=maxiter)
    return evals, evecs


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
    if tol is not None and not tol >= 0.0:
        raise ValueError(f"tol: a number of at least 0, got {tol!r}.")
    return int(k)


def _start(op: TorchLinearOperator, v0: Any) -> np.ndarray:
    """The vector that the iteration begins with; the same for each call."""
    n = op.shape[0]
    if v0 is None:
        start = np.random.default_rng(0).standard_normal(n)
    else:
        start = as_given(v0).detach().cpu().double().numpy()
        if start.shape != (n,) or not np.isfinite(start).all() or not start.any():
            raise ValueError(
                f"v0: a vector of {n} finite numbers, not all 0, got shape "
                f"{list(start.shape)}."
            )
    return np.asarray(start, dtype=op.dtype)
