"""Estimates with error bars, from products with random vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vivit_linop.arguments import as_count
from vivit_linop.linalg.reductions import CHUNK
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator


class DiagonalEstimate(NamedTuple):
    """An estimated diagonal.

    Attributes:
        diagonal: ``[n]``.
        standard_error: Of each entry, ``[n]``.
    """

    diagonal: Tensor
    standard_error: Tensor


@ordinary_mode()
def estimate_diagonal(
    op: TorchLinearOperator, num_products: int, seed: int | None = None
) -> DiagonalEstimate:
    """Estimate the diagonal of an operator from random products, with error bars.

    The mean of ``num_products`` estimates x ∘ A x with random signs x (Bekas,
    Kokiopoulou & Saad 2007), each unbiased. The variance of one estimate of entry i is
    Σ_{j≠i} A_ij², so errors fall with the root of ``num_products`` only: for an exact
    diagonal see ``op.diagonal()`` first.

    Args:
        op: A square operator.
        num_products: How many products to take, at least 2.
        seed: Of the random signs; None takes them from torch's global generator.

    Returns:
        The mean of the estimates, and its standard error entry by entry.

    Raises:
        ValueError: If the operator is not square or ``num_products`` is below 2.

    Example:
        >>> import torch, vivit_linop as vl
        >>> A = vl.Dense(torch.eye(5) + 0.1)
        >>> mean, error = vl.estimate_diagonal(A, num_products=100, seed=0)
        >>> bool(((mean - 1.1).abs() < 4 * error).all())
        True
    """
    parts = [
        part * product for part, product in _signed_products(op, num_products, seed)
    ]
    samples = torch.cat(parts, dim=1)
    return DiagonalEstimate(samples.mean(1), samples.std(1) / num_products**0.5)


class TraceEstimate(NamedTuple):
    """An estimated trace.

    Attributes:
        trace: Without axes.
        standard_error: Likewise.
    """

    trace: Tensor
    standard_error: Tensor


@ordinary_mode()
def estimate_trace(
    op: TorchLinearOperator, num_products: int, seed: int | None = None
) -> TraceEstimate:
    """Estimate the trace of an operator from random products, with an error bar.

    The mean of ``num_products`` estimates xᵀA x with random signs x (Hutchinson 1990),
    each unbiased, with the variance 2 Σ_{i≠j} A_ij² for a symmetric A. For an exact
    trace see ``op.trace()`` first: many operators have a closed form.

    Args:
        op: A square operator.
        num_products: How many products to take, at least 2.
        seed: Of the random signs; None takes them from torch's global generator.

    Returns:
        The mean of the estimates, and its standard error.

    Raises:
        ValueError: If the operator is not square or ``num_products`` is below 2.

    Example:
        >>> import torch, vivit_linop as vl
        >>> A = vl.Dense(torch.eye(50) + 0.1)
        >>> trace, error = vl.estimate_trace(A, num_products=100, seed=0)
        >>> bool((trace - 55).abs() < 4 * error)
        True
    """
    parts = [
        (part * product).sum(0)
        for part, product in _signed_products(op, num_products, seed)
    ]
    samples = torch.cat(parts)
    return TraceEstimate(samples.mean(), samples.std() / num_products**0.5)


def _signed_products(
    op: TorchLinearOperator, num_products: int, seed: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Check the arguments, and yield random signs x and A x, some columns at a time."""
    if not isinstance(op, TorchLinearOperator):
        raise TypeError(
            f"op: an operator, got {type(op).__name__}. Of a matrix take "
            "vl.Dense(matrix)."
        )
    if op.shape[0] != op.shape[1]:
        raise ValueError(f"op: must be square, has shape {tuple(op.shape)}.")
    num_products = as_count(num_products, "num_products")
    if num_products < 2:
        raise ValueError(f"num_products: at least 2 for an error, got {num_products}.")
    if seed is not None:
        as_count(seed, "seed", 0)
    with op.ranks.together(f"{num_products} random products"):
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        shape = op.shape[0], num_products
        signs = 2.0 * torch.randint(2, shape, generator=generator, device="cpu") - 1.0
    signs = op.ranks.sent(signs)
    for part in signs.to(op.device, op.torch_dtype).split(CHUNK, dim=1):
        yield part, op.apply(part)
