"""Data that are drawn when they are asked for."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vivit_linop as vl
from tests.cases import mlp


class Drawn(Dataset):
    """Samples that are made when they are asked for, and not kept."""

    def __init__(self, count: int, features: int) -> None:
        self.count, self.features = count, features

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(self.features, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (), generator=generator)


def streamed(**options: Any) -> tuple[nn.Module, vl.EmpiricalRisk]:
    """40 samples from a loader; D = 120 and N·R = 80."""
    torch.manual_seed(0)
    net = mlp(6, 11, 3)
    loader = DataLoader(Drawn(40, 6), batch_size=20)
    return net, vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), loader, **options)
