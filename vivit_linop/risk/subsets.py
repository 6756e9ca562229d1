"""Some samples of a risk: which, and whether they still are what they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vivit_linop.modes import as_given
from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.checks import same_outputs


def distinct_samples(indices: Sequence[int] | Tensor, num_samples: int) -> Tensor:
    """Return the numbers of some samples.

    Args:
        indices: What the user gave.
        num_samples: How many samples there are.

    Raises:
        TypeError: If they are no integers.
        ValueError: If there is none, or one is out of range or listed twice.
    """
    given = as_given(indices)
    if given.numel() == 0:
        raise ValueError("indices: is empty, a subset has at least one sample.")
    if given.ndim != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise TypeError(
            f"indices: a list of integers, got {list(given.shape)} {given.dtype}."
        )
    if given.min() < 0 or given.max() >= num_samples:
        raise ValueError(
            f"indices: must lie in 0..{num_samples - 1}, got "
            f"{int(given.min())}..{int(given.max())}."
        )
    if len(given.unique()) < len(given):
        raise ValueError("indices: a sample is listed twice.")
    return given


def own_samples(given: Tensor, ranks: Ranks, own: int) -> Tensor:
    """Return which of some samples are this rank's, numbered from its first one.

    Args:
        given: Numbers over all ranks.
        ranks: The ranks.
        own: How many samples this one has.

    Raises:
        ValueError: If there are several ranks, and the numbers do not ascend.
    """
    if not ranks.is_many:
        return given
    if (given.diff() < 0).any():
        raise ValueError(
            "indices: samples are numbered rank by rank, so over several processes "
            "they must ascend."
        )
    local = given - ranks.first
    return local[(local >= 0) & (local < own)]


def check_selected(
    rows: Tensor, before: Sequence[Tensor], found: Sequence[Tensor]
) -> None:
    """Raise an error unless samples have the outputs that they had.

    Gathering them was one more pass over the data.

    Args:
        rows: Which of all outputs are theirs.
        before: The outputs of all samples, by batch.
        found: Those of the selected ones.
    """
    if not len(rows):
        return
    old, new = (torch.cat([o.flatten() for o in each]) for each in (before, found))
    if not same_outputs(old[rows.to(old.device)], new):
        raise ValueError(
            "data: are not what they were when the risk was built, or the model is "
            "another function. Give data that are the same in every pass."
        )
