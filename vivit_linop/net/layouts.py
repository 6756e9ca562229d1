"""Where the samples are in the tensors of a use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A place of the samples, in tensors that have an axis for them.

    Args:
        name: ``"first"`` or ``"second"`` for the axis of samples; ``"merged"`` or
            ``"merged second"`` where it is the slow or the fast part of the first axis;
            ``"single"`` where all is of one sample.
        num_samples: n.
    """

    name: str
    num_samples: int

    def __call__(self, tensor: Tensor) -> Tensor:
        """Bring a tensor into the form ``[n, …]``."""
        n = self.num_samples
        if self.name == "first":
            return tensor
        if self.name == "second":
            return tensor.transpose(0, 1)
        if self.name == "merged":
            return tensor.reshape(n, -1, *tensor.shape[1:])
        if self.name == "merged second":
            return tensor.reshape(-1, n, *tensor.shape[1:]).transpose(0, 1)
        return tensor.unsqueeze(0)

    def aligned(self, B: Tensor) -> Tensor:
        """Give cotangents ``[n, R, …]`` one axis again for each of the use's output.

        What is left of the axis of samples has length one where they fill it.
        """
        axis = {"first": 2, "second": 3}.get(self.name)
        return B if axis is None else B.unsqueeze(axis)


def candidates(
    samples: str, shape: torch.Size, num_samples: int, parameter: torch.Size
) -> list[str]:
    """Return the names of the layouts that the output of a layer may have.

    Args:
        samples: Where its kind may have samples.
        shape: The shape of the output.
        num_samples: n.
        parameter: The shape of the layer's first parameter.
    """
    n = num_samples
    axes = len(shape) - (samples in ("first", "leading"))
    found = ["first"] if axes > 0 and shape[0] == n else []
    if samples != "first":
        if n == 1:
            return ["single"]
        if axes > 1 and shape[1] == n:
            found.append("second")
        if axes > 0 and shape[0] % n == 0 and shape[0] > n:
            found += ["merged", "merged second"]
    if samples == "broadcast":
        # A parameter that has entries of its own for each sample is no such use.
        lengths = (1,) * (len(shape) - len(parameter)) + parameter
        found = [c for c in found if lengths[c == "second"] == 1]
    return found
