"""Per-sample gradients and the empirical Fisher matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vivit_linop.curvature.blocks import (
    ParameterBlocks,
    block_diagonal,
    parameter_groups,
)
from vivit_linop.curvature.column_sums import (
    gram_matrix_of_pullback,
    gram_rows_of_pullback,
    sum_columns,
)
from vivit_linop.curvature.ggn import GGNFactor
from vivit_linop.curvature.jacobian import Jacobian, Pullback
from vivit_linop.curvature.loss_hessian import LossGradient
from vivit_linop.modes import ordinary_mode
from vivit_linop.net.totals import ColumnNorms
from vivit_linop.operators.base import Op
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.lowrank import Centered, LowRank
from vivit_linop.operators.verbs import gram_matrix, gram_rows, row_norms_squared
from vivit_linop.ranks.alone import RankRows
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk


class PerSampleGradients(Pullback):
    """U: the gradients of the samples' losses as columns, ``[D, N]``.

    Column n is ∇ℓ_n, without r: the gradient of the risk is r U 1.

    Args:
        risk: An :class:`EmpiricalRisk`, or its arguments, ``model, loss, data, …``.

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
        **options: Any,
    ) -> None:
        risk = as_risk(risk, loss, data, params, **options)
        super().__init__(Jacobian(risk), LossGradient(risk))

    @property
    def gradient(self) -> LossGradient:
        """The gradients in output space."""
        assert isinstance(self.output, LossGradient)
        return self.output

    def squared_norms(self, blocks: ParameterBlocks | None = None) -> Tensor:
        """Return the squared norms ‖∇ℓ_n‖² of the samples' gradients, without r.

        One pass over the data; gradients of linear layers are not formed (for one
        position ‖b ⊗ a‖² = ‖b‖² ‖a‖²; Goodfellow 2015, arXiv:1510.01799), those of
        convolutions are if that is cheaper. BackPACK's ``BatchL2Grad`` is r² times the
        result for ``blocks="parameter"``.

        Args:
            blocks: None for whole gradients; or ``"parameter"``, ``"module"`` or
                groups of parameters, as for :meth:`vivit_linop.GGN.block_diagonal`, for
                their restrictions.

        Returns:
            ``[N]``, or ``[N, B]`` for B blocks.

        Raises:
            ValueError: If a parameter is missing in ``blocks``, foreign or listed
                twice.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> U = vl.PerSampleGradients(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> U.squared_norms("parameter").shape
            torch.Size([4, 2])
        """
        with ordinary_mode():
            if blocks is None:
                return row_norms_squared(self.T)
            total = ColumnNorms(self, parameter_groups(self.risk, blocks))
            return sum_columns(self, total).norms

    def second_moment(self) -> Tensor:
        """Return (1/N) Σ_n (∇ℓ_n)², entry by entry and without r, ``[D]``.

        One pass over the data; U is not formed where a layer is linear. BackPACK's
        ``SumGradSquared`` is r² N times this. ``risk.unflatten`` gives it the shapes of
        the parameters.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> U = vl.PerSampleGradients(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> torch.allclose(U.second_moment(), U.to_dense().square().mean(1))
            True
        """
        with ordinary_mode():
            return row_norms_squared(self) / self.shape[1]

    def variance(self) -> Tensor:
        """Return the variance of ∇ℓ_n over the samples, entry by entry, ``[D]``.

        The biased one, (1/N) Σ_n (∇ℓ_n − ∇ℓ̄)², without r; as the second moment less
        the squared mean, so that its absolute error is about eps times the second
        moment. One pass over the data, U is not formed where a layer is linear.
        BackPACK's ``Variance`` is r² times this. The diagonal of :meth:`covariance`.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> U = vl.PerSampleGradients(risk)
            >>> weight, bias = risk.unflatten(U.variance())
            >>> weight.shape
            torch.Size([1, 3])
        """
        with ordinary_mode():
            return row_norms_squared(self.centered()) / self.shape[1]

    def centered(self) -> Centered:
        """Return the operator with the columns ∇ℓ_n − ∇ℓ̄, ``[D, N]``.

        ``Uc = U.centered()``; ``Uc.T @ Uc`` is the centred Gram matrix. A product costs
        what one with U does.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> U = vl.PerSampleGradients(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> Uc = U.centered()
            >>> Uc.T @ Uc
            <4x4 Gram, torch.float32, cpu>
        """
        return Centered(self)

    def covariance(self) -> LowRank:
        """Return the covariance of ∇ℓ_n over the samples, ``[D, D]``.

        The biased one, (1/N) Σ_n (∇ℓ_n − ∇ℓ̄)(∇ℓ_n − ∇ℓ̄)ᵀ, without r: a low-rank
        operator whose spectrum and damped inverses come from the centred Gram matrix
        of size N: a forward and a backward pass. A product costs two with U.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> U = vl.PerSampleGradients(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> torch.allclose(U.covariance().diagonal(), U.variance())
            True
        """
        return LowRank(self.centered(), 1.0 / self.shape[1])


@gram_matrix.register
def gram_matrix_of_gradients(left: PerSampleGradients, right: Op) -> Tensor:
    """From the Gram matrix VᵀV where that is known: u_n = Σ_r c_nr v_nr."""
    if (rows := gram_rows_of_gradients(left, right)) is not None:
        return rows.whole()
    coordinates = _coordinates(left, right)
    if coordinates is not None and isinstance(right, GGNFactor):
        return _combined(coordinates, right.gram.matrix)
    return gram_matrix_of_pullback(left, right)


@gram_rows.register
def gram_rows_of_gradients(left: PerSampleGradients, right: Op) -> RankRows | None:
    """From the rows of VᵀV, where these are known."""
    coordinates = _coordinates(left, right) if left.ranks.is_many else None
    K = right.gram.rows if isinstance(right, GGNFactor) else None
    if coordinates is None or K is None:
        return gram_rows_of_pullback(left, right)
    own = left.layout.of_all(coordinates)
    return RankRows(left.ranks, _combined(own, K.own), left.layout.before)


def _coordinates(U: PerSampleGradients, V: Op) -> Tensor | None:
    """Gradients in terms of columns of V whose Gram matrix is known, ``[N, R]``."""
    if isinstance(V, GGNFactor) and V.risk is U.risk and V.gram.known:
        return V.root.coordinates(U.gradient)
    return None


def _combined(coordinates: Tensor, K: Tensor) -> Tensor:
    """Σ_r c_nr K_nr, ``[n, N·R]``."""
    rows = K.view(*coordinates.shape, K.shape[1])
    return torch.einsum("nr,nrk->nk", coordinates, rows)


class EmpiricalFisher(LowRank):
    """F = r U Uᵀ = r Σ_n ∇ℓ_n ∇ℓ_nᵀ: the empirical Fisher matrix, ``[D, D]``.

    Args:
        risk: An :class:`EmpiricalRisk`, or its arguments, ``model, loss, data, …``.

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
        **options: Any,
    ) -> None:
        risk = as_risk(risk, loss, data, params, **options)
        super().__init__(PerSampleGradients(risk), risk.reduction_factor)

    def block_diagonal(self, blocks: ParameterBlocks) -> BlockDiagonal:
        """Return the block-diagonal of F over blocks of parameters, ``[D, D]``.

        Costs nothing; the Gram matrices of all blocks come from one pass over the data.

        Args:
            blocks: As for :meth:`vivit_linop.GGN.block_diagonal`. The Gram matrix of
                the per-sample gradients of one block is ``block.gram.to_dense()``.

        Raises:
            ValueError: If a parameter is missing, foreign or listed twice.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> F = vl.EmpiricalFisher(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> F.block_diagonal("parameter").blocks[0].gram
            <4x4 Gram, torch.float32, cpu>
        """
        return block_diagonal(self, blocks)
