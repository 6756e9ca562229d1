"""The columns of the weights of transposed convolutions.

Their sums go over positions of the input, which are the fewer ones. What approximates a
layer as ``outputs = weight @ inputs`` at positions of its output, as KFAC does, needs
the same sums over those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns

_FUNCTIONS: list[Callable[..., Tensor]] = [
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
]


@dataclass(frozen=True)
class Call:
    """A transposed convolution on n samples.

    Attributes:
        arguments: Its arguments by name; its weight has the shape ``[in, out/G, *k]``.
        inputs: ``[n, in, …]``.
        cotangents: R of them at its output, ``[n, R, out, …]``.
    """

    arguments: dict[str, Any]
    inputs: Tensor
    cotangents: Tensor


class TransposedConvolutionColumns(KhatriRaoColumns):
    """Khatri–Rao columns over the positions of the input of transposed convolutions.

    Args:
        inputs: ``[n, G, in/G, P]``.
        cotangents: What each input position reaches, ``[n, R, G, out/G·k, P]``.
        calls: The transposed convolutions with this weight.
    """

    of_data = frozenset({"_calls"})
    _calls: Sequence[Call] = ()

    def __init__(
        self, inputs: Tensor, cotangents: Tensor, calls: Sequence[Call]
    ) -> None:
        super().__init__(inputs, cotangents, inputs_first=True)
        self._calls = list(calls)

    @property
    def nbytes(self) -> int:
        """Inputs, cotangents, and the cotangents as they arrived."""
        arrived = sum(call.cotangents.numel() for call in self._calls)
        return super().nbytes + arrived * self.cotangents.element_size()

    def with_more(self, others: Sequence[KhatriRaoColumns]) -> KhatriRaoColumns:
        together = super().with_more(others)
        calls = list(self._calls)
        for other in others:
            if not isinstance(other, TransposedConvolutionColumns):
                return together
            calls += other._calls
        return TransposedConvolutionColumns(together.inputs, together.cotangents, calls)

    def at_outputs(self) -> KhatriRaoColumns:
        """The columns as sums over positions of the output, in another order of rows.

        Returns:
            Inputs ``[n, G, in/G·k, P]`` and cotangents ``[n, R, G, out/G, P]``, of
            weights in the order of :meth:`by_outputs`.
        """
        inputs, cotangents = [], []
        for call in self._calls:
            n, R, G = len(call.inputs), self.width, self._groups
            patches = _patches(call)
            inputs.append(patches.reshape(n, G, patches.shape[1] // G, -1))
            b = call.cotangents
            cotangents.append(b.reshape(n, R, G, b.shape[2] // G, -1))
        return KhatriRaoColumns(torch.cat(inputs, dim=-1), torch.cat(cotangents, -1))

    def by_outputs(self, entries: Tensor) -> Tensor:
        """Arrange ``[in · out/G · k]`` entries of a weight, ``[G, out/G, in/G·k]``."""
        inputs, outputs = self._calls[0].arguments["weight_shape"][:2]
        by_inputs = entries.view(self._groups, inputs // self._groups, outputs, -1)
        return by_inputs.transpose(1, 2).flatten(2)


def _patches(call: Call) -> Tensor:
    """What each output sees of the input, ``[n, in · k, *positions]``.

    Each channel by itself is convolved with all one-hot kernels.
    """
    arguments, X = call.arguments, call.inputs
    kernel = arguments["weight_shape"][2:]
    size, channels = kernel.numel(), X.shape[1]
    one_hot = torch.eye(size, dtype=X.dtype, device=X.device)
    options = ("stride", "padding", "output_padding", "dilation")
    given = {name: arguments[name] for name in options if name in arguments}
    return _FUNCTIONS[len(kernel) - 1](
        X,
        one_hot.view(1, size, *kernel).repeat(channels, 1, *([1] * len(kernel))),
        groups=channels,
        **given,
    )
