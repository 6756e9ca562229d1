"""The run of a net that construction has checked, kept for the first quantity.

Whatever is computed of a fresh risk starts with a run of the net on all samples, and
construction has just made one. A risk of one batch keeps it with its graph, where that
fits into the budget, until another risk is built. Whoever takes it has it alone: the
linearisation keeps the graph, columns are pulled back through it and let it go. Its
input is compared with what the data are then, so that a change of them is seen as ever.
What a graph has saved must be what it was, and so must memory of others that the net
has read (:mod:`vivit_linop.risk.model.foreign_memory`).
A risk at other parameters keeps its run too, if that of the risk before has been taken.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from vivit_linop.devices import is_out_of_memory, saved_bytes
from vivit_linop.graphs import has_own_code, nbytes_saved, saved_in
from vivit_linop.risk.data.containers import copied
from vivit_linop.risk.model.foreign_memory import ForeignMemory
from vivit_linop.risk.model.functional import FunctionalModel
from vivit_linop.risk.model.outputs import RaggedOutputs
from vivit_linop.risk.model.private_module import Params
from vivit_linop.risk.store import Store


class Record(Protocol):
    """What has watched a run.

    Attributes:
        has_hooks: Whether the net may have put hooks into the graph.
        keeps_gradients: Whether the net asks for gradients of what it computes.
    """

    has_hooks: bool
    keeps_gradients: bool


Watch = Callable[[Params], contextlib.AbstractContextManager[Record | None]]

Result = TypeVar("Result")

_KEY, _WANTED = "first run", "first runs are wanted"
# The share of free memory that it may take, as the columns that it is for.
_MEMORY_SHARE = 12
# Whose run is kept: of those that nobody asks for there is one at most.
_keeping: list[weakref.ref[Store]] = []
_KEEPING = threading.Lock()


def _by_nobody(params: Params) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


# What is entered around the run, until :func:`watched_by` says something else.
_watches: list[Watch] = [_by_nobody]


def watched_by(watch: Watch) -> None:
    """Let the room above see runs, which are kept with what has watched them.

    Before that none is kept.

    Args:
        watch: Returns, for the parameters, what is entered around the run.
    """
    _watches[:] = [watch]


@dataclass
class Run:
    """A run of a net on a batch.

    Attributes:
        X: The input: a copy that nobody else has.
        output: The outputs, with their graph.
        written: Whether parts of the input were written into.
        graph_bytes: What the graph takes.
        record: What has watched it; None where it may not serve as a run of the net:
            it was watched by nobody, or was more than one evaluation.
        repeats: Whether a second one who pulls back through it gets what the first
            would: there are only torch's own functions in the graph, and no hooks.
        saved: What the graph has saved, with the versions of then.
        foreign: The memory of others that the net reads.
    """

    X: Any
    output: Tensor
    written: list[Tensor]
    graph_bytes: int
    record: Record | None = None
    repeats: bool = False
    saved: list[tuple[Tensor, int]] = field(default_factory=list)
    foreign: ForeignMemory = field(default_factory=ForeignMemory)

    def serve(self, record: Record | None, model: FunctionalModel) -> None:
        """Let it serve as a run of the net.

        Args:
            record: What has watched it; None if it may not serve.
            model: The net.
        """
        if record is None:
            return
        self.record, self.foreign = record, model.foreign
        self.repeats = not record.has_hooks and not has_own_code(self.output)
        saved = saved_in(self.output)
        self.saved = [(tensor, tensor._version) for tensor in saved]

    @property
    def nbytes(self) -> int:
        """What it takes at most."""
        return self.graph_bytes + sum(p.nbytes for p in _plain_tensors(self.X).values())

    def is_of(self, X: Any) -> bool:
        """Whether an input is that of the run, and its graph is what it was.

        Raises:
            ValueError: If memory of others that the net reads has changed.
        """
        if self.foreign.parts:
            self.foreign.check()
        own, given = _plain_tensors(self.X), _plain_tensors(X)
        if own.keys() != given.keys():
            return False
        for name, part in own.items():
            if part.dtype != given[name].dtype or not torch.equal(part, given[name]):
                return False
        for tensor, version in self.saved:
            if tensor._version != version:
                return False
        return True


def _plain_tensors(X: Any) -> dict[Hashable, Tensor]:
    """The tensors of an input that consists of nothing else, none of another one."""
    parts: dict[Hashable, Any] = {None: X}
    if type(X) in (tuple, list):
        parts = dict(enumerate(X))
    elif type(X) is dict:
        parts = X
    for part in parts.values():
        if type(part) is not Tensor or part.layout != torch.strided or part.is_nested:
            return {}
    return parts


def run_of(model: FunctionalModel, X: Any, samples: int) -> Run:
    """Run a net on a batch for the first time.

    A graph that holds something else than what was computed (checkpoints) is that of a
    second run, and only measured.

    Args:
        model: The net.
        X: The input.
        samples: How many it has.
    """
    found = _watched(model, X, lambda: model.first(model.params, X, samples))
    if found is None:
        nbytes, result = saved_bytes(lambda: model.first(model.params, X, samples))
        return Run(*result, nbytes)
    (own, output, written), record = found
    run = Run(own, output, written, nbytes_saved(output))
    run.serve(record, model)
    return run


def next_run(model: FunctionalModel, X: Any, graph_bytes: int) -> Run | None:
    """Run a net at other parameters, on a batch whose first run could serve.

    None where it uses hooks on saved tensors at these, or bears nobody watching.

    Args:
        model: The net.
        X: The input.
        graph_bytes: What the graph of the first run took.
    """
    own = copied(X)
    found = _watched(model, X, lambda: model(model.params, own))
    if found is None:
        return None
    output, record = found
    run = Run(own, output, [], graph_bytes)
    run.serve(record, model)
    return run


def _watched(
    model: FunctionalModel, X: Any, evaluate: Callable[[], Result]
) -> tuple[Result, Record | None] | None:
    """Evaluate a net, and return what has watched it if the run may serve as another.

    None where it uses hooks on saved tensors, or bears nobody watching.

    Args:
        model: The net.
        X: The input.
        evaluate: Evaluates it.
    """
    (watch,), calls = _watches, model.calls
    try:
        with disable_saved_tensors_hooks("first run"), watch(model.params) as record:
            result = evaluate()
    except RaggedOutputs:
        raise
    except Exception as error:  # an error of its own comes again
        if is_out_of_memory(error):
            raise
        return None
    if record is not None:
        model.keeps_gradients |= record.keeps_gradients
    serves = model.calls - calls <= 1 and _plain_tensors(X)
    return result, record if serves else None


def is_wanted(kept: Store) -> bool:
    """Whether the run at some parameters has been asked for, so that others may be."""
    return _WANTED in kept.everywhere


def keep(kept: Store, run: Run | None) -> None:
    """Keep a run, if it may serve as one and fits, in place of that of another risk.

    Args:
        kept: What the risk keeps.
        run: That of its only batch.
    """
    if run is None or run.record is None:
        return
    if run.nbytes > kept.budget(_MEMORY_SHARE):
        return
    with _KEEPING:
        for other in _keeping:
            if (before := other()) is not None:
                before.values.pop(_KEY, None)
        _keeping[:] = [weakref.ref(kept)]
        kept.values[_KEY] = run


def taken(kept: Store, X: Any) -> Run | None:
    """Take the run, which is kept no longer; None if there is none on this input."""
    run: Run | None = kept.values.pop(_KEY, None)
    kept.everywhere[_WANTED] = True
    return run if run is not None and run.is_of(X) else None


def used(kept: Store, X: Any) -> Run | None:
    """Use the run, which stays kept; None if there is none on this input."""
    run: Run | None = kept.values.get(_KEY)
    return run if run is not None and run.repeats and run.is_of(X) else None


def nbytes_kept(kept: Store) -> int:
    """Return what the run takes, 0 if there is none."""
    run: Run | None = kept.values.get(_KEY)
    return 0 if run is None else run.nbytes
