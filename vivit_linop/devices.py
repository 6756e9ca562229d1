"""What a device has room for, and what it tells the host."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor

Result = TypeVar("Result")

# Seconds for which the host's answer is believed. Asking takes as long as a product of
# small matrices, and in this time 100 MiB of memory can be filled at most.
_MOMENT = 0.02
# As many are taken together again as soon as so much more memory is free than when it
# did not suffice.
_MORE = 1.25
# How errors of no class of their own say that there is no memory.
_NO_MEMORY = "DefaultCPUAllocator", "_STATUS_ALLOC_FAILED", "CUDA error: out of memory"
# What K columns of tangents may take together on the CPU. More would not be faster:
# columns one by one use the caches better.
_CPU_COLUMN_BYTES = 4 * 2**20
# From here on the C library gets each block from the system anew (glibc's
# M_MMAP_THRESHOLD is at most this on 64 bits).
_FRESH_BYTES = 32 * 2**20


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


def fresh(like: Tensor, *shape: int) -> Tensor:
    """Return a tensor that is not filled, in large pages where that saves time.

    Linux makes fresh memory page by page when it is first written. With pages of 4 KiB
    that took half as long as the matrix product that was written. NumPy asks for pages
    of 2 MiB, and torch does not.
    """
    nbytes = math.prod(shape) * like.element_size()
    if not like.is_cpu or nbytes < _FRESH_BYTES:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(nbytes, np.uint8)).view(like.dtype).view(shape)


def return_free_heap() -> None:
    """Give the system what the heap of this process holds and nobody uses.

    glibc gets blocks of up to 32 MiB from its heap once such a one was freed. A pass
    over many batches, whose activations come and go, leaves more and more holes there:
    the peak of 20,000 images through a net of 0.9 million parameters was 15 % above
    that of 600, with this every eighth batch 5 %. It does nothing elsewhere.
    """
    if _trim is not None:
        _trim(0)


_trim: Callable[[int], Any] | None
try:
    _trim = ctypes.CDLL(None).malloc_trim
# Another C library, or another system.
except (AttributeError, OSError, TypeError):
    _trim = None


def columns_at_a_time(device: torch.device, per_column: int) -> int:
    """Return how many columns to multiply at a time, by the bytes that each takes."""
    budget = _CPU_COLUMN_BYTES
    if device.type == "cuda":
        budget = free_memory(device) // 4
    return max(1, budget // max(per_column, 1))


class Room:
    """How many vectors are multiplied together, where the memory of a device decides.

    Where it does not suffice they are halved, and no more are taken until more memory
    is free than then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most, self._free = 0, 0

    def most(self, wanted: int) -> int:
        """Return how many to take of those that are wanted, at least one."""
        if self._most and free_memory(self._device) > _MORE * self._free:
            self._most = 0
        return min(wanted, self._most) if self._most else wanted

    def shrink(self, tried: int) -> int:
        """Return how many to take where that many, two at least, did not fit."""
        self._most, self._free = tried // 2, free_memory(self._device)
        return self._most


def check_matrix_fits(
    name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise a ``MemoryError`` if a dense matrix is larger than what is free."""
    size = shape[0] * shape[1] * torch.finfo(dtype).bits // 8
    if size > (free := free_memory(device)):
        raise MemoryError(
            f"The matrix [{shape[0]}, {shape[1]}] of {name} takes {size / 1e9:.3g} GB, "
            f"and {free / 1e9:.3g} GB are free on {device}. Multiply with it, or "
            "take fewer samples: risk.subset(indices)."
        )


def saved_bytes(build: Callable[[], Result]) -> tuple[int, Result]:
    """Run a function, and count the bytes that autograd saves for its backward pass."""
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        # The graph owns what it saves: the tensor itself, if it is an output, owns its
        # graph, and neither would ever be freed.
        return tensor.detach()

    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            result = build()
        return sum(seen.values()), result
    # Transformations inside of the model do not bear hooks; then nobody counts.
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return 0, build()


@contextlib.contextmanager
def explained(describe: Callable[..., str], *arguments: Any) -> Iterator[None]:
    """Say what would fit where the memory of a device does not suffice.

    Raises:
        MemoryError: In place of torch's own errors; it says what ``describe`` returns.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(describe(*arguments)) from error


class tolerated(contextlib.suppress):
    """For ``with``: go on behind it after an error, unless memory was missing."""

    def __exit__(self, *raised: Any) -> bool:
        return bool(super().__exit__(*raised)) and not is_out_of_memory(raised[1])


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory does not suffice."""
    kinds = torch.OutOfMemoryError, MemoryError
    # Torch on the CPU raises no class of its own, nor do libraries on a GPU.
    return isinstance(error, kinds) or any(text in str(error) for text in _NO_MEMORY)


def told(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Read vectors of one device and dtype; the host waits once for all of them."""
    if not tensors:
        return []
    read = torch.cat([*tensors]).cpu().split([*map(len, tensors)])
    return [*map(Tensor.tolist, read)]
