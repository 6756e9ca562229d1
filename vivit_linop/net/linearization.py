"""The linearisation of a net at θ on one batch: J x and Jᵀ u without a forward pass.

Jᵀ u is an ordinary backward pass through the kept graph of one forward pass. J x is the
derivative of Jᵀ u in u, along x: a backward pass through the backward pass, whose graph
is kept as well. One product with J and one with Jᵀ are the arithmetic of 4/3 of a
gradient.

In a net of convolutions the tangent map x ↦ J x is traced instead
(:mod:`vivit_linop.net.tangents`), and Jᵀ u is the backward pass through that linear
map. Each way stands in where the other fails: control flow that depends on values and
kernels without forward mode, or derivatives that torch does not have or has wrong.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from vivit_linop.devices import explained, is_out_of_memory
from vivit_linop.graphs import batched_gradients, strided
from vivit_linop.modes import as_guest
from vivit_linop.net.chunks import Chunks, columns_at_a_time
from vivit_linop.net.rounding import BY_NOISE, nearby
from vivit_linop.net.tangents import (
    OutOfPlace,
    Probe,
    TracedTangents,
    agree,
    tangent_map,
    tracing_pays,
)
from vivit_linop.noise import Noise
from vivit_linop.risk import first_run
from vivit_linop.risk.checks import read
from vivit_linop.risk.data.containers import copied, leaves
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.first_run import Run
from vivit_linop.risk.model.functional import Params
from vivit_linop.risk.passes import batch_does_not_fit
from vivit_linop.risk.store import Kept

# What a net's trace keeps, or the graph of a backward pass, in graphs of its outputs:
# measured 1.4 for a net of linear layers, 1.8 for attention, 2.9 for convolutions.
_KEPT_GRAPHS = 3
# The share of free memory that linearisations may take.
_MEMORY_SHARE = 4
# Where a risk keeps them: those of everybody, and those that are not yet certified.
_KEPT, _TRUSTED = "linearizations", "trusted linearizations"
# What keeps those that this thread certifies itself.
_CERTIFYING: ContextVar[Kept | None] = ContextVar("certifying", default=None)
# The tracer changes things that all threads see.
_TRACING = threading.Lock()


class NoTangentError(ValueError):
    """J x cannot be had from torch's derivatives; Jᵀ u can, and columns made of it."""


class Graph(NamedTuple):
    """An output with its graph; Jᵀ u is its gradient in the arguments, along u.

    Attributes:
        output: The output, or its tangent as a linear function of the arguments.
        arguments: One for each parameter.
    """

    output: Tensor
    arguments: list[Tensor]


class ReverseTangents:
    """J x as a backward pass through the kept backward pass u ↦ Jᵀ u.

    Args:
        graph: The net's.
    """

    method = "reverse"

    def __init__(self, graph: Graph) -> None:
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
        """Return J x for x in the shapes of the parameters, or for K of them."""
        vectors = list(compress(tangents, self._used))
        if batched:
            (images,) = batched_gradients(self._pulled_back, [self._dual], vectors)
            assert images is not None
            return images
        (image,) = torch.autograd.grad(
            self._pulled_back, self._dual, vectors, retain_graph=True
        )
        return image


class Linearization:
    """The Jacobian of a function of parameters, ready for products.

    Several threads may multiply at once. It holds graphs, which cannot be copied:
    whoever is copied makes it anew.

    Args:
        function: Maps parameters, by name, to outputs ``[n, …]``.
        params: θ, by name; tensors that require grad.
        nbytes: The memory that the graph of the outputs keeps, beyond θ.
        output: The outputs with their graph, if the function was evaluated already.

    Attributes:
        outputs: The outputs at θ, ``[n, …]``.
        nbytes: As given.
        kept: Whether it is used again; else tracing J x would not pay.
        checked: Whether J x has been seen to be right for this function and θ.
    """

    def __init__(
        self,
        function: Callable[[Params], Tensor],
        params: Params,
        nbytes: int = 0,
        output: Tensor | None = None,
    ) -> None:
        self._function, self._params = function, params
        self._shapes = [*map(attrgetter("shape"), params.values())]
        self._sizes = [*map(Tensor.numel, params.values())]
        first = next(iter(params.values()))
        self._dtype, self.device = first.dtype, first.device
        self.kept, self.checked = True, False
        self._chunks = Chunks(self.device)
        self._tangents: ReverseTangents | TracedTangents | None = None
        self._preparing = threading.Lock()
        self._failure = ""
        self._probe: Probe | None = None
        self._repeats = self._spent = self._few = False
        self.nbytes = nbytes
        if output is None:
            with as_guest(self.device):
                output = function(params)
        self._graph = Graph(output, list(params.values()))
        self.outputs = output.detach()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError("A linearisation holds graphs; copy the risk, which makes it.")

    def trust(self) -> None:
        """Leave the checks of products to who takes them; some will be taken only.

        Nothing is traced for these.
        """
        self.checked = self._repeats = self._few = True
        self._chunks.trust("_jvp", "_vjp")

    @property
    def kept_bytes(self) -> int:
        """About what it takes at most once J x is possible."""
        return _KEPT_GRAPHS * self.nbytes

    @property
    def method(self) -> str:
        """How J x is computed, decided when needed: "trace" or "reverse".

        Raises:
            NoTangentError: If J x is impossible.
        """
        return self._prepared().method

    def _prepared(self) -> ReverseTangents | TracedTangents:
        """Make J x possible, once."""
        with self._preparing, as_guest(self.device):
            if self._tangents is None:
                if not self.checked:
                    self._probed()
                ways = [self._reverse]
                if self.kept and not self._few:
                    first = tracing_pays(self._graph.output)
                    ways.insert(0 if first else 1, self._trace_somehow)
                for way in ways:
                    if way():
                        break
                else:
                    self._refuse()
                self.checked = self._repeats = True
                self._probe = None
        assert self._tangents is not None
        return self._tangents

    def _probed(self) -> Probe:
        # Before anything else: a net may do other things the second time.
        if self._probe is None:
            noise = Noise()
            u = noise(self.outputs.numel(), like=self.outputs)
            x = noise(sum(self._sizes), like=self.outputs)
            self._probe = Probe(x, u, self._vjp(u))
        return self._probe

    def _trace_somehow(self) -> bool:
        right = self._trace(contextlib.nullcontext()) or self._trace(OutOfPlace())
        # The tracer leaves circles of references, to its callers too, which would keep
        # the data of this risk until Python's collector happens to run.
        gc.collect()
        return right

    def _trace(self, mode: contextlib.AbstractContextManager[object]) -> bool:
        """Trace the tangent map; returns whether it turned out to be right."""
        theta = {name: p.detach() for name, p in self._params.items()}
        try:
            with _TRACING, warnings.catch_warnings(), mode:
                warnings.filterwarnings("ignore", message=".*get_attr Node.*")
                warnings.filterwarnings("ignore", category=FutureWarning)
                tangents = tangent_map(self._function, theta)
            arguments = [p.clone().requires_grad_() for p in theta.values()]
            graph = Graph(tangents(*arguments), arguments)
            right = self._agree(graph, TracedTangents(tangents))
        # Any failure of the tracer, of which there are many kinds, only means that
        # another way must be taken; an error of the model itself was seen before.
        except Exception:
            return False
        if right:
            self._graph, self._tangents = graph, TracedTangents(tangents)
        return right

    def _reverse(self) -> bool:
        """Keep the graph of u ↦ Jᵀ u; returns whether it turned out to be right."""
        try:
            tangents = ReverseTangents(self._graph)
            right = self.checked or self._agree(self._graph, tangents)
        # Some operations have no second derivative.
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            self._failure = f" ({error})"
            return False
        if right:
            self._tangents = tangents
        return right

    def _agree(self, graph: Graph, tangents: ReverseTangents | TracedTangents) -> bool:
        """Whether products are those of the Jacobian, and stay so when used."""
        is_trace = graph is not self._graph
        return agree(
            self._probed(),
            functools.partial(self._jvp, tangents=tangents),
            self._vjp,
            functools.partial(self._vjp, graph=graph) if is_trace else None,
            self._is_rounding,
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
                change = (self._vjp(cotangent, graph) - pulled_back).norm()
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
        _, u, once = self._probed()
        self._check_repeats(u, once)
        v = Noise(1)(u.numel(), like=u)
        error = once + self._vjp(v) - self._vjp(u + v)
        if error.norm() <= torch.finfo(self._dtype).eps ** 0.5 * once.norm():
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

    def release(self) -> None:
        """Let go of the graph, also where this object is still referred to."""
        for name in ("_graph", "_tangents", "_function"):
            self.__dict__.pop(name, None)

    def column_chunk(self) -> int:
        """How many columns to multiply at a time."""
        entries = sum(self._sizes)
        per_column = self.nbytes + self.outputs.element_size() * entries
        return columns_at_a_time(self.device, per_column)

    def jvp(self, X: Tensor) -> Tensor:
        """Return J X, ``[D, K] -> [n C, K]``.

        Raises:
            NoTangentError: If J x is impossible.
        """
        if self._tangents is None:
            with explained(self._does_not_fit):
                self._prepared()
        return self._by_rows(self._jvp, X, self.outputs.numel())

    def vjp(self, U: Tensor) -> Tensor:
        """Return Jᵀ U, ``[n C, K] -> [D, K]``.

        Raises:
            ValueError: If the graph cannot be used more than once.
        """
        if not self._repeats and (self.kept or U.shape[1] > 1):
            with explained(self._does_not_fit):
                self._check_repeats(U[:, 0].contiguous())
        return self._by_rows(self._vjp, U, sum(self._sizes))

    def _check_repeats(self, u: Tensor, once: Tensor | None = None) -> None:
        """Raise an error if a second backward pass gives another Jᵀ u.

        Args:
            u: ``[n C]``.
            once: What the first backward pass of the graph gave, if it was for u.
        """
        once = self._vjp(u) if once is None else once
        twice = self._vjp(u)
        size = once.nan_to_num(0.0, 0.0, 0.0).norm()
        tolerance = float(torch.finfo(self._dtype).eps ** 0.5 * size)
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
        self._repeats = bool(once.any())

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
            return self._chunks.apply(product, X, size, self.column_chunk())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(self._does_not_fit()) from error

    def _does_not_fit(self) -> str:
        samples = len(self.outputs)
        return batch_does_not_fit(self.device, samples, self.nbytes / samples)

    def _jvp(
        self, rows: Tensor, tangents: ReverseTangents | TracedTangents | None = None
    ) -> Tensor:
        """``[D] -> [n C]`` or ``[K, D] -> [K, n C]``, rows contiguous."""
        tangents = tangents or self._tangents
        assert tangents is not None
        leading = rows.shape[:-1]
        # Kernels of a model may walk through memory: parts of several rows are copied,
        # those of one row lie together already.
        parts = []
        for part, shape in zip(
            rows.split(self._sizes, dim=-1), self._shapes, strict=True
        ):
            parts.append(part.contiguous().view((*leading, *shape)))
        image = tangents(parts, batched=rows.ndim == 2)
        return image.reshape(*leading, -1)

    def _vjp(self, rows: Tensor, graph: Graph | None = None) -> Tensor:
        """``[n C] -> [D]`` or ``[K, n C] -> [K, D]``, rows contiguous."""
        leading = rows.shape[:-1]
        cotangents = rows.view((*leading, *self.outputs.shape))
        graph = graph or self._graph
        gradients: Sequence[Tensor | None]
        if rows.ndim == 2:
            gradients = batched_gradients(graph.output, graph.arguments, [cotangents])
        else:
            gradients = torch.autograd.grad(
                graph.output,
                graph.arguments,
                cotangents,
                retain_graph=True,
                allow_unused=True,
            )
        parts = []
        for gradient, size in zip(gradients, self._sizes, strict=True):
            if gradient is None:
                gradient = rows.new_zeros(*leading, size)
            elif gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            parts.append(gradient.reshape(*leading, size))
        return torch.cat(parts, dim=-1)


def linearizations(risk: EmpiricalRisk) -> Iterable[Linearization]:
    """Return the linearisation of each batch, kept while the memory budget lasts.

    One that is not kept is good until the next one is asked for. Products with them are
    taken as a guest (:class:`vivit_linop.modes.as_guest`), entered once for all.

    Raises:
        ValueError: If the outputs differ from those at construction: the data are not
            the same in every pass.
    """
    # Without a call, since it is asked in each product.
    kept: list[Linearization] = risk.kept.values.get(_KEPT, [])
    if len(kept) == len(risk.batch_sizes):
        return kept
    return _linearized(risk, trust=_CERTIFYING.get() is risk.kept)


def _linearized(risk: EmpiricalRisk, trust: bool) -> Iterator[Linearization]:
    kept: list[Linearization] = risk.kept.get(_TRUSTED if trust else _KEPT, list)
    checked: set[int] = risk.kept.get("checked", set)
    budget = risk.kept.budget(_MEMORY_SHARE)
    answers: dict[int, Tensor] = {}
    for index, (X, _) in enumerate(risk.batches("product")):
        # The batches come in order, so the kept ones are the first ones. Threads that
        # come together keep each batch once; the others they make alone.
        making = risk.kept.making if index >= len(kept) else contextlib.nullcontext()
        with making:
            if index < len(kept):
                linearization = kept[index]
            else:
                run = first_run.taken(risk.kept, X)
                nbytes = risk.graph_bytes[index] if index < len(risk.outputs) else 0
                room = budget - risk.kept.nbytes
                keep = index == len(kept)
                keep = keep and sum(map(_nbytes, leaves(X))) <= room
                keep = keep and _KEPT_GRAPHS * nbytes <= room
                linearization = _linearization(risk, index, X, nbytes, keep, run)
                linearization.checked = index in checked
                if trust:
                    linearization.trust()
                if keep:
                    kept.append(linearization)
                    risk.kept.nbytes += linearization.kept_bytes
        keep = linearization.kept
        if not keep:  # read at the end, since the host waits for the device
            answers[index] = risk.has_outputs(index, linearization.outputs)
        yield linearization
        if linearization.checked and not trust:
            checked.add(index)
        # Else its graph would be there while that of the next batch is made.
        if not keep:
            linearization.release()
    for index, right in zip(answers, read(list(answers.values())), strict=True):
        if not right:
            raise risk.other_data(index)


def _nbytes(leaf: Tensor) -> int:
    """At most what a tensor takes; sparse ones do not say it."""
    return leaf.numel() * leaf.element_size()


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
        linearization = Linearization(function, risk.model.params, nbytes, output)
    if keep and run is None:
        risk.check_outputs(index, linearization.outputs)
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
            if not kept.values.get(_KEPT):
                made = kept.values.pop(_TRUSTED, [])
                checked: set[int] = kept.get("checked", set)
                kept.values[_KEPT] = made
                checked.update(range(len(made)))
    finally:
        _CERTIFYING.reset(token)
        kept.drop_list(_TRUSTED)
