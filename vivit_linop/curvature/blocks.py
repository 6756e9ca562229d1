"""Diagonal blocks of a GGN: its restriction to groups of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from vivit_linop.arguments import as_list
from vivit_linop.curvature.column_sums import formed_pieces, sum_columns
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.linalg.restrictions import gram_matrix_of_rows
from vivit_linop.net.totals import GramTotal, OuterTotal, RowNorms
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.parts import Rows
from vivit_linop.risk.empirical import EmpiricalRisk

ParameterBlocks = str | Iterable[Any]


class Partition:
    """A pullback, and groups of names of parameters, each in one at most."""

    def __init__(self, factor: Pullback, groups: Sequence[Sequence[str]]) -> None:
        self.factor, self.groups = factor, groups

    @cached_property
    def indices(self) -> list[Tensor]:
        """The numbers of the rows of each group."""
        return places_of(self.factor.risk, self.groups)

    def _sum(self, group: int, by_gram: bool) -> GramTotal | OuterTotal:
        names = self.groups[group]
        if by_gram:
            return GramTotal(self.factor, self.factor, names)
        return OuterTotal(self.factor, names)

    @cached_property
    def small_sides(self) -> list[Tensor]:
        """For each group the smaller of VᵀV and V Vᵀ, all from one pass."""
        width = self.factor.shape[1]
        by_gram = [len(index) >= width for index in self.indices]
        totals = [*map(self._sum, range(len(by_gram)), by_gram)]
        sum_columns(self.factor, *totals)
        return [total.matrix for total in totals]

    def side(self, group: int, by_gram: bool) -> Tensor:
        """VᵀV or V Vᵀ of one group; the larger one takes a pass of its own."""
        if by_gram == (len(self.indices[group]) >= self.factor.shape[1]):
            return self.small_sides[group]
        return sum_columns(self.factor, self._sum(group, by_gram)).matrix

    @cached_property
    def row_norms(self) -> Sequence[Tensor]:
        """For each group the squared norms of its rows, all from one pass."""
        names = [name for group in self.groups for name in group]
        total = sum_columns(self.factor, RowNorms(self.factor, names))
        return total.entries.split([*map(len, self.indices)])


class FactorRows(Rows):
    """The rows of a pullback that belong to one group of parameters, ``[d, N·R]``."""

    def __init__(self, partition: Partition, group: int) -> None:
        self.partition, self.group = partition, group
        super().__init__(partition.factor, partition.indices[group])


@verbs.gram_matrix.register
def gram_matrix_of_block(left: FactorRows, right: Op) -> Tensor:
    """All groups' in one pass, where that is the smaller side; else alone."""
    if left is not right:
        return gram_matrix_of_rows(left, right)
    return left.partition.side(left.group, by_gram=True)


@verbs.outer_matrix.register
def outer_matrix_of_block(factor: FactorRows) -> Tensor:
    """As the Gram matrix."""
    return factor.partition.side(factor.group, by_gram=False)


@verbs.column_pieces.register
def column_pieces_of_block(op: FactorRows) -> Iterator[tuple[slice, Tensor]]:
    """Formed, without those of other parameters."""
    return formed_pieces(op.partition.factor, op.partition.groups[op.group])


@verbs.row_norms_squared.register
def row_norms_of_block(op: FactorRows) -> Tensor:
    """Those of all groups come from one pass."""
    return op.partition.row_norms[op.group].clone()


def block_diagonal(op: LowRank, blocks: ParameterBlocks) -> BlockDiagonal:
    """Return the diagonal blocks of c V Vᵀ over groups of parameters."""
    factor = op.factor
    assert isinstance(factor, Pullback)
    partition = Partition(factor, parameter_groups(factor.risk, blocks))
    return BlockDiagonal(
        [
            LowRank(FactorRows(partition, group), op.scale)
            for group in range(len(partition.groups))
        ],
        partition.indices,
    )


def places_of(risk: EmpiricalRisk, groups: Sequence[Sequence[str]]) -> list[Tensor]:
    """Return the numbers of the rows of groups of parameters."""
    spans = spans_of(risk)
    rows = partial(torch.arange, device=risk.device)
    return [torch.cat([rows(*spans[name]) for name in group]) for group in groups]


def spans_of(risk: EmpiricalRisk) -> dict[str, tuple[int, int]]:
    """Return the first row of each parameter, and that after its last."""
    ends = (0, *accumulate(risk.sizes))
    return dict(zip(risk.params, pairwise(ends), strict=True))


def parameter_groups(risk: EmpiricalRisk, blocks: ParameterBlocks) -> list[list[str]]:
    """Turn a description of blocks into names of parameters.

    Raises:
        ValueError: If a parameter is missing, foreign or listed twice.
    """
    with risk.ranks.together("blocks") as ballot:
        groups = _groups(risk, blocks)
        sizes = torch.tensor([*map(len, groups)], device="cpu")
        ballot.given = sizes, *places_of(risk, groups)
    return groups


def _groups(risk: EmpiricalRisk, blocks: ParameterBlocks) -> list[list[str]]:
    names = list(risk.params)
    if isinstance(blocks, str):
        if blocks == "parameter":
            return [[name] for name in names]
        if blocks == "module":
            modules: dict[str, list[str]] = {}
            for name in names:
                modules.setdefault(name.rpartition(".")[0], []).append(name)
            return list(modules.values())
        raise ValueError(
            f"blocks: 'parameter', 'module' or groups of parameters, got {blocks!r}."
        )
    what = "groups of parameters; or 'parameter' or 'module'"
    by_identity = {id(t): name for name, t in risk.model.original.tensors().items()}
    groups = []
    for position, block in enumerate(as_list(blocks, "blocks", what)):
        if isinstance(block, Mapping):
            if "params" not in block:
                raise ValueError(f"blocks[{position}]: a group needs the key 'params'.")
            block = block["params"]
        members = (
            [block]
            if isinstance(block, (Tensor, str))
            else as_list(block, f"blocks[{position}]", "parameters, or their names")
        )
        group = [
            m if isinstance(m, str) else by_identity.get(id(m), "") for m in members
        ]
        foreign = [at for at, name in enumerate(group) if name not in risk.params]
        if foreign or not group:
            what = f"entry {foreign[0]} is not a parameter" if foreign else "is empty"
            raise ValueError(f"blocks[{position}]: {what} of the risk.")
        groups.append(group)
    listed = [name for group in groups for name in group]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    missing = [name for name in names if name not in listed]
    if twice:
        raise ValueError(f"blocks: {twice[0]!r} is listed twice.")
    if missing:
        raise ValueError(
            f"blocks: {missing[0]!r} is in no block. Add it, or leave it out of the "
            "risk with params=."
        )
    return groups
