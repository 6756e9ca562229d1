"""Dense symmetric matrices: eigenpairs within what LAPACK can do.

The smaller side of a low-rank node is one, decomposed once: all that is exact about
c V Vᵀ + δ I for every c and δ comes from VᵀV or V Vᵀ, and what is kept of it, its
eigenvalues, its eigenpairs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Self

import numpy as np
import scipy.linalg
import torch
from scipy.linalg.lapack import get_lapack_funcs
from threadpoolctl import ThreadpoolController
from torch import Tensor

from vivit_linop.modes import Shared, Undo, is_followed
from vivit_linop.ranks.alone import RankRows

Pairs = tuple[Tensor, Tensor]

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
# Beyond so many rows MKL reduces a matrix to a band before it is tridiagonal, which of
# 2,000 rows takes half to two thirds of the time. No other library does.
_ONE_STAGE_ROWS = {torch.float32: 1500, torch.float64: 1100}
# Of so many columns LAPACK makes a block, where it is given room for that.
_BLOCK = 64


def symmetric_eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a symmetric matrix, ascending, and orthonormal eigenvectors.

    Args:
        matrix: ``[n, n]``.

    Returns:
        ``[n]`` and ``[n, n]``.

    Raises:
        MemoryError: If the matrix has more rows than LAPACK can count entries of.
        ValueError: If an entry is NaN or Inf.
    """
    _check_finite(matrix)
    if _VERY_FEW_ROWS < len(matrix) <= _FEW_ROWS and _is_for_scipy(matrix):
        return _by_scipy(matrix, "evd")
    if matrix.device.type != "cpu" or len(matrix) <= SYEVD_ROWS:
        evals, evecs = torch.linalg.eigh(matrix)
        if evecs.requires_grad and not is_followed(matrix):
            evecs.register_hook(partial(_check_apart, evals.detach()))
        return evals, evecs
    _check_rows(matrix)
    if not _is_for_scipy(matrix):
        raise ValueError(
            f"eigh: derivatives are wanted of eigenvectors of {len(matrix)} rows, and "
            f"torch computes none beyond {SYEVD_ROWS}. Use .detach()ed tensors."
        )
    return _by_scipy(matrix, "evr")


def symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    """The eigenvalues of a symmetric matrix, ascending.

    Args:
        matrix: ``[n, n]``; what is above the diagonal is not read.

    Raises:
        MemoryError: As :func:`symmetric_eigenpairs`.
        ValueError: Likewise.
    """
    if matrix.requires_grad and torch.is_grad_enabled():
        # Second derivatives are those of the vectors.
        return symmetric_eigenpairs(matrix)[0]
    _check_finite(matrix)
    if len(matrix) <= _VERY_FEW_ROWS or not _is_for_scipy(matrix):
        return torch.linalg.eigvalsh(matrix)
    if _in_two_stages(matrix):
        with _mkl_threads_for(len(matrix)):
            return torch.linalg.eigvalsh(matrix)
    scale, evals, _ = _reduced(matrix)
    return evals.div_(scale)


def largest_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of a symmetric matrix, ascending, and eigenvectors.

    On the CPU by LAPACK's ``?syevr``, which spares the other eigenvectors.

    Args:
        matrix: ``[n, n]``.
        k: At most n.

    Raises:
        MemoryError: As :func:`symmetric_eigenpairs`.
        ValueError: Likewise.
    """
    _check_finite(matrix)
    if not _is_for_scipy(matrix):
        evals, evecs = symmetric_eigenpairs(matrix)
        return evals[-k:], evecs[:, -k:]
    _check_rows(matrix)
    return _by_scipy(matrix, "evr", [len(matrix) - k, len(matrix) - 1])


class Tridiagonal:
    """A symmetric matrix A = Q T Qᵀ with tridiagonal T, on the CPU.

    To find T is most of the work for eigenvalues alone, and for a few vectors. Where it
    depends on the eigenvalues which vectors are wanted, both take half as long together
    as all pairs do.

    Args:
        matrix: A, ``[n, n]``.

    Attributes:
        eigenvalues: All, ascending, ``[n]``.

    Raises:
        MemoryError: As :func:`symmetric_eigenpairs`.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._scale, values, found = _reduced(matrix)
        self._reflectors, self._diagonal, self._beside, self._scales = found
        self.eigenvalues = values.div(self._scale)

    @classmethod
    def of(cls, matrix: Tensor) -> Self | None:
        """Return that of a matrix, or None where all pairs take no more."""
        few = len(matrix) <= _VERY_FEW_ROWS
        return None if few or not _is_for_scipy(matrix) else cls(matrix)

    @property
    def nbytes(self) -> int:
        """What it takes to be kept."""
        return int(self._reflectors.nbytes)

    def eigenvectors(self, first: int, last: int) -> Tensor | None:
        """Those from one index to another, both included: ``[n, K]``.

        None where LAPACK does not find them, which happens where very many eigenvalues
        are the same but for rounding.
        """
        with threads_for(len(self.eigenvalues)):
            try:
                values, inner = scipy.linalg.eigh_tridiagonal(
                    self._diagonal, self._beside, select="i", select_range=(first, last)
                )
            except np.linalg.LinAlgError:
                return None
            if not self._are_pairs(values, inner):
                return None
            # Q leaves the first entries alone; the others it turns as in Q R.
            below = np.asfortranarray(self._reflectors[1:, :-1])
            (turn,) = get_lapack_funcs(("ormqr",), (below, inner))
            size = _BLOCK * inner.shape[1]
            inner[1:], *_ = turn("L", "N", below, self._scales, inner[1:], size)
        return torch.from_numpy(inner)

    def _are_pairs(self, values: np.ndarray, vectors: np.ndarray) -> bool:
        """Whether these are eigenpairs of T, and vectors ``[n, K]`` independent."""
        residual = (self._diagonal[:, None] - values) * vectors
        residual[1:] += self._beside[:, None] * vectors[:-1]
        residual[:-1] += self._beside[:, None] * vectors[1:]
        size = np.abs(self._diagonal).max() + 2.0 * np.abs(self._beside).max()
        rows, eps = len(vectors), np.finfo(vectors.dtype).eps
        overlaps = vectors.T @ vectors - np.eye(len(values))
        right = np.abs(residual).max() <= 10.0 * rows**0.5 * eps * size
        return bool(right and np.abs(overlaps).max() <= eps**0.5)


def _check_apart(evals: Tensor, gradients: Tensor | None) -> None:
    """Refuse derivatives of vectors whose eigenvalues are not apart from others.

    They are divided by the difference of two eigenvalues, of which rounding leaves less
    than half of the digits where that is below √eps λ_max.
    """
    if gradients is None:
        return
    gaps, used = (evals[:, None] - evals).abs(), gradients.abs().amax(0) > 0.0
    near = gaps <= torch.finfo(evals.dtype).eps ** 0.5 * evals.abs().max()
    wanted = used[:, None] | used | (gaps == 0.0)
    if (near & wanted).fill_diagonal_(False).any():
        raise ValueError(
            "eigh: derivatives are wanted of eigenvectors of eigenvalues that are the "
            "same, or nearly, where they have none. Use .detach()ed tensors, or "
            "torch.linalg.solve, logdet or another function of op.to_dense()."
        )


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
    with threads_for(len(matrix)):
        found = scipy.linalg.eigh(
            matrix.numpy(), subset_by_index=chosen, driver=driver, check_finite=False
        )
    evals, evecs = map(torch.from_numpy, found)
    return evals, evecs


def _in_two_stages(matrix: Tensor) -> bool:
    """Whether torch gets eigenvalues sooner, by way of a band."""
    rows = len(matrix)
    if rows <= _ONE_STAGE_ROWS.get(matrix.dtype, SYEVD_ROWS) or rows > SYEVD_ROWS:
        return False
    if not torch.backends.mkl.is_available():
        return False
    as_they_are = torch.get_num_threads() == 1 or rows > _FEW_ROWS
    return as_they_are or _set_mkl_threads() is not None


def _check_finite(matrix: Tensor) -> float:
    """Return the largest entry's size; an error where some are no numbers.

    Of these LAPACK makes numbers now and then. A GPU's solvers say so themselves, and
    the host would have to wait for the entries.
    """
    if not matrix.numel() or matrix.device.type != "cpu":
        return 0.0
    size = max(abs(matrix.amin().item()), abs(matrix.amax().item()))
    if not math.isfinite(size):
        raise ValueError(
            "eigh: the matrix must not contain infs or NaNs. Its entries may be too "
            f"large for {matrix.dtype}."
        )
    return size


def _reduced(matrix: Tensor) -> tuple[float, Tensor, tuple[np.ndarray, ...]]:
    """Scale a matrix, and return its eigenvalues and tridiagonal form.

    Returns:
        By what it is scaled, its eigenvalues then, ascending, and reflectors, the
        diagonal, what is beside it, and the reflectors' scales.
    """
    _check_rows(matrix)
    # Products of very large or very small entries are no numbers. Neither may be what
    # they are scaled by.
    size = _check_finite(matrix)
    most = -math.frexp(torch.finfo(matrix.dtype).tiny)[1]
    scale = 2.0 ** min(max(-math.frexp(size)[1], -most), most)
    columns = np.asfortranarray((scale * matrix).numpy())
    reduce, roots = get_lapack_funcs(("sytrd", "sterf"), (columns,))
    with threads_for(len(columns)):
        *found, _ = reduce(columns, 1, _BLOCK * len(columns), overwrite_a=True)
        evals, failed = roots(found[1], found[2])
    if failed:
        raise np.linalg.LinAlgError(f"eigh: {failed} eigenvalues do not converge.")
    return scale, torch.from_numpy(evals), tuple(found)


def _check_rows(matrix: Tensor) -> None:
    if len(matrix) > LAPACK_ROWS:
        raise MemoryError(
            f"eigh: a matrix of {len(matrix)} rows has more entries than LAPACK counts "
            f"(its limit is {LAPACK_ROWS} rows). Ask for k= of the largest eigenpairs "
            "of a GGN or Fisher matrix, or use scipy.sparse.linalg.eigsh(op, k)."
        )


def _is_for_scipy(matrix: Tensor) -> bool:
    """Whether it is on the CPU, and nobody wants derivatives, which would be lost."""
    followed = matrix.requires_grad or is_followed(matrix)
    return matrix.device.type == "cpu" and not followed


def threads_for(rows: int) -> AbstractContextManager[None]:
    """Run NumPy's and SciPy's BLAS in one thread for few rows, in all threads."""
    return _ONE_THREAD.inside() if rows <= _FEW_ROWS else nullcontext()


# What sets the number of threads; finding the libraries takes milliseconds.
_scipy_threads = cache(ThreadpoolController)


def _set_one_thread(_: torch.device | None, undo: Undo) -> None:
    limited = _scipy_threads().limit(limits=1, user_api="blas")
    undo.append(limited.restore_original_limits)


_ONE_THREAD = Shared(_set_one_thread)


@cache
def _set_mkl_threads() -> Callable[[int], int] | None:
    """What sets the threads of MKL for the calling thread alone, if torch has that.

    It returns the number before.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
        found = library.MKL_Set_Num_Threads_Local
    # Another system, or another library for linear algebra.
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_int], ctypes.c_int
    return found


@contextmanager
def _mkl_threads_for(rows: int) -> Iterator[None]:
    """Run MKL in one thread for few rows; other threads of the process see nothing."""
    put = _set_mkl_threads() if rows <= _FEW_ROWS else None
    if put is None:
        yield
        return
    before = put(1)
    try:
        yield
    finally:
        put(before)


# Decomposed once ----------------------------------------------------------------------


@dataclass
class KeptMatrix:
    """A symmetric matrix that is computed once, and its decomposition.

    It knows nothing of what it is computed from. Over several processes each has some
    of its rows.

    Attributes:
        budget: Returns how many bytes eigenvectors may take to be kept; None for any
            number.
        matrix: ``[n, n]``, or None while it has not been computed.
        rows: Those of this process, where there are several.
        eigenvalues: Ascending, ``[n]``, while there are no eigenpairs.
        nonnegative: The largest of them, with zeros where rounding left less.
        eigenpairs: All.
        tridiagonal: What has all eigenvalues, and vectors of a few.
    """

    budget: Callable[[], int] | None = None
    matrix: Tensor | None = None
    rows: RankRows | None = None
    eigenvalues: Tensor | None = None
    nonnegative: Tensor | None = None
    eigenpairs: Pairs | None = None
    tridiagonal: Tridiagonal | None = None

    @property
    def known(self) -> bool:
        """Whether it has been computed."""
        return self.matrix is not None or self.rows is not None

    @property
    def decomposed(self) -> bool:
        """Whether its eigenpairs are kept."""
        return self.eigenpairs is not None

    @property
    def has_eigenvalues(self) -> bool:
        """Whether its eigenvalues are kept, alone or with eigenvectors."""
        return self.decomposed or self.eigenvalues is not None

    def has_room(self, nbytes: int) -> bool:
        """Whether something as large may be kept."""
        return self.budget is None or nbytes <= self.budget()
