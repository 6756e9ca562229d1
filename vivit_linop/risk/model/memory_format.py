"""Images in the order in memory in which convolutional nets run faster on a CPU.

Torch pools images whose channels lie side by side several times faster, and convolves
them without bringing them into another order before. What a net computes is the same.
A net may not take them (``view`` asks for the usual order), or look at strides and
compute something else: whoever gives them sees to that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.risk.data.containers import leaves, map_leaves


def runs_faster(module: nn.Module) -> bool:
    """Whether a module is one that gains by it: with convolutions of images."""
    if not torch.backends.mkldnn.is_available():
        return False
    return any(type(part) is nn.Conv2d for part in module.modules())


def channels_last(X: Any) -> Any:
    """Return an input with its images in that order; the others are as they were."""
    return map_leaves(_channels_last, X)


def image_shapes(X: Any) -> tuple[torch.Size, ...]:
    """The shapes of the images in an input, without their first axis.

    What a net makes of an order is shown on images of one shape only.
    """
    return tuple(leaf.shape[1:] for leaf in leaves(X) if _is_image(leaf))


def _is_image(leaf: Tensor) -> bool:
    """Of float32; in float64 there is little to gain."""
    return (
        type(leaf) is Tensor
        and leaf.layout == torch.strided
        and not leaf.is_nested
        and leaf.is_cpu
        and leaf.dtype is torch.float32
        and leaf.ndim == 4
    )


def _channels_last(leaf: Tensor) -> Tensor:
    if not _is_image(leaf) or not leaf.is_contiguous():
        return leaf
    try:
        return leaf.contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # inside of vmap tensors have no such order
        return leaf
