"""Damped Newton steps in the whole space, and what they promise."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vivit_linop.analysis.predictive import check_square
from vivit_linop.arguments import check_finite
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.elementary import Identity
from vivit_linop.risk.empirical import EmpiricalRisk, check_risk


class TrustRegionStep(NamedTuple):
    """A step, and how much of the risk it is to take away.

    Attributes:
        step: ``[D]``; ``risk.unflatten(step)`` has the parameters' shapes.
        predicted_decrease: −gᵀs − ½ sᵀA s, without axes: by how much the quadratic
            model of the risk falls.
    """

    step: Tensor
    predicted_decrease: Tensor


@ordinary_mode()
def trust_region_step(
    risk: EmpiricalRisk,
    A: TorchLinearOperator,
    damping: float | TorchLinearOperator,
) -> TrustRegionStep:
    """Return s = −(A + δ I)⁻¹ g, and the decrease that the model of the risk predicts.

    The minimum of the model m(s) = L + gᵀs + ½ sᵀA s in a ball, whose radius falls
    with δ (Levenberg 1944; Nocedal & Wright, *Numerical Optimization*, §4.1 and §10.3).
    ρ = (L(θ) − L(θ + s)) / predicted says how good the model is: where ρ > ¾, take less
    damping in the next step; where ρ < ¼, more, and for ρ ≤ 0 try again.
    ``risk.at(θ + s)`` is the risk after the step.

    Costs a gradient and ``(A + δ I).solve(g)``: for a GGN its Gram matrix, for a
    Hessian products.

    Args:
        risk: L.
        A: Its curvature, self-adjoint ``[D, D]``, with r in it as it belongs to the
            risk.
        damping: δ; or an operator in the place of δ I, such as
            ``delta * vl.Diagonal(G.diagonal())`` (Marquardt 1963).

    Raises:
        TypeError: If A is not self-adjoint.
        ValueError: If A + δ I is not positive definite along the gradient, so that s
            does not descend.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(8, 3), torch.rand(8, 1))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
        >>> step, predicted = vl.trust_region_step(risk, vl.GGN(risk), damping=0.1)
        >>> after = risk.at(risk.flatten(risk.params) + step)
        >>> torch.allclose(risk.value() - after.value(), predicted)  # L is quadratic
        True
    """
    check_risk(risk)
    D = risk.num_params
    check_square(A, D, "A")
    if isinstance(damping, TorchLinearOperator):
        check_square(damping, D, "damping")
    else:
        check_finite(damping, "damping")
        damping = damping * Identity(D, A._own_dtype, A._own_device)
    g = risk.gradient()
    step = -((A + damping).solve(g))
    slope = g @ step
    if not slope < 0.0 and g.any():
        raise ValueError(
            f"damping: the step has the slope {slope:.3g} and does not descend, A + "
            "damping is not positive definite. Use a larger damping."
        )
    # sᵀA s = −gᵀs − sᵀP s, so no further product with A.
    return TrustRegionStep(step, -0.5 * slope + 0.5 * step @ (damping @ step))
