"""Passes over the data of a risk: each time the same batches in the same order."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from vivit_linop.modes import ordinary_mode, replayed
from vivit_linop.risk import fingerprint
from vivit_linop.risk.containers import is_leaf
from vivit_linop.risk.cuts import Cuts
from vivit_linop.risk.data import Batch, Target, iterate
from vivit_linop.risk.model import FunctionalModel
from vivit_linop.risk.progress import shown
from vivit_linop.risk.ways import Search

Item = TypeVar("Item")


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
        data: What was given.
        search: Where samples are, as far as is known.
        cuts: Into which parts batches are cut.
        number: How many batches and parts there are, 0 until all have been seen.
        progress: As given.
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
        raw = self.data if fingerprints is None else _compared(self.data, fingerprints)
        count = 0
        for batch in self._cut(raw, self._device, what):
            count += 1
            yield batch
        if count < self.number:
            raise ValueError(
                f"data: there are {count} batches, when the risk was built there were "
                f"{self.number}. Give data that are the same in every pass."
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
        return shown(items, what, self.number or operator.length_hint(self.data))

    def fingerprints(self) -> list[bytes]:
        """Pass over the data without the model, from another state of the generator."""
        other = torch.Generator(device="cpu").manual_seed(
            (torch.initial_seed() + 1) % 2**63
        )
        batches = replay(self.data, other.get_state())
        if self.progress:
            batches = self._shown(batches, "check_data")
        return [fingerprint.of_batch(batch) for batch in batches]

    def digests(self) -> tuple[bytes, list[bytes]]:
        """Return a digest of what samples have in common, and one of each."""
        # On the host, where data come from, and the digests are made.
        cut = self._cut(self.data, torch.device("cpu"), "fingerprint")
        return fingerprint.of_samples(cut, self.search)


def replay(items: Iterable[Item], state: Tensor) -> Iterator[Item]:
    """Iterate with the generator in a given state; the caller's is left alone."""
    iterator: Iterator[Item] | None = None
    while True:
        with replayed(state):
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
