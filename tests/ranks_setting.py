"""Risks of the same samples, in one process and over all: what work on them shares."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import vivit_linop as vl
from tests.ranks_cases import gathered

N, C, DELTA = 29, 4, 0.1
# What the next evaluation of a moody net raises.
FAILURES: list[BaseException] = []


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, C)
    ).double()


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.rand(N, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (N,), generator=generator)
    y[3] = y[20] = -100
    return X, y


def loss() -> nn.Module:
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    return nn.CrossEntropyLoss(weight=weight, ignore_index=-100)


class Moody(nn.Module):
    """A net that fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, X: Tensor) -> Tensor:
        if FAILURES:
            raise FAILURES.pop()
        return self.inner(X)


class Setting:
    """Risks of the same samples, in one process and over all.

    Args:
        group: The processes.
        folder: Where files may be written.
    """

    def __init__(self, group: Any, folder: Path) -> None:
        self.group, self.folder = group, folder
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.X, self.y = samples()
        counts = {1: [N], 2: [17, 12], 3: [12, 0, 17]}[self.size]
        own = torch.arange(N).split(counts)[self.rank]
        self.data = [(self.X[i], self.y[i]) for i in (own.split(5) if len(own) else ())]
        self.one = vl.EmpiricalRisk(net(), loss(), (self.X, self.y))
        self.risk = self.over(net(), self.data)
        generator = torch.Generator().manual_seed(2)
        self.D = self.one.num_params
        size = self.D, 3
        self.x = torch.randn(size, generator=generator, dtype=torch.float64)

    def over(self, model: nn.Module, data: Any, **keywords: Any) -> vl.EmpiricalRisk:
        return vl.EmpiricalRisk(
            model, loss(), data, process_group=self.group, **keywords
        )

    def both(self, compute: Callable[[vl.EmpiricalRisk], Tensor]) -> Any:
        """What a risk over processes gives, and what one process does."""
        return lambda: compute(self.risk), lambda: compute(self.one)


def agreement(results: Any) -> Tensor:
    arrays = [np.ascontiguousarray(np.asarray(r)) for r in results]
    digest = hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
    return torch.tensor([float(len(set(gathered(digest))) == 1)])


def raised(fail: Callable[[], Any], text: str) -> Tensor:
    """One if it raises on every rank, soon, and says why."""
    dist.barrier()
    return without_barrier(fail, text)


def without_barrier(fail: Callable[[], Any], text: str) -> Tensor:
    start = time.monotonic()
    try:
        fail()
        said = "nothing"
    except BaseException as error:  # which is what is looked at
        said = str(error)
    seconds = time.monotonic() - start
    right = text in said and seconds < 20.0
    if not right:
        raise AssertionError(f"after {seconds:.1f} s it said: {said}")
    return torch.ones(1)
