"""The linearisation of a net at θ on one batch: J x and Jᵀ u without a forward pass.

Jᵀ u is an ordinary backward pass through the kept graph of one forward pass. J x is the
derivative of Jᵀ u in u, along x: a backward pass through the backward pass, whose graph
is kept as well. One product with J and one with Jᵀ are the arithmetic of 4/3 of a
gradient.

In a net of convolutions the tangent map x ↦ J x is traced instead
(:mod:`vivit_linop.net.tracing`), and Jᵀ u is the backward pass through that linear
map. Each way stands in where the other fails: control flow that depends on values and
kernels without forward mode, or derivatives that torch does not have or has wrong.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import compress
from operator import attrgetter
from typing import NoReturn

import torch
from torch import Tensor

from vivit_linop.devices import (
    Room,
    columns_at_a_time,
    explained,
    fresh,
    is_out_of_memory,
)
from vivit_linop.graphs import batched_gradients, strided, used_up
from vivit_linop.modes import as_guest
from vivit_linop.noise import Noise
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.passes import batch_does_not_fit

# ``[d] -> [m]`` and ``[K, d] -> [K, m]``, rows contiguous.
Product = Callable[[Tensor], Tensor]

# What a net's trace keeps, or the graph of a backward pass, in graphs of its outputs:
# measured 1.4 for a net of linear layers, 1.8 for attention, 2.9 for convolutions.
KEPT_GRAPHS = 3
# Where a risk keeps them.
KEPT = "linearizations"


class Graph:
    """An output with its graph; Jᵀ u is its gradient in the arguments, along u.

    Attributes:
        output: The output, or its tangent as a linear function of the arguments.
        arguments: One for each parameter.
        sizes: The entries of each argument.
        repeats: Whether a second backward pass is known to give what the first does.
        reads_only: Whether one is known to write nothing into what it is given.
    """

    def __init__(
        self, output: Tensor, arguments: Sequence[Tensor], reads_only: bool = False
    ) -> None:
        self.output, self.arguments = output, arguments
        self.sizes = [*map(Tensor.numel, arguments)]
        self.repeats, self.reads_only, self._spent = False, reads_only, ""

    def pull_back(self, rows: Tensor, spare: bool = False) -> Tensor:
        """Jᵀ u, ``[n C] -> [D]`` or ``[K, n C] -> [K, D]``, rows contiguous.

        Unless they are spare, they stay what they are.
        """
        if self._spent:  # later, all passes might agree
            raise used_up(self._spent)
        leading = rows.shape[:-1]
        given = rows if self.reads_only or spare else rows.clone()
        cotangents = given.view((*leading, *self.output.shape))
        gradients: Sequence[Tensor | None]
        if rows.ndim == 2:
            gradients = batched_gradients(self.output, self.arguments, [cotangents])
        else:
            gradients = torch.autograd.grad(
                self.output,
                self.arguments,
                cotangents,
                retain_graph=True,
                allow_unused=True,
            )
        parts = []
        for gradient, size in zip(gradients, self.sizes, strict=True):
            if gradient is None:
                gradient = rows.new_zeros(*leading, size)
            elif gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            parts.append(gradient.reshape(*leading, size))
        return torch.cat(parts, dim=-1)

    def watched(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Jᵀ u for random u, and whether what the pass was given stayed what it was."""
        given = u.clone()
        return self.pull_back(given, spare=True), (given == u).all()

    def check_repeats(self, probe: tuple[Tensor, Tensor] | None = None) -> None:
        """Raise a ``ValueError`` if a second backward pass differs, or fails.

        Args:
            probe: u ``[n C]`` of random numbers, and Jᵀ u by the first pass of the
                graph, if that has been made. Zeros and ones may show no difference,
                and leave behind what gives wrong numbers for another u.
        """
        if probe is None:
            u = Noise()(self.output.numel(), like=self.output.detach())
            probe = u, self.pull_back(u)
        u, once = probe
        try:
            twice, stayed = self.watched(u)
        # Whatever a net says when it misses what it has let go.
        except Exception as error:
            if is_out_of_memory(error) or self._spent:
                raise
            self._spent = f"fails ({error})"
        else:
            self.reads_only |= bool(stayed)
            size = once.nan_to_num(0.0, 0.0, 0.0).norm()
            tolerance = float(torch.finfo(once.dtype).eps ** 0.5 * size)
            # What is not finite is so again.
            if not torch.allclose(once, twice, 0.0, tolerance, equal_nan=True):
                self._spent = "gives another result"
        if self._spent:
            raise used_up(self._spent)
        self.repeats = True


class Tangents(ABC):
    """J x in one of two ways, for arguments of the shapes of the parameters."""

    method: str

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        self._sizes = [*map(Tensor.numel, arguments)]
        self._shapes = [*map(attrgetter("shape"), arguments)]

    def along(self, rows: Tensor) -> Tensor:
        """J x, ``[D] -> [n C]`` or ``[K, D] -> [K, n C]``, rows contiguous."""
        leading = rows.shape[:-1]
        # Kernels of a model may walk through memory: parts of several rows are copied,
        # those of one row lie together already.
        parts = []
        for part, shape in zip(
            rows.split(self._sizes, dim=-1), self._shapes, strict=True
        ):
            parts.append(part.contiguous().view((*leading, *shape)))
        return self(parts, batched=rows.ndim == 2).reshape(*leading, -1)

    @abstractmethod
    def __call__(self, tangents: list[Tensor], batched: bool) -> Tensor:
        """Return J x for x in the shapes of the parameters, or for K of them."""


class ReverseTangents(Tangents):
    """J x as a backward pass through the kept backward pass u ↦ Jᵀ u."""

    method = "reverse"

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.arguments)
        self._dual = torch.zeros_like(
            graph.output, requires_grad=True, memory_format=torch.contiguous_format
        )
        gradients = torch.autograd.grad(
            graph.output,
            graph.arguments,
            self._dual,
            create_graph=True,
            allow_unused=True,
        )
        self._used, self._pulled_back = list[bool](), list[Tensor]()
        for gradient in map(strided, gradients):
            self._used.append(gradient is not None and gradient.requires_grad)
            if gradient is not None and gradient.requires_grad:
                self._pulled_back.append(gradient)

    def __call__(self, tangents: list[Tensor], batched: bool) -> Tensor:
        vectors = list(compress(tangents, self._used))
        if batched:
            (images,) = batched_gradients(self._pulled_back, [self._dual], vectors)
            assert images is not None
            return images
        (image,) = torch.autograd.grad(
            self._pulled_back, self._dual, vectors, retain_graph=True
        )
        return image


class Chunks:
    """What is known of the products of several vectors together.

    torch's rules for batches are not all right, and some operations have none. So the
    first product of each kind is compared with one of a single vector; where they
    differ, or it fails, vectors are multiplied one by one from then on. Where memory
    does not suffice, fewer are taken for the time being.

    Attributes:
        possible: Whether torch has not failed yet.
        trusted: Whether the check is left to who takes the products.
    """

    def __init__(self, device: torch.device) -> None:
        self.possible, self._checked = True, set[tuple[Hashable, int]]()
        self._room, self.trusted = Room(device), False

    def apply(
        self, product: Product, X: Tensor, size: int, chunk: int, kind: Hashable
    ) -> Tensor:
        """Multiply columns, ``[d, K] -> [size, K]``, a chunk of them at a time.

        The product is one of rows, whose parts lie together in memory. Those of no kind
        (None) are compared each time.
        """
        rows = X.T.contiguous()
        result = fresh(X, X.shape[1], size)
        chunk, start = self._room.most(chunk) if self.possible else 1, 0
        while start < len(rows):
            part, images = (t[start : start + chunk] for t in (rows, result))
            try:
                self._multiply(product, part, images, kind)
            except RuntimeError as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                chunk = self._room.shrink(len(part))
            else:
                start += len(part)
        return result.T

    def _multiply(
        self, product: Product, rows: Tensor, images: Tensor, kind: Hashable
    ) -> None:
        """Write the images of some rows; together where that is right."""
        if len(rows) > 1 and self.possible:
            try:
                if self._is_right(product, rows, images.copy_(product(rows)), kind):
                    return
            # Not all operations can be batched; all can be done row by row.
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
            self.possible = False
        for place, row in enumerate(rows):
            images[place] = product(row)

    def _is_right(
        self, product: Product, rows: Tensor, images: Tensor, kind: Hashable
    ) -> bool:
        """Whether images of rows together are those of rows alone.

        Checked once for each number of them; of random rows where these show no fault.
        """
        key = kind, len(rows)
        if self.trusted or key in self._checked:
            return True
        right, shows = _compared(product, rows, images)
        if not shows:
            rows = Noise(1).like(rows)
            right, _ = _compared(product, rows, product(rows))
        if right and kind is not None:
            self._checked.add(key)
        return right


def _compared(product: Product, rows: Tensor, images: Tensor) -> tuple[bool, bool]:
    """Whether a random combination of images is right, and a fault would show.

    Not where images are alike, as of zeros, or not finite.
    """
    weights, eps = Noise()(len(rows), like=rows), torch.finfo(rows.dtype).eps
    error = weights @ images - product(weights @ rows)
    lengths = images.norm(dim=1)
    right = error.norm() <= 100 * eps**0.75 * (weights * lengths).norm()
    apart = lengths.sort().values.diff()
    shows = (apart > 30 * eps * lengths.max()) & apart.isfinite()
    # The host waits for both together.
    first, second = torch.stack([right, shows.all()]).tolist()
    return first, second


Find = Callable[[bool, bool], tuple[Graph, Tangents]]


class Linearization:
    """The Jacobian of a function of parameters, ready for products.

    Several threads may multiply at once. It holds graphs, which cannot be copied:
    whoever is copied makes it anew.

    Args:
        graph: That of the outputs at θ, ``[n, …]``.
        find: Finds J x when it is needed: the first way that is right, and the graph
            that Jᵀ u then goes through. It is told whether a trace may pay, and whether
            J x is known to be right.
        nbytes: The memory that the graph of the outputs keeps, beyond θ.

    Attributes:
        outputs: The outputs at θ, ``[n, …]``.
        nbytes: As given.
        kept: Whether it is used again; else tracing J x would not pay.
        checked: Whether J x has been seen to be right for this function and θ.
    """

    def __init__(self, graph: Graph, find: Find, nbytes: int = 0) -> None:
        self.device, self.nbytes = graph.output.device, nbytes
        self.kept, self.checked, self._few = True, False, False
        self._graph, self._find = graph, find
        self._num_params = sum(graph.sizes)
        self._tangents: Tangents | None = None
        self._preparing = threading.Lock()
        self.outputs = graph.output.detach()

    @cached_property
    def _chunks(self) -> Chunks:
        return Chunks(self.device)

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError("A linearisation holds graphs; copy the risk, which makes it.")

    def trust(self) -> None:
        """Leave the checks of products to who takes them; some will be taken only.

        Nothing is traced for these.
        """
        self.checked = self._graph.repeats = self._few = True
        self._chunks.trusted = True

    @property
    def kept_bytes(self) -> int:
        """About what it takes at most once J x is possible."""
        return KEPT_GRAPHS * self.nbytes

    @property
    def method(self) -> str:
        """How J x is computed, decided when needed: "trace" or "reverse".

        Raises:
            NoTangentError: If J x is impossible.
        """
        return self._prepared().method

    def _prepared(self) -> Tangents:
        """Make J x possible, once."""
        with self._preparing, as_guest(self.device):
            if self._tangents is None:
                may_trace = self.kept and not self._few
                found = self._find(may_trace, self.checked)
                self._graph, self._tangents = found
                self.checked = self._graph.repeats = True
                del self._find
        return self._tangents

    def release(self) -> None:
        """Let go of the graph, also where this object is still referred to."""
        for name in ("_graph", "_tangents", "_find"):
            self.__dict__.pop(name, None)

    def jvp(self, X: Tensor) -> Tensor:
        """Return J X, ``[D, K] -> [n C, K]``.

        Raises:
            NoTangentError: If J x is impossible.
        """
        tangents = self._tangents
        if tangents is None:
            with explained(self._does_not_fit):
                tangents = self._prepared()
        return self._by_rows(tangents.along, X, self.outputs.numel())

    def vjp(self, U: Tensor) -> Tensor:
        """Return Jᵀ U, ``[n C, K] -> [D, K]``.

        Raises:
            ValueError: If the graph cannot be used more than once.
        """
        graph = self._graph
        if not graph.repeats and (self.kept or U.shape[1] > 1):
            with explained(self._does_not_fit):
                graph.check_repeats()
        return self._by_rows(graph.pull_back, U, self._num_params)

    def _by_rows(
        self, product: Callable[[Tensor], Tensor], X: Tensor, size: int
    ) -> Tensor:
        """Apply a product to the columns of a matrix, some of them at a time.

        The products take and give rows, whose parts lie together in memory.
        """
        # Written out, since it is entered in each product.
        try:
            if X.shape[1] == 1:
                return product(X.squeeze(1).contiguous()).unsqueeze(1)
            per_column = self.nbytes + self.outputs.element_size() * self._num_params
            chunk = columns_at_a_time(self.device, per_column)
            return self._chunks.apply(product, X, size, chunk, product.__name__)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(self._does_not_fit()) from error

    def _does_not_fit(self) -> str:
        samples = len(self.outputs)
        return batch_does_not_fit(self.device, samples, self.nbytes / samples)


def kept_linearizations(risk: EmpiricalRisk) -> list[Linearization] | None:
    """Return the linearisation of each batch if all are kept, asked in each product.

    Raises:
        ValueError: If memory that the net reads has changed.
    """
    if risk.model.foreign.parts:
        risk.model.foreign.check()
    kept: list[Linearization] = risk.kept.values.get(KEPT, [])
    return kept if len(kept) == len(risk.batch_sizes) else None
