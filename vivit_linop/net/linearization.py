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

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import cached_property
from typing import Any, NoReturn

from torch import Tensor

from vivit_linop.devices import explained, is_out_of_memory
from vivit_linop.modes import as_guest
from vivit_linop.net.chunks import Chunks, columns_at_a_time
from vivit_linop.net.tangents import Graph, Preparation, Tangents
from vivit_linop.risk import first_run
from vivit_linop.risk.checks import read
from vivit_linop.risk.data.containers import copied, leaves
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.first_run import Run
from vivit_linop.risk.model.private_module import Params
from vivit_linop.risk.passes import batch_does_not_fit
from vivit_linop.risk.store import Store

# What a net's trace keeps, or the graph of a backward pass, in graphs of its outputs:
# measured 1.4 for a net of linear layers, 1.8 for attention, 2.9 for convolutions.
_KEPT_GRAPHS = 3
# The share of free memory that linearisations may take.
_MEMORY_SHARE = 4
# Where a risk keeps them: those of everybody, and those that are not yet certified.
_KEPT, _TRUSTED = "linearizations", "trusted linearizations"
# What keeps those that this thread certifies itself.
_CERTIFYING: ContextVar[Store | None] = ContextVar("certifying", default=None)


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
        self.device = next(iter(params.values())).device
        self.kept, self.checked, self._few = True, False, False
        self._tangents: Tangents | None = None
        self._preparing = threading.Lock()
        self.nbytes = nbytes
        if output is None:
            with as_guest(self.device):
                output = function(params)
        self._graph = Graph(output, list(params.values()))
        self._num_params = sum(self._graph.sizes)
        self._preparation = Preparation(function, params, self._graph)
        self.outputs = output.detach()

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
        self._chunks.trust("along", "pull_back")

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

    def _prepared(self) -> Tangents:
        """Make J x possible, once."""
        with self._preparing, as_guest(self.device):
            if self._tangents is None:
                may_trace = self.kept and not self._few
                found = self._preparation.find(may_trace, self.checked)
                self._graph, self._tangents = found
                self.checked = self._graph.repeats = True
                del self._preparation
        return self._tangents

    def release(self) -> None:
        """Let go of the graph, also where this object is still referred to."""
        for name in ("_graph", "_tangents", "_preparation"):
            self.__dict__.pop(name, None)

    def column_chunk(self) -> int:
        """How many columns to multiply at a time."""
        per_column = self.nbytes + self.outputs.element_size() * self._num_params
        return columns_at_a_time(self.device, per_column)

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
                graph.check_repeats(U[:, 0].contiguous())
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
            return self._chunks.apply(product, X, size, self.column_chunk())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(self._does_not_fit()) from error

    def _does_not_fit(self) -> str:
        samples = len(self.outputs)
        return batch_does_not_fit(self.device, samples, self.nbytes / samples)


def linearizations(risk: EmpiricalRisk) -> Iterable[Linearization]:
    """Return the linearisation of each batch, kept while the memory budget lasts.

    One that is not kept is good until the next one is asked for. Products with them are
    taken as a guest (:class:`vivit_linop.modes.as_guest`), entered once for all.

    Raises:
        ValueError: If the outputs differ from those at construction: the data are not
            the same in every pass; or if memory that the net reads has changed.
    """
    if risk.model.foreign.parts:
        risk.model.foreign.check()
    # Without a call, since it is asked in each product.
    kept: list[Linearization] = risk.kept.values.get(_KEPT, [])
    if len(kept) == len(risk.batch_sizes):
        return kept
    return _linearized(risk, trust=_CERTIFYING.get() is risk.kept)


def _linearized(risk: EmpiricalRisk, trust: bool) -> Iterator[Linearization]:
    kept: list[Linearization] = risk.kept.get(_TRUSTED if trust else _KEPT, list)
    checked: set[int] = risk.kept.get("checked", set)
    budget = risk.kept.budget(_MEMORY_SHARE)
    # Batches, what is asked of them, and what the answer should be.
    asked: list[tuple[int, Tensor, bool]] = []
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
            asked.append((index, risk.has_outputs(index, linearization.outputs), True))
            asked += [(index, fact, False) for fact in risk.inputs_differ(index, X)]
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
        risk.check_outputs(index, linearization.outputs, X)
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
