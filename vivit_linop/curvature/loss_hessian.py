"""The derivatives of the loss in output space: H, its root S, and the gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from vivit_linop.arguments import as_count, check_flag, check_generator
from vivit_linop.curvature.output_space import (
    FactoredOutputOperator,
    OutputOperator,
    check_blocks_fit,
)
from vivit_linop.devices import is_out_of_memory
from vivit_linop.modes import ordinary_mode
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.certificates import (
    certified_sqrt,
    certify_curvature,
    check_curvature,
    checked_sample,
)
from vivit_linop.risk.losses.derived import HessianPart
from vivit_linop.risk.losses.draws import Draws
from vivit_linop.risk.row_layout import RowLayout

# How many tensors of the outputs' size products with the loss Hessian may need.
_MULTIPLIER_COPIES = 3
# How many tensors of its size an exact square root takes while it is computed.
_SQRT_COPIES = 4

# Where a risk keeps that its loss has the right second derivatives.
_CERTIFIED = "certified loss"

Multiplier = tuple[torch.Size, Callable[[Tensor], Tensor]]


def check_root_fits(
    risk: EmpiricalRisk, loss: OutputLoss, what: str, columns: RowLayout
) -> None:
    """Raise the error of :func:`check_blocks_fit` where exact roots do not fit."""
    coupled = loss.channels(risk.example[0]).shape[1] > 1
    copies = _SQRT_COPIES if coupled else 1
    check_blocks_fit(risk, what, columns, copies)


def certify_loss(risk: EmpiricalRisk, what: str) -> None:
    """Raise an error if the loss has no second derivatives on the data, or wrong ones.

    They are looked at once.
    """
    if _CERTIFIED in risk.kept.values:
        return
    # Constructors may be called in any mode of the caller's.
    with ordinary_mode(), risk.ranks.together(what):
        check_curvature(risk.loss, *risk.example)
        for output, target in zip(risk.outputs, risk.all_targets, strict=True):
            certify_curvature(risk.loss, output, target)
    risk.kept.put(_CERTIFIED, True)


def root_columns(
    risk: EmpiricalRisk, loss: OutputLoss, of_all: bool = False
) -> RowLayout:
    """Return which columns exact square roots have, of one position or of all."""
    some = risk.example[:1] if risk.layout.is_uniform else risk.outputs
    each = [
        loss.sqrt_width(f) * (loss.channels(f).shape[2] if of_all else 1) for f in some
    ]
    if len(each) <= 1:  # none, where this process has no samples
        return RowLayout.uniform(risk.batch_sizes, each[0] if each else 0)
    return RowLayout(risk.layout.samples, tuple(each))


class LossHessian(OutputOperator):
    """H: r times the Hessian of the losses in output space, ``[N·C, N·C]``.

    Products are in closed form for the losses that have one; the blocks are not
    formed. A loss that is not convex has an indefinite H.

    Args:
        risk: An :class:`EmpiricalRisk`, or its arguments, ``model, loss, data, …``.
        positive_part: Whether each sample's Hessian is replaced by its positive part,
            Q diag(max(λ, 0)) Qᵀ for eigenpairs λ, Q: by an eigendecomposition of
            ``[C, C]`` blocks. What is positive semi-definite stays what it is.

    Attributes:
        loss: The loss whose Hessians these are.
        positive_part: Whether these are positive parts.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 2))
        >>> H = vl.LossHessian(nn.Linear(3, 2), nn.MSELoss(), data)
        >>> H.diagonal()  # 2 / (N C)
        tensor([0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500, 0.2500])
    """

    self_adjoint = True
    determined = True

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
        *,
        positive_part: bool = False,
        **options: Any,
    ) -> None:
        check_flag(positive_part, "positive_part")
        risk = as_risk(risk, loss, data, params, **options)
        if not risk.loss.tested:
            certify_loss(risk, "LossHessian")
        self.loss = risk.loss
        self._multipliers: dict[int, Multiplier] = {}
        super().__init__(risk, risk.layout)
        self.positive_part = positive_part
        if positive_part and not self.loss.convex:
            self._take_part(1)

    def part(self, sign: int) -> LossHessian:
        """Return the positive part for 1, and what is to be subtracted from it for −1.

        H is their difference.
        """
        node = copy.copy(self)
        node._take_part(sign)
        return node

    def _take_part(self, sign: int) -> None:
        columns = root_columns(self.risk, self.risk.loss)
        check_root_fits(self.risk, self.risk.loss, "The positive part of H", columns)
        self.loss, self.positive_part = HessianPart(self.risk.loss, sign), sign > 0
        self._multipliers, self.determined = {}, False

    def apply_batch(self, batch: int, X: Tensor) -> Tensor:
        """In closed form, or by the loss's own derivatives."""
        channels, multiply = self._multipliers.get(batch) or self._multiplier(batch)
        product = multiply(X.reshape(*channels, X.shape[1]))
        return self.risk.scale * product.reshape(X.shape)

    def _multiplier(self, batch: int) -> Multiplier:
        """The shape that products of a batch need, and what does not depend on X."""
        risk = self.risk
        output, target = risk.outputs[batch], risk.all_targets[batch]
        made = self.loss.channels(output).shape, self.loss.hessian_at(output, target)
        copies = _MULTIPLIER_COPIES
        if isinstance(self.loss, HessianPart):  # has its root
            copies += made[0][1]
        taken = copies * sum(f.nbytes for f in risk.outputs)
        if taken <= risk.kept.small_budget:
            self._multipliers[batch] = made
        return made

    def __getstate__(self) -> dict[str, Any]:
        """What travels: what products need is made anew."""
        return super().__getstate__() | {"_multipliers": {}}

    def dense_batch(self, batch: int) -> Tensor:
        """By products with the columns of the identity."""
        n, width = self.risk.batch_sizes[batch], self.layout.each[batch]
        check_blocks_fit(self.risk, "The Hessian of the loss", self.layout, copies=2)
        unit = torch.eye(width, dtype=self.torch_dtype, device=self.device)
        return self.apply_batch(batch, unit.repeat(n, 1)).reshape(n, width, width)

    def own_diagonal(self) -> Tensor:
        """The diagonal of this rank's samples; the blocks are not formed."""
        risk = self.risk
        found = map(self.loss.hessian_diagonal, risk.outputs, risk.all_targets)
        return risk.scale * torch.cat([diagonal.reshape(-1) for diagonal in found])

    def sqrt(
        self, mc_samples: int = 0, generator: torch.Generator | None = None
    ) -> LossHessianSqrt:
        """Return S with H = S Sᵀ, ``[N·C, N·R]``.

        Costs no pass over the data: outputs are kept. Blocks are made when a product
        needs them.

        Args:
            mc_samples: 0 for the exact square root; else the number M of sampled
                columns a sample, and S Sᵀ is H in expectation only.
            generator: For reproducible samples; by default torch's global one, which
                then advances by one number, the seed of the draw. What is drawn
                for a sample depends on the seed and the sample's number only, not
                on how the data are cut into batches, nor on the device. The samples
                are drawn here, once.

        Raises:
            ValueError: If ``mc_samples`` is negative or the loss has no likelihood to
                sample from; if the loss is not convex at some sample (see
                ``positive_part``).
            MemoryError: If the outputs are too many for an exact square root.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.randint(2, (4,)))
            >>> H = vl.LossHessian(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
            >>> S = H.sqrt()
            >>> S.shape, torch.allclose((S @ S.T).to_dense(), H.to_dense())
            ((8, 4), True)
        """
        return LossHessianSqrt(self, mc_samples, generator).check()


class LossHessianSqrt(FactoredOutputOperator):
    """S with H = S Sᵀ, exact or sampled, ``[N·C, N·R]``; made by ``H.sqrt()``.

    Exact, R is C − 1 for cross-entropy (Tanabe & Sagae 1992) and C otherwise; sampled,
    it is ``mc_samples``.

    Args:
        hessian: H.
        mc_samples: 0 for exact.
        generator: On any device, for the seed of the samples.

    Attributes:
        hessian: H.
        mc_samples: 0 if exact.
    """

    def __init__(
        self,
        hessian: LossHessian,
        mc_samples: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        mc_samples = as_count(mc_samples, "mc_samples", 0)  # 0 for exact
        check_generator(generator)
        self.hessian, self.mc_samples = hessian, mc_samples
        self.determined = hessian.determined and not mc_samples
        risk, loss = hessian.risk, hessian.loss
        if not mc_samples:
            self._columns = root_columns(risk, loss)
            whole = root_columns(risk, loss, of_all=True)
            uniform = risk.layout.is_uniform
            super().__init__(risk, whole.width if uniform else whole.over(risk.ranks))
        else:
            super().__init__(risk, mc_samples)
            # A draw is kept whatever it takes: a second one would be another matrix.
            with risk.ranks.together(f"{mc_samples} draws"):
                draws = Draws.seeded_by(generator)  # one number on each rank
            self._draw(risk.ranks.sent(draws), mc_samples)

    def _draw(self, draws: Draws, mc_samples: int) -> None:
        """Draw for this rank's samples, semi-definite in any case."""
        risk, loss, start = self.risk, self.risk.loss, self.risk.ranks.first
        with risk.ranks.together("mc_samples"):
            for batch, (output, target) in enumerate(
                zip(risk.outputs, risk.all_targets, strict=True)
            ):
                mine = draws.starting_at(start)
                if not risk.layout.is_uniform:
                    # Samples that draw more have numbers that others do not have.
                    mine = mine.another(risk.layout.each[batch] << 32)
                drawn = checked_sample(loss, output, target, mc_samples, mine)
                self._blocks[batch] = risk.scale**0.5 * drawn
                start += len(output)

    def draw(self) -> Tensor:
        """What was drawn, ``[N·C, M]``."""
        drawn = [block.flatten(0, 1).squeeze(-1) for block in self._blocks.values()]
        return self.risk.ranks.listed(lambda: torch.cat(drawn))

    @classmethod
    def of_draw(cls, hessian: LossHessian, draw: Tensor) -> LossHessianSqrt:
        """Return the root of a draw of before, ``[N·C, M]`` or ``[N, C, M, 1]``."""
        node = cls.__new__(cls)
        draw = draw.reshape(-1, draw.shape[-1] if draw.ndim == 2 else draw.shape[-2])
        FactoredOutputOperator.__init__(node, hessian.risk, draw.shape[1])
        node.hessian, node.mc_samples = hessian, draw.shape[1]
        node.determined = False
        layout = hessian.risk.layout
        for batch, rows in enumerate(layout.of_all(draw).split(layout.sizes)):
            blocks = rows.unflatten(0, (layout.samples[batch], -1)).unsqueeze(-1)
            node._blocks[batch] = blocks
        return node

    def _form(self, batch: int) -> Tensor:
        risk = self.risk
        self._check_fits()
        output, target = risk.outputs[batch], risk.all_targets[batch]
        loss = self.hessian.loss
        make = loss.sqrt if loss.tested else partial(certified_sqrt, loss)
        root = make(output, target)
        return risk.scale**0.5 * root

    def _check_fits(self) -> None:
        check_root_fits(
            self.risk,
            self.hessian.loss,
            f"The exact factor has R = {self.width} columns for each sample. The root "
            "of the loss Hessian",
            self._columns,
        )

    @property
    def block_entries(self) -> int:
        """Where it is exact, positions are not coupled."""
        positions = self.hessian.loss.channels(self.risk.example[0]).shape[2]
        return super().block_entries // (1 if self.mc_samples else positions)

    def blocks_fit(self) -> bool:
        """Whether the root of every batch fits, as a matrix for each sample too."""
        try:
            if not self.mc_samples:
                self._check_fits()
            check_blocks_fit(self.risk, "S", self.layout)
        except MemoryError:
            return False
        return True

    def check(self) -> LossHessianSqrt:
        """Raise now what would be raised when the blocks are formed; returns itself."""
        with self.risk.ranks.together("root of the loss Hessian"):
            if not self.mc_samples:
                self._check_fits()
            if not self.certain:
                for batch in range(len(self.risk.batch_sizes)):
                    self.blocks(batch)
        return self

    @property
    def certain(self) -> bool:  # type: ignore[override]
        """Drawn, of a convex loss, or looked at."""
        known = self.mc_samples or self.hessian.loss.convex
        return bool(known) or self.__dict__.get("exists", False)

    @cached_property
    def exists(self) -> bool:
        """Whether H has a root. Blocks that do not fit into memory cannot be asked."""
        if self.certain:
            return True
        risk, loss = self.risk, self.hessian.loss
        with risk.ranks.together("root of the loss Hessian") as ballot:
            own = self.blocks_fit() and all(
                loss.has_roots(output, target)
                for output, target in zip(risk.outputs, risk.all_targets, strict=True)
            )
            ballot.flag = not own
        return own and not ballot.flag

    def coordinates(self, gradient: LossGradient) -> Tensor | None:
        """Return c with ∇ℓ_n = S_n c_n for all samples, ``[N, R]``, or None.

        The gradients of a likelihood lie in the range of its Hessian's square root
        (unless probabilities have underflown), so per-sample gradients are
        combinations of the columns of V.
        """
        if not self.layout.is_uniform:
            return None
        ranks = self.risk.ranks
        with ranks.together("coordinates") as ballot:
            own = self._own_coordinates(gradient)
            ballot.flag = own is None
        return None if own is None or ballot.flag else ranks.listed(lambda: own)

    def _own_coordinates(self, gradient: LossGradient) -> Tensor | None:
        """Those of this rank's samples."""
        parts = [self.risk.example[0].new_zeros(0, self.width)]
        for batch in range(len(self.risk.batch_sizes)):
            # By positions, which are not coupled: [n, P, c, s] and [n, P, c, 1].
            S = self.blocks(batch).permute(0, 3, 1, 2)
            n, positions, channels, _ = S.shape
            g = gradient.blocks(batch).reshape(n, channels, positions, 1)
            g = g.transpose(1, 2)
            # Columns may differ by many orders of magnitude: solve in unit columns.
            norms = S.norm(dim=2, keepdim=True)
            norms = torch.where(norms == 0.0, 1.0, norms)
            c = _least_squares(S / norms, g)
            tolerance = 100 * torch.finfo(g.dtype).eps
            error = (S / norms @ c - g).norm(dim=2)
            if not (error <= tolerance * g.norm(dim=2)).all():
                return None
            parts.append((c / norms.mT).transpose(1, 2).flatten(1))
        return torch.cat(parts)

    def outer(self) -> OutputOperator:
        """H itself where S is exact: its products need no square root."""
        return super().outer() if self.mc_samples else self.hessian


class LossGradient(FactoredOutputOperator):
    """The gradients ∇_f ℓ_n as the columns of a block-diagonal operator, ``[N·C, N]``.

    Without r, as :class:`vivit_linop.PerSampleGradients`.
    """

    determined = True

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__(risk, 1)

    def _form(self, batch: int) -> Tensor:
        risk = self.risk
        factor = risk.scale / risk.reduction_factor
        gradient = risk.loss.gradient(risk.outputs[batch], risk.all_targets[batch])
        return factor * gradient.reshape(len(gradient), -1, 1, 1)


def _least_squares(A: Tensor, b: Tensor) -> Tensor:
    """The shortest x with the least ‖A x - b‖, in batches; any where A has full rank.

    LAPACK's QR finds ranks. CUDA's does not, and gives up where R has a zero.
    """
    try:
        return torch.linalg.lstsq(A, b).solution
    # It is torch.linalg.LinAlgError, whose name torch keeps from mypy.
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return torch.linalg.pinv(A) @ b
