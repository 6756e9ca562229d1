"""SciPy's ``LinearOperator``, and what type checkers are to know of it.

SciPy comes without types. To mypy a class of an untyped base may be anything, also an
``int``, so that ``2 * A`` would be one. With the package ``scipy-stubs`` SciPy's
functions have types, and take what is seen here for an array, which it is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:

    class LinearOperator:
        """What is used of SciPy's class."""

        ndim: int
        shape: tuple[int, int]
        dtype: np.dtype[Any]

        def __init__(self, dtype: Any, shape: tuple[int, int]) -> None: ...
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

__all__ = ["LinearOperator"]
