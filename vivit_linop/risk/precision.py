"""In which precision a model is evaluated; complex numbers as pairs of real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What curvature is computed in.
PRECISIONS = (torch.float32, torch.float64)


def check_precision(dtype: Any) -> None:
    """Raise a ``ValueError`` unless a model can be evaluated in it; None is no wish."""
    if dtype is not None and dtype not in PRECISIONS:
        raise ValueError(
            f"dtype: torch.float32 or torch.float64, in which copies of the model are "
            f"evaluated, or None for the model's own; got {dtype!r}."
        )


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
