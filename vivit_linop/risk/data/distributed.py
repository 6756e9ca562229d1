"""The parts of the data that the ranks of a process group have: no sample twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vivit_linop.modes import replayed, seeded
from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.data import fingerprint
from vivit_linop.risk.data.batches import Anew
from vivit_linop.risk.data.containers import leaves
from vivit_linop.risk.data.sample_search import ways_of

_SEED, _CPU = 1, torch.device("cpu")


def _once_each(loader: Any, kept: Sequence[Tensor]) -> Iterator[Any]:
    """Yield batches, smaller where samples are left out that another rank has."""
    for number, (batch, mine) in enumerate(zip(loader, kept, strict=True)):
        if mine.all():
            yield batch
        elif mine.any():
            ways = ways_of(batch, len(mine))
            if not ways:
                raise ValueError(
                    f"data: batch {number} repeats samples of another process, and "
                    "where its samples are cannot be told. Give parts without that, "
                    "such as Subset(dataset, range(rank, len(dataset), world_size)); "
                    "they may be of any sizes."
                )
            yield ways[0].take(batch, mine.nonzero()[:, 0])


def without_padding(data: Any, ranks: Ranks) -> Any:
    """Return a loader that gives each sample of a dataset on one rank only.

    ``DistributedSampler`` and Accelerate repeat samples so that all ranks have as many.
    Which, their ``batch_sampler`` tells.
    """
    with ranks.together("the samples of a loader"):
        batches = _numbers(data)
        size = dataset_size(data)
    every = ranks.gathered((batches, size))
    sizes = {each for _, each in every}
    known = [found for found, _ in every if found is not None]
    if len(known) < len(every) or len(sizes) > 1:
        return data  # datasets of their own
    (whole,) = sizes
    listed = [sum(map(len, found)) for found in known]
    # Everything on each rank is another mistake.
    if whole is None or sum(listed) <= whole or all(n == whole for n in listed):
        return data
    seen: set[int] = set()
    kept: list[list[Tensor]] = []
    for found in known:
        kept.append([])
        for batch in found:
            new = [n not in seen and not seen.add(n) for n in batch]  # type: ignore[func-returns-value]
            kept[-1].append(torch.tensor(new, device="cpu"))
    return Anew(partial(_once_each, data, kept[ranks.rank]))


def _numbers(data: Any) -> list[list[int]] | None:
    """The samples of a loader's batches, None where that is not known or changes."""
    sampler = getattr(data, "batch_sampler", None)
    if sampler is None:
        return None
    found = []
    for seed in (_SEED, _SEED + 1):
        with replayed(seeded(seed, _CPU), _CPU):
            found.append([list(batch) for batch in sampler])
    numbers = all(isinstance(n, int) for batch in found[0] for n in batch)
    return found[0] if numbers and found[0] == found[1] else None


def dataset_size(data: Any) -> int | None:
    """How many samples the dataset of a loader has, None if it does not say."""
    dataset: Any = getattr(data, "dataset", None)
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def check_is_whole(data: Any, samples: int) -> None:
    """Raise an error if one process of several has a part of a dataset, unasked."""
    if not dist.is_available() or not dist.is_initialized():
        return
    whole, processes = dataset_size(data), dist.get_world_size()
    if whole is None or processes == 1:
        return
    last = getattr(data, "batch_size", None) or 0
    left_out = last if getattr(data, "drop_last", False) else 1
    if whole - samples >= left_out:
        raise ValueError(
            f"data: the loader gives {samples} of the {whole} samples of its dataset, "
            f"and torch.distributed has {processes} processes. For the "
            "matrix of all samples give "
            "process_group=torch.distributed.group.WORLD; for that of these samples "
            "give list(loader)."
        )


def check_parts(
    ranks: Ranks,
    outputs: Sequence[Tensor],
    targets: Sequence[Any],
    data: Any,
    check: bool,
) -> None:
    """Raise an error for parts of the data that repeat samples, or are not alike.

    Parts that are the same are one only if all ranks check that.
    """
    size, mine = dataset_size(data), sum(map(len, outputs))
    parts = ranks.gathered(None if size is None else (mine, size))
    given = [part for part in parts if part is not None]
    total = sum(n for n, _ in given)
    if len(given) == len(parts) and any(n < whole for n, whole in given):
        if len({whole for _, whole in given}) == 1 and total > given[0][1]:
            raise ValueError(
                f"data: the ranks have {total} samples of a dataset of {given[0][1]}: "
                "some come twice, and which cannot be told. Give parts without that, "
                "such as Subset(dataset, range(rank, len(dataset), world_size)); they "
                "may be of any sizes."
            )
    tensors = [*outputs, *leaves(list(targets))]
    digest = fingerprint.of_tensors((str(i), t) for i, t in enumerate(tensors))
    every = ranks.gathered((digest, mine, check))
    digests = [digest for digest, samples, _ in every if samples]
    checked = all(wanted for *_, wanted in every)
    if checked and len(digests) > 1 and len(set(digests)) == 1:
        raise ValueError(
            "data: all ranks have the same samples. Give each rank a part of them. If "
            "they are meant to come several times, give check_data=False."
        )


def by_items(ranks: Ranks, own: bool | None) -> bool:
    """Return whether outputs come item by item: on all ranks with samples, or none."""
    every = list(ranks.gathered(own))
    if True in every and False in every:
        raise ValueError(
            f"data: outputs come item by item on rank {every.index(True)}, and not on "
            f"rank {every.index(False)}. All ranks need batches of one form."
        )
    return True in every
