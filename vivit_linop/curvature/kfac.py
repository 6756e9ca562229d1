"""Kronecker-factored approximations of the GGN and the empirical Fisher matrix.

A block of c V Vᵀ for the weight of a layer is c Σ (Σ_p b_p ⊗ a_p)(Σ_p b_p ⊗ a_p)ᵀ, the
outer sum over columns, with inputs a and backpropagated columns b at positions p.
KFAC replaces the sum of Kronecker products by a Kronecker product of sums, B ⊗ A. The
factors come from the layer factors of :mod:`vivit_linop.net`, so for every use of a
weight that has such a structure, not for registered modules only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vivit_linop.arguments import as_count, check_choice, check_finite, check_flag
from vivit_linop.curvature.blocks import FactorRows, Partition, places_of
from vivit_linop.curvature.column_sums import sum_columns
from vivit_linop.curvature.fisher import EmpiricalFisher
from vivit_linop.curvature.ggn import GGN
from vivit_linop.curvature.kronecker_sums import (
    EigenvalueSums,
    KroneckerSums,
    LayerFactors,
)
from vivit_linop.modes import ordinary_mode, uncompiled
from vivit_linop.net.certified import find_structure
from vivit_linop.operators.base import Op
from vivit_linop.operators.elementary import Identity, symmetric_over
from vivit_linop.operators.kronecker import BlockDiagonal, CorrectedKronecker, Kronecker
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.verbs import trace
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk

Curvature: TypeAlias = GGN | EmpiricalFisher
VARIANTS = ("mc", "exact", "empirical")
WEIGHT_SHARINGS = ("expand", "reduce", "backpack")


class _LayerBlocks(BlockDiagonal):
    """Blocks made of layer factors: what :class:`KFAC` and :class:`EKFAC` share."""

    _corrected = False

    @uncompiled
    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
        *,
        variant: str = "mc",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        weight_sharing: str = "expand",
        joint_bias: bool = False,
        positive_part: bool = False,
        **options: Any,
    ) -> None:
        self.risk = as_risk(risk, loss, data, params, **options)
        what = f"{type(self).__name__} {variant} {weight_sharing} {joint_bias}"
        with self.risk.ranks.together(what):
            check_choice(variant, "variant", VARIANTS)
            check_choice(weight_sharing, "weight_sharing", WEIGHT_SHARINGS)
            if variant == "mc" and as_count(mc_samples, "mc_samples", 0) == 0:
                raise ValueError(
                    "mc_samples: at least 1 for variant='mc', got 0. Use "
                    "variant='exact' for the exact GGN."
                )
            check_flag(joint_bias, "joint_bias")
        curvature: Curvature
        if variant == "empirical":
            curvature = EmpiricalFisher(self.risk)
        else:
            curvature = GGN(
                self.risk,
                mc_samples=mc_samples if variant == "mc" else 0,
                generator=generator,
                positive_part=positive_part,
            )
        partners = _bias_partners(self.risk) if joint_bias else {}
        with ordinary_mode():
            parts = _approximate(curvature, weight_sharing, partners)
            if self._corrected:
                _correct(parts, curvature)
        self.names = [part.names for part in parts]
        self.inputs_first = [part.inputs_first for part in parts]
        super().__init__(*_placed(parts, self.risk))


class KFAC(_LayerBlocks):
    """The Kronecker-factored approximation B ⊗ A of a curvature, block by block.

    A weight ``[out, in]`` meets inputs a_np and cotangents b_nrp, at P positions p of
    each sample; cotangents are those of V, so they contain √r. With one position

        A = (1/N) Σ_n a_n a_nᵀ,    B = Σ_nr b_nr b_nrᵀ

    (Martens & Grosse 2015, arXiv:1503.05671; the exact variant is KFLR, Botev et al.
    2017, arXiv:1706.03662). Convolutions, tokens and weights that are used several
    times have more. Then ``weight_sharing`` is

    - ``"expand"``: A = (1/(N P)) Σ_np a aᵀ, B = Σ_nrp b bᵀ (KFC, Grosse & Martens 2016,
      arXiv:1602.01407; Eschenhagen et al. 2023, arXiv:2311.00636);
    - ``"reduce"``: the same with mean inputs (1/P) Σ_p a_np and summed cotangents
      Σ_p b_nrp (Eschenhagen et al. 2023);
    - ``"backpack"``: A = (1/N) Σ_np a aᵀ, and B of ``"reduce"``, as BackPACK's ``KFLR``
      and ``KFAC`` for convolutions.

    For linear layers on ``[N, in]`` all three are BackPACK's.

    Other blocks: groups of a convolution have one each. Biases, weights of norms and
    parameters without layer factors keep their exact block; that of ``"exact"`` is the
    GGN's. A transposed convolution has the positions of its output, and B ⊗ A is the
    block of ``weight.transpose(0, 1)``, placed by ``indices``.

    The block is the GGN's own (variant ``"exact"``) for one sample with one position,
    and where b does not depend on n: in deep linear nets with ``nn.MSELoss``
    (``"expand"`` if each position has its output, ``"reduce"`` if they are averaged at
    the end; Eschenhagen et al. 2023).

    Costs one pass over the data, at construction: a forward pass, and R backward passes
    without weight gradients. R is C − 1 or C for ``"exact"``, ``mc_samples`` for
    ``"mc"``, 1 for ``"empirical"``. All verbs act on the factors: the inverse
    ``(K + delta * Identity(D)).inv()`` is exact, by their eigendecompositions, and
    ``K.sqrt() @ noise`` samples. :meth:`pi_damped` damps factor by factor.

    Args:
        risk: An :class:`EmpiricalRisk`, or its arguments, ``model, loss, data, …``.
        variant: ``"mc"``: of the Monte-Carlo GGN; ``"exact"``: of the GGN (KFLR);
            ``"empirical"``: of the empirical Fisher matrix r U Uᵀ.
        mc_samples: Columns a sample for ``"mc"``.
        generator: For reproducible Monte-Carlo samples.
        weight_sharing: ``"expand"``, ``"reduce"`` or ``"backpack"``.
        joint_bias: Whether weight and bias of a layer are one block, with a 1 appended
            to the inputs; else the bias has a block of its own.
        positive_part: Of a loss that is not convex, for ``"exact"``: whether each
            sample's loss Hessian is replaced by its positive part.

    Attributes:
        risk: The risk.
        names: For each block the parameters that it is of.
        inputs_first: For each block whether it is A ⊗ B, as of a weight with the
            layout ``[in, out]`` (of an embedding, of x @ W).

    Raises:
        ValueError: For an unknown variant or weight sharing; what :class:`GGN` raises.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(8, 3), torch.randint(2, (8,)))
        >>> K = vl.KFAC(nn.Linear(3, 2), nn.CrossEntropyLoss(), data, variant="exact")
        >>> K.blocks[0]
        <6x6 Kronecker, torch.float32, cpu>
        >>> K.blocks[0].factors
        (<2x2 Dense, torch.float32, cpu>, <3x3 Dense, torch.float32, cpu>)
        >>> ((K + 0.1 * vl.Identity(8)).inv() @ torch.ones(8)).shape
        torch.Size([8])
    """

    def pi_damped(self, damping: float) -> BlockDiagonal:
        """Return K + δ I, ``[D, D]``, each Kronecker block damped factor by factor.

        (B + (√δ/π) I) ⊗ (A + π√δ I) with π² = (tr A/dim A)/(tr B/dim B) (Martens &
        Grosse 2015, §6.3); blocks of other types get δ I. Unlike the exact K + δ I its
        blocks stay Kronecker products: ``K.pi_damped(delta).inv()`` inverts two small
        matrices a block.

        Args:
            damping: δ, positive.

        Raises:
            ValueError: If it is not positive.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(8, 3), torch.rand(8, 2))
            >>> K = vl.KFAC(nn.Linear(3, 2), nn.MSELoss(), data, variant="exact")
            >>> K.pi_damped(0.1).inv().blocks[0]
            <6x6 Kronecker, torch.float32, cpu>
        """
        check_finite(damping, "damping")
        if not damping > 0.0:
            raise ValueError(f"damping: must be positive, got {damping}.")
        return self.like([_pi_damped(block, damping) for block in self.blocks])


def _pi_damped(block: Op, damping: float) -> Op:
    if not isinstance(block, Kronecker):
        return block + damping * Identity(block.shape[0])
    B, A = block.factors
    means = [(trace(factor) / factor.shape[0]).item() for factor in (B, A)]
    # A factor that is zero has no scale of its own.
    pi = (means[1] / means[0]) ** 0.5 if min(means) > 0.0 else 1.0
    root = damping**0.5
    return Kronecker(
        B + root / pi * Identity(B.shape[0]), A + root * pi * Identity(A.shape[0])
    )


@dataclass
class _Part:
    """A block, the parameters it is of, and its rows unless it is all of one's."""

    names: list[str]
    block: Op
    rows: Tensor | None = None
    inputs_first: bool = False


def _placed(
    parts: Sequence[_Part], risk: EmpiricalRisk
) -> tuple[list[Op], list[Tensor] | None]:
    """The blocks, and their places unless they follow each other."""
    blocks = [part.block for part in parts]
    if all(part.rows is None for part in parts):
        return blocks, None
    whole = places_of(risk, [part.names[:1] for part in parts])
    pairs = zip(parts, whole, strict=True)
    return blocks, [rows if part.rows is None else part.rows for part, rows in pairs]


def _approximate(
    curvature: Curvature, sharing: str, partners: dict[str, str]
) -> list[_Part]:
    """Return the blocks of c V Vᵀ, in the order of the parameters."""
    factor, risk = curvature.factor, curvature.factor.risk
    sums = KroneckerSums.over(factor, sharing, list(partners))
    parts = []
    joined = {
        weight: bias
        for weight, bias in partners.items()
        if weight in sums.factors and not sums.factors[weight].inputs_first
    }
    with_blocks = {*sums.factors, *sums.outer, *joined.values()}
    others = [name for name in risk.params if name not in with_blocks]
    partition = Partition(factor, [[name] for name in others])
    for name in risk.params:
        if name in joined.values():
            continue
        if name in sums.factors:
            factors = sums.factors[name]
            parts += _kronecker_parts(
                risk, name, joined.get(name), factors, curvature.scale
            )
        elif name in sums.outer:
            matrix = curvature.scale * sums.outer[name]
            parts.append(_Part([name], symmetric_over(risk.ranks, matrix)))
        else:
            rows = FactorRows(partition, others.index(name))
            parts.append(_Part([name], LowRank(rows, curvature.scale)))
    return parts


def _kronecker_parts(
    risk: EmpiricalRisk,
    name: str,
    bias: str | None,
    factors: LayerFactors,
    scale: float,
) -> list[_Part]:
    """One block for each group of channels."""
    groups, names, order = len(factors.B), [name], factors.order
    rows: list[Tensor] | list[None] = [None]
    if groups > 1 or bias is not None or order is not None:
        (numbers,) = places_of(risk, [names])
        if order is not None:
            numbers = numbers[order]
        numbers = numbers.view(groups, factors.B.shape[1], -1)
        if bias is not None:
            (own,) = places_of(risk, [[bias]])
            numbers = torch.cat([numbers, own.view(groups, -1, 1)], dim=2)
            names = [name, bias]
        rows = list(numbers.flatten(1))
    parts = []
    for B, A, numbers_of_group in zip(factors.B, factors.A, rows, strict=True):
        pair = [symmetric_over(risk.ranks, matrix) for matrix in (scale * B, A)]
        block = Kronecker(*(reversed(pair) if factors.inputs_first else pair))
        parts.append(_Part(names, block, numbers_of_group, factors.inputs_first))
    return parts


def _bias_partners(risk: EmpiricalRisk) -> dict[str, str]:
    """Weights of layers and the bias that is added wherever they are used."""
    structure = risk.ranks.led(find_structure, risk)
    pairs = dict.fromkeys((w, b) for _, w, b in structure.uses)
    return {
        w: b
        for w, b in pairs
        if w is not None
        and b is not None
        and b not in structure.opaque
        and all((w == weight) == (b == bias) for weight, bias in pairs)
    }


class EKFAC(_LayerBlocks):
    """KFAC with corrected eigenvalues, for every model.

    In the eigenbasis Q of a Kronecker block, the diagonal is that of the curvature
    itself, diag(Qᵀ G Q) (George et al. 2018, arXiv:1806.03884). Of all operators that
    are diagonal in this basis it is the closest to the GGN's block in the Frobenius
    norm. It has the block's trace, and equals it where KFAC does. Other blocks are
    those of :class:`KFAC`.

    Costs two passes over the data: one for the factors, one for the squares of the
    columns' entries in their eigenbases, Σ (Q_Bᵀ b aᵀ Q_A)². All verbs act on the
    eigenvalues: ``(E + delta * Identity(D)).inv()`` is exact, ``E.sqrt() @ noise``
    samples.

    Takes the arguments of :class:`KFAC`. Monte-Carlo samples are the same in both
    passes; ``weight_sharing`` decides the basis, not the eigenvalues.

    Attributes:
        risk: The risk.
        names: For each block the parameters that it is of.

    Raises:
        ValueError: For an unknown variant or weight sharing; what :class:`GGN` raises.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> E = vl.EKFAC(nn.Linear(3, 1), nn.MSELoss(), data, variant="exact")
        >>> E.blocks[0]
        <3x3 CorrectedKronecker, torch.float32, cpu>
    """

    _corrected = True


def _correct(parts: Sequence[_Part], curvature: Curvature) -> None:
    """Give the Kronecker blocks the diagonal of the curvature in their eigenbasis."""
    factor = curvature.factor
    blocks: dict[str, list[Kronecker]] = {}
    for part in parts:
        if isinstance(part.block, Kronecker):
            blocks.setdefault(part.names[0], []).append(part.block)
    if not blocks:
        return
    found = sum_columns(factor, EigenvalueSums(factor, blocks)).sums
    rows = {name: iter(curvature.scale * sums) for name, sums in found.items()}
    for part in parts:
        if isinstance(part.block, Kronecker):
            # A weight that no sample reaches has no columns.
            reached = rows.get(part.names[0])
            evals = part.block.eigenvalues.new_zeros(part.block.shape[0])
            part.block = CorrectedKronecker(
                part.block, evals if reached is None else next(reached)
            )
