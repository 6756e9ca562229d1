"""The class structure of the GGN of a cross-entropy: what its outliers are made of.

G is made of C² mean gradients, by label and class, and of the spread around them. The
means make its largest eigenvalues.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vivit_linop.curvature.jacobian import Jacobian
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.verbs import column_pieces
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.losses.cross_entropy import CrossEntropy


class ClassMeans(NamedTuple):
    """Mean gradients by class, and their weights in the GGN.

    Attributes:
        means: ``[D, C, C]``; zero where there is no weight.
        weights: ``[C, C]``.
    """

    means: Tensor
    weights: Tensor


@ordinary_mode()
def class_means(risk: EmpiricalRisk) -> ClassMeans:
    """Return the C² mean gradients whose spread makes the outliers of the GGN.

    For samples n of class c let g_nk = J_nᵀ (p_n − e_k) be the gradient of the loss as
    if the label were k. The GGN of the cross-entropy is r Σ_nk p_nk g_nk g_nkᵀ, and

        G = Σ_ck w_ck μ_ck μ_ckᵀ + the spread of g_nk around μ_ck,

    with w_ck = r Σ_{n in c} p_nk and μ_ck = r Σ_{n in c} p_nk g_nk / w_ck, where both
    terms are positive semi-definite (Papyan 2020, *JMLR* 21(252), whose δ_{c,c'} are
    −μ_ck). μ_cc are the gradients of class c, small at the end of training. Their
    weights and inner products give the first term's spectrum on the side of C²:
    ``(W := (means * weights.sqrt()).flatten(1)).T @ W``.

    Costs one pass over the data, with C backward passes, and D × C² entries for the
    result.

    Args:
        risk: Of ``nn.CrossEntropyLoss`` (or ``nn.NLLLoss``) with class indices, one for
            each sample. Class weights and ignored targets are in r.

    Raises:
        TypeError: For other losses or soft targets.
        ValueError: If a sample has several targets.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(8, 3), torch.arange(8) % 2)
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
        >>> means, weights = vl.class_means(risk)
        >>> means.shape, weights.shape
        (torch.Size([8, 2, 2]), torch.Size([2, 2]))
    """
    if not isinstance(risk, EmpiricalRisk) or not isinstance(risk.loss, CrossEntropy):
        raise TypeError(
            f"risk: of a CrossEntropyLoss, got {risk!r}; other losses have no classes."
        )
    C = risk.num_outputs
    with risk.ranks.together("class means"):
        found = [
            _labelled(risk, output, target)
            for output, target in zip(risk.outputs, risk.all_targets, strict=True)
        ]
    y, w, residual = (
        risk.ranks.listed(lambda part=part: torch.cat([each[part] for each in found]))
        for part in range(3)
    )
    # w_nk (p_n − e_k): what the columns of sample n are combined by.
    combinations = residual * w.unsqueeze(1)
    D = risk.num_params
    means = torch.zeros(D, C, C, dtype=risk.dtype, device=risk.device)
    for place, columns in column_pieces(Jacobian(risk).T):
        samples = slice(place.start // C, place.stop // C)
        own = columns.unflatten(1, (-1, C))
        parts = torch.einsum("dno,nok->dnk", own, combinations[samples])
        means.index_add_(1, y[samples], parts)
    sums = torch.zeros(C, C, dtype=risk.dtype, device=risk.device)
    sums.index_add_(0, y, w)
    return ClassMeans(means / torch.where(sums > 0, sums, 1.0), sums)


def _labelled(
    risk: EmpiricalRisk, output: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels ``[n]``, weights r m p ``[n, C]`` and p − e_k, ``[n, C, K]``."""
    loss = risk.loss
    assert isinstance(loss, CrossEntropy)
    if target.is_floating_point():
        raise TypeError("risk: its targets are soft; class means need class indices.")
    if output.ndim != 2:
        raise ValueError(
            f"risk: a sample has targets of shape {list(target.shape[1:])}; class "
            "means need one class for each sample."
        )
    C = output.shape[1]
    p = output.softmax(1)
    mass = loss.mass(output, target)  # zero where the target is ignored
    unit = torch.eye(C, dtype=p.dtype, device=p.device)
    labels = torch.where(mass.squeeze(1) > 0, target, torch.zeros_like(target))
    return labels, risk.scale * mass * p, p.unsqueeze(2) - unit
