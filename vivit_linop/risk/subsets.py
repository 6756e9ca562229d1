"""Some samples of a risk: which, and whether they still are what they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.checks import same_outputs


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
