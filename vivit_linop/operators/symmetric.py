"""Eigenpairs of dense symmetric matrices, within what LAPACK can do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from vivit_linop.modes import Shared, Undo

# torch calls LAPACK's ?syevd, whose workspace of 2 n² + 6 n + 1 entries is counted in
# 32 bits: from n = 32,766 on it overflows, and the process ends.
SYEVD_ROWS = 32_765
# Beyond, the entries of the matrix itself are not counted in 32 bits.
LAPACK_ROWS = 46_340
# With so few rows torch does it sooner than SciPy is called, and in one thread.
_VERY_FEW_ROWS = 128
# With so few rows one thread does it as soon as two: it is memory that takes time. Two
# wait for each other at each row, and without sleeping; where others use the cores,
# that takes up to 70 times as long (300 rows), and torch's threads wait afterwards.
_FEW_ROWS = 2000


def symmetric_eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric matrix, ascending, and orthonormal eigenvectors.

    Args:
        matrix: ``[n, n]``.

    Returns:
        ``[n]`` and ``[n, n]``.

    Raises:
        MemoryError: If the matrix has more rows than LAPACK can count entries of.
    """
    if _is_for_one_thread(matrix):
        return _by_scipy(matrix, "evd")
    if matrix.device.type != "cpu" or len(matrix) <= SYEVD_ROWS:
        evals, evecs = torch.linalg.eigh(matrix)
        return evals, evecs
    _check_rows(matrix)
    return _by_scipy(matrix, "evr")


def symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    """The eigenvalues of a symmetric matrix, ascending; on the CPU by LAPACK's ?syevr.

    torch's choice of algorithm on the CPU takes up to twice as long.

    Args:
        matrix: ``[n, n]``.

    Raises:
        MemoryError: As :func:`symmetric_eigenpairs`.
    """
    if (
        matrix.device.type != "cpu"
        or len(matrix) <= _VERY_FEW_ROWS
        or matrix.requires_grad
    ):
        return torch.linalg.eigvalsh(matrix)
    _check_rows(matrix)
    with _threads_for(matrix):
        found = scipy.linalg.eigh(matrix.numpy(), eigvals_only=True, driver="evr")
    return torch.from_numpy(found)


def largest_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of a symmetric matrix, ascending, and eigenvectors.

    On the CPU by LAPACK's ``?syevr``, which spares the other eigenvectors.

    Args:
        matrix: ``[n, n]``.
        k: At most n.

    Raises:
        MemoryError: As :func:`symmetric_eigenpairs`.
    """
    if matrix.device.type != "cpu":
        evals, evecs = torch.linalg.eigh(matrix)
        return evals[-k:], evecs[:, -k:]
    _check_rows(matrix)
    return _by_scipy(matrix, "evr", [len(matrix) - k, len(matrix) - 1])


def without_noise(evals: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Eigenvalues, with zeros where rounding alone may have made them negative.

    Rounding in a symmetric matrix of n rows moves its eigenvalues by up to about
    max(10, √n) eps λ_max.

    Args:
        evals: ``[n]``, in any order.
        dtype: What the matrix was rounded to, if not to that of the eigenvalues.
    """
    eps = torch.finfo(dtype or evals.dtype).eps
    noise = max(10.0, len(evals) ** 0.5) * eps * evals.abs().max()
    return torch.where((evals < 0.0) & (evals >= -noise), 0.0, evals)


def _by_scipy(
    matrix: Tensor, driver: str, chosen: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    with _threads_for(matrix):
        found = scipy.linalg.eigh(matrix.numpy(), subset_by_index=chosen, driver=driver)
    evals, evecs = map(torch.from_numpy, found)
    return evals, evecs


def _check_rows(matrix: Tensor) -> None:
    if len(matrix) > LAPACK_ROWS:
        raise MemoryError(
            f"eigh: a matrix of {len(matrix)} rows has more entries than LAPACK counts "
            f"(its limit is {LAPACK_ROWS} rows). Ask for k= of the largest eigenpairs "
            "of a GGN or Fisher matrix, or use scipy.sparse.linalg.eigsh(op, k)."
        )


def _is_for_one_thread(matrix: Tensor) -> bool:
    few = _VERY_FEW_ROWS < len(matrix) <= _FEW_ROWS
    return few and matrix.device.type == "cpu" and not matrix.requires_grad


def _threads_for(matrix: Tensor) -> AbstractContextManager[None]:
    return _ONE_THREAD.inside() if len(matrix) <= _FEW_ROWS else nullcontext()


@cache
def _scipy_threads() -> ThreadpoolController:
    """What sets the number of threads; finding the libraries takes milliseconds."""
    return ThreadpoolController()


def _set_one_thread(_: torch.device | None, undo: Undo) -> None:
    limited = _scipy_threads().limit(limits=1, user_api="blas")
    undo.append(limited.restore_original_limits)


_ONE_THREAD = Shared(_set_one_thread)
