"""SciPy's linear operators, sparse matrices and arrays as operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from vivit_linop.arguments import check_flag
from vivit_linop.operators.base import TorchLinearOperator


def from_scipy(
    op: Any, *, self_adjoint: bool = False, device: torch.device | str | None = None
) -> TorchLinearOperator:
    """Return a SciPy linear operator, sparse matrix or array as one of ours.

    Products go through numpy arrays, so on a GPU each one costs two transfers.

    Args:
        op: What ``scipy.sparse.linalg.aslinearoperator`` takes. float32 stays, all
            other real dtypes become float64.
        self_adjoint: Whether it equals its adjoint; SciPy's do not say.
        device: Where products with tensors come out.

    Raises:
        TypeError: If it is no linear operator, or complex, or its products are.
        ValueError: If it is said to equal its adjoint, and is not square.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from scipy.sparse import diags
        >>> A = vl.from_scipy(diags([1.0, 2.0]), self_adjoint=True)
        >>> (A + vl.Identity(2)) @ torch.ones(2)
        tensor([2., 3.], dtype=torch.float64)
    """
    if isinstance(op, TorchLinearOperator):
        return op
    check_flag(self_adjoint, "self_adjoint")
    try:
        operator = aslinearoperator(op)
    except TypeError:
        raise TypeError(
            f"op: an operator or a matrix of SciPy's, got {type(op).__name__}."
        ) from None
    return ScipyOperator(operator, self_adjoint, device)


class ScipyOperator(TorchLinearOperator):
    """A SciPy linear operator; made by :func:`from_scipy`."""

    def __init__(
        self,
        operator: LinearOperator,
        self_adjoint: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if np.issubdtype(operator.dtype, np.complexfloating):
            raise TypeError(f"op: must be real, got {operator.dtype}.")
        single = operator.dtype == np.float32
        self.operator = operator
        self.self_adjoint = self_adjoint
        rows, columns = operator.shape
        if self_adjoint and rows != columns:
            raise ValueError(
                f"self_adjoint: an operator of shape {(rows, columns)} is not square."
            )
        super().__init__(
            (rows, columns), torch.float32 if single else torch.float64, device
        )

    def _settled(
        self, dtype: torch.dtype | None, device: torch.device | None
    ) -> ScipyOperator:
        return ScipyOperator(self.operator, self.self_adjoint, device)

    def _multiply(self, X: Tensor) -> Tensor:
        return self._through_numpy(self.operator.matmat, X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self._through_numpy(self.operator.rmatmat, X)

    def _through_numpy(self, function: Callable[..., Any], X: Tensor) -> Tensor:
        product = function(np.ascontiguousarray(X.cpu().numpy()))
        if np.iscomplexobj(product):
            raise TypeError(
                f"op: its products are {product.dtype}, it says {self.operator.dtype}."
            )
        # A copy: a product may be what went in.
        array = np.array(product, dtype=self.dtype, order="C")
        return torch.from_numpy(array).to(X.device, self.torch_dtype)
