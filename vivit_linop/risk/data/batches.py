"""The data of a risk: validated batches, and parts of them.

A batch is a pair ``(X, y)`` of whatever holds tensors
(:mod:`vivit_linop.risk.data.containers`), or holds its targets itself. Where the
samples are in it says :mod:`vivit_linop.risk.data.samples`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vivit_linop.risk.data.containers import (
    attribute,
    described,
    holds_tensors,
    leaves,
    map_leaves,
)
from vivit_linop.risk.data.samples import Listing, Samples, number_of

Batch = tuple[Any, Any]
Target = Callable[[Any], Any]

# Where batches that hold their targets have them.
LABELS = "labels"


def as_batches(data: Any, target: Target | None = None) -> Iterable[Any]:
    """Return an object that can be iterated over again and again, of batches.

    Batches are pairs or hold targets under a known name, unless ``target`` finds them.

    Raises:
        TypeError: If ``data`` is neither a pair ``(X, y)`` nor an iterable of them.
        ValueError: If it can be iterated over only once.
    """
    if target is not None:
        single = not isinstance(data, Iterable) or isinstance(
            data, (Tensor, Mapping, tuple)
        )
    else:
        single = _is_pair(data) or holds_targets(data)
    if single:
        return [data]
    is_list = target is None and isinstance(data, (tuple, list))
    if is_list and len(data) == 2 and not holds_tensors(data[1]):
        raise TypeError(
            "data: of a pair (X, y), or a list of two, the second holds no tensor, got "
            f"{described(data[1])}. Targets become one by torch.as_tensor(y)."
        )
    if isinstance(data, (Tensor, str, bytes, Mapping)) or not isinstance(
        data, Iterable
    ):
        raise TypeError(
            "data: a pair (X, y), or a list or DataLoader of such pairs, got "
            f"{type(data).__name__}."
        )
    if isinstance(data, Iterator):
        raise ValueError(
            f"data: {type(data).__name__} can be iterated over only once, and every "
            "product passes over the data. Give list(data) or a DataLoader."
        )
    if isinstance(data, DataLoader) and data.persistent_workers:
        # Such a loader has one iterator, which a pass inside of another, or inside of a
        # loop of the user's, would start anew.
        data = copy.copy(data)
        vars(data).update(persistent_workers=False, _iterator=None)
    return data


def _is_pair(data: Any) -> bool:
    """Whether it is one batch, not two of them.

    A list of two is one where the second is a tensor; a tuple also where it holds some,
    unless the two can be batches only.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    if isinstance(data[1], Tensor):
        return True
    if type(data) is not tuple or not holds_tensors(data[1]):
        return False
    if not all(isinstance(part, (tuple, list)) and len(part) == 2 for part in data):
        return True
    lengths = [{len(leaf) for leaf in leaves(part) if leaf.ndim} for part in data]
    return lengths[0] == lengths[1] or not all(isinstance(y, Tensor) for _, y in data)


def holds_targets(batch: Any) -> bool:
    """Whether a batch holds its targets: ``labels`` in a mapping, or ``y`` beside."""
    if isinstance(batch, Mapping):
        return LABELS in batch
    if isinstance(batch, (Tensor, tuple, list)):
        return False
    return holds_tensors(attribute(batch, "y")) and holds_tensors(batch)


def without_targets(inputs: Any, count: Callable[[Any], int | None]) -> Iterable[Batch]:
    """Return batches of inputs as pairs, with zeros for targets.

    One batch is a tensor, a tuple or a mapping. Where ``count`` does not know how many
    samples it has, the first axis of its first tensor that has axes does.

    Raises:
        TypeError: If it is none of these, nor an iterable of batches.
        ValueError: If one can pass over it only once.
    """

    def pair(batch: Any) -> Batch:
        # A list of one tensor, as loaders give, is a tensor.
        X = batch[0] if isinstance(batch, list) and len(batch) == 1 else batch
        with_axes = [leaf for leaf in leaves(X) if leaf.ndim > 0]
        if not with_axes:
            raise TypeError(
                f"inputs: a batch must hold tensors with samples, got {described(X)}."
            )
        n = count(X)
        return X, torch.zeros(len(with_axes[0]) if n is None else n, device="cpu")

    single = isinstance(inputs, (Tensor, tuple, Mapping))
    if single or number_of(inputs) is not None:
        return [pair(inputs)]
    if isinstance(inputs, list):
        return [pair(batch) for batch in inputs]
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise TypeError(
            "inputs: a tensor, a tuple or a mapping of tensors, or a list or a "
            f"DataLoader of these, got {type(inputs).__name__}."
        )
    return Anew(partial(map, pair, as_batches(inputs)))


class Anew:
    """What can be passed over again and again: iterators are made anew."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        """Make one."""
        return self._make()


def numbers_of(y: Any, index: int) -> list[int]:
    """Return how many samples the targets of a batch may be of, the likeliest first."""
    tensors = list(leaves(y))
    lengths = {len(t) if t.ndim else -1 for t in tensors}
    if 0 in lengths:
        raise ValueError(f"data: batch {index} has no samples, y is {described(y)}.")
    numbers = list(lengths) if len(lengths) == 1 and -1 not in lengths else []
    if isinstance(y, (list, tuple)):  # of targets for each sample
        numbers.append(len(y))
    if -1 in lengths and not numbers:
        raise ValueError(
            f"data: batch {index} has one target without a sample axis. A list "
            "holds batches, not samples: stack these, or give "
            "DataLoader(data, batch_size=…)."
        )
    if not numbers:
        raise ValueError(
            f"data: the targets of batch {index} have first axes of "
            f"{sorted(lengths)} ({described(y)}); all must count samples."
        )
    return numbers


def stacked(y: Any, n: int, samples: Samples) -> Any:
    """Return targets that are listed for n samples with a sample axis, if that can be.

    What has one already stays, and a list of targets of several shapes.
    """
    listed = isinstance(samples, Listing)
    if not isinstance(y, (list, tuple)) or len(y) != n:
        return y
    if not listed and all(leaf.ndim and len(leaf) == n for leaf in leaves(y)):
        return y
    if any(not isinstance(part, Tensor) for part in y):
        return y
    same = len({part.shape for part in y}) == 1
    return torch.stack(list(y)) if same else y


# Some samples -----------------------------------------------------------------------


def some_targets(y: Any, index: Tensor) -> Any:
    """Return the targets of some samples, by number or by a mask."""
    return map_leaves(lambda leaf: leaf[index.to(leaf.device)], y)


def joined_targets(targets: Sequence[Any]) -> Any:
    """Put the targets of several batches into one."""
    if isinstance(targets[0], Tensor):
        return torch.cat(list(targets))
    parts = iter(list(zip(*map(leaves, targets), strict=True)))
    return map_leaves(lambda _: torch.cat(next(parts)), targets[0])


def select_samples(
    batches: Iterable[Batch],
    sizes: Sequence[int],
    indices: Sequence[int],
    samples: Samples,
) -> list[Batch]:
    """Gather samples, numbered over all batches, in the order of ``indices``.

    They come in batches at most as large as those that they were taken from. What
    cannot be put into one batch comes in several.
    """
    wanted = torch.as_tensor(indices, device="cpu")
    found: list[tuple[Tensor, Any, Any]] = []
    start = 0
    for (X, y), n in zip(batches, sizes, strict=True):
        mine = (wanted >= start) & (wanted < start + n)
        local = wanted[mine] - start
        if len(local):
            part = samples.take(X, local), some_targets(y, local)
            found.append((mine.nonzero().squeeze(1), *part))
        start += n
    order = torch.cat([positions for positions, _, _ in found]).argsort()
    try:
        X = samples.joined([X for _, X, _ in found])
        y = joined_targets([y for _, _, y in found])
    # Shapes differ, or nobody knows how to put them together.
    except (NotImplementedError, RuntimeError):
        return _in_runs(found, samples)
    return [
        (samples.take(X, part), some_targets(y, part))
        for part in order.split(max(sizes))
    ]


def _in_runs(found: Sequence[tuple[Tensor, Any, Any]], samples: Samples) -> list[Batch]:
    """Cut what comes from each batch where samples of others stand between."""
    runs: list[tuple[int, Batch]] = []
    for positions, X, y in found:
        ends = (positions.diff() != 1).nonzero().squeeze(1) + 1
        for run in torch.arange(len(positions), device="cpu").tensor_split(ends):
            part = samples.take(X, run), some_targets(y, run)
            runs.append((int(positions[run[0]]), part))
    return [part for _, part in sorted(runs, key=lambda run: run[0])]
