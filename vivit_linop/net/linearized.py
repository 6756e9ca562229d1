"""How linearisations are made, by a way to J x that is right, and which a risk keeps.

For convolutions torch's backward pass through a backward pass takes twice as long as it
should; a trace (:mod:`vivit_linop.net.tracing`) does not. Tracing takes seconds, so it
is not done for a trace that would be used only once, nor for nets of linear layers and
attention, where a trace is no faster. A trace may be wrong in many ways, and so may
second derivatives by torch: products are compared with Jᵀ u before they are used.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import vmap

from vivit_linop.devices import explained, is_out_of_memory
from vivit_linop.graphs import nodes
from vivit_linop.modes import as_guest
from vivit_linop.net.certificate import roundings
from vivit_linop.net.linearization import (
    KEPT,
    KEPT_GRAPHS,
    Graph,
    Linearization,
    ReverseTangents,
    Tangents,
    kept_linearizations,
)
from vivit_linop.net.tracing import tangent_map
from vivit_linop.noise import BY_NOISE, Noise
from vivit_linop.risk.checks import read
from vivit_linop.risk.data.containers import copied, leaves
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.kept import Run, Store
from vivit_linop.risk.model.original import Params
from vivit_linop.risk.model.parameters import check_derivatives
from vivit_linop.warned import ignoring

# One convolution in this many matrix products makes a trace worth its time.
_PER_CONVOLUTION = 4
# The tracer changes things that all threads see.
_TRACING = threading.Lock()
# The share of free memory that linearisations may take.
_MEMORY_SHARE = 4
# Where a risk keeps those that are not yet certified.
_TRUSTED = "trusted linearizations"
# What keeps those that this thread certifies itself.
_CERTIFYING: ContextVar[Store | None] = ContextVar("certifying", default=None)


class NoTangentError(ValueError):
    """J x cannot be had from torch's derivatives; Jᵀ u can, and columns made of it."""


class TracedTangents(Tangents):
    """J x by the traced tangent map, a function of a tensor for each parameter."""

    method = "trace"

    def __init__(
        self, tangent_map: Callable[..., Tensor], arguments: Sequence[Tensor]
    ) -> None:
        super().__init__(arguments)
        self._map = tangent_map

    def __call__(self, tangents: list[Tensor], batched: bool) -> Tensor:
        with torch.no_grad():
            apply = vmap(self._map) if batched else self._map
            image: Tensor = apply(*tangents)
        return image


@contextlib.contextmanager
def young_circles_collected() -> Iterator[None]:
    """Free what the tracer leaves in circles of references, to its callers too.

    They would keep the data of a risk until Python's collector happens to run. While
    that waits all new objects are young ones, which are looked through in little time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        if was_enabled:
            gc.enable()


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
        self._probe: tuple[Tensor, Tensor, Tensor] | None = None

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
        found = self._trace() if first else None
        found = found or self._reverse(checked)
        if found is None and may_trace and not first:
            self._is_last = True
            found = self._trace()
        return found or self._refuse()

    def _probed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random x ``[D]`` and u ``[n C]``; Jᵀ u by the first pass of the graph."""
        # Before anything else: a net may do other things the second time.
        if self._probe is None:
            graph, noise = self._graph, Noise()
            output = graph.output.detach()
            u = noise(output.numel(), like=output)
            x = noise(sum(graph.sizes), like=output)
            pulled_back, self._stayed = graph.watched(u)
            self._probe = x, u, pulled_back
        return self._probe

    @young_circles_collected()
    def _trace(self) -> tuple[Graph, Tangents] | None:
        """Trace the tangent map; None if it turned out to be wrong."""
        theta = {name: p.detach() for name, p in self._params.items()}
        try:
            with _TRACING, ignoring(".*get_attr Node"), ignoring(kind=FutureWarning):
                traced = tangent_map(self._function, theta)
            arguments = [p.clone().requires_grad_() for p in theta.values()]
            # Its operations are torch's own, which write into no gradient.
            graph = Graph(traced(*arguments), arguments, reads_only=True)
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
        # Some operations have no second derivative, or no second backward pass.
        except Exception as error:
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
        *right, reads_only = torch.stack([*facts, self._stayed]).tolist()
        self._graph.reads_only |= reads_only
        if traced:  # it is let go without a question
            return all(right)
        return (right[0] or self._is_rounding(slope, u, expected)) and (
            right[1] or self._is_rounding(square, image, pulled_back)
        )

    def _is_rounding(self, slope: Tensor, u: Tensor, pulled_back: Tensor) -> bool:
        """Whether ⟨u, J x⟩ − ⟨Jᵀ u, x⟩, along the probe, is no more than rounding."""
        if not slope.isfinite():
            return False
        tolerated = BY_NOISE * self._probed()[0].norm()

        def again(params: Params, cotangent: Tensor) -> list[Tensor]:
            wanted = [p.requires_grad_() for p in params.values()]
            return [Graph(self._function(params), wanted).pull_back(cotangent)]

        changes = roundings(again, self._params, u, [pulled_back])
        return any(bool(slope.abs() <= tolerated * change) for (change,) in changes)

    def _refuse(self) -> NoReturn:
        """Say why torch's J x fails or is wrong.

        Columns, which are made of backward passes, can stand in for it if these are
        linear. Rounding to a lower precision is not, nor is a coarse iteration.
        """
        graph, (_, u, once) = self._graph, self._probed()
        check_derivatives(self._params, once)
        graph.check_repeats((u, once))
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
            f"one, or dtype={once.dtype}, which its casts follow), or iterates in its "
            "backward pass and stops early (let it iterate until it has converged)."
        )


def tracing_pays(output: Tensor) -> bool:
    """Whether a net has many convolutions, seen from the graph of its output."""
    counts = {"conv": 0, "mm": 0}
    for node in nodes(output):
        name = node.name().lower()
        for kind in counts:
            counts[kind] += kind in name
    return _PER_CONVOLUTION * counts["conv"] > counts["mm"]


# What a risk keeps --------------------------------------------------------------------


def linearized(
    function: Callable[[Params], Tensor],
    params: Params,
    nbytes: int = 0,
    output: Tensor | None = None,
) -> Linearization:
    """Linearise a function of parameters.

    Args:
        function: Maps parameters, by name, to outputs ``[n, …]``.
        params: θ, by name; tensors that require grad.
        nbytes: The memory that the graph of the outputs keeps, beyond θ.
        output: The outputs with their graph, if the function was evaluated already.
    """
    if output is None:
        with as_guest(next(iter(params.values())).device):
            output = function(params)
    graph = Graph(output, list(params.values()))
    return Linearization(graph, Preparation(function, params, graph).find, nbytes)


def linearizations(risk: EmpiricalRisk) -> Iterable[Linearization]:
    """Return the linearisation of each batch, kept while the memory budget lasts.

    One that is not kept is good until the next one is asked for. Products with them are
    taken as a guest (:func:`vivit_linop.modes.as_guest`), entered once for all.

    Raises:
        ValueError: If the outputs differ from those at construction: the data are not
            the same in every pass; or if memory that the net reads has changed.
    """
    kept = kept_linearizations(risk)
    if kept is not None:
        return kept
    return _linearized(risk, trust=_CERTIFYING.get() is risk.kept)


def _linearized(risk: EmpiricalRisk, trust: bool) -> Iterator[Linearization]:
    kept: list[Linearization] = risk.kept.get(_TRUSTED if trust else KEPT, list)
    checked: set[int] = risk.kept.get("checked", set)
    budget = risk.kept.budget(_MEMORY_SHARE)
    # Batches, what is asked of them, and what the answer should be.
    asked: list[tuple[int, Tensor, bool]] = []
    for index, (X, _) in enumerate(risk.passes.batches("product")):
        # The batches come in order, so the kept ones are the first ones. Threads that
        # come together keep each batch once; the others they make alone.
        making = risk.kept.making if index >= len(kept) else contextlib.nullcontext()
        differ: list[Tensor] = []
        with making:
            if index < len(kept):
                linearization = kept[index]
            else:
                run = risk.kept.take_run(X)
                nbytes = risk.graph_bytes[index] if index < len(risk.outputs) else 0
                room = budget - risk.kept.nbytes
                keep = index == len(kept) and KEPT_GRAPHS * nbytes <= room
                if run is None:  # which would have its input
                    # At most what they take; sparse tensors do not say it.
                    bytes_of = (x.numel() * x.element_size() for x in leaves(X))
                    keep = keep and sum(bytes_of) <= room
                    differ = risk.inputs_differ(index, X)
                linearization = _linearization(risk, index, X, nbytes, keep, run)
                if keep and run is None:
                    risk.check_outputs(index, linearization.outputs, differ)
                linearization.checked = index in checked
                if trust:
                    linearization.trust()
                if keep:
                    kept.append(linearization)
                    risk.kept.nbytes += linearization.kept_bytes
        keep = linearization.kept
        if not keep:  # read at the end, since the host waits for the device
            asked.append((index, risk.has_outputs(index, linearization.outputs), True))
            asked += [(index, fact, False) for fact in differ]
        yield linearization
        if linearization.checked and not trust:
            checked.add(index)
        # Else its graph would be there while that of the next batch is made.
        if not keep:
            linearization.release()
    if asked:
        answers = read([fact for _, fact, _ in asked])
        for (index, _, expected), answer in zip(asked, answers, strict=True):
            if answer is not expected:
                raise risk.other_data(index)


def _linearization(
    risk: EmpiricalRisk, index: int, X: Any, nbytes: int, keep: bool, run: Run | None
) -> Linearization:
    """Linearise a batch, by a run of the net on it that has been made."""
    # Of the model alone: with a way back to the risk, which keeps it, neither would be
    # freed when the last reference goes.
    samples = risk.batch_sizes[index] if index < len(risk.batch_sizes) else 1
    with explained(risk.does_not_fit, X, samples):
        if run is not None:
            X = run.X
        elif keep:
            X = copied(X)
        function = functools.partial(risk.model, X=X)
        output = None if run is None else run.output
        linearization = linearized(function, risk.model.params, nbytes, output)
    linearization.kept = keep
    return linearization


@contextlib.contextmanager
def trusted(risk: EmpiricalRisk) -> Iterator[None]:
    """Take a few products that are certified inside, on linearisations made for them.

    Nobody else gets these before the end, and nobody does after an exception.
    """
    kept = risk.kept
    token = _CERTIFYING.set(kept)
    try:
        yield
        with kept.making:
            if not kept.values.get(KEPT):
                made = kept.values.pop(_TRUSTED, [])
                checked: set[int] = kept.get("checked", set)
                kept.values[KEPT] = made
                checked.update(range(len(made)))
    finally:
        _CERTIFYING.reset(token)
        kept.drop_list(_TRUSTED)
