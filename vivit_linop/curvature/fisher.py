"""Per-sample gradients and the empirical Fisher matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vivit_linop.curvature.blocks import ParameterBlocks, block_diagonal
from vivit_linop.curvature.ggn import GGNFactor
from vivit_linop.curvature.jacobian import Jacobian, Pullback
from vivit_linop.curvature.output_space import LossGradient
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.verbs import gram_matrix
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk


class PerSampleGradients(Pullback):
    """U: the gradients of the samples' losses as columns, ``[D, N]``.

    Column n is ∇ℓ_n, without r: the gradient of the risk is r U 1.

    Args:
        risk: An :class:`EmpiricalRisk`, or a model, followed by ``loss``, ``data`` and
            ``params`` as for :class:`EmpiricalRisk`.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
        >>> U = vl.PerSampleGradients(risk)
        >>> torch.allclose(U @ torch.ones(4) / 4, risk.gradient())
        True
    """

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
    ) -> None:
        risk = as_risk(risk, loss, data, params)
        super().__init__(Jacobian(risk), LossGradient(risk))

    @property
    def gradient(self) -> LossGradient:
        """The gradients in output space."""
        assert isinstance(self.blocks, LossGradient)
        return self.blocks


@gram_matrix.register
def _(left: PerSampleGradients, right: TorchLinearOperator) -> Tensor:
    """From the Gram matrix VᵀV where that is known: u_n = Σ_r c_nr v_nr."""
    if (
        isinstance(right, GGNFactor)
        and right.risk is left.risk
        and "matrix" in right.gram.__dict__
    ):
        coordinates = right.root.coordinates(left.gradient)
        if coordinates is not None:
            K = right.gram.matrix
            rows = K.view(*coordinates.shape, K.shape[1])
            return torch.einsum("nr,nrk->nk", coordinates, rows)
    return gram_matrix.dispatch(Pullback)(left, right)


class EmpiricalFisher(LowRank):
    """F = r U Uᵀ = r Σ_n ∇ℓ_n ∇ℓ_nᵀ: the empirical Fisher matrix, ``[D, D]``.

    Args:
        risk: An :class:`EmpiricalRisk`, or a model, followed by ``loss``, ``data`` and
            ``params`` as for :class:`EmpiricalRisk`.

    Attributes:
        factor: U, a :class:`PerSampleGradients`.
        scale: r.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> vl.EmpiricalFisher(nn.Linear(3, 1), nn.MSELoss(), data).eigvalsh().shape
        torch.Size([4])
    """

    factor: PerSampleGradients

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
    ) -> None:
        risk = as_risk(risk, loss, data, params)
        super().__init__(PerSampleGradients(risk), risk.reduction_factor)

    def block_diagonal(self, blocks: ParameterBlocks) -> BlockDiagonal:
        """Return the block-diagonal of F over blocks of parameters.

        Args:
            blocks: As for :meth:`vivit_linop.GGN.block_diagonal`. The Gram matrix of
                the per-sample gradients of one block is ``block.gram.to_dense()``.

        Raises:
            ValueError: If a parameter is missing, foreign or listed twice.
        """
        return block_diagonal(self, blocks)
