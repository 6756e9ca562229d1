"""The memory that is free on a device."""

from __future__ import annotations

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device."""
    if device.type == "cuda":
        # What torch holds without using it is free, too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return int(psutil.virtual_memory().available)
