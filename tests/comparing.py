"""How results are compared with what is expected, and numbers to compute them from."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def close(found: Any, expected: Tensor, rtol: float = 1e-10, size: Any = None) -> bool:
    """Of one shape, and near in norm: relative to what is expected, or to a size."""
    found = torch.as_tensor(found)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    size = expected.double().norm() if size is None else size
    return bool((found.double() - expected.double()).norm() <= rtol * size)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for one shape and seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def jacobian(outputs: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Derivatives of all entries, ``[entries, D]``, row by row by plain autograd."""
    given = list(params)
    rows = [
        torch.autograd.grad(entry, given, retain_graph=True, materialize_grads=True)
        for entry in outputs.reshape(-1)
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def inputs(n: int, *shape: int) -> Tensor:
    """Numbers for n samples."""
    return draw(n, *shape, seed=n)


def assert_near(found: Any, expected: Tensor, rtol: float = 1e-9) -> None:
    """Entry by entry, in float64."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-11)
