"""A small problem, and how a refusal is looked at."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vivit_linop as vl
from tests.cases import mlp

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=GENERATOR).double()
CLASSES = torch.randint(3, (6,), generator=GENERATOR)
TARGETS = torch.randn(6, 3, generator=GENERATOR).double()
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def net() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return mlp(4, 5, 3)


def toy() -> vl.EmpiricalRisk:
    return vl.EmpiricalRisk(net(), CE, (X, CLASSES))


def refused(
    argument: str,
    build: Callable[[], Any],
    errors: Any = (ValueError, TypeError),
    says: str = "",
) -> None:
    """Raises an error that begins with the argument's name and says what to do."""
    with pytest.raises(errors) as caught:
        build()
    message = str(caught.value)
    assert type(caught.value) in (ValueError, TypeError), caught.type
    assert re.match(rf"{argument}\b", message), message
    assert says in message, message


def risk_of(
    model: Any = None, loss: Any = CE, data: Any = (X, CLASSES), *rest: Any, **more: Any
) -> Callable[[], vl.EmpiricalRisk]:
    return lambda: vl.EmpiricalRisk(
        net() if model is None else model, loss, data, *rest, **more
    )
