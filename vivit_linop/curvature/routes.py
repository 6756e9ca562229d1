"""The k largest eigenpairs of low-rank operators, by the way that the plan chooses.

A way belongs to the factor V of c V Vᵀ: whatever is a factor has the same four. A GGN
whose loss is not convex has none: its pairs come from products, or from the dense G.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial, singledispatch
from operator import methodcaller
from typing import Any

from scipy.sparse.linalg import ArpackError
from torch import Tensor

from vivit_linop.arguments import check_k
from vivit_linop.curvature import plan
from vivit_linop.curvature.blocks import FactorRows
from vivit_linop.curvature.ggn import GGN
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.curvature.output_space import OutputOperator
from vivit_linop.devices import free_memory
from vivit_linop.linalg import krylov
from vivit_linop.linalg.decompositions import (
    GramEigenpairs,
    LowRankDecomposition,
    gram_rounding_error,
    krylov_products,
)
from vivit_linop.linalg.iterative import IterativeWoodbury
from vivit_linop.linalg.leading import led
from vivit_linop.net.costs import LayerCost, as_table, layer_costs
from vivit_linop.operators.base import Op, TorchLinearOperator
from vivit_linop.operators.damped import Damped
from vivit_linop.operators.dispatch import routed
from vivit_linop.operators.eigenpairs import Eigenpairs, Select
from vivit_linop.operators.elementary import Scaled, dense_over
from vivit_linop.operators.kronecker import BlockDiagonal
from vivit_linop.operators.lowrank import Centered, LowRank, Woodbury
from vivit_linop.operators.parts import HStack
from vivit_linop.operators.verbs import eigendecomposition, eigh, explain, gram, scale

DENSE = ("dense Gram", "dense G")
ITERATIONS = ("ARPACK on K", "ARPACK on G", "Lanczos on K", "Lanczos on G")


# What a factor costs ----------------------------------------------------------------


@singledispatch
def factor_cost(factor: Any) -> plan.FactorCost:
    """Return what a factor costs, by its type."""
    rows, columns = factor.shape
    return plan.FactorCost.of_dense(
        rows, columns, factor.torch_dtype.itemsize, factor.device
    )


@factor_cost.register
def cost_of_pullback(
    factor: Pullback, names: Sequence[str] | None = None
) -> plan.FactorCost:
    """Count the layers of some parameters, or of all."""
    S, risk = factor.output, factor.risk
    fits = S.blocks_fit()
    root_entries = risk.num_samples * S.block_entries if fits else float("inf")
    costs, rows = layer_costs(risk, factor.width), factor.shape[0]
    if names is not None:
        costs = [cost for cost in costs if cost.name in names]
        rows = sum(risk.params[name].numel() for name in names)
    return plan.FactorCost.of_layers(
        costs,
        (rows, factor.shape[1]),
        factor.width,
        risk.kept.columns_budget(),
        root_entries,
        risk.device,
    )


@factor_cost.register
def cost_of_rows(factor: FactorRows) -> plan.FactorCost:
    """Those of its parameters; products go through the whole net."""
    partition = factor.partition
    part = cost_of_pullback(partition.factor, partition.groups[factor.group])
    whole = cost_of_pullback(partition.factor)
    matrix = 0.0 if "small_sides" in partition.__dict__ else part.matrix
    return plan.FactorCost(matrix, whole.product, whole.once, whole.root_entries)


@factor_cost.register
def cost_of_changed(factor: Centered | Scaled) -> plan.FactorCost:
    """Those of what is centred or scaled."""
    inner = factor.factor if isinstance(factor, Centered) else factor.operator
    return factor_cost(inner)


@factor_cost.register
def cost_of_stack(factor: HStack) -> plan.FactorCost:
    """Those of the parts; blocks between parts cost what those of the parts do."""
    costs = [factor_cost(part) for part in factor.parts]
    return plan.FactorCost(
        len(costs) * sum(cost.matrix for cost in costs),
        sum(cost.product for cost in costs),
        sum(cost.once for cost in costs),
        sum(cost.root_entries for cost in costs),
    )


def choose_route(op: LowRank, k: int) -> plan.Choice:
    """Choose the way to the k largest pairs of c V Vᵀ, the same on all ranks."""
    return op.ranks.led(_cheapest, op, k)


def quickest_route(op: LowRank, k: int) -> str:
    """Return the name of that way; what layers cost is asked only where it decides."""
    shape, device = op.factor.shape, op.device
    nbytes = 3 * min(shape) ** 2 * op.torch_dtype.itemsize
    # A known matrix decides without the layers, and products with it take less.
    known = op.kept.known or op.factor.ranks.is_many
    fits = (
        not known
        and all(map(methodcaller("blocks_fit"), _outputs(op.factor)))
        and nbytes <= free_memory(device)
    )
    if fits and plan.dense_suffices(shape, k, device):
        return DENSE[0] if op.by_gram else DENSE[1]
    return choose_route(op, k).chosen.name


def _outputs(factor: Op) -> list[OutputOperator]:
    """The operators in output space that a factor is made of."""
    if isinstance(factor, Pullback):
        return [factor.output]
    parts = factor._made_of()
    nodes = [part for part in parts if isinstance(part, TorchLinearOperator)]
    return [output for node in nodes for output in _outputs(node)]


def _cheapest(op: LowRank, k: int) -> plan.Choice:
    return plan.choose(
        op.factor.shape,
        k,
        None if op.kept.known else factor_cost(op.factor),
        op.torch_dtype.itemsize,
        free_memory(op.device),
        op.by_gram,
        op.device,
        op.kept.decomposed,
        op.ranks.is_many,
    )


# Eigenpairs -------------------------------------------------------------------------


@eigh.register
def eigenpairs_of_low_rank(
    op: LowRank, k: int | None = None, select: Select = None, rcond: float | None = None
) -> Eigenpairs:
    """By the dense smaller side, or for few of the largest by an iteration."""
    decomposition = LowRankDecomposition(op)
    # Only the largest pairs can be had without all of them.
    if k is not None and select is None:
        check_k(k, decomposition.count)
        route = op.route or quickest_route(op, int(k))
        if route in ITERATIONS:
            return by_iteration(op, int(k), route)
        pairs = decomposition.largest(int(k))
    else:
        route = DENSE[0] if op.by_gram else DENSE[1]
        pairs = decomposition.pairs(decomposition.choose(k, select, rcond))
    pairs.route = route
    return pairs


@eigh.register
def eigenpairs_of_ggn(
    op: GGN, k: int | None = None, select: Select = None, rcond: float | None = None
) -> Eigenpairs:
    """Of an indefinite one the k largest by products, all from its matrix."""
    if op.semidefinite:
        return eigenpairs_of_low_rank(op, k, select, rcond)
    if op.route is not None and op.by_gram:
        op.factor.root.check()  # says why there is no Gram matrix
    if k is not None and select is None and op.route != "dense G":
        check_k(k, op.shape[0])
        if k < op.shape[0]:
            solver = (op.route or krylov.solver_on(op.device)).split()[0]
            return by_iteration(op, int(k), f"{solver} on G")
    decomposition = eigendecomposition(op)
    pairs = decomposition.pairs(decomposition.choose(k, select, rcond))
    pairs.route = "dense G"
    return pairs


def by_iteration(op: LowRank, k: int, route: str) -> Eigenpairs:
    """Return the k largest pairs of c V Vᵀ, by products with K or with all of it."""
    target: Op = op
    solver, on_gram = route.split()[0], route.endswith("K")
    known = op.kept.known and op.by_gram == on_gram
    if on_gram:
        target = scale(op.gram, op.scale)
    elif known:
        target = dense_over(op.ranks, op.small_side)
    if solver == "ARPACK" and k >= target.shape[0]:
        raise ValueError(
            f"route: ARPACK finds at most {target.shape[0] - 1} pairs of a matrix with "
            f"as many rows + 1, k is {k}. Leave route= out."
        )
    pairs: Eigenpairs | None = None
    try:
        values, vectors = _iterated(op, target, k, solver, known)
    except (krylov.NotConverged, ArpackError) as error:
        if not known or op.ranks.is_many:
            raise krylov.failed(error, k, op, solver) from error
    else:
        values, vectors = values.to(op.device), vectors.to(op.device)
        if not on_gram:
            pairs = Eigenpairs(values, vectors)
        elif (values > gram_rounding_error(values, target.shape[0])).all():
            pairs = GramEigenpairs(values, op, vectors)
    if pairs is None:
        # No iteration separates them, or fewer than k are numerically nonzero; the
        # dense way knows what to do.
        pairs, route = LowRankDecomposition(op).largest(k), DENSE[not on_gram]
    pairs.route = route
    return pairs


def _iterated(
    op: LowRank, target: Op, k: int, solver: str, known: bool
) -> tuple[Tensor, Tensor]:
    """The pairs of what is multiplied by, K or G."""
    v0 = krylov.start_of(target)
    here = op.device.type == "cpu" and not op.ranks.is_many
    shown = any(output.risk.progress for output in _outputs(op.factor))
    bar = krylov.watched(target, k, krylov_products(k))
    with bar if shown else contextlib.nullcontext(target) as multiplied:
        if solver == "ARPACK" and known and here:
            # Calls of an operator take longer than a product with a matrix.
            wanted = krylov.Wanted(k, v0)
            values, vectors = krylov.by_arpack(op.small.on_matrix(Tensor.numpy), wanted)
            return values * op.scale, vectors
        # Processes tell by these arguments whether they are at the same call.
        return led(partial(_solved, solver, k, v0), multiplied)


def _solved(solver: str, k: int, v0: Tensor, A: Op) -> tuple[Tensor, Tensor]:
    return krylov.SOLVERS[solver](A, krylov.Wanted(k, v0))


# Routes that are asked for ----------------------------------------------------------


@routed.register
def low_rank_by_route(op: LowRank, route: str, few: bool) -> Op:
    """Check the name; the node remembers it."""
    names = (*DENSE, *ITERATIONS) if few else DENSE
    if route not in names:
        listed = ", ".join(map(repr, names))
        raise ValueError(f"route: found {route!r}; give one of {listed}.")
    return op.routed(route)


@routed.register
def damped_by_route(op: Damped, route: str, few: bool) -> Op:
    """By the route of what is damped."""
    return Damped(routed(op.operator, route, few), op.damping)


@routed.register
def scaled_by_route(op: Scaled, route: str, few: bool) -> Op:
    """By the route of what is scaled; the smallest pairs with dense matrices."""
    return Scaled(op.factor, routed(op.operator, route, few and bool(op.factor > 0)))


@routed.register
def blocks_by_route(op: BlockDiagonal, route: str, few: bool) -> Op:
    """The same route for all blocks, with dense matrices."""
    return op.like([routed(block, route, few=False) for block in op.blocks])


# Explanations -----------------------------------------------------------------------


@explain.register
def explain_low_rank(op: LowRank, k: int | None = None) -> plan.Choice:
    """The ways to k eigenpairs and the one that is taken; what products run on."""
    decomposition = LowRankDecomposition(op)
    k = min(10, decomposition.count) if k is None else k
    check_k(k, decomposition.count)
    choice = choose_route(op, k)
    print(choice)
    if isinstance(op.factor, HStack):
        parts = op.factor.parts
        known = sum(gram(part).known for part in parts)
        print(
            f"V is stacked of {len(parts)} parts: blocks of their Gram matrices, "
            f"{known} of {len(parts)} on the diagonal are known."
        )
    if isinstance(factor := op.factor, Pullback):
        costs = factor.ranks.led(layer_costs, factor.risk, factor.width)
        stored = factor.stored is not None or plan.columns_pay(
            costs, factor.width, op.device
        )
        print(plan.explained_products(costs, stored, op.device))
    return choice


@explain.register
def explain_ggn(op: GGN, k: int | None = None) -> plan.Choice:
    """The ways to k eigenpairs; of an indefinite one there is one."""
    if op.semidefinite:
        return explain_low_rank(op, k)
    k = min(10, op.shape[0]) if k is None else k
    check_k(k, op.shape[0])
    routes = choose_route(op.routed("dense G"), k).routes
    fits = op.factor.root.blocks_fit()
    why = "the loss is not convex" if fits else "blocks of H do not fit into memory"
    taken = f"{krylov.solver_on(op.device)} on G"
    chosen = next(route for route in routes if route.name == taken)
    choice = plan.Choice(k, routes, chosen, f"{why}, so there is no factor V")
    print(choice)
    return choice


@explain.register
def explain_pullback(factor: Pullback, k: int | None = None) -> list[LayerCost]:
    """What each parameter costs in the Gram matrix of the columns, as a table.

    Its rows are returned: the parameter, the uses that were seen of it, the contraction
    chosen, floating-point operations and bytes.
    """
    costs = layer_costs(factor.risk, factor.width)
    print(as_table(costs))
    return costs


@explain.register
def explain_woodbury(op: Woodbury, k: int | None = None) -> plan.Route:
    """The side that was factorised."""
    inner = op.operator
    D, columns = inner.factor.shape
    rows, name = (columns, "dense Gram") if inner.by_gram else (D, "dense G")
    why = f"{columns} columns of length {D}" if inner.route is None else "asked for"
    route = plan.Route(name, rows**3 / 3, 8.0 * rows**2)
    if isinstance(op, IterativeWoodbury):
        name, why = "CG on K", "no process has room for a factor; an iteration"
        route = plan.Route(name, 2.0 * rows**2, 8.0 * rows**2)
    print(f"inv took {name!r}: {why}.\n  {route}")
    return route
