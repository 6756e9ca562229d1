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

from vivit_linop.risk.data.containers import map_leaves


def runs_faster(module: nn.Module) -> bool:
    """Whether a module is one that gains by it: with convolutions of images."""
    if not torch.backends.mkldnn.is_available():
        return False
    return any(type(part) is nn.Conv2d for part in module.modules())


def channels_last(X: Any) -> Any:
    """Return an input with its images in that order; the others are as they were."""
    return map_leaves(_channels_last, X)


def _channels_last(leaf: Tensor) -> Tensor:
    """Of float32; in float64 there is little to gain."""
    if (
        type(leaf) is not Tensor
        or leaf.layout != torch.strided
        or not leaf.is_cpu
        or leaf.dtype is not torch.float32
        or leaf.ndim != 4
        or not leaf.is_contiguous()
    ):
        return leaf
    try:
        return leaf.contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # inside of vmap tensors have no such order
        return leaf
