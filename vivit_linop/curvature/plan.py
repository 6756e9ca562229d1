"""Which way to the eigenpairs: a cost model, and ARPACK where it is the cheaper one.

In floating-point operations, with f those of a forward pass over all samples, R̂ = N·R
and g(R̂) those of the Gram matrix by layers:

- Gram matrix: R f + g(R̂), and 10 R̂³ for its leading eigenpairs or 40 R̂³ for all
  (a symmetric eigensolver needs some 4/3 R̂³ or 9 R̂³, at a fraction of the speed of a
  matrix product);
- ARPACK: (20 + 4 k) products and 1e9 each for its calls; on K = VᵀV as an operator
  where R̂ ≤ D, else on G. It is on G as well where the root S of the loss Hessian,
  which products with K need and those with G do not, does not fit into memory or has
  more entries than ARPACK's vectors of length D. A product takes 12 f on the
  linearisation (4 f operations, at a third of the speed of a large matrix product), and
  1e11 once to trace a net with convolutions; or what reading the stored columns twice
  takes, and 2 R f once to get them (:mod:`vivit_linop.net.stored`).

The numbers of products and the ratios of speed are measured averages; the model decides
between ways that differ by factors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from vivit_linop.curvature.fisher import EmpiricalFisher
from vivit_linop.curvature.ggn import GGN
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.linalg.decompositions import (
    FEW,
    GramEigenpairs,
    LowRankDecomposition,
    gram_rounding_error,
)
from vivit_linop.linalg.krylov import watched
from vivit_linop.net.blocks import memory_budget
from vivit_linop.net.costs import layer_costs
from vivit_linop.net.stored import product_cost
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.lowrank import Gram, LowRank
from vivit_linop.operators.verbs import eigh, scale
from vivit_linop.risk.memory import free_memory

_EIGH_FLOPS, _LEADING_FLOPS = 40.0, 10.0
_PRODUCT_PASSES = 12.0
_CALL_FLOPS = 1e9
_TRACE_FLOPS = 1e11
# How many passes over a root of the loss Hessian its formation takes.
_FORMING = 4


@dataclass(frozen=True)
class Route:
    """A way to the k largest eigenpairs.

    Attributes:
        name: ``"dense Gram"``, ``"dense G"``, ``"ARPACK on K"`` or ``"ARPACK on G"``.
        flops: Its estimated floating-point operations.
        nbytes: The memory of its matrix or vectors.
    """

    name: str
    flops: float
    nbytes: float


def routes(op: LowRank, k: int) -> list[Route]:
    """Return the two ways to k eigenpairs of c V Vᵀ, with their estimated costs."""
    factor = op.factor
    assert isinstance(factor, Pullback)
    D, columns = factor.shape
    itemsize = torch.finfo(op.torch_dtype).bits // 8
    costs = layer_costs(factor.risk, factor.width)
    forward = sum(cost.forward_flops for cost in costs)
    small = min(D, columns)
    if columns <= D:
        matrix = sum(cost.gram_flops for cost in costs)
        name = "dense Gram"
    else:
        matrix = float(D) ** 2 * columns
        name = "dense G"
    on_gram = columns <= D and _root_is_small(factor, k)
    eigh_flops = _LEADING_FLOPS if k <= FEW * small else _EIGH_FLOPS
    dense = factor.width * forward + matrix + eigh_flops * small**3
    traced = any("conv" in cost.use for cost in costs)
    product, once = _PRODUCT_PASSES * forward, _TRACE_FLOPS * traced
    stored = 2 * product_cost(costs)
    if stored < product and sum(c.nbytes for c in costs) < memory_budget(factor.risk):
        product, once = stored, 2 * factor.width * forward
    krylov = (20 + 4 * k) * (product + _CALL_FLOPS) + once
    return [
        Route(name, dense, 3.0 * small**2 * itemsize),
        Route(
            "ARPACK on K" if on_gram else "ARPACK on G",
            krylov,
            (2.0 * k + 20) * (columns if on_gram else D) * itemsize,
        ),
    ]


def _root_is_small(factor: Pullback, k: int) -> bool:
    """Whether products with the root S cost less than longer vectors of ARPACK."""
    S = factor.blocks
    if S is None:
        return True
    # Each product reads 2 k + 20 vectors twice, and S twice; S may have to be formed.
    entries = _FORMING * factor.risk.num_samples * S.block_entries
    return S.blocks_fit() and entries <= (2 * k + 20) * factor.shape[0]


def choose_route(op: LowRank, k: int) -> Route:
    """Return the cheaper way of those that fit into memory."""
    dense, krylov = routes(op, k)
    if "small_side" in op.__dict__ or op.gram.known:
        return dense  # most of it has been paid for
    blocks = op.factor.blocks if isinstance(op.factor, Pullback) else None
    if blocks is not None and not blocks.blocks_fit() and k < op.shape[0]:
        return krylov  # nothing else is possible
    # ARPACK needs room for more vectors than it is asked for.
    if k >= min(op.factor.shape) // 2:
        return dense
    fits = dense.nbytes <= free_memory(op.device)
    return dense if fits and dense.flops <= krylov.flops else krylov


def _eigh(
    op: LowRank,
    k: int | None = None,
    select: Callable[[Tensor], Sequence[int] | Tensor] | None = None,
    rcond: float | None = None,
) -> Eigenpairs:
    decomposition = LowRankDecomposition(op)
    # Only the largest pairs can be had without all of them.
    if k is not None and select is None:
        decomposition.check_k(k)
        route = choose_route(op, int(k))
        if route.name.startswith("ARPACK"):
            return _arpack(op, int(k), route.name)
        if op.by_gram and not op.gram.known:
            op.factor.keep_columns()  # the vectors are formed of them
        pairs = decomposition.largest(int(k))
    else:
        pairs = decomposition.pairs(decomposition.choose(k, select, rcond))
    pairs.route = "dense Gram" if op.by_gram else "dense G"
    return pairs


def _arpack(op: LowRank, k: int, name: str) -> Eigenpairs:
    assert isinstance(op.factor, Pullback)
    target: TorchLinearOperator = op
    if name == "ARPACK on K":
        target = scale(Gram(op.factor, op.factor), op.scale)
    start = np.random.default_rng(0).standard_normal(target.shape[0])
    shown = op.factor.risk.progress
    with watched(target, k) if shown else contextlib.nullcontext(target) as multiplied:
        v0 = start.astype(target.dtype)
        evals, evecs = eigsh(multiplied, k=k, which="LA", v0=v0)
    order = np.argsort(evals)
    values = torch.from_numpy(evals[order]).to(op.device)
    vectors = torch.from_numpy(np.ascontiguousarray(evecs[:, order])).to(op.device)
    pairs: Eigenpairs
    if target is op:
        pairs = Eigenpairs(values, vectors)
    elif (values > gram_rounding_error(values, target.shape[0])).all():
        pairs = GramEigenpairs(values, op, vectors)
    else:
        # Fewer than k are numerically nonzero; the dense way knows what to do.
        pairs = LowRankDecomposition(op).largest(k)
        name = "dense Gram"
    pairs.route = name
    return pairs


eigh.register(GGN)(_eigh)
eigh.register(EmpiricalFisher)(_eigh)
