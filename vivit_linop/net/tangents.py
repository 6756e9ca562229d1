"""J x and Jᵀ u by graphs of a net, and which way to J x is right.

For convolutions torch's backward pass through a backward pass takes twice as long as it
should; a trace (:mod:`vivit_linop.net.tracing`) does not. Tracing takes seconds, so it
is not done for a trace that would be used only once, nor for nets of linear layers and
attention, where a trace is no faster. A trace may be wrong in many ways, and so may
second derivatives by torch: products are compared with Jᵀ u before they are used.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import compress
from operator import attrgetter
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.func import vmap

from vivit_linop.devices import is_out_of_memory
from vivit_linop.graphs import batched_gradients, nodes, strided
from vivit_linop.net.rounding import nearby
from vivit_linop.net.tracing import OutOfPlace, tangent_map
from vivit_linop.noise import BY_NOISE, Noise
from vivit_linop.risk.model.private_module import Params

# One convolution in this many matrix products makes a trace worth its time.
_PER_CONVOLUTION = 4
# The tracer changes things that all threads see.
_TRACING = threading.Lock()


class NoTangentError(ValueError):
    """J x cannot be had from torch's derivatives; Jᵀ u can, and columns made of it."""


class Graph:
    """An output with its graph; Jᵀ u is its gradient in the arguments, along u.

    Args:
        output: The output, or its tangent as a linear function of the arguments.
        arguments: One for each parameter.

    Attributes:
        output: As given.
        arguments: As given.
        sizes: The entries of each argument.
        repeats: Whether a second backward pass is known to give what the first does.
    """

    def __init__(self, output: Tensor, arguments: Sequence[Tensor]) -> None:
        self.output, self.arguments = output, arguments
        self.sizes = [*map(Tensor.numel, arguments)]
        self.repeats = self._spent = False

    def pull_back(self, rows: Tensor) -> Tensor:
        """Jᵀ u, ``[n C] -> [D]`` or ``[K, n C] -> [K, D]``, rows contiguous."""
        leading = rows.shape[:-1]
        cotangents = rows.view((*leading, *self.output.shape))
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

    def check_repeats(self, u: Tensor, once: Tensor | None = None) -> None:
        """Raise an error if a second backward pass gives another Jᵀ u.

        Args:
            u: ``[n C]``.
            once: What the first backward pass of the graph gave, if it was for u.

        Raises:
            ValueError: It says which nets do so.
        """
        once = self.pull_back(u) if once is None else once
        twice = self.pull_back(u)
        size = once.nan_to_num(0.0, 0.0, 0.0).norm()
        tolerance = float(torch.finfo(once.dtype).eps ** 0.5 * size)
        # What is not finite is so again. Later, all passes might agree.
        self._spent = self._spent or not torch.allclose(
            once, twice, 0.0, tolerance, equal_nan=True
        )
        if self._spent:
            raise ValueError(
                "model: a second backward pass through the same graph gives another "
                "result. Hooks that remove themselves, and functions that free or "
                "change what they have saved, do so; use ones that can be used again."
            )
        self.repeats = bool(once.any())


class Tangents(ABC):
    """J x in one of two ways.

    Args:
        arguments: One for each parameter, of its shape.
    """

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
    """J x as a backward pass through the kept backward pass u ↦ Jᵀ u.

    Args:
        graph: The net's.
    """

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
        self._used: list[bool] = []
        self._pulled_back: list[Tensor] = []
        for gradient in map(strided, gradients):
            used = gradient is not None and gradient.requires_grad
            self._used.append(used)
            if gradient is not None and used:
                self._pulled_back.append(gradient)

    def __call__(self, tangents: list[Tensor], batched: bool) -> Tensor:
        """Pull the tangents back."""
        vectors = list(compress(tangents, self._used))
        if batched:
            (images,) = batched_gradients(self._pulled_back, [self._dual], vectors)
            assert images is not None
            return images
        (image,) = torch.autograd.grad(
            self._pulled_back, self._dual, vectors, retain_graph=True
        )
        return image


class TracedTangents(Tangents):
    """J x by the traced tangent map.

    Args:
        tangent_map: A linear function of as many tensors as there are parameters.
        arguments: As for :class:`Tangents`.
    """

    method = "trace"

    def __init__(
        self, tangent_map: Callable[..., Tensor], arguments: Sequence[Tensor]
    ) -> None:
        super().__init__(arguments)
        self._map = tangent_map

    def __call__(self, tangents: list[Tensor], batched: bool) -> Tensor:
        """Run the trace."""
        with torch.no_grad():
            apply = vmap(self._map) if batched else self._map
            image: Tensor = apply(*tangents)
        return image


class Probe(NamedTuple):
    """Random vectors, and what an ordinary backward pass makes of one.

    Attributes:
        x: ``[D]``.
        u: ``[n C]``.
        pulled_back: Jᵀ u, by the first backward pass of the graph, ``[D]``.
    """

    x: Tensor
    u: Tensor
    pulled_back: Tensor


class Preparation:
    """How J x is found: way by way, until one is right.

    Args:
        function: Maps parameters, by name, to outputs ``[n, …]``.
        params: θ, by name; tensors that require grad.
        graph: That of the outputs at θ.
    """

    def __init__(
        self, function: Callable[[Params], Tensor], params: Params, graph: Graph
    ) -> None:
        self._function, self._params, self._graph = function, params, graph
        self._failure, self._is_last = "", False
        self._probe: Probe | None = None

    def find(self, may_trace: bool, checked: bool) -> tuple[Graph, Tangents]:
        """Return the first way that is right, and the graph that Jᵀ u goes through.

        Args:
            may_trace: Whether it is used so often that a trace may pay.
            checked: Whether J x is known to be right for this function and θ.

        Raises:
            NoTangentError: If J x is impossible.
            ValueError: If it is wrong, and columns cannot stand in for it.
        """
        if not checked:
            self._probed()
        first = may_trace and tracing_pays(self._graph.output)
        found = self._trace_somehow() if first else None
        found = found or self._reverse(checked)
        if found is None and may_trace and not first:
            self._is_last = True
            found = self._trace_somehow()
        return found or self._refuse()

    def _probed(self) -> Probe:
        # Before anything else: a net may do other things the second time.
        if self._probe is None:
            graph, noise = self._graph, Noise()
            output = graph.output.detach()
            u = noise(output.numel(), like=output)
            x = noise(sum(graph.sizes), like=output)
            self._probe = Probe(x, u, graph.pull_back(u))
        return self._probe

    def _trace_somehow(self) -> tuple[Graph, Tangents] | None:
        found = self._trace(contextlib.nullcontext()) or self._trace(OutOfPlace())
        # The tracer leaves circles of references, to its callers too, which would keep
        # the data of this risk until Python's collector happens to run.
        gc.collect()
        return found

    def _trace(
        self, mode: contextlib.AbstractContextManager[object]
    ) -> tuple[Graph, Tangents] | None:
        """Trace the tangent map; None if it turned out to be wrong."""
        theta = {name: p.detach() for name, p in self._params.items()}
        try:
            with _TRACING, warnings.catch_warnings(), mode:
                warnings.filterwarnings("ignore", message=".*get_attr Node.*")
                warnings.filterwarnings("ignore", category=FutureWarning)
                traced = tangent_map(self._function, theta)
            arguments = [p.clone().requires_grad_() for p in theta.values()]
            graph = Graph(traced(*arguments), arguments)
            tangents = TracedTangents(traced, arguments)
            right = self._agree(graph, tangents)
        # Any failure of the tracer, of which there are many kinds, only means that
        # another way must be taken; an error of the model itself was seen before. The
        # other way takes less memory.
        except Exception as error:
            if self._is_last and is_out_of_memory(error):
                raise
            return None
        return (graph, tangents) if right else None

    def _reverse(self, checked: bool) -> tuple[Graph, Tangents] | None:
        """Keep the graph of u ↦ Jᵀ u; None if it turned out to be wrong."""
        try:
            tangents = ReverseTangents(self._graph)
            right = checked or self._agree(self._graph, tangents)
        # Some operations have no second derivative.
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            self._failure = f" ({error})"
            return None
        return (self._graph, tangents) if right else None

    def _agree(self, graph: Graph, tangents: Tangents) -> bool:
        """Whether products are those of the Jacobian, and stay so when used.

        ⟨u, J x⟩ must equal ⟨Jᵀ u, x⟩ for a random u, where a large error of J x may be
        hidden among many outputs, and for u = J x, where its square is seen. Of a
        trace, Jᵀ u must also be what an ordinary backward pass gives, and all this
        again: what it keeps is changed by its use if the model works in place.

        Args:
            graph: The net's, or a trace.
            tangents: Of it.
        """
        x, u, expected = self._probed()
        traced = graph is not self._graph
        eps = torch.finfo(x.dtype).eps
        tolerance = 100 * eps**0.75
        facts = []
        for _ in range(2 if traced else 1):
            image = tangents.along(x)
            if traced:
                error = graph.pull_back(u) - expected
                facts.append(error.norm() <= tolerance * expected.norm())
            slope = torch.dot(image, u) - torch.dot(expected, x)
            size = image.norm() * u.norm() + expected.norm() * x.norm()
            facts.append(slope.abs() <= tolerance * size)
        pulled_back = self._graph.pull_back(image)
        norm = torch.dot(image, image)
        square = norm - torch.dot(pulled_back, x)
        tolerated = tolerance * norm
        tolerated += 100 * eps * pulled_back.norm() * x.norm()
        facts.append(square.abs() <= tolerated)
        # The host waits for all of them together.
        right = torch.stack(facts).tolist()
        if traced:  # it is let go without a question
            return all(right)
        return (right[0] or self._is_rounding(slope, u, expected)) and (
            right[1] or self._is_rounding(square, image, pulled_back)
        )

    def _is_rounding(self, slope: Tensor, u: Tensor, pulled_back: Tensor) -> bool:
        """Whether a difference of two slopes along the probe is no more than rounding.

        Args:
            slope: ⟨u, J x⟩ − ⟨Jᵀ u, x⟩.
            u: ``[n C]``.
            pulled_back: Jᵀ u, ``[D]``, by a backward pass.
        """
        if not slope.isfinite():
            return False
        size = self._probed().x.norm()
        for number, (at, cotangent) in enumerate(nearby(self._params, u)):
            # Whatever a net says to parameters that are no longer what they were.
            try:
                wanted = [p.requires_grad_() for p in at.values()]
                graph = Graph(self._function(at), wanted)
                change = (graph.pull_back(cotangent) - pulled_back).norm()
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                return False
            # Another gradient at the same parameters is no rounding.
            if number == 0 and change != 0.0:
                return False
            if slope.abs() <= BY_NOISE * change * size:
                return True
        return False

    def _refuse(self) -> NoReturn:
        """Say why torch's J x fails or is wrong.

        Columns, which are made of backward passes, can stand in for it if these are
        linear. Rounding to a lower precision is not, nor is a coarse iteration.
        """
        graph, (_, u, once) = self._graph, self._probed()
        graph.check_repeats(u, once)
        v = Noise(1)(u.numel(), like=u)
        error = once + graph.pull_back(v) - graph.pull_back(u + v)
        if error.norm() <= torch.finfo(once.dtype).eps ** 0.5 * once.norm():
            raise NoTangentError(
                "model: torch has no second derivative of an operation of it, or a "
                f"wrong one{self._failure}, so J x is impossible."
            )
        raise ValueError(
            "model: its derivatives by torch disagree, J x is not the slope that a "
            f"backward pass gives{self._failure}. An operation of the model has a "
            "wrong second derivative (replace it by an equivalent one), or computes "
            "in a lower precision than that of the parameters (give the model in that "
            "one), or iterates in its backward pass and stops early (let it iterate "
            "until it has converged)."
        )


def tracing_pays(output: Tensor) -> bool:
    """Whether a net has many convolutions, seen from the graph of its output."""
    counts = {"conv": 0, "mm": 0}
    for node in nodes(output):
        name = node.name().lower()
        for kind in counts:
            counts[kind] += kind in name
    return _PER_CONVOLUTION * counts["conv"] > counts["mm"]
