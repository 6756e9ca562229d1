"""The data of a risk: validated batches, and parts of them.

A batch is a pair ``(X, y)``; X is a tensor, a tuple of tensors or a mapping of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Any, Tensor]


def as_batches(data: Any) -> Iterable[Any]:
    """Return an object that can be iterated over again and again, of batches.

    Raises:
        TypeError: If ``data`` is neither a pair ``(X, y)`` nor an iterable of them.
        ValueError: If it can be iterated over only once.
    """
    if _is_batch(data):
        return [data]
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
    return data


def iterate(
    batches: Iterable[Any], device: torch.device, dtype: torch.dtype
) -> Iterator[Batch]:
    """Yield checked batches on a device, real-valued targets in a dtype.

    Raises:
        TypeError: If a batch is no pair ``(X, y)``.
        ValueError: If the sample counts of X and y differ, or there are none.
    """
    for index, batch in enumerate(batches):
        if not _is_batch(batch):
            raise TypeError(
                f"data: batch {index} must be a pair (X, y) with a tensor y, got "
                f"{_describe(batch)}."
            )
        X, y = batch
        counts = {len(leaf) for leaf in leaves(X) if leaf.ndim > 0}
        if y.ndim == 0:
            raise ValueError(
                f"data: batch {index} has one target without a sample axis. A list "
                "holds batches, not samples: stack these, or give "
                "DataLoader(data, batch_size=…)."
            )
        if len(y) == 0:
            raise ValueError(
                f"data: batch {index} has no samples, y is {_describe(y)}."
            )
        if len(y) not in counts:
            raise ValueError(
                f"data: batch {index} has {len(y)} samples in y and "
                f"{sorted(counts)} in X ({_describe(X)}); the first axis of both must "
                "count samples."
            )
        if y.is_complex():
            raise TypeError(f"data: targets must be real, batch {index} has {y.dtype}.")
        y = _ordinary(_moved(y, device))
        X = map_leaves(lambda leaf: _ordinary(_moved(leaf, device)), X)
        yield X, y.to(dtype) if y.is_floating_point() else y


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; to a GPU without waiting, where the memory is pinned.

    The loader's own thread pins batches while the GPU works. Pinning them here would
    keep the caller waiting for longer than the plain copy that there is otherwise.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def _ordinary(tensor: Tensor) -> Tensor:
    """Autograd cannot save tensors that were made in inference mode."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor


def sample_axes(X: Any, num_samples: int) -> list[bool]:
    """Return for each tensor of an input whether its first axis can count samples."""
    return [leaf.ndim > 0 and len(leaf) == num_samples for leaf in leaves(X)]


def take(X: Any, index: Tensor, by_sample: Sequence[bool]) -> Any:
    """Return some samples of an input; tensors without a sample axis stay whole.

    Args:
        X: The input.
        index: The samples.
        by_sample: For each tensor of the input, whether its first axis counts samples.
    """
    flags = iter(by_sample)
    return map_leaves(
        lambda leaf: leaf[index.to(leaf.device)] if next(flags) else leaf, X
    )


def copied(X: Any) -> Any:
    """Return an input in memory of its own, for what is kept: the user's may change.

    What is one tensor in two places stays one.
    """
    copies: dict[int, Tensor] = {}

    def copy(leaf: Tensor) -> Tensor:
        if id(leaf) not in copies:
            own = leaf.detach().clone()
            # Not asked for in vain: transformations of functions do not allow it.
            copies[id(leaf)] = own.requires_grad_() if leaf.requires_grad else own
        return copies[id(leaf)]

    return map_leaves(copy, X)


def select_samples(
    batches: Iterable[Batch], indices: Sequence[int], by_sample: Sequence[bool]
) -> list[Batch]:
    """Gather samples, numbered over all batches, in the order of ``indices``.

    They come in batches at most as large as those that they were taken from.
    """
    wanted = torch.as_tensor(indices, device="cpu")
    found: list[tuple[Tensor, Any, Tensor]] = []
    start = largest = 0
    for X, y in batches:
        mine = (wanted >= start) & (wanted < start + len(y))
        local = wanted[mine] - start
        if len(local):
            part = take(X, local, by_sample)
            found.append((mine.nonzero().squeeze(1), part, y[local.to(y.device)]))
        start += len(y)
        largest = max(largest, len(y))
    order = torch.cat([positions for positions, _, _ in found]).argsort()
    inputs = [list(leaves(X)) for _, X, _ in found]
    joined = iter(
        [
            torch.cat(parts) if flag else parts[0]
            for flag, *parts in zip(by_sample, *inputs, strict=True)
        ]
    )
    X = map_leaves(lambda _: next(joined), found[0][1])
    y = torch.cat([y for _, _, y in found])
    return [
        (take(X, part, by_sample), y[part.to(y.device)])
        for part in order.split(largest)
    ]


def leaves(X: Any) -> Iterator[Tensor]:
    """Yield the tensors of an input."""
    if isinstance(X, Tensor):
        yield X
    elif isinstance(X, Mapping):
        for value in X.values():
            yield from leaves(value)
    elif isinstance(X, (tuple, list)):
        for value in X:
            yield from leaves(value)


def map_leaves(function: Callable[[Tensor], Tensor], X: Any) -> Any:
    """Apply a function to the tensors of an input; everything else stays."""
    if isinstance(X, Tensor):
        return function(X)
    if isinstance(X, Mapping):
        mapped = {key: map_leaves(function, value) for key, value in X.items()}
        # Mappings of other types have attributes that a model may ask for.
        return mapped if type(X) is dict else _rebuilt(X, mapped)
    if isinstance(X, (tuple, list)):
        return tuple(map_leaves(function, value) for value in X)
    return X


def _rebuilt(like: Mapping[str, Any], mapped: dict[str, Any]) -> Mapping[str, Any]:
    """Return a mapping of the type of another one, a dict where that fails."""
    build: Any = type(like)
    try:
        result: Mapping[str, Any] = build(mapped)
    # A type may refuse to be built from a dict in any way that it likes.
    except Exception:
        return mapped
    return result if list(result) == list(mapped) else mapped


def _is_batch(data: Any) -> bool:
    """A list of two batches is none: its second element is not a tensor."""
    return (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and isinstance(data[1], Tensor)
    )


def _describe(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)}"
    if isinstance(x, Mapping):
        items = (f"{key}: {_describe(value)}" for key, value in x.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(x, (tuple, list)):
        return "(" + ", ".join(map(_describe, x)) + ")"
    return type(x).__name__
