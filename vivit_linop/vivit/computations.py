"""The four computations of ViViT 1.0.0, on the operators of this package.

Each records layers during BackPACK's backward pass and turns them into the factor V of
a group of parameters, whose Gram matrix, eigenpairs, derivatives and steps are those of
:class:`vivit_linop.operators.lowrank.LowRank` and of :mod:`vivit_linop.analysis`.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Generic, TypeVar

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from torch import Tensor, nn

from vivit_linop.analysis.newton import (
    evaluated_damping,
    gram_eigenvectors,
    newton_combination,
)
from vivit_linop.curvature import plan
from vivit_linop.linalg.decompositions import GramEigenpairs
from vivit_linop.net.columns.base import LayerColumns, merged
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.operators.base import Op
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.elementary import Dense
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.symmetric import symmetric_eigenvalues
from vivit_linop.vivit.column_factor import ColumnFactor, formed
from vivit_linop.vivit.extensions import (
    LayerRecord,
    Subsampling,
    check_subsampling,
    layer_records,
)
from vivit_linop.vivit.groups import Block, Group, GroupsHook, Pass, checked_blocks

# The bytes that temporaries of a Gram matrix may take.
_MEMORY = 2**27

Result = TypeVar("Result")


class _Computation(ABC, Generic[Result]):
    """What the four computations have in common; arguments come with their names."""

    _keys: tuple[str, ...] = ("params", "criterion")
    _at_rank = False  # whether the exact S of a cross-entropy may have a column less

    def __init__(
        self, mc_samples: tuple[str, int], verbose: bool, **subsampling: Subsampling
    ) -> None:
        self._lists = {
            name: check_subsampling(name, indices)
            for name, indices in subsampling.items()
        }
        self._subsampling, *_ = self._lists.values()  # the first is the GGN's
        name, count = mc_samples
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(
                f"{name}: 0 for the exact GGN or a number of Monte-Carlo samples, got "
                f"{count!r}."
            )
        self._mc_samples, self._verbose = count, verbose
        # By the ids of their groups, which they keep: no other object gets that id.
        self._begun: dict[int, Block] = {}

    def _extension(self) -> BackpropExtension:
        return layer_records(
            self._mc_samples, self._subsampling, self._lists, self._at_rank
        )

    def get_extension_hook(
        self, param_groups: Sequence[Group]
    ) -> Callable[[nn.Module], None]:
        """Return the extension hook for ``with backpack(…)``.

        Args:
            param_groups: One dictionary for each block of the GGN, with the keys that
                the computation needs. ``"params"``: its parameters, d entries together.
                ``"criterion"``: a function that is given the ``min(R·|S|, d)``
                eigenvalues, ascending, and returns the indices of those whose
                eigenvectors are wanted. ``"damping"``: a function that is given
                ``(evals, gram_evecs, gammas, lambdas)`` of these, with shapes ``[K]``,
                ``[R·|S|, K]`` (rows ``r·|S| + n`` as in ViViT), ``[N, K]`` and
                ``[N, K]``, and returns δ, ``[K]``; or a number.

        Raises:
            ValueError: If a group lacks a key or has no parameters, or a parameter is
                frozen or listed twice.
        """
        blocks = checked_blocks(param_groups, self._keys)
        return GroupsHook(
            blocks, self._begin, self._collect, self._finish, self._verbose
        )

    def get_result(self, group: Group) -> Result:
        """Return the result of a group.

        Raises:
            KeyError: If there is none.
        """
        block = self._begun.get(id(group))
        if block is None:
            raise KeyError(
                "No results available for this group: no backward pass with a hook for "
                "it has begun. It must be the same dictionary as in param_groups."
            )
        if block.result is not None:
            return block.result
        missing = ", ".join(
            f"{at} (of shape {list(block.params[at].shape)})" for at in block.missing
        )
        raise KeyError(
            "No results available for this group: the backward pass did not reach its "
            f"parameters {missing}. Are they those of the model, and is it extended?"
        )

    def _begin(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.result = None
            self._begun[id(block.group)] = block

    @abstractmethod
    def _collect(self, block: Block, records: list[LayerRecord], of: Pass) -> list[Any]:
        """Return what is kept of each of some parameters."""

    @abstractmethod
    def _compute(self, block: Block, of: Pass) -> Any:
        """Return the result of a complete block."""

    def _finish(self, block: Block, of: Pass) -> None:
        with torch.no_grad():
            block.result = self._compute(block, of)

    # Operators ------------------------------------------------------------------

    def _operator(
        self, columns: Sequence[LayerColumns], like: Tensor, N: int
    ) -> LowRank:
        """The GGN's block N/|S| V Vᵀ; BackPACK's factor 1/N is that of all samples."""
        scale = N / columns[0].num_samples
        return LowRank(_factor(columns, like, _is_small(columns)), scale)

    def _pairs(
        self, operator: LowRank, group: Group, warn_small_eigvals: float
    ) -> Eigenpairs:
        pairs = operator.eigh(select=group["criterion"])
        if self._verbose:
            count = min(operator.factor.shape)
            print(f"Eigenpairs: {len(pairs)} of {count} kept")
        if (pairs.eigenvalues.abs() < warn_small_eigvals).any():
            warnings.warn(
                f"Some of the chosen eigenvalues are smaller than {warn_small_eigvals} "
                "(warn_small_eigvals). Directions of numerically zero eigenvalues are "
                "any in the complement of the others; a more restrictive 'criterion' "
                "leaves them out.",
                stacklevel=2,
            )
        return pairs


class _OfGGN(_Computation[Result]):
    """What those of the GGN alone have in common: its samples, and one extension."""

    def __init__(
        self,
        subsampling: Subsampling = None,
        mc_samples: int = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__(("mc_samples", mc_samples), verbose, subsampling=subsampling)

    def get_extension(self) -> BackpropExtension:
        """Return a BackPACK extension for ``with backpack(…)``."""
        return self._extension()


class EigvalshComputation(_OfGGN[Tensor]):
    """GGN eigenvalues during a backward pass.

    ``get_result(group)`` returns the eigenvalues of a group's block, ascending,
    ``[R·|S|]``. R is C, or ``mc_samples``. Scaled as the GGN of the mean loss over the
    chosen samples S (for ``reduction="sum"``: N times that). If there are more than the
    group has entries, the surplus is zero. Groups need ``"params"``.

    Args:
        subsampling: The indices of the samples that the GGN is of; all if None.
        mc_samples: 0 for the exact GGN, or the number of Monte-Carlo samples that
            approximate the Hessian of the loss.
        verbose: Whether to print what happens during the backward pass.

    Raises:
        ValueError: If ``subsampling`` is empty or repeats an index, or ``mc_samples``
            is negative. Indices out of range are found in the backward pass.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> from torch import nn
        >>> from vivit_linop.vivit import EigvalshComputation
        >>> model, loss = extend(nn.Linear(3, 2)), extend(nn.CrossEntropyLoss())
        >>> X, y = torch.rand(4, 3), torch.randint(2, (4,))
        >>> computation = EigvalshComputation()
        >>> group = {"params": list(model.parameters())}
        >>> hook = computation.get_extension_hook([group])
        >>> with backpack(computation.get_extension(), extension_hook=hook):
        ...     loss(model(X), y).backward()
        >>> computation.get_result(group).shape
        torch.Size([8])
    """

    _keys = ("params",)
    _at_rank = True

    def _begin(self, blocks: Sequence[Block]) -> None:
        super()._begin(blocks)
        self._grams: dict[int, Tensor] = {}

    def _collect(
        self, block: Block, records: list[LayerRecord], of: Pass
    ) -> list[LayerColumns | None]:
        columns = _of_one_module(
            [record.ggn_columns(self._subsampling) for record in records]
        )
        rows = columns[0].num_samples * columns[0].width
        # Fewer rows than the Gram matrix has: its smaller side will do.
        if sum(block.sizes) < rows:
            return [part.compacted() for part in columns]
        key = id(block.group)
        if key not in self._grams:
            self._grams[key] = records[0].signals.new_zeros(rows, rows)
        for part, _ in merged([(part, part) for part in columns]):
            part.add_gram(self._grams[key], part, _MEMORY)
        return [None] * len(columns)

    def _compute(self, block: Block, of: Pass) -> Tensor:
        columns = block.take()
        N = of.num_samples
        samples = N if self._subsampling is None else len(self._subsampling)
        if columns[0] is not None:
            evals = self._operator(columns, block.params[0], N).eigvalsh()
        else:
            # Only what is above the diagonal has been summed.
            gram = self._grams.pop(id(block.group)).T
            evals = symmetric_eigenvalues(gram) * (N / samples)
        surplus = samples * (self._mc_samples or of.num_outputs) - len(evals)
        return torch.cat([evals.new_zeros(surplus), evals]).sort().values


class EighComputation(_OfGGN[tuple[Tensor, list[Tensor]]]):
    """GGN eigenvalues and eigenvectors during a backward pass.

    ``get_result(group)`` returns the chosen eigenvalues ``[K]`` in the order of the
    criterion, and for each parameter ``[K, *p.shape]``. Over all parameters together
    the eigenvectors are orthonormal. Groups need ``"params"`` and ``"criterion"``.

    Takes the arguments of :class:`EigvalshComputation`, and raises its errors.

    Args:
        warn_small_eigvals: Warn if a chosen eigenvalue is smaller; 0 for never.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> from torch import nn
        >>> from vivit_linop.vivit import EighComputation
        >>> model, loss = extend(nn.Linear(3, 2)), extend(nn.CrossEntropyLoss())
        >>> X, y = torch.rand(4, 3), torch.randint(2, (4,))
        >>> computation = EighComputation()
        >>> group = {
        ...     "params": list(model.parameters()),
        ...     "criterion": lambda evals: [evals.numel() - 1],
        ... }
        >>> hook = computation.get_extension_hook([group])
        >>> with backpack(computation.get_extension(), extension_hook=hook):
        ...     loss(model(X), y).backward()
        >>> evals, evecs = computation.get_result(group)
        >>> [vecs.shape for vecs in evecs]
        [torch.Size([1, 2, 3]), torch.Size([1, 2])]
    """

    def __init__(
        self,
        subsampling: Subsampling = None,
        mc_samples: int = 0,
        verbose: bool = False,
        warn_small_eigvals: float = 1e-4,
    ) -> None:
        super().__init__(subsampling, mc_samples, verbose)
        self._warn_small_eigvals = _checked_threshold(warn_small_eigvals)

    def _collect(
        self, block: Block, records: list[LayerRecord], of: Pass
    ) -> list[LayerColumns]:
        return _compacted([record.ggn_columns(self._subsampling) for record in records])

    def _compute(self, block: Block, of: Pass) -> tuple[Tensor, list[Tensor]]:
        operator = self._operator(block.take(), block.params[0], of.num_samples)
        pairs = self._pairs(operator, block.group, self._warn_small_eigvals)
        factor = operator.factor
        if isinstance(pairs, GramEigenpairs) and isinstance(factor, ColumnFactor):
            vectors = pairs.lifted(factor.by_parameter, factor.components_of)
        else:
            vectors = [*pairs.eigenvectors.T.split(block.sizes, dim=1)]
        return pairs.eigenvalues, [
            part.reshape(-1, *param.shape)
            for part, param in zip(vectors, block.params, strict=True)
        ]


class _DirectionalComputation(_Computation[Result]):
    """Slopes and curvatures along the eigenvectors of the GGN.

    Takes the arguments of :class:`DirectionalDerivativesComputation`.
    """

    def __init__(
        self,
        subsampling_grad: Subsampling = None,
        subsampling_ggn: Subsampling = None,
        mc_samples_ggn: int = 0,
        verbose: bool = False,
        warn_small_eigvals: float = 1e-4,
    ) -> None:
        super().__init__(
            ("mc_samples_ggn", 0 if mc_samples_ggn is None else mc_samples_ggn),
            bool(verbose),
            subsampling_ggn=subsampling_ggn,
            subsampling_grad=subsampling_grad,
        )
        self._subsampling_grad = self._lists["subsampling_grad"]
        self._warn_small_eigvals = _checked_threshold(warn_small_eigvals)

    def get_extensions(self) -> list[BackpropExtension]:
        """Return the BackPACK extensions for ``with backpack(*extensions, …)``."""
        return [self._extension()]

    def _collect(
        self, block: Block, records: list[LayerRecord], of: Pass
    ) -> list[tuple[LayerColumns, LayerColumns]]:
        ggn = [record.ggn_columns(self._subsampling) for record in records]
        gradients = [
            record.gradient_columns(self._subsampling_grad) for record in records
        ]
        return [*zip(_compacted(ggn), _compacted(gradients), strict=True)]

    def _derivatives(
        self, block: Block, of: Pass
    ) -> tuple[LowRank, Eigenpairs, Tensor, Tensor]:
        """Return the block, its chosen eigenpairs, γ and λ."""
        ggn_columns, gradients = zip(*block.take(), strict=True)
        operator = self._operator(ggn_columns, block.params[0], of.num_samples)
        pairs = self._pairs(operator, block.group, self._warn_small_eigvals)
        U = _factor(gradients, block.params[0], _is_small(ggn_columns))
        gammas = pairs.components(U) / of.r
        squares = pairs.components(operator.factor).square()
        samples = ggn_columns[0].num_samples
        lambdas = squares.unflatten(0, (samples, -1)).sum(1) / of.r
        return operator, pairs, gammas, lambdas


class DirectionalDerivativesComputation(_DirectionalComputation[tuple[Tensor, Tensor]]):
    """Slopes γ and curvatures λ of samples along GGN eigenvectors.

    ``get_result(group)`` returns γ ``[N, K]`` and λ ``[N, K]`` along a block's K
    directions: γ[n, k] = ⟨∇ℓ_n, e_k⟩ for the samples of ``subsampling_grad`` and
    λ[n, k] = e_kᵀ G_n e_k for those of ``subsampling_ggn``, both of the samples' own
    losses: for a mean loss, λ's mean over n is the eigenvalues. Groups need
    ``"params"`` and ``"criterion"``.

    Args:
        subsampling_grad: The indices of the samples whose slopes are wanted; all if
            None.
        subsampling_ggn: The indices of the samples whose GGN gives the directions, and
            whose curvatures are wanted; all if None.
        mc_samples_ggn: 0 for the exact GGN, or the number of Monte-Carlo samples that
            approximate the Hessian of the loss, for directions and curvatures.
        verbose: Whether to print what happens during the backward pass.
        warn_small_eigvals: Warn if a chosen eigenvalue is smaller; 0 for never.

    Raises:
        ValueError: As for :class:`EigvalshComputation`.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> from torch import nn
        >>> from vivit_linop.vivit import DirectionalDerivativesComputation
        >>> model, loss = extend(nn.Linear(3, 2)), extend(nn.MSELoss())
        >>> X, y = torch.rand(4, 3), torch.rand(4, 2)
        >>> computation = DirectionalDerivativesComputation(subsampling_grad=[0, 1])
        >>> group = {
        ...     "params": list(model.parameters()),
        ...     "criterion": lambda evals: [evals.numel() - 1],
        ... }
        >>> hook = computation.get_extension_hook([group])
        >>> with backpack(*computation.get_extensions(), extension_hook=hook):
        ...     loss(model(X), y).backward()
        >>> gammas, lambdas = computation.get_result(group)
        >>> gammas.shape, lambdas.shape
        (torch.Size([2, 1]), torch.Size([4, 1]))
    """

    def _compute(self, block: Block, of: Pass) -> tuple[Tensor, Tensor]:
        _, _, gammas, lambdas = self._derivatives(block, of)
        return gammas, lambdas


class DirectionalDampedNewtonComputation(_DirectionalComputation[tuple[Tensor, ...]]):
    """Damped Newton steps in the span of GGN eigenvectors.

    s = Σ_k −γ̄_k / (λ̄_k + δ_k) e_k, with γ̄ and λ̄ the means over the samples (for
    ``reduction="sum"``, N times these) of the directional derivatives.
    ``get_result(group)`` returns a block's step, in the shapes and order of
    ``group["params"]``. Groups need ``"params"``, ``"criterion"`` and ``"damping"``.

    Takes the arguments of :class:`DirectionalDerivativesComputation`, and raises its
    errors; ``subsampling_grad`` are the samples whose gradient the step is for.

    Example:
        >>> import torch
        >>> from backpack import backpack, extend
        >>> from torch import nn
        >>> from vivit_linop.vivit import DirectionalDampedNewtonComputation
        >>> model, loss = extend(nn.Linear(3, 2)), extend(nn.MSELoss())
        >>> X, y = torch.rand(4, 3), torch.rand(4, 2)
        >>> computation = DirectionalDampedNewtonComputation()
        >>> group = {
        ...     "params": list(model.parameters()),
        ...     "criterion": lambda evals: [evals.numel() - 1],
        ...     "damping": lambda evals, evecs, gammas, lambdas: torch.ones_like(evals),
        ... }
        >>> hook = computation.get_extension_hook([group])
        >>> with backpack(*computation.get_extensions(), extension_hook=hook):
        ...     loss(model(X), y).backward()
        >>> [part.shape for part in computation.get_result(group)]
        [torch.Size([2, 3]), torch.Size([2])]
    """

    _keys = ("params", "criterion", "damping")

    def _compute(self, block: Block, of: Pass) -> tuple[Tensor, ...]:
        operator, pairs, gammas, lambdas = self._derivatives(block, of)
        damping, gram_evecs = block.group["damping"], None
        if callable(damping):  # in the order of ViViT, the sample the faster index
            rows = gram_eigenvectors(pairs, operator.factor)
            rows = rows.unflatten(0, (len(lambdas), -1))
            gram_evecs = rows.transpose(0, 1).flatten(0, 1)
        damping = evaluated_damping(damping, pairs, gram_evecs, gammas, lambdas)
        weight = of.r * of.num_samples
        step = newton_combination(
            pairs, weight * gammas.mean(0), weight * lambdas.mean(0), damping
        )
        parts = step.split(block.sizes)
        return tuple(
            part.reshape(param.shape)
            for part, param in zip(parts, block.params, strict=True)
        )


def _factor(columns: Sequence[LayerColumns], like: Tensor, form: bool) -> Op:
    if form:
        return Dense(formed(columns).rows().T)
    return ColumnFactor(columns, like.dtype, like.device, _MEMORY)


def _of_one_module(columns: list[LayerColumns]) -> list[LayerColumns]:
    """Let columns of one module know that they are of one S."""
    if isinstance(first := columns[0], KhatriRaoColumns):
        for other in columns[1:]:
            first.share_cotangents(other)
    return columns


def _compacted(columns: list[LayerColumns]) -> list[LayerColumns]:
    """The same of one module, formed where that takes less memory."""
    return [part.compacted() for part in _of_one_module(columns)]


def _is_small(columns: Sequence[LayerColumns]) -> bool:
    entries = sum(part.num_samples * part.width * part.numel for part in columns)
    return entries <= plan.FORMED_ENTRIES


def _checked_threshold(warn_small_eigvals: float) -> float:
    if not isinstance(warn_small_eigvals, Real) or not warn_small_eigvals >= 0.0:
        raise ValueError(
            f"warn_small_eigvals: a number of at least 0, got {warn_small_eigvals!r}."
        )
    return float(warn_small_eigvals)
