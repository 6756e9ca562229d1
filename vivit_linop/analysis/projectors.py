"""Projectors onto the span of some directions, and onto its complement."""

from __future__ import annotations

import torch
from torch import Tensor

from vivit_linop.arguments import check_flag, check_has_values
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.elementary import Dense, Identity
from vivit_linop.operators.lowrank import LowRank


@ordinary_mode()
def projector(
    directions: Eigenpairs | Tensor, complement: bool = False
) -> TorchLinearOperator:
    """Return P = E Eᵀ, the orthogonal projector onto a span, ``[D, D]``, or I − P.

    Projecting an operator A onto the span or its complement is ``P @ A @ P``. A product
    costs two with the ``[D, K]`` matrix E of orthonormal columns.

    Args:
        directions: Eigenpairs, whose eigenvectors are formed; or linearly independent
            columns ``[D, K]``, which are made orthonormal.
        complement: Whether to project onto the orthogonal complement instead.

    Returns:
        A low-rank operator, or the identity minus one.

    Raises:
        TypeError: If ``directions`` is neither.
        ValueError: If it has another shape, or linearly dependent columns.

    Example:
        >>> import torch, vivit_linop as vl
        >>> P = vl.projector(torch.tensor([[1.0], [1.0]]))
        >>> (P @ torch.tensor([1.0, 3.0])).round(decimals=4)
        tensor([2., 2.])
        >>> Q = vl.projector(torch.tensor([[1.0], [1.0]]), complement=True)
        >>> (Q @ torch.tensor([1.0, 3.0])).round(decimals=4)
        tensor([-1.,  1.])
    """
    check_flag(complement, "complement")
    if isinstance(directions, Eigenpairs):
        E = directions.eigenvectors
    elif isinstance(directions, Tensor):
        E = _orthonormal(directions.detach())
    else:
        raise TypeError(
            "directions: what eigh returned, or a tensor [D, K], got "
            f"{type(directions).__name__}."
        )
    P = LowRank(Dense(E))
    if not complement:
        return P
    difference: TorchLinearOperator = Identity(len(E), E.dtype, E.device) - P
    return difference


def _orthonormal(columns: Tensor) -> Tensor:
    if columns.ndim != 2 or not 1 <= columns.shape[1] <= columns.shape[0]:
        raise ValueError(
            f"directions: columns [D, K] with K from 1 to D, got {list(columns.shape)}."
        )
    if columns.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"directions: float32 or float64, got {columns.dtype}.")
    check_has_values(columns, "directions: a tensor")
    if not columns.isfinite().all():
        raise ValueError("directions: hold NaN or Inf.")
    # Of a size whose square is a number.
    columns = columns / columns.abs().amax(0, keepdim=True).clamp(
        min=torch.finfo(columns.dtype).tiny
    )
    Q, R = torch.linalg.qr(columns)
    heights = R.diagonal().abs()
    eps = torch.finfo(columns.dtype).eps
    lengths = columns.norm(dim=0)
    if not (heights > 10 * eps * len(columns) ** 0.5 * lengths).all():
        raise ValueError("directions: the columns are linearly dependent.")
    return Q
