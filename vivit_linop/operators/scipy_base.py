"""SciPy's ``LinearOperator``: what type checkers are to know of it, what it calls.

SciPy comes without types. To mypy a class of an untyped base may be anything, also an
``int``, so that ``2 * A`` would be one. With the package ``scipy-stubs`` SciPy's
functions have types, and take what is seen here for an array, which it is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vivit_linop.arguments import as_torch_takes, check_numbers

if TYPE_CHECKING:

    class LinearOperator:
        """What is used of SciPy's class."""

        ndim: int
        shape: tuple[int, int]
        dtype: np.dtype[Any]

        def __init__(self, dtype: Any, shape: tuple[int, int]) -> None: ...
        def __getstate__(self) -> dict[str, Any]: ...
        def __array__(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]: ...
        def __len__(self) -> int: ...
        def matvec(self, x: Any) -> Any: ...
        def matmat(self, X: Any) -> Any: ...
        def rmatvec(self, x: Any) -> Any: ...
        def rmatmat(self, X: Any) -> Any: ...
        def dot(self, x: Any) -> Any: ...
        def __add__(self, x: Any) -> Any: ...
        def __neg__(self) -> LinearOperator: ...
        def __call__(self, x: Any) -> Any: ...

else:
    from scipy.sparse.linalg import LinearOperator

__all__ = ["LinearOperator", "NumpyProducts"]


class NumpyProducts(LinearOperator):
    """Products with numpy arrays by those with tensors."""

    if TYPE_CHECKING:  # what the class of all operators has
        T: NumpyProducts

        def apply(self, X: Tensor) -> Tensor:
            """Multiply the columns of a matrix, ``[n, K] -> [m, K]``."""

    def _product_numpy(self, X: np.ndarray) -> np.ndarray:
        """Multiply a numpy matrix ``[n, K]``."""
        X = np.asarray(X)
        check_numbers(X)
        if X.dtype.kind == "c":  # all operators are real
            both = self._product_numpy(np.concatenate([X.real, X.imag], axis=1))
            real, imaginary = np.split(both, 2, axis=1)
            return np.asarray(real + 1j * imaginary)
        # SciPy finds out dtypes with integers; torch has no extended precision.
        if X.dtype not in (np.float32, np.float64):
            X = X.astype(self.dtype)
        result = self.apply(torch.from_numpy(as_torch_takes(X)))
        return result.detach().cpu().numpy()

    # SciPy calls these hooks, always with numpy arrays. SciPy 1.18 hands batches
    # [..., n] to `_matvec`; before, also columns [n, 1].
    def _matvec(self, x: np.ndarray) -> np.ndarray:
        rows, columns = self.shape
        if x.shape[-1] != columns:
            x = x.reshape(columns)
        product = self._product_numpy(x.reshape(-1, columns).T)
        return product.T.reshape(*x.shape[:-1], rows)

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        if X.ndim == 2:
            return self._product_numpy(X)
        return np.stack([self._matmat(x) for x in X])

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self.T._matvec(x)

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        return self.T._matmat(X)
