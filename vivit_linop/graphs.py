"""Graphs of torch's autograd: what is in them, and gradients as ordinary tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import (
    GradientEdge,
    Node,
    disable_saved_tensors_hooks,
    saved_tensors_hooks,
)
from torch.func import vmap


class recorded:
    """For ``with``: record a graph, and save for it what was computed.

    Gradients are recorded also where the caller has turned that off. Hooks of the
    caller's (``torch.autograd.graph.saved_tensors_hooks``) may round or change what a
    graph saves, and nobody can tell which do. So all of them have no effect inside,
    ``save_on_cpu`` included; the ``memory`` of a risk bounds what is kept.
    """

    def __enter__(self) -> None:
        """Enter both."""
        # Written out, since it is entered in each product.
        self._grad = torch.enable_grad()
        self._grad.__enter__()
        self._hooks = None
        if _has_hooks():
            self._hooks = saved_tensors_hooks(_with_version, _unchanged)
            self._hooks.__enter__()

    def __exit__(self, *exception: object) -> None:
        """Leave them."""
        if self._hooks is not None:
            self._hooks.__exit__()
        self._grad.__exit__(None, None, None)


def _has_hooks() -> bool:
    """Whether hooks on saved tensors are on in this thread."""
    try:
        with disable_saved_tensors_hooks("There are none."):
            return False
    except RuntimeError:  # torch refuses to while they are on
        return True


def _with_version(tensor: Tensor) -> tuple[Tensor, int]:
    """Save a tensor as torch does without hooks, which looks at versions too."""
    # Detached: an output would own the graph that owns it, and never be freed.
    return tensor.detach(), tensor._version


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "A tensor that is needed for a gradient has been modified by an inplace "
            "operation."
        )
    return tensor


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


def batched_gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    vectors: Sequence[Tensor],
) -> list[Tensor | None]:
    """Pull several vectors back at once through a graph that stays.

    By the rules of ``torch.func`` for batches. Those of ``is_grads_batched`` are older
    and fewer: layers that have none (convolutions, pools, norms, softmax) are walked
    through vector by vector.

    Args:
        outputs: One output, or several.
        inputs: What to pull back to.
        vectors: K of them for each output, ``[K, …]``.

    Returns:
        ``[K, …]`` for each input; None for one that no output depends on.

    Raises:
        RuntimeError: If an operation cannot be batched; functions of the user's may
            raise errors of other kinds.
    """
    used: list[bool] = []

    def pulled_back(*few: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(
            outputs, inputs, few, retain_graph=True, allow_unused=True
        )
        used[:] = [gradient is not None for gradient in found]
        # None is nothing that can be batched, nor is no result at all.
        return few[0], *(gradient for gradient in found if gradient is not None)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        _, *found = vmap(pulled_back)(*vectors)
    rest = iter(found)
    return [next(rest) if is_used else None for is_used in used]


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
