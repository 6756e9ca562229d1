"""What a risk keeps for all operators of it: one store, one lock and one budget.

Linearisations, the structure of the net, costs and columns are made once, at the first
product that needs them. None of them may refer to the risk: it would not be freed with
the last reference. They hold graphs, so they do not travel: a copy makes them anew.
What is the same at all parameters (the structure of the net, costs) belongs to all
risks of the same data.

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
from functools import partial
from itertools import starmap
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from vivit_linop.devices import free_memory, is_out_of_memory, saved_bytes
from vivit_linop.graphs import has_own_code, nbytes_of, saved_in
from vivit_linop.risk.data.containers import copied
from vivit_linop.risk.model.foreign_memory import ForeignMemory
from vivit_linop.risk.model.functional import FunctionalModel, is_written
from vivit_linop.risk.model.given import check_graph
from vivit_linop.risk.model.original import Params
from vivit_linop.risk.model.outputs import RaggedOutputs
from vivit_linop.risk.model.parameters import in_precision, other_entries

Value = TypeVar("Value")

# First words of keys: what belongs to a net, whatever the data are.
_OF_THE_NET = "structure", "sample sizes"
# What blocks that can be formed again may take.
_SMALL = 2**24
_RUN, _WANTED = "first run", "first runs are wanted"
# The share of free memory that the columns of one piece of samples may take, and the
# run that they are for.
_MEMORY_SHARE = 12
# Whose run is kept: of those that nobody asks for there is one at most.
_keeping: list[weakref.ref[Store]] = []
_KEEPING = threading.Lock()


class Store:
    """What has been made once.

    Args:
        memory: The bytes that it may take, None for a share of what is free.
        device: Where it is.

    Attributes:
        making: The lock of what is made, for all threads.
        values: What is kept, by key.
        everywhere: What is the same at all parameters, by key; shared by risks of the
            same data.
        nbytes: What they take, where they say so.
    """

    def __init__(self, memory: int | None, device: torch.device) -> None:
        self._memory, self._device = memory, device
        self.drop()

    def drop(self) -> None:
        """Let go of everything."""
        self.making = threading.RLock()
        self.values: dict[Hashable, Any] = {}
        self.everywhere: dict[Hashable, Any] = {}
        self.nbytes = 0.0

    def elsewhere(self) -> Store:
        """Return a store for other parameters, with what is the same there."""
        kept = Store(self._memory, self._device)
        kept.everywhere = self.everywhere
        return kept

    def structures(self) -> dict[Hashable, Any]:
        """Return what is the same for other data too, as far as it is known."""
        return {
            key: value
            for key, value in self.everywhere.items()
            if isinstance(key, tuple) and key[0] in _OF_THE_NET
        }

    def drop_list(self, key: Hashable) -> None:
        """Let go of a list of what says how many bytes it takes."""
        with self.making:
            self.nbytes -= sum(item.kept_bytes for item in self.values.pop(key, []))

    def budget(self, share: int) -> int:
        """Return the bytes that may be taken: what the user said, or a share of all."""
        if self._memory is not None:
            return self._memory
        return free_memory(self._device) // share

    def columns_budget(self) -> int:
        """The bytes that columns may take."""
        return self.budget(_MEMORY_SHARE)

    @property
    def small_budget(self) -> int:
        """The bytes that an operator may keep of what can be formed again."""
        return _SMALL if self._memory is None else min(self._memory, _SMALL)

    def get(self, key: Hashable, make: Callable[..., Value], *arguments: Any) -> Value:
        """Return a value, made at the first call; by one thread, the others wait."""
        if key not in self.values:
            with self.making:
                if key not in self.values:
                    self.put(key, make(*arguments))
        return self.values[key]

    def get_everywhere(
        self, key: Hashable, make: Callable[..., Value], *arguments: Any
    ) -> Value:
        """Likewise for a value that is the same at all parameters."""
        if key not in self.everywhere:
            with self.making:
                # Risks at other parameters have other locks: the first value stays.
                if key not in self.everywhere:
                    self.everywhere.setdefault(key, make(*arguments))
        return self.everywhere[key]

    def put(self, key: Hashable, value: Any) -> None:
        """Keep a value, in place of what was kept before, and count its ``nbytes``."""
        with self.making:
            before = self.values.get(key)
            self.nbytes += getattr(value, "nbytes", 0) - getattr(before, "nbytes", 0)
            self.values[key] = value

    def __getstate__(self) -> dict[str, Any]:
        """What travels: the budget."""
        return {"_memory": self._memory, "_device": self._device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive, with nothing."""
        self.__dict__.update(state)
        self.drop()

    # The run of construction --------------------------------------------------------

    @property
    def wants_runs(self) -> bool:
        """Whether the run at some parameters has been asked for, so others may be."""
        return _WANTED in self.everywhere

    @property
    def run_nbytes(self) -> int:
        """What the run takes, 0 if there is none."""
        run: Run | None = self.values.get(_RUN)
        return 0 if run is None else run.nbytes

    def keep_run(self, run: Run | None) -> None:
        """Keep that of the only batch, in place of that of another risk.

        If it may serve as one, and fits.
        """
        if run is None or run.record is None:
            return
        if run.nbytes > self.columns_budget():
            return
        with _KEEPING:
            for other in _keeping:
                if (before := other()) is not None:
                    before.values.pop(_RUN, None)
            _keeping[:] = [weakref.ref(self)]
            self.values[_RUN] = run

    def take_run(self, X: Any) -> Run | None:
        """Take the run, kept no longer; None if there is none on this input."""
        run: Run | None = self.values.pop(_RUN, None)
        self.everywhere[_WANTED] = True
        return run if run is not None and run.is_of(X) else None

    def use_run(self, X: Any) -> Run | None:
        """Use the run, which stays kept; None if there is none on this input."""
        run: Run | None = self.values.get(_RUN)
        return run if run is not None and run.repeats and run.is_of(X) else None


# Runs of a net ----------------------------------------------------------------------


class Record(Protocol):
    """What has watched a run.

    Attributes:
        has_hooks: Whether the net may have put hooks into the graph.
        keeps_gradients: Whether the net asks for gradients of what it computes.
    """

    has_hooks: bool
    keeps_gradients: bool


Watch = Callable[[Params], contextlib.AbstractContextManager[Record | None]]


# What is entered around the run, once :func:`watched_by` has said it.
_watches: list[Watch] = []


def watched_by(watch: Watch) -> None:
    """Let the room above see runs, which are kept with what has watched them.

    Before that none is kept. A watch returns, for parameters, what is entered around a
    run.
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
        precision: That of the input, if it has another one than what is given.
    """

    X: Any
    output: Tensor
    written: list[Tensor]
    graph_bytes: int
    record: Record | None = None
    repeats: bool = False
    saved: list[tuple[Tensor, int]] = field(default_factory=list)
    foreign: ForeignMemory = field(default_factory=ForeignMemory)
    precision: torch.dtype | None = None

    def serve(self, record: Record | None, model: FunctionalModel) -> None:
        """Let it serve as a run of the net; not if nothing has watched it."""
        if record is None:
            return
        self.record, self.foreign = record, model.foreign
        self.precision = model.precision
        self.repeats = not record.has_hooks and not has_own_code(self.output)
        self.saved = [(t, t._version) for t in saved_in(self.output)]

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
            other = given[name]
            if self.precision is not None:
                other = in_precision(other, self.precision)
            if part.dtype != other.dtype:
                return False
            # Written out, as what follows: it is asked in each first quantity.
            if not torch.equal(part, other) and other_entries(part, other):
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
    """Run a net on a batch of so many samples for the first time.

    A graph that holds something else than what was computed (checkpoints) is that of a
    second run, and only measured.
    """
    first = partial(model.first, model.params, X, samples)
    found = _watched(model, X, first)
    if found is None and model.channels_last:  # which it may not bear
        model.channels_last = False
        found = _watched(model, X, first)
    record: Record | None = None
    if found is None:
        nbytes, (own, output, pairs) = saved_bytes(first)
    else:
        (own, output, pairs), record = found
        nbytes = nbytes_of(saved_in(output))
    # Not under what watches for who looks at graphs.
    check_graph(output, model.original.module)
    run = Run(own, output, [*starmap(is_written, pairs)], nbytes)
    run.serve(record, model)
    return run


def next_run(model: FunctionalModel, X: Any, graph_bytes: int) -> Run | None:
    """Run a net at other parameters, on a batch whose first run could serve.

    None where it uses hooks on saved tensors at these, or bears nobody watching.
    """
    own = copied(X)
    found = _watched(model, X, partial(model, model.params, own))
    if found is None:
        return None
    output, record = found
    run = Run(own, output, [], graph_bytes)
    run.serve(record, model)
    return run


def _watched(
    model: FunctionalModel, X: Any, evaluate: Callable[[], Value]
) -> tuple[Value, Record | None] | None:
    """Evaluate a net, and return what has watched it if the run may serve as another.

    None where it uses hooks on saved tensors, or bears nobody watching.
    """
    calls = model.calls
    watch = _watches[0](model.params) if _watches else contextlib.nullcontext()
    try:
        with disable_saved_tensors_hooks("first run"), watch as record:
            result = evaluate()
    except RaggedOutputs:
        raise
    except Exception as error:  # an error of its own comes again
        if is_out_of_memory(error):
            raise
        return None
    if record is not None:
        model.keeps_gradients |= record.keeps_gradients or record.has_hooks
    serves = model.calls - calls <= 1 and _plain_tensors(X)
    return result, record if serves else None
