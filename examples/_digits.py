"""What examples share: scikit-learn's digits, training, checks, a folder."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Result = TypeVar("Result")


def digits(count: int, skip: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Some shuffled digits: pixels [N, 64] with mean zero, and classes."""
    X, y = load_digits(return_X_y=True)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    chosen = order[skip : skip + count]
    pixels = torch.tensor(X / 16.0, dtype=torch.get_default_dtype())
    return (pixels - pixels.mean(0))[chosen], torch.tensor(y)[chosen]


def train(
    net: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    decay: float = 0.0,
    last_rate: float = 0.0,
) -> None:
    """Adam with a rate that falls from 0.01, on a loss and ½ decay |θ|²."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, last_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in net.parameters())
        (loss() + 0.5 * decay * penalty).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def check(what: str, value: Any, reference: Any, tolerance: float) -> None:
    """Print the relative error of a value, and raise where it is too large."""
    value, reference = (torch.as_tensor(x).double() for x in (value, reference))
    error = ((value - reference).norm() / reference.norm()).item()
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative error {error:.1e} > {tolerance:.0e}")
    print(f"  {what}: relative error {error:.1e} (allowed: {tolerance:.0e})")


def folder(description: str) -> Path:
    """The folder for pictures, from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        help="folder for the picture (default: output)",
    )
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    return output


def installed(name: str) -> Any:
    """A package if it is there, also where a script of this folder has its name."""
    here, before = Path(__file__).parent.resolve(), sys.path.copy()
    sys.path[:] = [path for path in before if Path(path).resolve() != here]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    finally:
        sys.path[:] = before
