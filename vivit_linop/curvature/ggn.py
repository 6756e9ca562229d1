"""The generalised Gauss–Newton matrix, and its low-rank factor where it has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from vivit_linop.curvature.blocks import ParameterBlocks, block_diagonal
from vivit_linop.curvature.column_sums import sum_columns
from vivit_linop.curvature.jacobian import Jacobian, Pullback
from vivit_linop.curvature.loss_hessian import LossHessian, LossHessianSqrt
from vivit_linop.linalg.decompositions import DenseDecomposition
from vivit_linop.modes import ordinary_mode
from vivit_linop.net.totals import SampleRowNorms
from vivit_linop.operators import verbs
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.elementary import as_dense
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk


class GGNFactor(Pullback):
    """V = Jᵀ S: the low-rank factor of the GGN, ``[D, N·R]``, with G = V Vᵀ.

    Column n·R + r belongs to sample n. R is C − 1 for cross-entropy and C for other
    losses (a column of V is unique only up to an orthogonal mixing of all of them), or
    ``mc_samples``. A product with V or V.T is one pass over the data and costs about
    2/3 of a gradient.

    Args:
        risk: An :class:`EmpiricalRisk`, or its arguments, ``model, loss, data, …``.
        mc_samples: 0 for the exact factor, or the number M of random columns a sample;
            V Vᵀ then is G in expectation (the Fisher matrix, where that is another).
        generator: For reproducible random columns.
        positive_part: Whether each sample's H is replaced by its positive part, for a
            loss that is not convex. What is drawn is semi-definite without it.

    Raises:
        ValueError: If the loss is not convex at some sample, or has no likelihood and
            ``mc_samples`` is given.
        MemoryError: If the outputs of a sample are too many for exact columns (a
            vocabulary); products with :class:`GGN` need none, ``mc_samples`` few.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.randint(2, (4,)))
        >>> V = vl.GGNFactor(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
        >>> V.shape
        (8, 4)
    """

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
        *,
        mc_samples: int = 0,
        generator: torch.Generator | None = None,
        positive_part: bool = False,
        **options: Any,
    ) -> None:
        risk = as_risk(risk, loss, data, params, **options)
        hessian = LossHessian(risk, positive_part=positive_part)
        root = hessian.sqrt(mc_samples, generator)
        super().__init__(Jacobian(risk), root)

    @property
    def root(self) -> LossHessianSqrt:
        """S, the square root of the loss Hessian that V = Jᵀ S contains."""
        assert isinstance(self.output, LossHessianSqrt)
        return self.output

    @property
    def mc_samples(self) -> int:
        """0 for the exact factor."""
        return self.root.mc_samples


class GGN(LowRank):
    """G = Jᵀ H J = V Vᵀ: the generalised Gauss–Newton matrix, ``[D, D]``.

    A product is one tangent pass, a product in output space and one transposed pass:
    about 4/3 of the arithmetic of a gradient. Eigenvalues, eigenpairs and damped
    inverses go through the Gram matrix K = VᵀV of size N·R, computed once and kept; or
    through the dense G where that is smaller.

    For a loss that is not convex H, and with it G, is indefinite, and there is no V.
    Products, ``to_dense``, ``diagonal``, ``trace``, ``logdet``, ``eigvalsh`` and
    ``eigh`` (by ARPACK for ``k=``) are those of JᵀHJ; inverses and roots are refused,
    but for ``positive_part=True`` and for Monte-Carlo samples.

    Args:
        risk: An :class:`EmpiricalRisk`, or its arguments, ``model, loss, data, …``.
        mc_samples: 0 for the exact GGN, or the number of Monte-Carlo samples of the
            loss Hessian; one draw for all products. In expectation G is then the
            Fisher matrix: where H depends on targets, that is not H.
        generator: For reproducible samples.
        positive_part: As for :class:`GGNFactor`.

    Attributes:
        factor: V, a :class:`GGNFactor`.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> data = (torch.rand(4, 3), torch.randint(2, (4,)))
        >>> G = vl.GGN(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
        >>> evals, evecs = G.eigh(k=2)
        >>> torch.allclose(G @ evecs, evals * evecs, atol=1e-6)
        True
    """

    factor: GGNFactor

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
        *,
        mc_samples: int = 0,
        generator: torch.Generator | None = None,
        positive_part: bool = False,
        **options: Any,
    ) -> None:
        risk = as_risk(risk, loss, data, params, **options)
        # Products need H only; whether H has a root is checked when V is used.
        hessian = LossHessian(risk, positive_part=positive_part)
        root = LossHessianSqrt(hessian, mc_samples, generator)
        super().__init__(GGNFactor.through(Jacobian(risk), root))

    @classmethod
    def of(cls, factor: GGNFactor) -> Self:
        """Return V Vᵀ."""
        node = cls.__new__(cls)
        LowRank.__init__(node, factor)
        return node

    @property
    def risk(self) -> EmpiricalRisk:
        """The risk that it belongs to."""
        return self.factor.risk

    @property
    def semidefinite(self) -> bool:  # type: ignore[override]
        """Whether H has a root; looked at once, for a loss without a closed form."""
        return self.factor.root.exists

    @cached_property
    def parts(self) -> tuple[GGN, GGN]:
        """Jᵀ H₊ J and Jᵀ H₋ J, whose difference is JᵀHJ, for an indefinite H."""
        J, H = self.factor.jacobian, self.factor.root.hessian
        positive, negative = (
            GGN.of(GGNFactor.through(J, LossHessianSqrt(H.part(sign))))
            for sign in (1, -1)
        )
        return positive, negative

    def sample_diagonals(self) -> Tensor:
        """Return the diagonals of the samples' GGNs G_n = J_nᵀ H_n J_n, ``[N, D]``.

        Without r, as all quantities of single samples: r Σ_n of them is
        ``G.diagonal()``. BackPACK's ``BatchDiagGGNExact`` (and ``…MC``, for a GGN with
        ``mc_samples``) is r times this. One pass over the data; V is not formed. Take
        ``risk.subset`` where N·D entries are too many.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.randint(2, (4,)))
            >>> G = vl.GGN(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
            >>> torch.allclose(G.sample_diagonals().mean(0), G.diagonal())
            True
        """
        if not self.semidefinite:
            positive, negative = self.parts
            difference = positive.sample_diagonals() - negative.sample_diagonals()
            return self.scale * difference
        with ordinary_mode():
            norms = sum_columns(self.factor, SampleRowNorms(self.factor)).norms
            return norms.mul_(self.scale / self.risk.reduction_factor)

    def block_diagonal(self, blocks: ParameterBlocks) -> BlockDiagonal:
        """Return the block-diagonal of G over blocks of parameters.

        Args:
            blocks: ``"parameter"``, ``"module"``, a list of lists of ``Parameter``s
                (or names), or ``torch.optim``-style groups ``[{"params": […]}, …]``.
                Together they hold every parameter of the risk once.

        Returns:
            An operator whose ``blocks`` are low-rank nodes; the Gram matrices of all of
            them come from one pass over the data.

        Raises:
            ValueError: If a parameter is missing, foreign or listed twice; if the loss
                is not convex.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(4, 3), torch.rand(4, 1))
            >>> G = vl.GGN(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> blocks = G.block_diagonal("parameter")
            >>> [block.shape for block in blocks.blocks]
            [(3, 3), (1, 1)]
            >>> torch.allclose(blocks.diagonal(), G.diagonal())
            True
        """
        if not self.semidefinite:
            self.factor.root.check()
        return block_diagonal(self, blocks)


# Rules without a root ---------------------------------------------------------------

# Of a loss that is not convex JᵀHJ has an indefinite H and no V. What is linear in H is
# a difference, G = Jᵀ H₊ J − Jᵀ H₋ J, and both parts have factors, in the structure of
# the layers. All eigenvalues come from the dense G; a few pairs by
# :mod:`vivit_linop.curvature.routes`. Inverses and roots need V.


def _register(verb: Any, without_root: Callable[..., Any]) -> None:
    """Register a verb for GGNs: where H has a root as for c V Vᵀ, else another way."""
    with_root = verb.dispatch(LowRank)

    def rule(op: GGN, *arguments: Any) -> Any:
        return (with_root if op.semidefinite else without_root)(op, *arguments)

    verb.register(rule)


def _by_parts(verb: Callable[[GGN], Tensor]) -> Callable[[GGN], Tensor]:
    def difference(op: GGN) -> Tensor:
        positive, negative = map(verb, op.parts)
        return op.scale * (positive - negative)

    return difference


def _refused(verb: Any) -> Callable[..., Any]:
    def without_root(op: GGN, *arguments: Any) -> Any:
        op.factor.root.check()  # says why there is none
        return verb.dispatch(LowRank)(op, *arguments)

    return without_root


verb: Any
for verb in (verbs.to_dense, verbs.diagonal, verbs.trace):
    _register(verb, _by_parts(verb))
_register(verbs.eigvalsh, lambda op: verbs.eigvalsh(as_dense(op)))
_register(
    verbs.eigendecomposition,
    lambda op: DenseDecomposition(verbs.to_dense(op), op.ranks),
)
for verb in (verbs.logdet, verbs.damped_logdet, verbs.damped_logdets):
    _register(verb, verb.dispatch(TorchLinearOperator))
for verb in (verbs.inv, verbs.damped_inv, verbs.sqrt, verbs.damped_sqrt):
    _register(verb, _refused(verb))
