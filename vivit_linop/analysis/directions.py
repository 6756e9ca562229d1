"""Directions: derivatives of single samples along them, and projectors onto them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vivit_linop.arguments import check_flag, check_has_values
from vivit_linop.curvature.fisher import PerSampleGradients
from vivit_linop.curvature.ggn import GGN, GGNFactor
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.linalg.decompositions import GramEigenpairs
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.elementary import Dense, Identity
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.risk.empirical import EmpiricalRisk, check_risk


@ordinary_mode()
def directional_derivatives(
    risk: EmpiricalRisk,
    directions: Eigenpairs | Tensor,
    curvature_risk: EmpiricalRisk | None = None,
) -> tuple[Tensor, Tensor]:
    """Return γ and λ: slopes and curvatures of each sample along each direction.

    γ[n, k] = ⟨∇ℓ_n, e_k⟩ and λ[n, k] = e_kᵀ G_n e_k with the GGN G_n of sample n,
    both without r (Dangel, Tatzel & Hennig 2022, ViViT, eq. 7). For eigenpairs
    of the GGN of the same mean-reduced risk, the mean of λ over n is the eigenvalues.

    For eigenpairs from a Gram matrix everything is computed on the small side, from
    Gram and cross-Gram matrices. For other directions it costs a product with K
    columns over the data of each risk.

    Args:
        risk: Whose N samples' gradients γ is of.
        directions: Eigenpairs, or orthonormal columns ``[D, K]``, through which
            derivatives pass.
        curvature_risk: Whose samples' curvature λ is of; by default ``risk``.

    Returns:
        γ ``[N, K]`` and λ ``[N', K]``, one row for each sample of their risk.

    Raises:
        TypeError: If ``directions`` is neither.
        ValueError: If shapes do not match.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> data = (torch.rand(6, 3), torch.randint(3, (6,)))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 3), nn.CrossEntropyLoss(), data)
        >>> pairs = vl.GGN(risk).eigh(k=2)
        >>> gammas, lambdas = vl.directional_derivatives(risk, pairs)
        >>> torch.allclose(lambdas.mean(0), pairs.eigenvalues)
        True
    """
    pairs = as_directions(risk, directions)
    curvature_risk = risk if curvature_risk is None else curvature_risk
    check_risk(curvature_risk, "curvature_risk")
    if curvature_risk.sizes != risk.sizes:
        raise ValueError(
            f"curvature_risk: its parameters have {curvature_risk.sizes} entries, "
            f"those of risk {risk.sizes}; both need the same ones."
        )
    gammas = pairs.components(PerSampleGradients(risk))
    factor = _known_factor(pairs, curvature_risk)
    if factor is not None:
        return gammas, curvatures(factor, pairs)
    G = GGN(curvature_risk)
    if G.semidefinite:
        return gammas, curvatures(G.factor, pairs)
    positive, negative = (curvatures(part.factor, pairs) for part in G.parts)
    return gammas, positive - negative


def curvatures(factor: Pullback, pairs: Eigenpairs) -> Tensor:
    """Return λ for the GGN factor V, ``[N, K]``: V_nᵀ e_k squared, without r."""
    risk, squares = factor.risk, pairs.components(factor).square()
    sums = risk.ranks.listed(factor.layout.summed, squares)
    return sums / risk.reduction_factor


def as_directions(risk: EmpiricalRisk, directions: Eigenpairs | Tensor) -> Eigenpairs:
    """Return directions as eigenpairs; tensors get NaN for eigenvalues."""
    check_risk(risk)
    if isinstance(directions, Tensor):
        if directions.ndim != 2 or len(directions) != risk.num_params:
            raise ValueError(
                f"directions: columns [{risk.num_params}, K], got "
                f"{list(directions.shape)}."
            )
        if not directions.is_floating_point():
            raise TypeError(
                f"directions: must be real floating point, got {directions.dtype}."
            )
        columns = directions.to(risk.device, risk.dtype)
        if not columns.isfinite().all():
            raise ValueError("directions: hold NaN or Inf.")
        return Eigenpairs(columns.new_full((columns.shape[1],), torch.nan), columns)
    if not isinstance(directions, Eigenpairs):
        raise _no_directions(directions)
    if directions.eigenvalues.dtype != risk.dtype:
        raise TypeError(
            f"directions: are {directions.eigenvalues.dtype}, the risk is "
            f"{risk.dtype}. Compute both in one precision, or pass "
            "directions.eigenvectors."
        )
    if (rows := directions._size()) != risk.num_params:
        raise ValueError(
            f"directions: have {rows} entries, the risk has {risk.num_params} "
            "parameters."
        )
    return directions


def _known_factor(pairs: Eigenpairs, risk: EmpiricalRisk) -> GGNFactor | None:
    """The factor that the pairs come from, if it is the exact one of this risk."""
    factor = pairs.operator.factor if isinstance(pairs, GramEigenpairs) else None
    if not isinstance(factor, GGNFactor) or not factor.root.determined:
        return None
    return factor if factor.risk is risk else None


# Projectors ---------------------------------------------------------------------------


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
        E = _orthonormal(directions)
    else:
        raise _no_directions(directions)
    P = LowRank(Dense(E))
    if not complement:
        return P
    return Identity(len(E), E.dtype, E.device) - P


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
    about = torch.finfo(columns.dtype)
    columns = normalize(columns, torch.inf, dim=0, eps=about.tiny)
    Q, R = torch.linalg.qr(columns)
    heights, lengths = R.diagonal().abs(), columns.norm(dim=0)
    if not (heights > 10 * about.eps * len(columns) ** 0.5 * lengths).all():
        raise ValueError("directions: the columns are linearly dependent.")
    return Q


def _no_directions(given: object) -> TypeError:
    return TypeError(
        f"directions: what eigh returned, or a tensor [D, K], got "
        f"{type(given).__name__}."
    )
