"""The Laplace approximation's evidence, and the precision of its posterior."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vivit_linop.analysis.inner_products import check_square
from vivit_linop.arguments import as_real_numbers, as_scalar
from vivit_linop.curvature import EKFAC, KFAC
from vivit_linop.linalg.diagonal_damping import LogDet
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators import BlockDiagonal, Diagonal, TorchLinearOperator
from vivit_linop.operators.damped import Damped, DiagonallyDamped
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.verbs import add, damp, eigvalsh, logdet, scale
from vivit_linop.risk.empirical import EmpiricalRisk, check_risk
from vivit_linop.risk.losses.derived import without_items_and_weights
from vivit_linop.risk.losses.elementwise import SquaredError

PriorPrecision: TypeAlias = float | Tensor | Mapping[str, float | Tensor]
"""A number, one a parameter (in order, or by name), or one an entry, ``[D]``."""

# Where a risk keeps that its mean has been warned of.
_WARNED = "mean warned of"


@ordinary_mode()
def log_marginal_likelihood(
    risk: EmpiricalRisk, curvature: TorchLinearOperator, prior_precision: PriorPrecision
) -> Tensor:
    """Return the Laplace approximation of log p(data), differentiable in the prior.

    With the prior N(0, P⁻¹), the loss as a negative log-likelihood, L = r Σ_n ℓ_n, and
    a curvature A of L (so that A/r is that of Σ_n ℓ_n; MacKay 1992, *Neural
    Computation* 4, eq. 4.11; Immer et al. 2021, arXiv:2104.04975, eq. 8),

        −L/r − ½ θᵀPθ + ½ log det P − ½ log det(A/r + P).

    Larger is better. The powers of 2π of prior and posterior cancel. What a loss leaves
    out of its negative log-likelihood, the value leaves out: nothing for
    ``nn.CrossEntropyLoss``; ``nn.MSELoss``, a mean over C outputs, is that of Gaussians
    with variance C/2, less the constant C/2 log(π C) a sample. ``nn.GaussianNLLLoss``
    has the variances of the targets, and leaves out C/2 log 2π unless ``full=True``.
    Where a mean of another loss divides by something else than N (several outputs or
    positions of a sample, class weights, ignored targets), L/r is so much more or less
    than a likelihood's, and a warning says so: take ``reduction="sum"``. For other
    temperatures scale loss and curvature.

    θ is where the risk was built; the approximation is meant for a minimum of
    L/r + ½ θᵀPθ. Gradients reach P, not θ and the data. Costs log det(A/r + P): of a
    GGN its Gram matrix once, and its eigenvalues serve every scalar P. With one number
    a parameter or entry, each value costs a factorisation, and gradients the diagonal
    of the posterior covariance.

    Args:
        risk: N samples, D parameters.
        curvature: A, self-adjoint ``[D, D]``, as it belongs to the risk (with r in
            it): a GGN, KFAC, EKFAC, ``Diagonal(G.diagonal())``, G's block-diagonal.
        prior_precision: The diagonal of P, positive: a number; one for each parameter,
            ``[len(risk.params)]`` or by name; or one for each entry, ``[D]``. Tensors
            that require grad get gradients. Kronecker factors have closed forms for
            one number a block, and as matrices in blocks of up to 2,048 rows.

    Returns:
        A scalar.

    Raises:
        TypeError: If ``curvature`` has no closed-form determinant with such a prior.
        ValueError: If a precision is not positive, or has another shape; if A/r + P is
            not positive definite.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> data = (torch.rand(8, 3), torch.randint(2, (8,)))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
        >>> precision = torch.tensor(1.0, requires_grad=True)
        >>> value = vl.log_marginal_likelihood(risk, vl.GGN(risk), precision)
        >>> value.backward()
        >>> bool(precision.grad.isfinite())
        True
    """
    precision = _checked(risk, curvature, prior_precision)
    theta = risk.flatten(risk.params)
    log_likelihood = -risk.value() / risk.reduction_factor
    likelihood_curvature = scale(curvature, 1.0 / risk.reduction_factor)
    penalty = (precision * theta.square()).sum()
    log_det_prior = precision.log().expand(risk.num_params).sum()
    log_det = _log_det(likelihood_curvature, precision, _is_semidefinite(curvature))
    value = log_likelihood + 0.5 * (log_det_prior - penalty - log_det)
    return value.to(risk.dtype)


@ordinary_mode()
def posterior_precision(
    risk: EmpiricalRisk, curvature: TorchLinearOperator, prior_precision: PriorPrecision
) -> TorchLinearOperator:
    """Return A/r + P: what the Laplace approximation has for the posterior precision.

    Its ``.inv()`` is the posterior covariance, for :func:`predictive_covariance` and
    ``.sample``. Costs nothing; a product costs one with A.

    Args:
        risk: N samples, D parameters.
        curvature: A, self-adjoint ``[D, D]``, as it belongs to the risk (with r in it).
        prior_precision: The diagonal of P, as for :func:`log_marginal_likelihood`.

    Raises:
        ValueError: If a precision is not positive, or has another shape; if A/r + P is
            diagonal and not positive.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(8, 3), torch.rand(8, 1))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
        >>> S = vl.posterior_precision(risk, vl.GGN(risk), 2.0).inv()
        >>> S.sample(5).shape
        torch.Size([4, 5])
    """
    precision = _checked(risk, curvature, prior_precision)
    likelihood_curvature = scale(curvature, 1.0 / risk.reduction_factor)
    whole: TorchLinearOperator
    if precision.ndim == 0:
        whole = damp(likelihood_curvature, as_scalar(precision))
    else:
        whole = add(likelihood_curvature, Diagonal(precision))
    if isinstance(whole, Diagonal):
        _check_definite(whole)
    return whole


def _log_det(
    operator: TorchLinearOperator, precision: Tensor, semidefinite: bool
) -> Tensor:
    """Return log det(A + P), with derivatives in P."""
    value: Tensor
    if precision.ndim == 0:
        whole = damp(operator, as_scalar(precision))
        value = logdet(whole)
    else:
        try:
            whole = add(operator, Diagonal(precision.detach()))
            value = LogDet.apply(precision, whole)
        except TypeError as error:
            raise TypeError(
                f"prior_precision: no closed-form determinant of this "
                f"{type(operator).__name__} with one number for each parameter or "
                "entry. Give one for all or one for each block of a block-diagonal "
                "curvature, or take vl.GGN(risk), which has one with every prior."
            ) from error
    if not semidefinite:
        _check_definite(whole)
    return value


def _is_semidefinite(op: TorchLinearOperator) -> bool:
    """Whether it has no negative eigenvalue by what it is."""
    if isinstance(op, Damped):
        return bool(op.damping >= 0.0) and _is_semidefinite(op.operator)
    if isinstance(op, DiagonallyDamped):
        entries = op.damping.entries
        return bool((entries >= 0.0).all()) and _is_semidefinite(op.low_rank)
    if isinstance(op, LowRank):
        return op.semidefinite
    return isinstance(op, (KFAC, EKFAC))


def _check_definite(op: TorchLinearOperator) -> None:
    """Raise an error if a precision, whose determinant is known, is none.

    A determinant has an absolute value, also where two eigenvalues are negative.
    """
    if isinstance(op, BlockDiagonal):
        for block in op.blocks:
            _check_definite(block)
    elif not _is_semidefinite(op):
        evals = op.entries if isinstance(op, Diagonal) else eigvalsh(op)
        least = evals.detach().min()
        if not least > 0.0:
            raise ValueError(
                "curvature: there is no posterior, A/r + P has the eigenvalue "
                f"{least:.3g}. Take a larger prior_precision, or a curvature without "
                "negative eigenvalues: of a loss that is not convex "
                "vl.GGN(risk, positive_part=True)."
            )


def _checked(
    risk: EmpiricalRisk, curvature: TorchLinearOperator, given: PriorPrecision
) -> Tensor:
    """Return the diagonal of P as a scalar, or ``[D]``; check what belongs together."""
    check_risk(risk)
    _warn_unless_likelihood(risk)
    D = risk.num_params
    with risk.ranks.together("prior_precision") as ballot:
        check_square(curvature, D, "curvature")
        precision = prior_entries(risk, given)
        if not (precision.isfinite() & (precision > 0)).all():
            raise ValueError(
                "prior_precision: must be positive and finite, the least is "
                f"{precision.min():.3g}."
            )
        ballot.given = (precision,)
    return precision


def _warn_unless_likelihood(risk: EmpiricalRisk) -> None:
    """Warn of a mean over something else than samples; of squares it is a variance."""
    share = risk.scale / risk.reduction_factor
    squares = isinstance(without_items_and_weights(risk.loss), SquaredError)
    if squares or abs(share - 1.0) <= 1e-6:
        return
    if not risk.kept.everywhere.get(_WARNED):  # an optimum asks many times
        risk.kept.everywhere.setdefault(_WARNED, True)
        warnings.warn(
            f"risk: its loss, a mean, divides by {1.0 / risk.scale:.6g}, and there are "
            f"{risk.num_samples} samples. So L/r is {share:.3g} times the negative "
            "log-likelihood of the data, and posterior and evidence are those of this. "
            "For the likelihood give the loss reduction='sum'.",
            stacklevel=5,
        )


def prior_entries(risk: EmpiricalRisk, given: PriorPrecision) -> Tensor:
    """Return the diagonal of P, a scalar or ``[D]``."""
    if isinstance(given, Mapping):
        if set(given) != set(risk.params):
            raise ValueError(
                f"prior_precision: names are {list(given)}, the parameters are "
                f"{list(risk.params)}."
            )
        numbers = [_numbers(risk, given[name]) for name in risk.params]
        for name, number in zip(risk.params, numbers, strict=True):
            if number.numel() != 1:
                raise ValueError(
                    f"prior_precision: one number for each name, got "
                    f"{list(number.shape)} for {name!r}. One for each entry is a "
                    "vector, risk.flatten(numbers)."
                )
        return _of_parameters(risk, torch.cat([n.reshape(1) for n in numbers]))
    precision = _numbers(risk, given)
    if precision.ndim == 0:
        return precision
    of_entries = precision.shape == (risk.num_params,)
    if precision.shape == (len(risk.sizes),):
        if of_entries and any(size != 1 for size in risk.sizes):
            raise ValueError(
                f"prior_precision: {list(precision.shape)} may be one number for each "
                "parameter or for each entry, since some are empty. Give a mapping "
                "from names of parameters to numbers."
            )
        return _of_parameters(risk, precision)
    if of_entries:
        return precision
    raise ValueError(
        f"prior_precision: a number, [{len(risk.sizes)}] for the parameters or "
        f"[{risk.num_params}] for their entries, got {list(precision.shape)}."
    )


def _numbers(risk: EmpiricalRisk, given: Any) -> Tensor:
    numbers = as_real_numbers(given, "prior_precision", risk.dtype)
    return numbers.to(risk.device, risk.dtype)


def _of_parameters(risk: EmpiricalRisk, numbers: Tensor) -> Tensor:
    sizes = torch.tensor(risk.sizes, device=risk.device)
    return numbers.repeat_interleave(sizes)
