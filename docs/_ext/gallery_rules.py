"""What the gallery asks of its examples: their order, and a torch that is as new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ORDER = (
    "quickstart",
    "laplace",
    "influence",
    "training",
    "least_squares",
    "pruning_and_ewc",
    "preconditioner",
    "heteroscedastic",
    "graphs",
    "texts",
    "distributed",
    "minilm",
    "gpt2",
    "all_quantities",
)


class Order:
    """Those of a tour first, then the others by name."""

    def __init__(self, folder: str) -> None:
        pass

    def __call__(self, name: str) -> tuple[int, str]:
        stem = Path(name).stem
        return (ORDER.index(stem) if stem in ORDER else len(ORDER)), stem


def fresh_torch(conf: dict[str, Any], name: str) -> None:
    """What an example sets of torch is not the next one's."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
