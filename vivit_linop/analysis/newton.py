"""Damped Newton steps: in the span of some directions, and in the whole space."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vivit_linop.analysis.directions import as_directions, directional_derivatives
from vivit_linop.analysis.inner_products import check_square
from vivit_linop.arguments import as_real_numbers, check_finite, without_gradient
from vivit_linop.curvature.ggn import GGNFactor
from vivit_linop.linalg.decompositions import GramEigenpairs
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.elementary import Identity
from vivit_linop.risk.empirical import EmpiricalRisk, check_risk
from vivit_linop.risk.model.parameters import check_derivatives

Damping = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@ordinary_mode()
def damped_newton_step(
    risk: EmpiricalRisk,
    directions: Eigenpairs | Tensor,
    damping: float | Damping,
    curvature_risk: EmpiricalRisk | None = None,
) -> Tensor:
    """Return the damped Newton step in the span of some directions, ``[D]``.

    s = Σ_k −γ̄_k / (λ̄_k + δ_k) e_k, with γ̄ and λ̄ the means (for ``"sum"``: sums) of
    :func:`directional_derivatives` over the samples. The step stays in the span of the
    directions; the full-space step ``-(G + delta * I).inv() @ g`` also moves by −g/δ
    outside of it.

    Costs what :func:`directional_derivatives` does: for eigenpairs of G the cross-Gram
    matrix UᵀV, a backward pass and inner products; and a product of V with one vector.

    Args:
        risk: Whose gradient the step is for.
        directions: Eigenpairs, or orthonormal columns ``[D, K]``.
        damping: δ, one number for all directions, or a function
            ``(evals, gram_evecs, gammas, lambdas) -> [K]`` of the eigenvalues ``[K]``,
            the eigenvectors of the Gram matrix ``[N·R, K]``, and γ and λ.
        curvature_risk: Whose curvature is used; by default ``risk``.

    Returns:
        The step as a vector; ``risk.unflatten(step)`` has the parameters' shapes.

    Raises:
        TypeError: If ``damping`` is neither, or a function is given without eigenpairs
            of a low-rank operator.
        ValueError: If a damped curvature is not positive, or what the function returns
            does not have shape ``[K]``.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(6, 3), torch.rand(6, 1))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
        >>> step = vl.damped_newton_step(risk, vl.GGN(risk).eigh(k=2), damping=0.1)
        >>> step.shape
        torch.Size([4])
    """
    gammas, lambdas = directional_derivatives(risk, directions, curvature_risk)
    curvature_risk = risk if curvature_risk is None else curvature_risk
    pairs = as_directions(risk, directions)
    slope = gammas.sum(0) * risk.reduction_factor
    curvature = lambdas.sum(0) * curvature_risk.reduction_factor
    evecs = None
    if callable(damping) and isinstance(directions, Eigenpairs):
        evecs = gram_eigenvectors(pairs, GGNFactor(curvature_risk))
    dampings = evaluated_damping(damping, directions, evecs, gammas, lambdas)
    return newton_combination(pairs, slope, curvature, risk.ranks.agreed(dampings))


def newton_combination(
    pairs: Eigenpairs, slope: Tensor, curvature: Tensor, damping: Tensor
) -> Tensor:
    """Return Σ_k −slope_k / (curvature_k + damping_k) e_k, ``[D]``."""
    damped = curvature + damping
    if not (damped > 0).all():
        worst = int(damped.argmin())
        raise ValueError(
            f"damping: along direction {worst} curvature + damping is "
            f"{damped[worst]:.3g}, which must be positive. Use a larger damping."
        )
    return pairs.combine(-slope / damped)


def gram_eigenvectors(pairs: Eigenpairs, factor: TorchLinearOperator) -> Tensor:
    """Return the eigenvectors of VᵀV that belong to those of V Vᵀ, ``[R, K]``."""
    if isinstance(pairs, GramEigenpairs):
        return pairs.gram_eigenvectors
    components = pairs.components(factor)
    return normalize(components, dim=0, eps=torch.finfo(components.dtype).tiny)


def evaluated_damping(
    damping: float | Damping,
    directions: Eigenpairs | Tensor,
    gram_evecs: Tensor | None,
    gammas: Tensor,
    lambdas: Tensor,
) -> Tensor:
    """Return δ, a scalar or ``[K]``; a function needs ``gram_evecs``."""
    if not callable(damping):
        check_finite(damping, "damping")
        return lambdas.new_full((), without_gradient(damping, "damping"))
    if not isinstance(directions, Eigenpairs) or gram_evecs is None:
        raise TypeError(
            "damping: a function is given eigenvalues, so directions must be what eigh "
            "returned, not a tensor."
        )
    evals = directions.eigenvalues
    # The function may write into what it is given.
    given = [x.clone() for x in (evals, gram_evecs, gammas, lambdas)]
    result = as_real_numbers(damping(*given), "damping", evals.dtype).to(evals)
    if result.shape != evals.shape:
        raise ValueError(
            f"damping: the function must return [{len(evals)}], it returned "
            f"{list(result.shape)}."
        )
    return result


# In the whole space -----------------------------------------------------------------


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
    risk: EmpiricalRisk, A: TorchLinearOperator, damping: float | TorchLinearOperator
) -> TrustRegionStep:
    """Return s = −(A + δ I)⁻¹ g, and the decrease that the model of the risk predicts.

    The minimum of the model m(s) = L + gᵀs + ½ sᵀA s in a ball, whose radius falls
    with δ (Levenberg 1944; Nocedal & Wright, *Numerical Optimization*, §4.1 and §10.3);
    where A + δ I is indefinite, as of a Hessian and too small a δ, a saddle point of m.
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
        ValueError: If δ is negative; if A + δ I is not positive definite along the
            gradient, so that s does not descend; if the gradient has NaN or Inf.

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
        if damping < 0.0:
            raise ValueError(f"damping: at least 0, got {damping}.")
        damping = damping * Identity(D, A._own_dtype, A._own_device)
    g = risk.gradient()
    check_derivatives(risk.params, g)
    step = -((A + damping).solve(g))
    slope = g @ step
    if not slope < 0.0 and g.any():
        raise ValueError(
            f"damping: the step has the slope {slope:.3g} and does not descend, A + "
            "damping is not positive definite. Use a larger damping."
        )
    # sᵀA s = −gᵀs − sᵀP s, so no further product with A.
    return TrustRegionStep(step, -0.5 * slope + 0.5 * step @ (damping @ step))
