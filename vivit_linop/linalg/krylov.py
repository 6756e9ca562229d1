"""Iterative eigensolvers for operators: one contract, two places to be.

ARPACK keeps its vectors on the host. Of an operator on a GPU each product's go there
and come back, so there it is Lanczos on the device (:mod:`vivit_linop.linalg.lanczos`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from torch import Tensor
from tqdm.auto import tqdm

from vivit_linop.bars import bar
from vivit_linop.linalg.lanczos import NotConverged, lanczos
from vivit_linop.operators.base import TorchLinearOperator


class Solver(Protocol):
    """What finds k eigenpairs at an end of a spectrum.

    Args:
        A: Self-adjoint.
        k: How many pairs.
        start: The vector that it begins with, ``[n]``, on any device.
        which: ``"LA"``, ``"SA"`` or ``"LM"``.
        tol: The relative accuracy; 0 for machine epsilon.
        restarts: After so many it gives up; None for its own number.

    Returns:
        Eigenvalues ``[k]``, ascending, and orthonormal columns ``[n, k]``, in the
        operator's dtype.

    Raises:
        NotConverged: If it gives up.
    """

    def __call__(
        self,
        A: TorchLinearOperator,
        k: int,
        start: Tensor,
        which: str = "LA",
        tol: float = 0.0,
        restarts: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Find them."""


def by_arpack(
    A: TorchLinearOperator | np.ndarray,
    k: int,
    start: Tensor,
    which: str = "LA",
    tol: float = 0.0,
    restarts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """By SciPy's ARPACK; the pairs are on the host."""
    v0 = start.cpu().numpy().astype(A.dtype)
    try:
        evals, evecs = eigsh(A, k, which=which, tol=tol, v0=v0, maxiter=restarts)
    except ArpackNoConvergence as error:
        raise NotConverged(len(error.eigenvalues)) from error
    order = np.argsort(evals)
    vectors = np.ascontiguousarray(evecs[:, order])
    return torch.from_numpy(evals[order]), torch.from_numpy(vectors)


def by_lanczos(
    A: TorchLinearOperator,
    k: int,
    start: Tensor,
    which: str = "LA",
    tol: float = 0.0,
    restarts: int | None = None,
    hidden: float | None = None,
) -> tuple[Tensor, Tensor]:
    """By thick-restart Lanczos; nothing leaves the device but what a restart needs."""

    def product(x: Tensor) -> Tensor:
        return A.apply(x.unsqueeze(1)).squeeze(1)

    v0 = start.to(A.device, A.torch_dtype)
    return lanczos(product, v0, k, which, tol, restarts or 10 * len(v0), hidden)


SOLVERS: dict[str, Solver] = {"ARPACK": by_arpack, "Lanczos": by_lanczos}


def solver_on(device: torch.device) -> str:
    """Return which solver fits a device, where nothing else decides."""
    return "ARPACK" if device.type == "cpu" else "Lanczos"


def too_few(
    error: NotConverged, k: int, op: TorchLinearOperator, solver: str
) -> RuntimeError:
    """Return what to say where a solver gives up."""
    return RuntimeError(
        f"eigh: {solver} has found {error} of {k} pairs of this {type(op).__name__}. "
        "Eigenvalues that lie close need more vectors: ask for a larger k, or give a "
        "larger tol=, or take the dense way."
    )


def start_of(op: TorchLinearOperator) -> Tensor:
    """Return the vector that a solver begins with, the same at each call."""
    start = np.random.default_rng(0).standard_normal(op.shape[0])
    return torch.from_numpy(start).to(op.torch_dtype)


@contextlib.contextmanager
def watched(
    op: TorchLinearOperator, k: int, total: int
) -> Iterator[TorchLinearOperator]:
    """Count products on a bar on stderr while k eigenpairs are computed from them.

    Args:
        op: A, square.
        k: How many pairs are looked for.
        total: How many products that takes in the mean; it may be more or less.
    """
    with bar(desc=f"eigh(k={k})", unit=" products", total=total) as shown:
        yield Counted(op, shown)
        shown.total = shown.n  # that many it were
        shown.refresh()


class Counted(TorchLinearOperator):
    """An operator that tells a bar how many columns it has multiplied.

    Args:
        op: A, square.
        shown: The bar where they are counted.
    """

    def __init__(self, op: TorchLinearOperator, shown: tqdm) -> None:
        super().__init__(op.shape, op.torch_dtype, op.device)
        self.self_adjoint = op.self_adjoint
        self._op, self._bar = op, shown

    def _made_of(self) -> tuple[TorchLinearOperator]:
        return (self._op,)

    def _multiply(self, X: Tensor) -> Tensor:
        self._count(X)
        return self._op.apply(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        self._count(X)
        return self._op.T.apply(X)

    def _count(self, X: Tensor) -> None:
        self._bar.total = max(self._bar.total, self._bar.n + X.shape[1])
        self._bar.update(X.shape[1])
