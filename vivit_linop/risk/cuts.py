"""How batches are cut where their samples have different numbers of outputs.

Each part is a batch of its own from then on. What a sample has alone must be what it
has in its batch: so the cut also is the check that samples are independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vivit_linop.risk.checks import checked_outputs, dependent, same_outputs
from vivit_linop.risk.containers import leaves
from vivit_linop.risk.data import Batch, stacked
from vivit_linop.risk.memory import is_out_of_memory
from vivit_linop.risk.model import FunctionalModel, as_guest
from vivit_linop.risk.ragged import (
    Part,
    RaggedOutputs,
    orders_of_items,
    parts_by_items,
    parts_by_shape,
)
from vivit_linop.risk.samples import Samples
from vivit_linop.risk.ways import Search

# A batch with outputs of one shape: the bytes of its graph, and the outputs.
Evaluated = tuple[Any, Any, int, Tensor]


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
        """Cut batches as it was found.

        Args:
            batches: The batches.
            search: Where their samples are.
        """
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

        Args:
            model: The model.
            search: Where samples may be; one that cuts the batch is the one.
            number: The batch.
            batch: Its inputs and targets.
            n: How many samples it has.
            first: How many batches and parts were evaluated before.
            check: Whether parts must have the outputs that they have in the batch.

        Raises:
            ItemByItem: If outputs come item by item, and those before did not.
            ValueError: If samples have other outputs alone.
        """
        X, y = batch
        y = stacked(y, n, search.samples)
        if self._final or (model.count is None and not self._by_items):
            items = 0 if self._final else number_of_items(y, n)
            try:
                yield X, y, *checked_outputs(model, first, X, n, items)
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
        for part, (nbytes, output) in zip(parts, evaluated, strict=True):
            yield samples.take(X, part.samples), part.targets(y), nbytes, output


Outputs = Sequence[Tensor] | Tensor
Cut = tuple[Samples, list[Part], list[tuple[int, Tensor]]]


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
                outputs = [output for _, output in evaluated]
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
