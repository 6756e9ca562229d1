"""Every choice between ways, and the constants that the choices rest on.

Costs are floating-point operations of a large matrix product. f are those of a forward
pass over all samples, R̂ = N·R, and g(R̂) those of the Gram matrix by layers:

- the Gram matrix takes R f + g(R̂), and 10 R̂³ for its leading eigenpairs or 40 R̂³ for
  all (a symmetric eigensolver needs some 4/3 R̂³ or 9 R̂³, at a fraction of the speed of
  a matrix product);
- ARPACK takes (20 + 4 k) products and 1e9 each for its calls (2e7 for a known K); on K
  = VᵀV where R̂ ≤ D, else on G. ARPACK runs on G as well where the root S of the loss
  Hessian does not fit into memory or has more entries than ARPACK's vectors of length
  D: products with G need no S. A product reads a known K once. Without K a product
  takes 12 f on the linearisation (4 f operations, at a third of the speed of a large
  matrix product), and 1e11 once to trace a net with convolutions; or two readings of
  the stored columns, and 2 R f once to get them;
- a product with V takes 2 f on the linearisation, making which takes 6 f; on stored
  columns at most f, and reading the columns.

The numbers of products and the ratios of speed are measured averages; the model decides
between ways that differ by factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vivit_linop.linalg.decompositions import FEW
from vivit_linop.net.costs import LayerCost

# Of a symmetric eigensolver, by the cube of the rows.
_ALL_PAIRS, _LEADING_PAIRS = 40.0, 10.0
# ARPACK's products, and what one call takes beside.
_PRODUCTS, _PRODUCTS_A_PAIR = 20, 4
_CALL_FLOPS = 1e9
# What a product with a matrix that is there takes beside reading it.
_KNOWN_CALL_FLOPS = 2e7
# Passes over the net that a product with V Vᵀ takes by its time.
_PRODUCT_PASSES = 12.0
# Tracing a net with convolutions for its linearisation.
_TRACE_FLOPS = 1e11
# Reading a byte takes as long as this many operations of a large matrix product: some
# 300 GFLOP/s at 10 GB/s (CPU), 50 TFLOP/s at 3 TB/s (H100).
READING_FLOPS = 25
# How many passes over a root of the loss Hessian its formation takes.
_FORMING = 4
# After this many products (of an eigensolver) the backward passes that it takes to get
# the columns should have paid for themselves.
_PAID_AFTER = 200
# Columns that are there anyway: how many products are expected to follow, and what the
# linearisation that they spare takes, by forward passes and by its calls.
_FOLLOWING = 4
_LINEARISING_PASSES, _LINEARISING_CALLS = 6.0, 3e9
# Exact blocks up to this many entries are dense matrices, larger ones low-rank.
LARGEST_DENSE_BLOCK = 2048
# Columns of a backward pass with at most this many entries are formed: structure would
# not pay.
FORMED_ENTRIES = 2**16
# Products with a Hessian are taken together where a pass over the data is so short that
# most of it is overhead; else there is nothing to gain by it.
_TOGETHER, _SHORT_PASS = 16, 3e7


# Columns --------------------------------------------------------------------------


@dataclass(frozen=True)
class NetCost:
    """What the layers of a net cost together.

    Attributes:
        forward: f, the operations of a forward pass over all samples.
        gram: Those of the Gram matrix by layers.
        product: Those of a product with stored columns, reading them included.
        nbytes: What the columns of all samples take.
        tracing: Operations to trace the net, if its linearisation needs that.
    """

    forward: float
    gram: float
    product: float
    nbytes: float
    tracing: float

    @classmethod
    def of(cls, costs: Sequence[LayerCost]) -> NetCost:
        """Add up the layers'."""
        forward = gram = product = nbytes = tracing = 0.0
        for cost in costs:
            forward += cost.forward_flops
            gram += cost.gram_flops
            product += cost.product_flops + READING_FLOPS * cost.nbytes
            nbytes += cost.nbytes
            if "conv" in cost.use:
                tracing = _TRACE_FLOPS
        return cls(forward, gram, product, nbytes, tracing)


def columns_pay(costs: Sequence[LayerCost], width: int) -> bool:
    """Whether columns are worth making for products alone.

    Args:
        costs: Of the layers.
        width: R, the columns of a sample.
    """
    net = NetCost.of(costs)
    return net.product + 2 * width * net.forward / _PAID_AFTER < 2 * net.forward


def columns_stay(costs: Sequence[LayerCost], nbytes: int, budget: int) -> bool:
    """Whether columns that a Gram matrix was made of are kept for what follows.

    Eigenvectors and damped inverses need some products with V, which else make the
    linearisation.

    Args:
        costs: Of the layers.
        nbytes: What the columns take.
        budget: What they may take.
    """
    net = NetCost.of(costs)
    linearising = _LINEARISING_PASSES * net.forward + _LINEARISING_CALLS + net.tracing
    on_linearisation = 2 * net.forward + linearising / _FOLLOWING
    return nbytes <= budget and net.product <= on_linearisation


def explained_products(costs: Sequence[LayerCost], stored: bool) -> str:
    """Say what products with V run on, and what the two ways cost."""
    place = "stored columns" if stored else "the linearisation"
    net = NetCost.of(costs)
    return (
        f"products run on {place}: {net.product / 1e9:.3g} GFLOP on stored columns, "
        f"{2 * net.forward / 1e9:.3g} GFLOP on the linearisation."
    )


def products_together(costs: Sequence[LayerCost]) -> int:
    """How many products with a Hessian one backward pass takes."""
    return _TOGETHER if NetCost.of(costs).forward < _SHORT_PASS else 1


# Eigenpairs -------------------------------------------------------------------------


def arpack_products(k: int) -> int:
    """How many products ARPACK takes for k pairs, in the mean."""
    return _PRODUCTS + _PRODUCTS_A_PAIR * k


@dataclass(frozen=True)
class FactorCost:
    """What a factor V of shape ``[D, R̂]`` costs.

    Attributes:
        matrix: Operations of the smaller of VᵀV and V Vᵀ; infinite where it cannot be.
        product: Those of a product with V Vᵀ or VᵀV.
        once: Those before the first product.
        root_entries: Entries of the root S that products with VᵀV read and products
            with V Vᵀ do not; infinite where S does not fit into memory.
    """

    matrix: float
    product: float
    once: float = 0.0
    root_entries: float = 0.0

    @classmethod
    def of_dense(cls, rows: int, columns: int, itemsize: int) -> FactorCost:
        """Those of a matrix, or of a factor that nothing is known of."""
        entries = float(rows) * columns
        product = 4 * entries + 2 * READING_FLOPS * itemsize * entries
        return cls(entries * min(rows, columns), product)

    @classmethod
    def of_layers(
        cls,
        costs: Sequence[LayerCost],
        shape: tuple[int, int],
        width: int,
        budget: int,
        root_entries: float,
    ) -> FactorCost:
        """Those of Jᵀ B.

        Args:
            costs: Of the layers.
            shape: Of the factor.
            width: R, the columns of a sample.
            budget: The bytes that stored columns may take.
            root_entries: As the attribute.
        """
        D, columns = shape
        net = NetCost.of(costs)
        matrix = net.gram if columns <= D else float(D) ** 2 * columns
        matrix += width * net.forward
        product, once = _PRODUCT_PASSES * net.forward, net.tracing
        if 2 * net.product < product and net.nbytes < budget:
            product, once = 2 * net.product, 2 * width * net.forward
        return cls(matrix, product, once, _FORMING * root_entries)


@dataclass(frozen=True)
class Route:
    """A way to the k largest eigenpairs.

    Attributes:
        name: ``"dense Gram"``, ``"dense G"``, ``"ARPACK on K"`` or ``"ARPACK on G"``.
        flops: Its estimated floating-point operations.
        nbytes: The memory of its matrix or vectors.
        refusal: Why it is impossible, or empty.
    """

    name: str
    flops: float
    nbytes: float
    refusal: str = ""

    def __str__(self) -> str:
        """Say it in a line."""
        cost = f"{self.flops / 1e9:10.3g} GFLOP {self.nbytes / 1e6:10.3g} MB"
        return f"{self.name:12}{cost}  {self.refusal}".rstrip()


@dataclass(frozen=True)
class Choice:
    """The ways to k eigenpairs, and the one that is taken.

    Attributes:
        k: How many.
        routes: All ways.
        chosen: The way that is taken.
        why: The reason.
    """

    k: int
    routes: list[Route]
    chosen: Route
    why: str

    def __str__(self) -> str:
        """The choice, and a line for each way."""
        head = f"eigh(k={self.k}) takes {self.chosen.name!r}: {self.why}."
        return "\n  ".join([head, *map(str, self.routes)])


def choose(
    shape: tuple[int, int],
    k: int,
    cost: FactorCost | None,
    itemsize: int,
    free: int,
    by_gram: bool,
    decomposed: bool = False,
) -> Choice:
    """Choose the cheaper way to k eigenpairs of c V Vᵀ that fits into memory.

    Args:
        shape: Of V, ``[D, R̂]``.
        k: How many.
        cost: Of V; None where the smaller side is known.
        itemsize: The bytes of a number.
        free: The bytes that are free.
        by_gram: Whether the smaller side is the Gram matrix.
        decomposed: Whether all eigenpairs of the smaller side are known.
    """
    D, columns = shape
    small = min(shape)
    lapack = (_LEADING_PAIRS if k <= FEW * small else _ALL_PAIRS) * float(small) ** 3
    lapack = 0.0 if decomposed else lapack
    on_gram, lost = by_gram, ""
    if cost is None:
        product, once = READING_FLOPS * itemsize * float(small) ** 2, 0.0
        product += _KNOWN_CALL_FLOPS
    else:
        product, once = cost.product + _CALL_FLOPS, cost.once
        lapack += cost.matrix
        vectors = (2 * k + 20) * D
        # Each product reads 2 k + 20 vectors twice, and S twice; S may have to be made.
        on_gram = by_gram and cost.root_entries <= vectors
        if cost.root_entries == float("inf") and k < D:
            lost = "the root of the loss Hessian does not fit into memory"
    dense = Route(
        "dense Gram" if by_gram else "dense G", lapack, 3.0 * small**2 * itemsize, lost
    )
    # ARPACK needs room for more vectors than it is asked for.
    many = "" if lost or k < small // 2 else "ARPACK finds less than half of the pairs"
    krylov = Route(
        "ARPACK on K" if on_gram else "ARPACK on G",
        arpack_products(k) * product + once,
        (2.0 * k + 20) * (columns if on_gram else D) * itemsize,
        many,
    )
    routes = [dense, krylov]
    if lost or many:
        chosen, why = (krylov, lost) if lost else (dense, many)
    elif cost is not None and dense.nbytes > free:
        chosen, why = krylov, f"{free / 1e6:.3g} MB are free"
    else:
        chosen = dense if dense.flops <= krylov.flops else krylov
        known = "its matrix is known, and " if cost is None else ""
        known = "its matrix is known and decomposed, and " if decomposed else known
        why = f"{known}it is estimated to be the cheaper"
    return Choice(k, routes, chosen, why)
