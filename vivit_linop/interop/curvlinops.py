"""Operators of curvlinops as ours, and ours for the estimators of curvlinops."""

from __future__ import annotations

from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from vivit_linop.extras import extra
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.dispatch import no_inverse
from vivit_linop.operators.verbs import damped_inv, to_curvlinops


def from_curvlinops(op: Any) -> TorchLinearOperator:
    """Return an operator of curvlinops as one of ours.

    It then takes part in expressions, and in SciPy without a conversion: ``eigsh(A)``.
    curvlinops computes on the model's present parameters, so what it multiplies by
    changes with them (its KFAC and EKFAC keep the factors of their first product).

    Args:
        op: A linear operator of curvlinops.

    Raises:
        TypeError: If it is none.

    Example:
        >>> import curvlinops, torch, vivit_linop as vl
        >>> from torch import nn
        >>> net, data = nn.Linear(3, 1), (torch.rand(4, 3), torch.rand(4, 1))
        >>> loss = nn.MSELoss()
        >>> H = curvlinops.HessianLinearOperator(
        ...     net, loss, list(net.parameters()), [data]
        ... )
        >>> G = vl.GGN(net, loss, data)
        >>> x = torch.ones(4)  # for a linear model the GGN is the Hessian
        >>> torch.allclose((vl.from_curvlinops(H) - G) @ x, torch.zeros(4), atol=1e-5)
        True
    """
    if isinstance(op, CurvlinopsView):
        return op.operator
    needed = ("shape", "dtype", "device", "adjoint", "SELF_ADJOINT", "__matmul__")
    missing = [name for name in needed if not hasattr(op, name)]
    if missing:
        raise TypeError(
            f"op: a linear operator of curvlinops, got {type(op).__name__} without "
            f"{missing[0]!r}."
        )
    return CurvlinopsOperator(op)


class CurvlinopsOperator(TorchLinearOperator):
    """An operator of curvlinops; made by :func:`from_curvlinops`."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.self_adjoint = bool(operator.SELF_ADJOINT)
        rows, columns = operator.shape
        super().__init__((int(rows), int(columns)), operator.dtype, operator.device)

    def _multiply(self, X: Tensor) -> Tensor:
        with torch.enable_grad():
            return (self.operator @ X).detach()

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        with torch.enable_grad():
            return (self.operator.adjoint() @ X).detach()


class CurvlinopsView:
    """One of our operators with the interface of curvlinops' estimators.

    Made by ``op.to_curvlinops()``. It multiplies tensors, and has what
    ``hutchpp_trace`` and the like ask for; :func:`from_curvlinops` gives the operator
    back.

    Attributes:
        shape: Rows and columns.
        dtype: The torch dtype.
        device: The torch device.
    """

    def __init__(self, operator: TorchLinearOperator) -> None:
        self.operator = operator
        self.shape = tuple(operator.shape)
        self.dtype, self.device = operator.torch_dtype, operator.device
        self.SELF_ADJOINT = operator.self_adjoint

    def __matmul__(self, X: Tensor) -> Tensor:
        """Multiply a vector or the columns of a matrix."""
        return self.operator @ X

    def adjoint(self) -> CurvlinopsView:
        """Return the adjoint."""
        return CurvlinopsView(self.operator.T)

    @property
    def T(self) -> CurvlinopsView:
        """The adjoint."""
        return self.adjoint()

    def to_scipy(self, dtype: Any = None) -> LinearOperator:
        """Return the operator itself, which is one of SciPy's."""
        return self.operator


@to_curvlinops.register
def view_for_curvlinops(op: TorchLinearOperator) -> CurvlinopsView:
    """The operator, seen as curvlinops expects it."""
    return CurvlinopsView(op)


@damped_inv.register
def damped_inverse_of_curvlinops(
    op: CurvlinopsOperator, damping: float
) -> TorchLinearOperator:
    """The inverse of curvlinops' (E)KFAC + δ I, exactly damped; it has no others."""
    with extra("curvlinops"):
        from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    if not isinstance(op.operator, KFACLinearOperator):
        raise no_inverse(op, "a damped ")
    inverse = KFACInverseLinearOperator(
        op.operator, damping=damping, use_exact_damping=True
    )
    return CurvlinopsOperator(inverse)
