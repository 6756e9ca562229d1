"""Eigenvalues and eigenpairs: the rules of ``eigvalsh`` and ``eigh``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from vivit_linop.linalg.decompositions import (
    DenseDecomposition,
    LowRankDecomposition,
    MergedDecomposition,
    ScaledShifted,
)
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.damped import Damped, DampedInverse
from vivit_linop.operators.dispatch import NoClosedForm, no_eigenpairs
from vivit_linop.operators.eigenpairs import Eigendecomposition, Eigenpairs
from vivit_linop.operators.elementary import (
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
)
from vivit_linop.operators.kronecker import (
    BlockDiagonal,
    CorrectedKronecker,
    Kronecker,
)
from vivit_linop.operators.lowrank import DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.symmetric import (
    symmetric_eigenpairs,
    symmetric_eigenvalues,
)
from vivit_linop.operators.verbs import (
    eigendecomposition,
    eigh,
    eigvalsh,
    extreme_eigenpairs,
    to_dense,
)


@eigh.register
def eigenpairs_of_operator(
    op: TorchLinearOperator,
    k: int | None = None,
    select: Callable[[Tensor], Sequence[int] | Tensor] | None = None,
    rcond: float | None = None,
) -> Eigenpairs:
    """Where there is no closed form, the k largest by ARPACK."""
    try:
        decomposition = eigendecomposition(op)
    except NoClosedForm:
        if k is None or select is not None:
            raise
        return extreme_eigenpairs(op, k)
    return decomposition.pairs(decomposition.choose(k, select, rcond))


@eigh.register
def eigenpairs_of_damped(
    op: Damped,
    k: int | None = None,
    select: Callable[[Tensor], Sequence[int] | Tensor] | None = None,
    rcond: float | None = None,
) -> Eigenpairs:
    """The k largest are those of what is damped, found in the same way."""
    inner = op.operator
    turned = isinstance(inner, Scaled) and not inner.factor > 0
    if k is None or select is not None or turned:
        return eigenpairs_of_operator(op, k, select, rcond)
    pairs = eigh(inner, k, rcond=rcond)
    return _with_values(pairs, pairs.eigenvalues + op.damping)


@eigh.register
def eigenpairs_of_scaled(
    op: Scaled,
    k: int | None = None,
    select: Callable[[Tensor], Sequence[int] | Tensor] | None = None,
    rcond: float | None = None,
) -> Eigenpairs:
    """The k largest are those of what is scaled, unless the order is turned around."""
    if k is None or select is not None or not op.factor > 0:
        return eigenpairs_of_operator(op, k, select, rcond)
    pairs = eigh(op.operator, k, rcond=rcond)
    return _with_values(pairs, op.factor * pairs.eigenvalues)


def _with_values(pairs: Eigenpairs, eigenvalues: Tensor) -> Eigenpairs:
    """The same vectors, formed when they are asked for."""
    others = Eigenpairs(eigenvalues, lambda: pairs.eigenvectors)
    others.route = pairs.route
    return others


@eigvalsh.register
def eigenvalues_of_operator(op: TorchLinearOperator) -> Tensor:
    return eigendecomposition(op).eigenvalues


@eigvalsh.register
def eigenvalues_of_identity(op: Identity) -> Tensor:
    return torch.ones(op.shape[0], dtype=op.torch_dtype, device=op.device)


@eigvalsh.register
def eigenvalues_of_dense(op: Dense) -> Tensor:
    return cast(Tensor, op.ranks.led(symmetric_eigenvalues, op.matrix))


@eigvalsh.register
def eigenvalues_of_gram(op: Gram) -> Tensor:
    return op.eigenvalues


@eigvalsh.register
def eigenvalues_of_low_rank(op: LowRank) -> Tensor:
    """The min(D, R) eigenvalues of the smaller side; the others are zero."""
    evals = op.scale * op.small_eigenvalues
    return evals[-min(op.factor.shape) :]


@eigvalsh.register
def eigenvalues_of_scaled(op: Scaled) -> Tensor:
    evals = op.factor * eigvalsh(op.operator)
    return evals if op.factor > 0 else evals.flip(0)


@eigvalsh.register
def eigenvalues_of_damped(op: Damped) -> Tensor:
    """All n eigenvalues: those of A, its zeros included, shifted by δ."""
    evals = eigvalsh(op.operator)
    zeros = evals.new_zeros(op.shape[0] - len(evals))
    return torch.cat([zeros, evals]).sort().values + op.damping


@eigvalsh.register
def eigenvalues_of_damped_inverse(op: DampedInverse) -> Tensor:
    return (1.0 / eigvalsh(Damped(op.operator, op.damping))).sort().values


@eigvalsh.register
def eigenvalues_of_woodbury(op: Woodbury) -> Tensor:
    return (1.0 / eigvalsh(Damped(op.operator, op.damping))).flip(0)


@eigvalsh.register
def eigenvalues_of_damped_root(op: DampedRoot) -> Tensor:
    roots = eigvalsh(Damped(op.operator, op.damping)).sqrt()
    return (1.0 / roots).flip(0) if op.inverse else roots


@eigvalsh.register
def eigenvalues_of_product(op: Product) -> Tensor:
    return eigvalsh(op.reduced_or(no_eigenpairs(op)))


@eigvalsh.register
def eigenvalues_of_block_diagonal(op: BlockDiagonal) -> Tensor:
    return torch.cat([block.eigvalsh() for block in op.blocks]).sort().values


@eigendecomposition.register
def decomposition_of_dense(op: Dense) -> Eigendecomposition:
    return DenseDecomposition(op.matrix, op.ranks)


@eigendecomposition.register
def decomposition_of_dense_inverse(op: DenseInverse) -> Eigendecomposition:
    """Of the inverted matrix: positive where that is positive definite."""
    evals, evecs = op.ranks.led(symmetric_eigenpairs, op.operator.matrix.double())
    vectors = evecs.to(op.torch_dtype)
    inverse = (1.0 / (evals + op.damping)).to(op.torch_dtype)
    return MergedDecomposition(inverse, lambda order: vectors[:, order])


@eigendecomposition.register
def decomposition_of_gram(op: Gram) -> Eigendecomposition:
    return DenseDecomposition(op.matrix, op.ranks)


@eigendecomposition.register
def decomposition_of_identity(op: Identity) -> Eigendecomposition:
    return DenseDecomposition(to_dense(op))


@eigendecomposition.register
def decomposition_of_diagonal(op: Diagonal) -> Eigendecomposition:
    def vectors(order: Tensor) -> Tensor:
        columns = op.entries.new_zeros(len(op.entries), len(order))
        columns[order, torch.arange(len(order), device=order.device)] = 1.0
        return columns

    return MergedDecomposition(op.entries, vectors)


@eigendecomposition.register
def decomposition_of_low_rank(op: LowRank) -> Eigendecomposition:
    return LowRankDecomposition(op)


@eigendecomposition.register
def decomposition_of_scaled(op: Scaled) -> Eigendecomposition:
    return ScaledShifted(eigendecomposition(op.operator), factor=op.factor)


@eigendecomposition.register
def decomposition_of_damped(op: Damped) -> Eigendecomposition:
    return ScaledShifted(eigendecomposition(op.operator), shift=op.damping)


@eigendecomposition.register
def decomposition_of_product(op: Product) -> Eigendecomposition:
    return eigendecomposition(op.reduced_or(no_eigenpairs(op)))


@eigendecomposition.register
def decomposition_of_block_diagonal(op: BlockDiagonal) -> Eigendecomposition:
    """The pairs of the blocks, padded with zeros."""
    parts = [eigendecomposition(block) for block in op.blocks]
    wanted = [
        torch.zeros(part.count, dtype=torch.bool, device="cpu").index_fill(
            0, part.default().cpu(), True
        )
        for part in parts
    ]
    rests = [part.rest for part in parts if part.rest is not None]
    places = op.split(torch.arange(op.shape[0], device=op.device))

    def vectors(order: Tensor) -> Tensor:
        columns = torch.zeros(
            op.shape[0], len(order), dtype=op.torch_dtype, device=op.device
        )
        start = 0
        for part, place in zip(parts, places, strict=True):
            mine = (
                ((order >= start) & (order < start + part.count)).nonzero().squeeze(1)
            )
            if len(mine):
                vectors = part.pairs(order[mine] - start).eigenvectors
                columns[place[:, None], mine] = vectors.to(columns)
            start += part.count
        return columns

    return MergedDecomposition(
        torch.cat([part.eigenvalues for part in parts]).to(op.torch_dtype),
        vectors,
        torch.cat(wanted).to(op.device),
        max(rests, default=None),
    )


@eigendecomposition.register
def decomposition_of_kronecker(
    op: Kronecker | CorrectedKronecker,
) -> Eigendecomposition:
    """Products of the factors' eigenvalues, Kronecker products of their vectors."""
    parts = op.factor_eigenpairs

    def vectors(order: Tensor) -> Tensor:
        columns = torch.ones(1, len(order), dtype=op.torch_dtype, device=op.device)
        for _, evecs in reversed(parts):
            part = evecs[:, order % len(evecs)]
            order = order // len(evecs)
            columns = (part[:, None, :] * columns[None, :, :]).flatten(0, 1)
        return columns

    return MergedDecomposition(op.eigenvalues, vectors)
