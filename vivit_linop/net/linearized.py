"""The linearisations that a risk keeps: one of each batch, while the memory lasts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from vivit_linop.devices import explained
from vivit_linop.modes import as_guest
from vivit_linop.net.linearization import (
    KEPT,
    KEPT_GRAPHS,
    Graph,
    Linearization,
    kept_linearizations,
)
from vivit_linop.net.tangents import Preparation
from vivit_linop.risk import first_run
from vivit_linop.risk.checks import read
from vivit_linop.risk.data.containers import copied, leaves
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.first_run import Run
from vivit_linop.risk.model.private_module import Params
from vivit_linop.risk.store import Store

# The share of free memory that linearisations may take.
_MEMORY_SHARE = 4
# Where a risk keeps those that are not yet certified.
_TRUSTED = "trusted linearizations"
# What keeps those that this thread certifies itself.
_CERTIFYING: ContextVar[Store | None] = ContextVar("certifying", default=None)


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
    taken as a guest (:class:`vivit_linop.modes.as_guest`), entered once for all.

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
    for index, (X, _) in enumerate(risk.batches("product")):
        # The batches come in order, so the kept ones are the first ones. Threads that
        # come together keep each batch once; the others they make alone.
        making = risk.kept.making if index >= len(kept) else contextlib.nullcontext()
        differ: list[Tensor] = []
        with making:
            if index < len(kept):
                linearization = kept[index]
            else:
                run = first_run.taken(risk.kept, X)
                nbytes = risk.graph_bytes[index] if index < len(risk.outputs) else 0
                room = budget - risk.kept.nbytes
                keep = index == len(kept)
                keep = keep and sum(map(_nbytes, leaves(X))) <= room
                keep = keep and KEPT_GRAPHS * nbytes <= room
                differ = risk.inputs_differ(index, X) if run is None else []
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
