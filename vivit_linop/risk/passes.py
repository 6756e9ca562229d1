"""Passes over the data of a risk: each time the same batches in the same order.

A batch whose samples have different numbers of outputs is cut, and each part is a
batch of its own from then on. What a sample has alone must be what it has in its
batch: so the cut also is the check that samples are independent.
"""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from vivit_linop.arguments import check_has_values
from vivit_linop.bars import shown
from vivit_linop.devices import (
    free_memory,
    is_out_of_memory,
    return_free_heap,
    saved_bytes,
)
from vivit_linop.modes import as_guest, ordinary_mode, replayed, seeded
from vivit_linop.risk.checks import Checked, checked_outputs, same_outputs
from vivit_linop.risk.data import fingerprint
from vivit_linop.risk.data.batches import (
    LABELS,
    Batch,
    Target,
    as_batches,
    holds_targets,
    stacked,
)
from vivit_linop.risk.data.containers import (
    described,
    holds_tensors,
    is_leaf,
    leaves,
    map_leaves,
    without_item,
)
from vivit_linop.risk.data.sample_search import Search
from vivit_linop.risk.data.samples import Samples
from vivit_linop.risk.independence import dependent
from vivit_linop.risk.model.functional import FunctionalModel
from vivit_linop.risk.model.outputs import (
    Part,
    RaggedOutputs,
    orders_of_items,
    parts_by_items,
    parts_by_shape,
)

# A batch with outputs of one shape, and these.
Evaluated = tuple[Any, Any, Checked]
Outputs = Sequence[Tensor] | Tensor
Cut = tuple[Samples, list[Part], list[Checked]]
Item = TypeVar("Item")

_CPU = torch.device("cpu")
# After so many batches memory goes back to the system. That takes some milliseconds.
_HEAP_BATCHES = 8
# After so many, data that say no length may have no end.
_ENDLESS = 10_000


# Cuts --------------------------------------------------------------------------------


class ItemByItem(Exception):
    """Outputs come item by item, which batches before did not show."""


class Cuts:
    """The parts of each batch.

    Args:
        final: Whether batches have been cut before.
        by_items: Whether outputs are known to come item by item.
    """

    def __init__(self, final: bool = False, by_items: bool = False) -> None:
        self._final, self._by_items = final, by_items
        self._parts: dict[int, list[Part]] = {}

    def applied(self, batches: Iterable[Batch], search: Search) -> Iterator[Batch]:
        """Cut batches as it was found."""
        for number, (X, y) in enumerate(batches):
            if number not in self._parts:
                if isinstance(y, (list, tuple)) and search.ways:
                    y = stacked(y, search.samples.number(X), search.samples)
                yield X, y
                continue
            for part in self._parts[number]:
                yield search.samples.take(X, part.samples), part.targets(y)

    def found(
        self,
        model: FunctionalModel,
        search: Search,
        number: int,
        batch: Batch,
        n: int,
        first: int,
        check: bool,
    ) -> Iterator[Evaluated]:
        """Evaluate a batch; yield it, or its parts if that is what it shows to have.

        A way in ``search`` that cuts it is the one from then on. ``first`` counts what
        came before. If checked, parts must have the outputs that the batch has.

        Raises:
            ItemByItem: If outputs come item by item, and those before did not.
            ValueError: If samples have other outputs alone.
        """
        X, y = batch
        y = stacked(y, n, search.samples)
        if self._final or (model.count is None and not self._by_items):
            items = 0 if self._final else number_of_items(y, n)
            try:
                yield X, y, checked_outputs(model, first, X, n, items)
                return
            except RaggedOutputs as ragged:
                whole = ragged.outputs
            if isinstance(whole, Tensor) and first:
                raise ItemByItem
        else:
            whole = _item_by_item(model, X)
        samples, parts, evaluated = _cut(model, search.ways, X, n, whole, first, check)
        search.ways = [samples]
        self._parts[number] = parts
        for part, checked in zip(parts, evaluated, strict=True):
            checked.run = None  # there are others
            yield samples.take(X, part.samples), part.targets(y), checked


def _cut(
    model: FunctionalModel,
    ways: Sequence[Samples],
    X: Any,
    n: int,
    whole: Outputs,
    first: int,
    check: bool,
) -> Cut:
    """Return the way that samples can be taken in, the parts, and what they give."""
    failure: Exception | None = None
    before = model.count
    for samples in ways:
        try:
            for parts in _possible_parts(model, samples, X, n, whole):
                if isinstance(whole, Tensor):
                    model.count = samples.number
                evaluated = [
                    checked_outputs(
                        model,
                        first + number,
                        samples.take(X, part.samples),
                        len(part.samples),
                    )
                    for number, part in enumerate(parts)
                ]
                outputs = [checked.outputs for checked in evaluated]
                if not check or _are_those_of(whole, parts, outputs):
                    return samples, parts, evaluated
        # In a wrong way it fails somehow.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            failure = failure or error
        model.count = before
    raise failure or dependent()


def _possible_parts(
    model: FunctionalModel, samples: Samples, X: Any, n: int, whole: Outputs
) -> Iterator[list[Part]]:
    if not isinstance(whole, Tensor):
        yield parts_by_shape([output.shape for output in whole])
        return
    indices = torch.arange(n, device="cpu").split(1)
    sizes = [len(_item_by_item(model, samples.take(X, index))) for index in indices]
    for order in orders_of_items(X, sizes):
        yield parts_by_items(sizes, order)


def _item_by_item(model: FunctionalModel, X: Any) -> Tensor:
    with as_guest(model.device):
        own = model.private_input(X)
        return model.item_by_item(model.params, own).detach()


def _are_those_of(
    whole: Outputs, parts: Sequence[Part], outputs: Sequence[Tensor]
) -> bool:
    """Whether parts have the outputs that they have in their batch."""
    if isinstance(whole, Tensor):
        found = torch.cat([output.flatten(0, 1) for output in outputs])
        items = torch.cat([part.items for part in parts if part.items is not None])
        return same_outputs(found, whole[items.to(whole.device)])
    return all(
        same_outputs(output, torch.stack([whole[i] for i in part.samples.tolist()]))
        for part, output in zip(parts, outputs, strict=True)
    )


def number_of_items(y: Any, n: int) -> int:
    """Return how many items targets are of that are no samples; 0 where none are."""
    lengths = [len(leaf) if leaf.ndim else 0 for leaf in leaves(y)]
    items = set(lengths)
    if isinstance(y, (list, tuple)) and len(y) == n and len(lengths) == n:
        items = {sum(lengths)}
    return items.pop() if len(items) == 1 and items != {n} else 0


# Passes ------------------------------------------------------------------------------


class Passes:
    """The data, as batches of tensors on one device, cut as the first pass found.

    Every pass starts from one state of torch's generator, so that what a loader draws
    from it is the same again; the caller's state is as before.

    Args:
        data: Batches, over which one can pass again and again.
        model: Batches go to its device, and real-valued targets get its dtype.
        search: Where samples may be.
        target: What finds the targets in a batch, if the user says it.
        cuts: What is known of the parts of batches.
        progress: Whether passes that have a name show a bar.

    Attributes:
        number: How many batches and parts there are, 0 until all have been seen.
    """

    @ordinary_mode()
    def __init__(
        self,
        data: Iterable[Any],
        model: FunctionalModel,
        search: Search,
        target: Target | None,
        cuts: Cuts,
        progress: bool,
    ) -> None:
        self.data, self.search, self.cuts, self.number = data, search, cuts, 0
        self._device, self._dtype = model.device, model.dtype
        self._target, self.progress = target, progress
        self._draws = target is not None or not _is_in_memory(data)
        self._state = torch.random.get_rng_state()

    def of(self, data: Any, model: FunctionalModel) -> Passes:
        """Return passes over other data, with samples and targets where these are."""
        batches = as_batches(data, self._target)
        search = Search.known(self.search.samples)
        return Passes(batches, model, search, self._target, Cuts(), self.progress)

    def batches(
        self, what: str | None = None, fingerprints: list[bytes] | None = None
    ) -> Iterator[Batch]:
        """Pass over the data.

        Args:
            what: What the pass is for, for its progress bar; None for no bar.
            fingerprints: Those that the batches must have, if they are to be checked.

        Raises:
            ValueError: If the batches are others, or fewer.
        """
        raw = self.data if self.number else ending(self.data)
        if fingerprints is not None:
            raw = _compared(self.data, fingerprints)
        count = 0
        for batch in self._cut(raw, self._device, what):
            count += 1
            if 0 < self.number < count:
                break
            yield batch
            if count % _HEAP_BATCHES == 0 and self._device.type == "cpu":
                return_free_heap()
        if count != self.number > 0:
            more = "or more " if count > self.number else ""
            raise ValueError(
                f"data: there are {count} {more}batches, when the risk was built there "
                f"were {self.number}. Give data that are the same in every pass."
            )

    def _cut(
        self, raw: Iterable[Any], device: torch.device, what: str | None
    ) -> Iterator[Batch]:
        batches = iterate(raw, device, self._dtype, self._target)
        if self._draws:
            batches = replay(batches, self._state)
        if self.progress and what is not None:
            batches = self._shown(batches, what)
        return self.cuts.applied(batches, self.search)

    def _shown(self, items: Iterator[Item], what: str) -> Iterator[Item]:
        return shown(items, what, self.number or _length(self.data))

    def fingerprints(self) -> list[bytes]:
        """Pass over the data without the model, from another state of the generator."""
        (other,) = seeded((torch.initial_seed() + 1) % 2**63, _CPU)
        batches = replay(ending(self.data), other)
        if self.progress:
            batches = self._shown(batches, "check_data")
        return [fingerprint.of_batch(batch) for batch in batches]

    def digests(self) -> tuple[bytes, list[bytes]]:
        """Return a digest of what samples have in common, and one of each."""
        # On the host, where data come from, and the digests are made.
        cut = self._cut(self.data, torch.device("cpu"), "fingerprint")
        return fingerprint.of_samples(cut, self.search)


def _length(data: Iterable[Any]) -> int:
    """How many batches data say that they are; 0 where they do not."""
    with contextlib.suppress(NotImplementedError):
        return operator.length_hint(data)
    return 0


def ending(data: Iterable[Item]) -> Iterator[Item]:
    """Yield batches; warn once of data that may have no end."""
    for count, batch in enumerate(data):
        if count == _ENDLESS and count >= _length(data):
            warnings.warn(
                f"data: {type(data).__name__} has given {count} batches, and says no "
                "length. Every pass reads all of them; if they never end, give some, "
                "list(itertools.islice(data, 100)).",
                stacklevel=2,
            )
        yield batch


def iterate(
    batches: Iterable[Any],
    device: torch.device,
    dtype: torch.dtype,
    target: Target | None = None,
) -> Iterator[Batch]:
    """Yield batches on a device, real-valued targets in a dtype.

    Raises:
        TypeError: If a batch is no pair ``(X, y)`` and holds no targets where they are
            looked for, or targets are complex.
    """

    def on_device(leaf: Tensor) -> Tensor:
        if leaf.is_meta:
            check_has_values(leaf, f"data: batch {index}")
        leaf = leaf.to(device, non_blocking=overlaps)
        if not leaf.is_inference():
            return leaf
        # Autograd cannot save tensors that were made in inference mode.
        with torch.inference_mode(False):
            return leaf.clone()

    def as_target(leaf: Tensor) -> Tensor:
        if leaf.is_complex():
            raise TypeError(
                f"data: targets must be real, batch {index} has {leaf.dtype}."
            )
        leaf = on_device(leaf).detach()  # constants, also those that are learnt
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    # Without waiting, where the memory is pinned. The loader's own thread pins batches
    # while the GPU works; to pin them here would take longer than the plain copy.
    overlaps = device.type == "cuda"
    for index, batch in enumerate(batches):
        X, y = _split(batch, index, target)
        if isinstance(y, PackedSequence):
            y = y.data  # item by item, as outputs are
        yield _mapped(on_device, X), _mapped(as_target, y)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors of a value, most often of one alone."""
    return function(value) if isinstance(value, Tensor) else map_leaves(function, value)


def _split(batch: Any, index: int, target: Target | None) -> Batch:
    """Return the inputs and the targets of a batch."""
    if target is not None:
        y = target(batch)
        if not holds_tensors(y):
            raise TypeError(
                f"target: returned {described(y)} for batch {index}; it must return "
                "tensors, with an entry for each sample."
            )
        return batch, y
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        X, y = batch
        if isinstance(y, Tensor) or holds_tensors(y):
            return X, y
    if holds_targets(batch):
        if not isinstance(batch, Mapping):
            return batch, batch.y
        return without_item(batch, LABELS)
    raise TypeError(
        f"data: batch {index} must be a pair (X, y) with a tensor y, or hold its "
        f"targets as {LABELS!r} in a mapping or as an attribute y, got "
        f"{described(batch)}. Else say where they are with target=."
    )


def replay(items: Iterable[Item], state: Tensor) -> Iterator[Item]:
    """Iterate with the generator in a given state; the caller's is left alone."""
    iterator: Iterator[Item] | None = None
    while True:
        with replayed([state], _CPU):
            try:
                iterator = iter(items) if iterator is None else iterator
                item = next(iterator)
            except StopIteration:
                return
            state = torch.random.get_rng_state()
        yield item


def _is_in_memory(batches: Iterable[Any]) -> bool:
    """Whether batches are tensors that are there, so that nothing draws them."""
    return type(batches) is list and all(
        type(batch) is tuple and all(map(is_leaf, batch)) for batch in batches
    )


def _compared(batches: Iterable[Any], fingerprints: list[bytes]) -> Iterator[Any]:
    """Yield batches that are those of the pass before."""
    count = 0
    for count, batch in enumerate(batches, 1):
        known = fingerprints[count - 1 : count]
        if known != [fingerprint.of_batch(batch)]:
            raise _not_the_same(f"batch {count - 1} is another")
        yield batch
    if count < len(fingerprints):
        raise _not_the_same(f"there are {count} batches, after {len(fingerprints)},")


def _not_the_same(difference: str) -> ValueError:
    return ValueError(
        f"data: {difference} in a second pass over the data, but an operator is "
        "one matrix and numbers its samples. Give a loader with shuffle=False and "
        "a dataset without random augmentations, or list(loader) for one draw of "
        "them. What depends on torch's global generator only is drawn alike in "
        "every pass with check_data=False."
    )


# Batches that are too large ----------------------------------------------------------


def does_not_fit(model: FunctionalModel, search: Search, X: Any, n: int) -> str:
    """What to say of a batch that is too large, by what two samples of it take."""
    device = model.device

    def graph_bytes(some: int) -> int:
        part = search.samples.take(X, torch.arange(some, device="cpu"))
        with as_guest(device):
            return saved_bytes(lambda: model(model.params, part))[0]

    per_sample: int | None = None
    # A model may run on no other batch; what is to be said is said without sizes.
    with contextlib.suppress(Exception):
        one = graph_bytes(1)
        per_sample = graph_bytes(2) - one if n > 1 else one
    return batch_does_not_fit(device, n, per_sample)


def batch_does_not_fit(
    device: torch.device, samples: int, per_sample: float | None
) -> str:
    """Return what to say of a batch whose linearisation does not fit.

    It keeps ``per_sample`` bytes for each of the samples; None where nobody knows.
    """
    free = free_memory(device)
    takes, advice = "", "Give smaller batches, or"
    if per_sample is not None:
        # A product needs about as much again as what is kept.
        takes = (
            ": linearising the net on it takes about "
            f"{2 * samples * per_sample / 1e9:.3g} GB"
        )
        fitting = max(1, min(samples // 2, int(free / (2 * max(per_sample, 1.0)))))
        advice = f"Give batches of up to {fitting} samples (batch_size={fitting}), or"
    if samples == 1:
        advice = "Make the sample smaller,"
    return (
        f"data: a batch of {samples} samples does not fit on {device}{takes}, and "
        f"{free / 1e9:.3g} GB are free. {advice} keep fewer linearisations of other "
        "batches with EmpiricalRisk(..., memory=0)."
    )
