"""The memory of a device, and what is said where it does not suffice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from vivit_linop.devices import free_memory

Result = TypeVar("Result")

# As many are taken together again as soon as so much more memory is free than when it
# did not suffice.
_MORE = 1.25


class Room:
    """How many vectors are multiplied together, where memory decides.

    Where it does not suffice they are halved, and no more are taken until more memory
    is free than then.

    Args:
        device: Where they are.
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
    """Raise an error if a dense matrix does not fit into the memory that is free.

    Raises:
        MemoryError: It says how large it is and what needs none.
    """
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

    def unpacked(tensor: Tensor) -> Tensor:
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(count, unpacked):
            result = build()
        return sum(seen.values()), result
    # Transformations inside of the model do not bear hooks; then nobody counts.
    except RuntimeError:
        return 0, build()


@contextlib.contextmanager
def explained(describe: Callable[..., str], *arguments: Any) -> Iterator[None]:
    """Say what would fit where the memory of a device does not suffice.

    Args:
        describe: Returns the message; called when there is no memory.
        *arguments: What it is called with.

    Raises:
        MemoryError: In place of torch's own errors.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(describe(*arguments)) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of torch says that memory does not suffice."""
    # On the CPU, torch raises no class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(
        error
    )


def batch_does_not_fit(
    device: torch.device, samples: int, per_sample: float | None
) -> str:
    """Return what to say of a batch whose linearisation does not fit.

    Args:
        device: The device.
        samples: How many the batch has.
        per_sample: The bytes that the linearisation keeps for each of them, None where
            nobody knows.
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
