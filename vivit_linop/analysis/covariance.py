"""The covariance of fitted parameters: error bars of a least-squares fit."""

from __future__ import annotations

import torch
from torch import Tensor

from vivit_linop.arguments import check_flag
from vivit_linop.curvature.blocks import spans_of
from vivit_linop.curvature.ggn import GGNFactor
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.devices import check_matrix_fits
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.verbs import column_pieces
from vivit_linop.risk.empirical import EmpiricalRisk, check_risk
from vivit_linop.risk.losses.derived import without_items_and_weights
from vivit_linop.risk.losses.elementwise import SquaredError


class ParameterCovariance:
    """The covariance matrix of all parameters, and its blocks by name.

    ``cov["weight"]`` is the block of one parameter, ``cov["weight", "bias"]`` that
    between two; rows and columns are entries in the parameter's order.

    Args:
        matrix: ``[D, D]``, in the order of the risk's parameters.
        risk: The risk.

    Attributes:
        matrix: The matrix.
    """

    def __init__(self, matrix: Tensor, risk: EmpiricalRisk) -> None:
        self.matrix, self._risk = matrix, risk
        self._places = {n: slice(*span) for n, span in spans_of(risk).items()}

    def __getitem__(self, names: str | tuple[str, str]) -> Tensor:
        """Return a block, ``[d, d']``."""
        row, column = (names, names) if isinstance(names, str) else names
        for name in (row, column):
            if name not in self._places:
                raise KeyError(
                    f"{name!r} is not a parameter of the risk, these are "
                    f"{list(self._places)}."
                )
        return self.matrix[self._places[row], self._places[column]]

    def standard_errors(self) -> dict[str, Tensor]:
        """Return the roots of the variances, in the shapes of the parameters."""
        roots = self._risk.unflatten(self.matrix.diagonal().sqrt())
        return dict(zip(self._risk.params, roots, strict=True))

    def __repr__(self) -> str:
        """Say of how many parameters it is."""
        return f"<ParameterCovariance of {list(self._places)}, {self.matrix.dtype}>"


@ordinary_mode()
def covariance(
    risk: EmpiricalRisk, absolute_sigma: bool = False
) -> ParameterCovariance:
    """Return the covariance of the parameters at a minimum of the risk.

    Of ``nn.MSELoss``, s² (JᵀJ)⁻¹ with s² = Σ (f − y)² / (N·C − D): the ``pcov`` of
    ``scipy.optimize.curve_fit``. With weights of samples, ``vl.losses.Weighted``, s²
    (JᵀW J)⁻¹ with s² = Σ w (f − y)² / (N·C − D), without samples of weight zero:
    ``curve_fit(…, sigma=σ)`` for w = 1/σ². Of any other negative log-likelihood with a
    convex loss, the inverse of the GGN of its sum, whatever a mean divides by: of the
    Fisher information of all samples (for exponential families). With
    ``nn.GaussianNLLLoss`` and the variances σ² as targets, ``curve_fit(…, sigma=σ,
    absolute_sigma=True)``.

    J is factorised by Householder reflections, some samples at a time, so that its
    condition number is not squared; memory is two D × D matrices in float64. One pass
    over the data, with C (or R) columns a sample, and N·C·D² operations.

    Args:
        risk: N samples, D parameters.
        absolute_sigma: Whether of ``nn.MSELoss`` s² is 1: the residuals, times √w, are
            in units of their standard deviation.

    Raises:
        ValueError: If the data do not determine all parameters, or leave no residual
            to take s² from; if the loss is not convex.
        MemoryError: If D × D entries do not fit.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net, X = nn.Linear(1, 1), torch.linspace(0, 1, 50).unsqueeze(1)
        >>> y = net(X).detach() + 0.1 * torch.randn(50, 1)
        >>> cov = vl.covariance(vl.EmpiricalRisk(net, nn.MSELoss(), (X, y)))
        >>> cov["weight", "bias"].shape, cov.standard_errors()["weight"].shape
        (torch.Size([1, 1]), torch.Size([1, 1]))
    """
    check_risk(risk)
    squares = isinstance(without_items_and_weights(risk.loss), SquaredError)
    D = risk.num_params
    with risk.ranks.together(f"covariance {absolute_sigma}"):
        check_flag(absolute_sigma, "absolute_sigma")
        if absolute_sigma and not squares:
            raise ValueError(
                f"absolute_sigma: is for nn.MSELoss; {risk.loss.name} is a likelihood, "
                "which has its own scale."
            )
        check_matrix_fits("a covariance", (2 * D, D), torch.float64, risk.device)
    R = triangular_factor(GGNFactor(risk))
    unit = torch.eye(D, dtype=R.dtype, device=R.device)
    inverse = torch.linalg.solve_triangular(R, unit, upper=True)
    matrix = inverse @ inverse.T
    # Of squares, G = 2 · scale · JᵀW J. A mean may divide by more than N.
    matrix *= 2.0 * risk.scale if squares else risk.scale
    if squares and not absolute_sigma:
        matrix *= _residual_variance(risk)
    return ParameterCovariance(matrix.to(risk.dtype), risk)


def triangular_factor(factor: Pullback) -> Tensor:
    """Return R of VᵀQ R, triangular ``[D, D]``, with V Vᵀ = RᵀR, in float64.

    Raises:
        ValueError: If V has numerically less than full rank.
    """
    D, columns = factor.shape
    R = torch.zeros(0, D, dtype=torch.float64, device=factor.device)
    for _, piece in column_pieces(factor):
        R = torch.linalg.qr(torch.cat([R, piece.T.double()]), mode="r").R
    # Units of the parameters say nothing of the rank: columns are brought to one size.
    sizes = R.norm(dim=0)
    scaled = R / torch.where(sizes > 0, sizes, 1.0)
    rounding = max(D, columns) * torch.finfo(factor.torch_dtype).eps
    rank = int(torch.linalg.matrix_rank(scaled, rtol=rounding))
    if rank < D:
        raise ValueError(
            f"risk: its data determine {rank} of {D} combinations of the parameters, "
            f"so the covariance of the others is infinite in {factor.torch_dtype}. "
            "Leave parameters out (params=), take more samples, or a prior: "
            "vl.posterior_precision(risk, vl.GGN(risk), prior).inv()."
        )
    return R


def _residual_variance(risk: EmpiricalRisk) -> float:
    """Return s²."""
    sums = torch.zeros(2, dtype=torch.float64, device=risk.device)
    for output, target in zip(risk.outputs, risk.all_targets, strict=True):
        weighted = isinstance(target, tuple)
        y, w = target if weighted else (target, output.new_ones(len(output)))
        # Weights are those of samples, or of the items in them.
        each = (output - y).double().square().reshape(*w.shape, -1)
        sums[0] += (each.sum(-1) * w).sum()
        sums[1] += (w > 0).sum() * each.shape[-1]
    total, count = risk.ranks.total(sums).tolist()
    residuals = int(count)
    if residuals <= risk.num_params:
        raise ValueError(
            f"risk: {residuals} residuals leave nothing to estimate their variance "
            f"from, after {risk.num_params} parameters. With residuals in units of "
            "their standard deviation give absolute_sigma=True."
        )
    return total / (residuals - risk.num_params)
