"""Every choice between ways, and the constants that the choices rest on.

Costs are floating-point operations of a large matrix product. f are those of a forward
pass over all samples, R̂ = N·R, and g(R̂) those of the Gram matrix by layers. What a
device takes for the rest stands in :class:`DeviceCosts`; the numbers here are a CPU's:

- the Gram matrix takes R f + g(R̂), and 10 R̂³ for its leading eigenpairs or 40 R̂³ for
  all (a symmetric eigensolver needs some 4/3 R̂³ or 9 R̂³, at a fraction of the speed of
  a matrix product), and 2 μs a row;
- ARPACK takes (36 + 4 k) products and 1e9 each for its calls (12 μs for a known K); on
  K = VᵀV where R̂ ≤ D, else on G. ARPACK runs on G as well where the root S of the loss
  Hessian does not fit into memory or has more entries than ARPACK's vectors of length
  D: products with G need no S. A product reads a known K once. Without K a product
  takes 12 f on the linearisation (4 f operations, at a third of the speed of a large
  matrix product), and 1e11 once to trace a net with convolutions; or two readings of
  the stored columns, and 2 R f once to get them;
- on a GPU, Lanczos takes as many products and reads its vectors there; ARPACK has them
  on the host, where each product's go to and come from;
- a product with V takes 2 f on the linearisation (on a GPU 7 f by its time), making
  which takes 6 f; on stored columns at most f, and reading the columns.

The numbers of products and the ratios of speed are measured averages; the model decides
between ways that differ by factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from vivit_linop.arguments import as_device, check_real
from vivit_linop.linalg.decompositions import FEW, krylov_products
from vivit_linop.net.costs import LayerCost

# What LAPACK takes in float64 by its time in float32 (1.4 to 1.8, 200 to 2,000 rows).
_DOUBLE = 1.5
# Passes over the net that a product with V Vᵀ takes by its time.
_PRODUCT_PASSES = 12.0
# How much cheaper a way is by a bound, where that decides.
_CERTAINLY = 2.0
# How many passes over a root of the loss Hessian its formation takes.
_FORMING = 4
# After this many products (of an eigensolver) the backward passes that it takes to get
# the columns should have paid for themselves.
_PAID_AFTER = 200
# Columns that are there anyway: how many products are expected to follow, and what the
# linearisation that they spare takes by forward passes.
_FOLLOWING = 4
_LINEARISING_PASSES = 6.0
# Half-steps that pairs are followed by, in the mean; and what columns take beside R
# backward passes by the time of forward passes: a run of the net, and the check.
_HALF_STEPS, _CERTIFIED_PASSES = 1.5, 5.0
# Exact blocks up to this many entries are dense matrices, larger ones low-rank.
LARGEST_DENSE_BLOCK = 2048
# Columns of a backward pass with at most this many entries are formed: structure would
# not pay.
FORMED_ENTRIES = 2**16
# From how many columns on one of C less of each sample pays for ViViT's eigenvalues:
# turning S takes 60 microseconds.
TURNED_COLUMNS = 128
# So many products with a Hessian are taken together where a pass over the data is so
# short that most of it is overhead; else there is nothing to gain by it.
_TOGETHER = 16


# Devices ----------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceCosts:
    """What a device takes, in seconds and rates: what the choice of a route rests on.

    There are defaults for a CPU and for a GPU; :func:`calibrate` measures the device at
    hand. ``explain(k)`` names what was used where that is not the CPU's default.

    Attributes:
        name: Of the device.
        rate: Floating-point operations of a large matrix product in float32, a second.
        bandwidth: Bytes of its memory that it reads a second.
        copying: Bytes a second between its memory and the host's; infinite on a CPU.
        call: Seconds of a product with G beside its arithmetic.
        step: Seconds of a product with a known matrix in a Krylov solver, beside
            reading it.
        tracing: Seconds to trace a net with convolutions for its linearisation.
        linearising: Seconds of a linearisation beside its arithmetic.
        short_pass: Seconds of a forward pass, most of which is overhead.
        all_pairs: Of a symmetric eigensolver for all pairs of n rows: its time, by that
            of n³ operations of a large matrix product.
        leading_pairs: Likewise for less than a quarter of them.
        passes: How many forward passes a product with V takes on the linearisation:
            two by its arithmetic, more by its time where activations are slow to read
            beside that.
        matrix_bandwidth: Bytes a second of a known matrix that is multiplied by one
            vector after the other; caches hold a part of it.
        row: Seconds of a symmetric eigensolver for each row, beside its arithmetic.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is not positive.

    Example:
        >>> import vivit_linop as vl
        >>> costs = vl.DeviceCosts(
        ...     name="mine", rate=1e12, bandwidth=1e11, copying=float("inf"), call=1e-3,
        ...     step=1e-4, tracing=0.3, linearising=1e-2, short_pass=1e-4,
        ...     all_pairs=40.0, leading_pairs=10.0,
        ... )
        >>> costs.reading_flops
        10.0
    """

    name: str
    rate: float
    bandwidth: float
    copying: float
    call: float
    step: float
    tracing: float
    linearising: float
    short_pass: float
    all_pairs: float
    leading_pairs: float
    passes: float = 2.0
    matrix_bandwidth: float = 3e10
    row: float = 2e-6

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            check_real(value, field.name)
            if not value > 0.0:
                raise ValueError(f"{field.name}: a positive number, got {value!r}.")

    @classmethod
    def default(cls, device: torch.device | str) -> DeviceCosts:
        """Return what is assumed of a device of its type."""
        return CPU_COSTS if as_device(device).type == "cpu" else GPU_COSTS

    @classmethod
    def on(cls, device: torch.device | str) -> DeviceCosts:
        """Return what routes on a device are chosen by."""
        return costs_on(as_device(device))

    def use(self, device: torch.device | str) -> None:
        """Choose routes on a device by these costs, in this process from now on."""
        _in_use[_key(as_device(device))] = self

    @property
    def reading_flops(self) -> float:
        """Operations of a large matrix product in the time that a byte is read in."""
        return self.rate / self.bandwidth

    def flops(self, seconds: float) -> float:
        """Operations of a large matrix product in some seconds."""
        return self.rate * seconds


# Two cores: some 300 GFLOP/s, and 12 GB/s. What is known of a matrix was measured with
# one thread on an AMD EPYC, for 200 to 4,000 rows and 1, 5, 10 and 20 pairs of matrices
# with a few large eigenvalues, with a power law and without gaps: a product of ARPACK
# took 12 μs and its bytes at 60 GB/s (a megabyte) to 22 GB/s (64), LAPACK's ?syevr 13
# (500 rows) to 9 (2,000) n³ beside 2 μs a row.
CPU_COSTS = DeviceCosts(
    name="a CPU",
    rate=3e11,
    bandwidth=1.2e10,
    copying=float("inf"),
    call=1e9 / 3e11,
    step=1.2e-5,
    tracing=1e11 / 3e11,
    linearising=3e9 / 3e11,
    short_pass=3e7 / 3e11,
    all_pairs=40.0,
    leading_pairs=10.0,
)
# What calibrate() measured on an H100 (PyTorch 2.11, 16 cores): copies go to pageable
# memory of the host, and what is bound by calls takes Python's time. cuSOLVER has no
# solver for some of the pairs. A product with V Vᵀ on linearisations took 13 to 24
# forward passes by the rate.
GPU_COSTS = DeviceCosts(
    name="a GPU",
    rate=5.1e13,
    bandwidth=2.8e12,
    copying=1.7e9,
    call=1e-3,
    step=7e-4,
    tracing=0.27,
    linearising=5e-3,
    short_pass=1.25e-4,
    all_pairs=160.0,
    leading_pairs=160.0,
    passes=7.0,
    matrix_bandwidth=2.8e12,
    row=1e-9,  # in the others
)
_in_use: dict[str, DeviceCosts] = {}


def _key(device: torch.device) -> str:
    """Several GPUs of a machine may differ; cuda is the first of them."""
    return f"{device.type}:{device.index or 0}"


def costs_on(device: torch.device) -> DeviceCosts:
    """Return what routes on a device are chosen by, as :meth:`DeviceCosts.on`."""
    default = CPU_COSTS if device.type == "cpu" else GPU_COSTS
    return _in_use.get(_key(device), default) if _in_use else default


# Columns --------------------------------------------------------------------------


@dataclass(frozen=True)
class NetCost:
    """What the layers of a net cost together.

    Attributes:
        forward: f, the operations of a forward pass over all samples.
        gram: Those of the Gram matrix by layers.
        product: Those of a product with stored columns, reading them included.
        inner: Those of a product with VᵀV on stored columns, without reading them.
        nbytes: What the columns of all samples take.
        tracing: Operations to trace the net, if its linearisation needs that.
        on: What the device takes.
    """

    forward: float
    gram: float
    product: float
    inner: float
    nbytes: float
    tracing: float
    on: DeviceCosts

    @classmethod
    def of(cls, costs: Sequence[LayerCost], device: torch.device) -> NetCost:
        """Add up the layers', on a device."""
        on = costs_on(device)
        forward = gram = product = inner = nbytes = tracing = 0.0
        for cost in costs:
            forward += cost.forward_flops
            gram += cost.gram_flops
            product += cost.product_flops + on.reading_flops * cost.nbytes
            inner += cost.inner_flops
            nbytes += cost.nbytes
            if "conv" in cost.use:
                tracing = on.flops(on.tracing)
        return cls(forward, gram, product, inner, nbytes, tracing, on)


def columns_pay(costs: Sequence[LayerCost], width: int, device: torch.device) -> bool:
    """Whether columns, R of each sample, are worth making for products alone."""
    net = NetCost.of(costs, device)
    making = 2 * width * net.forward / _PAID_AFTER
    return net.product + making < net.on.passes * net.forward


def columns_stay(
    costs: Sequence[LayerCost], nbytes: int, budget: int, device: torch.device
) -> bool:
    """Whether a Gram matrix's columns are kept, of so many bytes within a budget.

    Eigenvectors and damped inverses need some products with V, which else make the
    linearisation.
    """
    net = NetCost.of(costs, device)
    linearising = _LINEARISING_PASSES * net.forward + net.tracing
    linearising += net.on.flops(net.on.linearising)
    on_linearisation = net.on.passes * net.forward + linearising / _FOLLOWING
    return nbytes <= budget and net.product <= on_linearisation


def few_stay(nbytes: int, device: torch.device) -> bool:
    """Whether columns are so small that they stay, whatever the layers are.

    Reading them then takes less than a linearisation beside its arithmetic.
    """
    on = costs_on(device)
    return nbytes * on.reading_flops <= on.flops(on.linearising) / _FOLLOWING


def followed_on_columns(
    costs: Sequence[LayerCost], width: int, vectors: int, device: torch.device
) -> bool:
    """Whether so many pairs are followed by products with VᵀV, on columns for them.

    One such product does what takes two half-steps on the linearisation, and one or two
    are what it takes.
    """
    net = NetCost.of(costs, device)
    making = (width + _CERTIFIED_PASSES) * net.forward + net.on.flops(net.on.call)
    on_columns = making + vectors * net.inner + 2 * net.on.reading_flops * net.nbytes
    on_linearisation = _LINEARISING_PASSES + _HALF_STEPS / 2 * vectors * _PRODUCT_PASSES
    return on_columns < on_linearisation * net.forward


def explained_products(
    costs: Sequence[LayerCost], stored: bool, device: torch.device
) -> str:
    """Say what products with V run on, and what the two ways cost."""
    place = "stored columns" if stored else "the linearisation"
    net = NetCost.of(costs, device)
    return (
        f"products run on {place}: {net.product / 1e9:.3g} GFLOP on stored columns, "
        f"{net.on.passes * net.forward / 1e9:.3g} GFLOP on the linearisation."
    )


def products_together(costs: Sequence[LayerCost], device: torch.device) -> int:
    """How many products with a Hessian one backward pass takes."""
    net = NetCost.of(costs, device)
    return _TOGETHER if net.forward < net.on.flops(net.on.short_pass) else 1


# Eigenpairs -------------------------------------------------------------------------


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
    def of_dense(
        cls, rows: int, columns: int, itemsize: int, device: torch.device
    ) -> FactorCost:
        """Those of a matrix, or of a factor that nothing is known of."""
        entries = float(rows) * columns
        reading = costs_on(device).reading_flops
        product = 4 * entries + 2 * reading * itemsize * entries
        return cls(entries * min(rows, columns), product)

    @classmethod
    def of_layers(
        cls,
        costs: Sequence[LayerCost],
        shape: tuple[int, int],
        width: int,
        budget: int,
        root_entries: float,
        device: torch.device,
    ) -> FactorCost:
        """Those of Jᵀ B with R columns a sample, its width.

        Stored columns may take the bytes of the budget.
        """
        D, columns = shape
        net = NetCost.of(costs, device)
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
        name: ``"dense Gram"`` or ``"dense G"``; ``"ARPACK on K"`` or ``"ARPACK on G"``;
            on a GPU ``"Lanczos on K"`` or ``"Lanczos on G"``.
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
        costs: What it rests on, where that is not a CPU's defaults.
    """

    k: int
    routes: list[Route]
    chosen: Route
    why: str
    costs: DeviceCosts = CPU_COSTS

    def __str__(self) -> str:
        """The choice, a line for each way, and what it rests on."""
        head = f"eigh(k={self.k}) takes {self.chosen.name!r}: {self.why}."
        lines = [head, *map(str, self.routes)]
        if self.costs is not CPU_COSTS:
            lines.append(
                f"Costs of {self.costs.name}: {self.costs.rate / 1e9:.3g} GFLOP/s, "
                f"{self.costs.bandwidth / 1e9:.3g} GB/s, {1e3 * self.costs.call:.3g} "
                "ms for the calls of a product."
            )
        return "\n  ".join(lines)


def _lapack(on: DeviceCosts, rows: int, k: int) -> float:
    """Operations of a symmetric eigensolver for k pairs."""
    pairs = on.leading_pairs if k <= FEW * rows else on.all_pairs
    return pairs * float(rows) ** 3 + on.flops(on.row) * rows


def dense_suffices(shape: tuple[int, int], k: int, device: torch.device) -> bool:
    """Whether the dense way to k pairs is the cheapest, whatever the net's layers are.

    An iteration takes more for its calls alone than inner products of formed columns
    and an eigensolver do; each of its products takes more passes over the net than
    a column of each sample.
    """
    products, small = krylov_products(k), min(shape)
    on = costs_on(device)
    calls = products * on.flops(on.call)
    dense = float(math.prod(shape)) * small + _lapack(on, small, k)
    return dense <= calls / _CERTAINLY


def choose(
    shape: tuple[int, int],
    k: int,
    cost: FactorCost | None,
    itemsize: int,
    free: int,
    by_gram: bool,
    device: torch.device,
    decomposed: bool = False,
    shared: bool = False,
) -> Choice:
    """Choose the cheaper way to k eigenpairs of c V Vᵀ that fits into memory.

    Args:
        shape: Of V, ``[D, R̂]``.
        k: How many.
        cost: Of V; None where the smaller side is known.
        itemsize: The bytes of a number.
        free: The bytes that are free.
        by_gram: Whether the smaller side is the Gram matrix.
        device: Where V is.
        decomposed: Whether all eigenpairs of the smaller side are known.
        shared: Whether several processes have parts of the smaller side, and one would
            need all of it.
    """
    on = costs_on(device)
    D, columns = shape
    small = min(shape)
    lapack = 0.0 if decomposed else _lapack(on, small, k)
    on_gram, lost = by_gram, ""
    if cost is None:
        lapack *= _DOUBLE if itemsize == 8 else 1.0
        reading = itemsize * float(small) ** 2 / on.matrix_bandwidth
        product, once = on.flops(on.step + reading), 0.0
    else:
        product, once = cost.product + on.flops(on.call), cost.once
        lapack += cost.matrix
        vectors = (2 * k + 20) * D
        # Each product reads 2 k + 20 vectors twice, and S twice; S may have to be made.
        on_gram = by_gram and cost.root_entries <= vectors
        if cost.root_entries == float("inf") and k < D:
            lost = "the root of the loss Hessian does not fit into memory"
    dense = Route(
        "dense Gram" if by_gram else "dense G", lapack, 3.0 * small**2 * itemsize, lost
    )
    on_side = ("K", columns) if on_gram else ("G", D)
    # ARPACK needs room for more vectors than it is asked for.
    many = "" if lost or k < small // 2 else "ARPACK finds less than half of the pairs"
    iterations = _krylov_routes(k, product, once, on_side, itemsize, free, many, on)
    routes = [dense, *iterations]
    krylov = min(iterations, key=lambda route: (bool(route.refusal), route.flops))
    if lost or many:
        chosen, why = (krylov, lost) if lost else (dense, many)
    elif (cost is not None or (shared and not decomposed)) and dense.nbytes > free:
        chosen, why = krylov, f"{free / 1e6:.3g} MB are free"
    else:
        chosen = dense if dense.flops <= krylov.flops else krylov
        known = "its matrix is known, and " if cost is None else ""
        known = "its matrix is known and decomposed, and " if decomposed else known
        why = f"{known}it is estimated to be the cheaper"
    return Choice(k, routes, chosen, why, on)


def _krylov_routes(
    k: int,
    product: float,
    once: float,
    on_side: tuple[str, int],
    itemsize: int,
    free: int,
    refusal: str,
    on: DeviceCosts,
) -> list[Route]:
    """ARPACK on the host; before it Lanczos where that is not the device."""
    (side, rows), vectors = on_side, 2.0 * k + 20
    nbytes, products = vectors * rows * itemsize, krylov_products(k)
    flops = products * product + once
    if on.copying == float("inf"):
        return [Route(f"ARPACK on {side}", flops, nbytes, refusal)]
    full = "" if nbytes <= free else f"{free / 1e6:.3g} MB are free"
    # Each step reads the vectors; three quarters of them in the mean, four times.
    steps = products * 3 * nbytes / on.bandwidth
    copies = products * 2 * rows * itemsize / on.copying
    steps_of_host = products * 3 * nbytes / CPU_COSTS.bandwidth + copies
    return [
        Route(f"Lanczos on {side}", flops + on.flops(steps), nbytes, refusal or full),
        Route(f"ARPACK on {side}", flops + on.flops(steps_of_host), nbytes, refusal),
    ]
