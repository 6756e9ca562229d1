"""What a device tells the host: how much memory is free, and the values of numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import psutil
import torch
from torch import Tensor

# Seconds for which the host's answer is believed. Asking takes as long as a product of
# small matrices, and in this time 100 MiB of memory can be filled at most.
_MOMENT = 0.02


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device."""
    if device.type == "cuda":
        # What torch holds without using it is free, too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    moment = int(time.monotonic() / _MOMENT)
    return _free_on_host(moment)


@lru_cache(maxsize=1)
def _free_on_host(moment: int) -> int:
    return int(psutil.virtual_memory().available)


def told(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Read the entries of vectors of one device, for all of which the host waits once.

    Args:
        tensors: Of one dtype, each ``[k]``.
    """
    if not tensors:
        return []
    read = torch.cat([*tensors]).cpu().split([*map(len, tensors)])
    return [part.tolist() for part in read]
