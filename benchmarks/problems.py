"""Nets and data of published sizes, with random inputs.

Times and memory of products do not depend on the values, so the inputs are drawn from
N(0, 1) and the classes uniformly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A net in eval mode, a loss and one batch of data, all on one device."""

    name: str
    model: nn.Module
    loss: nn.Module
    data: tuple[Tensor, Tensor]

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def device(self) -> torch.device:
        return self.data[0].device

    def columns(self, count: int) -> Tensor:
        """Return the same random ``[D, count]`` for all cases."""
        generator = torch.Generator().manual_seed(1)
        X = torch.randn(self.num_params, count, generator=generator)
        return X.to(self.device)


def mlp(num_classes: int) -> tuple[nn.Module, tuple[int, ...]]:
    """The MLP 784-1024-512-C; 1,333,770 parameters for C = 10."""
    net = nn.Sequential(
        nn.Linear(784, 1024),
        nn.ReLU(),
        nn.Linear(1024, 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )
    return net, (784,)


def net_3c3d(num_classes: int) -> tuple[nn.Module, tuple[int, ...]]:
    """DeepOBS's cifar10_3c3d (Schneider et al. 2019); 895,210 parameters for C = 10."""
    # The pools are "same" with stride 2. After a ReLU, padding with zeros at the end
    # and windows that are cut off there (ceil_mode) give the same.
    net = nn.Sequential(
        nn.Conv2d(3, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Conv2d(64, 96, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Conv2d(96, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(1152, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, num_classes),
    )
    for module in net:
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(module.bias)
    return net, (3, 32, 32)


NETS: dict[str, Callable[[int], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": mlp,
    "3c3d": net_3c3d,
}


def make_problem(
    name: str, device: str, num_samples: int = 128, num_classes: int = 10
) -> Problem:
    """Return the problem of this name, in float32; the same for each call."""
    torch.manual_seed(0)
    net, shape = NETS[name](num_classes)
    X = torch.randn(num_samples, *shape)
    y = torch.randint(num_classes, (num_samples,))
    return Problem(
        name,
        net.eval().to(device),
        nn.CrossEntropyLoss(),
        (X.to(device), y.to(device)),
    )
