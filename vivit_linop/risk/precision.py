"""In which precision a model is evaluated; complex numbers as pairs of real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# What curvature is computed in.
PRECISIONS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


def check_precision(dtype: Any) -> None:
    """Raise a ``ValueError`` unless a model can be evaluated in it; None is no wish."""
    if dtype is not None and dtype not in PRECISIONS:
        raise ValueError(
            f"dtype: torch.float32 or torch.float64, in which copies of the model are "
            f"evaluated, or None for the model's own; got {dtype!r}."
        )


@contextlib.contextmanager
def explained_casts(dtype: torch.dtype | None) -> Iterator[None]:
    """Say what to do where a model in another precision casts by itself."""
    try:
        yield
    except RuntimeError as error:
        if dtype is None or "dtype" not in str(error):
            raise
        raise ValueError(
            f"model: does not run in dtype={dtype} ({error}). Its forward pass casts "
            "to a precision of its own. Let it take that of its parameters, as "
            "x.to(self.weight.dtype) does."
        ) from error


def in_precision(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a real or complex tensor in a real precision; integers stay."""
    if dtype is None:
        return tensor
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def as_pairs(tensor: Tensor) -> Tensor:
    """Return complex numbers ``[…]`` as real and imaginary parts ``[…, 2]``."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def of_pairs(pairs: Tensor) -> Tensor:
    """Return the complex numbers of pairs ``[…, 2]``."""
    return torch.complex(pairs[..., 0], pairs[..., 1])
