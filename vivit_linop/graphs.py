"""Graphs of torch's autograd: what is in them, and gradients as ordinary tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node


def strided(gradient: Tensor | None) -> Tensor | None:
    """Return a gradient as an ordinary tensor; embeddings can have sparse ones."""
    if gradient is None or gradient.layout == torch.strided:
        return gradient
    return gradient.to_dense()


def gradients(
    output: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Tensor | Sequence[Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    """Pull vectors back; zeros for inputs that no output depends on.

    Args:
        output: One output, or several; some may depend on nothing.
        inputs: The tensors to pull back to.
        vectors: One for each output; None for a scalar.
        **options: Those of ``torch.autograd.grad``.
    """
    several = [output] if isinstance(output, Tensor) else output
    given = [vectors] if vectors is None or isinstance(vectors, Tensor) else vectors
    pairs = zip(several, given, strict=True)
    used = [(out, vector) for out, vector in pairs if out.requires_grad]
    if not used:
        return [*map(torch.zeros_like, inputs)]
    outputs, cotangents = zip(*used, strict=True)
    found = torch.autograd.grad(
        outputs, inputs, cotangents, materialize_grads=True, **options
    )
    return [g if g.layout == torch.strided else g.to_dense() for g in found]


def nodes(output: Tensor) -> list[Node]:
    """Return the nodes of the graph of a tensor, each once."""
    if output.grad_fn is None:
        return []
    found, seen = [output.grad_fn], {output.grad_fn}
    for node in found:
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                found.append(following)
    return found
