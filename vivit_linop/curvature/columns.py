"""Dense columns of a pullback, piece by piece, and what is summed over the pieces.

A column of Jᵀ B belongs to one sample: it is the backward pass of that sample alone.
So the columns are computed sample by sample (vectorised where the model allows), for
some parameters at a time, and Gram matrices are summed over groups of parameters.
Nothing of the size D × N·R is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import vjp, vmap

from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.verbs import gram_matrix, row_norms_squared, to_dense
from vivit_linop.risk.data import leaves, map_leaves, take
from vivit_linop.risk.empirical import EmpiricalRisk, free_memory
from vivit_linop.risk.model import Params, as_guest

SampleOutputs = Callable[[Params, object], Tensor]

# The share of free memory that the columns of one group of parameters may take.
_MEMORY_SHARE = 8


class Columns:
    """The columns of a pullback that belong to some parameters.

    Args:
        pullback: Jᵀ B.
        names: The parameters.
    """

    def __init__(self, pullback: Pullback, names: Sequence[str]) -> None:
        self._pullback, self._names = pullback, list(names)

    def chunks(self, chunk: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns of at most ``chunk`` samples and their place.

        The columns come as rows, ``[s·R, d]`` for s samples and the d entries of the
        parameters.
        """
        start = 0
        risk = self._pullback.risk
        for batch, (X, y) in enumerate(risk.batches()):
            cotangents = self._pullback.cotangents(batch)
            for index in torch.arange(len(y)).split(chunk):
                rows = _columns(
                    risk,
                    take(X, index, len(y)),
                    cotangents[index.to(cotangents.device)],
                    self._names,
                )
                yield slice(start, start + len(rows)), rows
                start += len(rows)


def gram_over_groups(
    left: Pullback, right: Pullback, groups: Sequence[Sequence[str]]
) -> list[Tensor]:
    """Return Σ over the parameters of each group of (left columns)ᵀ (right columns).

    Args:
        left: Jᵀ A, ``[D, R]``.
        right: Jᵀ B, ``[D, Q]``.
        groups: Names of parameters; each group gives one matrix.

    Returns:
        One ``[R, Q]`` matrix for each group.
    """
    _check_same_parameters(left.risk, right.risk)
    grams = []
    for group in groups:
        gram = (
            left.risk.params[group[0]].detach().new_zeros(left.shape[1], right.shape[1])
        )
        for names, chunk in _pieces(left, right, group):
            _add_gram(gram, left, right, names, chunk)
        grams.append(gram)
    return grams


def _add_gram(
    gram: Tensor, left: Pullback, right: Pullback, names: Sequence[str], chunk: int
) -> None:
    symmetric = left is right
    for rows, A in Columns(left, names).chunks(chunk):
        if symmetric:
            gram[rows, rows] += A @ A.T
            if rows.stop == gram.shape[0] and rows.start == 0:
                return
        for columns, B in Columns(right, names).chunks(chunk):
            if symmetric and columns.start <= rows.start:
                continue
            product = A @ B.T
            gram[rows, columns] += product
            if symmetric:
                gram[columns, rows] += product.T


def _pieces(
    left: Pullback, right: Pullback, names: Sequence[str]
) -> Iterator[tuple[list[str], int]]:
    """Cut parameters into groups whose columns fit, with the samples at a time.

    As many parameters go together as fit with all samples; a parameter too large for
    that goes alone, with fewer samples at a time.
    """
    risk = left.risk
    budget = risk.memory
    if budget is None:
        budget = free_memory(risk.device) // _MEMORY_SHARE
    itemsize = torch.finfo(risk.dtype).bits // 8
    samples = max(left.risk.num_samples, right.risk.num_samples)
    width = max(left.width, right.width)
    group: list[str] = []
    size = 0
    for name in names:
        numel = risk.params[name].numel()
        if group and (size + numel) * samples * width * itemsize > budget:
            yield group, _chunk(size, width, itemsize, samples, budget)
            group, size = [], 0
        group.append(name)
        size += numel
    yield group, _chunk(size, width, itemsize, samples, budget)


def _chunk(size: int, width: int, itemsize: int, samples: int, budget: int) -> int:
    return min(samples, max(1, budget // (size * width * itemsize)))


def _check_same_parameters(left: EmpiricalRisk, right: EmpiricalRisk) -> None:
    if left is right:
        return
    shapes = [{n: tuple(p.shape) for n, p in r.params.items()} for r in (left, right)]
    if list(shapes[0].items()) != list(shapes[1].items()):
        raise ValueError(
            "Factors of risks with different parameters have no cross-Gram matrix: "
            f"{shapes[0]} and {shapes[1]}."
        )


def _columns(
    risk: EmpiricalRisk, X: object, cotangents: Tensor, names: Sequence[str]
) -> Tensor:
    """Pull back each sample's cotangents ``[n, C, R]`` to rows ``[n·R, d]``."""
    fixed = {name: p.detach() for name, p in risk.params.items()}
    chosen = {name: fixed.pop(name) for name in names}
    weights = cotangents.mT  # [n, R, C]

    def outputs(params: Params, sample: object) -> Tensor:
        return risk.model({**fixed, **params}, sample).reshape(-1)

    with as_guest(risk.device):
        try:
            rows = _vectorised(outputs, chosen, X, weights)
        # What cannot be vectorised (control flow on values, writing in place) is done
        # sample by sample; an error of the model itself is seen there.
        except Exception:
            rows = _one_by_one(outputs, chosen, X, weights)
    return rows.flatten(0, 1)


def _vectorised(
    outputs: SampleOutputs, chosen: Params, X: object, weights: Tensor
) -> Tensor:
    n = len(weights)
    by_sample = [leaf for leaf in leaves(X) if leaf.ndim > 0 and len(leaf) == n]

    def rows(sample_leaves: list[Tensor], weight: Tensor) -> Tensor:
        given = iter(sample_leaves)
        sample = map_leaves(
            lambda leaf: (
                next(given)[None] if leaf.ndim > 0 and len(leaf) == n else leaf
            ),
            X,
        )
        pull_back = vjp(lambda params: outputs(params, sample), chosen)[1]
        (gradients,) = vmap(pull_back)(weight)
        return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)

    with torch.no_grad():
        result: Tensor = vmap(rows)(by_sample, weights)
    return result


def _one_by_one(
    outputs: SampleOutputs, chosen: Params, X: object, weights: Tensor
) -> Tensor:
    params = {name: p.clone().requires_grad_() for name, p in chosen.items()}
    result = []
    for index, weight in enumerate(weights):
        output = outputs(params, take(X, torch.tensor([index]), len(weights)))
        columns = []
        for w in weight:
            gradients = torch.autograd.grad(
                output, list(params.values()), w, retain_graph=True, allow_unused=True
            )
            columns.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for g, p in zip(gradients, params.values(), strict=True)
                    ]
                )
            )
        result.append(torch.stack(columns))
    return torch.stack(result).detach()


def _sample_chunk(op: Pullback) -> int:
    itemsize = torch.finfo(op.torch_dtype).bits // 8
    budget = op.risk.memory or free_memory(op.device) // _MEMORY_SHARE
    return _chunk(op.shape[0], op.width, itemsize, op.risk.num_samples, budget)


@gram_matrix.register
def _(left: Pullback, right: TorchLinearOperator) -> Tensor:
    if not isinstance(right, Pullback):
        return left.T.apply(to_dense(right))
    return gram_over_groups(left, right, [list(left.risk.params)])[0]


@to_dense.register
def _(op: Pullback) -> Tensor:
    result = torch.empty(op.shape, dtype=op.torch_dtype, device=op.device)
    for place, rows in Columns(op, list(op.risk.params)).chunks(_sample_chunk(op)):
        result[:, place] = rows.T
    return result


@row_norms_squared.register
def _(op: Pullback) -> Tensor:
    result = torch.zeros(op.shape[0], dtype=op.torch_dtype, device=op.device)
    for _, rows in Columns(op, list(op.risk.params)).chunks(_sample_chunk(op)):
        result += rows.square().sum(0)
    return result


@to_dense.register
def _(op: LowRank) -> Tensor:
    """Σ V_s V_sᵀ over pieces of columns where the factor is a pullback."""
    if not isinstance(op.factor, Pullback):
        dense = to_dense(op.factor)
        return op.scale * (dense @ dense.T)
    factor = op.factor
    result = torch.zeros(op.shape, dtype=op.torch_dtype, device=op.device)
    for _, rows in Columns(factor, list(factor.risk.params)).chunks(
        _sample_chunk(factor)
    ):
        result.addmm_(rows.T, rows, alpha=op.scale)
    return result
