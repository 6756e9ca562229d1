"""Graphs of torch's autograd: what is in them, and gradients as ordinary tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node
from torch.func import vmap

from vivit_linop.warned import ignoring

# What a net calls before it can put a hook into its graph.
_GRAD_FN: Any = Tensor.grad_fn
TOUCHES_GRAPH = frozenset({Tensor.register_hook, _GRAD_FN.__get__})


def used_up(how: str) -> ValueError:
    """The error for a graph of which a second backward pass fails, or does so."""
    return ValueError(
        f"model: a second backward pass through the same graph {how}. Hooks that "
        "remove themselves, and functions that free or change what they have saved, do "
        "so; use ones that can be used again."
    )


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
        outputs, inputs, cotangents, allow_unused=True, **options
    )
    # The zeros of torch's ``materialize_grads`` require grad in version 2.8.
    graph = options.get("create_graph", False)
    return [
        torch.zeros_like(x, requires_grad=graph) if g is None else g
        for x, g in zip(inputs, map(strided, found), strict=True)
    ]


def batched_gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    vectors: Sequence[Tensor],
) -> list[Tensor | None]:
    """Pull K vectors for each output back at once through a graph that stays.

    By the rules of ``torch.func`` for batches. Those of ``is_grads_batched`` are older
    and fewer: layers that have none (convolutions, pools, norms, softmax) are walked
    through vector by vector.

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

    with ignoring("There is a performance drop"):
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


def leaves_of(output: Tensor) -> list[Tensor]:
    """Return the leaves that a tensor was computed from; itself, if it is one."""
    if output.grad_fn is None:
        return [output] if output.requires_grad else []
    ends = (getattr(node, "variable", None) for node in nodes(output))
    return [leaf for leaf in ends if isinstance(leaf, Tensor)]


# Nodes that multiply matrices, by the numbers of the inputs that they multiply.
_PRODUCTS: dict[str, Sequence[int]] = {
    **dict.fromkeys(["AddmmBackward0", "BaddbmmBackward0", "AddmvBackward0"], (1, 2)),
    **dict.fromkeys(["MmBackward0", "BmmBackward0", "MvBackward0"], (0, 1)),
    "ConvolutionBackward0": (0, 1),
}
_SUMS = ("AddBackward0", "SubBackward0")
_VIEWS = (
    *("AliasBackward0", "CloneBackward0", "ExpandBackward0", "PermuteBackward0"),
    *("ReshapeAliasBackward0", "SelectBackward0", "SliceBackward0", "SqueezeBackward0"),
    *("SqueezeBackward1", "TBackward0", "ToCopyBackward0", "TransposeBackward0"),
    *("UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0"),
    "ViewAsComplexBackward0",
)


def met_first(output: Tensor) -> list[Tensor] | None:
    """Return the leaves that one meets first, going back from a tensor on every way.

    Behind the weights of a layer there is what it is applied to, and further leaves
    stand there; biases and other summands have nothing behind them. So those of a last
    layer are found, of several heads and of the branches of a sum as well.

    Returns:
        None where matrices are multiplied that are both computed from leaves: which of
        them has the weights is not seen.
    """
    found: dict[int, Tensor] = {}
    queue, behind = [output.grad_fn], list[Node | None]()
    seen: set[Node | None] = {None}
    while queue or (behind and not found):
        if not queue:
            queue, behind = behind, []
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        inputs = [each for each, _ in node.next_functions]
        leaves = [_leaf_behind(each, _VIEWS) for each in inputs]
        factors = _PRODUCTS.get(node.name(), ())
        if factors and all(inputs[at] and leaves[at] is None for at in factors):
            # The weights may be computed from one leaf alone, such as masked ones.
            weights = {at: _leaf_behind(inputs[at]) for at in factors}
            if sum(leaf is not None for leaf in weights.values()) != 1:
                return None
            for at, leaf in weights.items():
                leaves[at] = leaf
        met = [at for at, leaf in enumerate(leaves) if leaf is not None]
        found |= {id(leaf): leaf for leaf in leaves if leaf is not None}
        further = [at for at in range(len(inputs)) if at not in (*met, *factors)]
        if factors and not any(at in met for at in factors):
            behind += [inputs[at] for at in factors]  # a constant has the weights
        elif met and not factors and node.name() not in _SUMS:
            further = []
        queue += [inputs[at] for at in further]
    return [*found.values()]


def _leaf_behind(node: Node | None, kinds: Sequence[str] = ()) -> Tensor | None:
    """Return the only leaf that a node leads to, without products of matrices.

    Through nodes of some kinds; of any, where only one way goes on.
    """
    while node is not None:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return leaf if isinstance(leaf, Tensor) else None
        ways = [following for following, _ in node.next_functions if following]
        name = node.name()
        if len(ways) != 1 or name in _PRODUCTS or (kinds and name not in kinds):
            return None
        node = ways[0]
    return None


def has_own_code(output: Tensor) -> bool:
    """Whether a backward pass runs functions that are not torch's, as far as is seen.

    These may do other things the second time.
    """
    return any(isinstance(node, BackwardCFunction) for node in nodes(output))


def saved_in(output: Tensor) -> list[Tensor]:
    """Return what the graph of a tensor has saved for backward passes.

    It must not have been made under hooks for saved tensors, which would be called.
    """
    return [tensor for node in nodes(output) for tensor in saved_by(node)]


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors take, which may share their memory."""
    seen: dict[int, int] = {}
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        try:
            seen[storage.data_ptr()] = storage.nbytes()
        # A tensor that wraps others has none of its own.
        except RuntimeError:
            total += tensor.nbytes
    return total + sum(seen.values())


def saved_by(node: Node) -> Iterator[Tensor]:
    """Yield what a node has saved, but what has been written into since."""
    for name in _names_of_saved(type(node)):
        try:
            saved = getattr(node, name)
        # Backward passes will say so.
        except RuntimeError:
            continue
        for part in saved if isinstance(saved, (tuple, list)) else (saved,):
            if isinstance(part, Tensor) and part.layout == torch.strided:
                yield part


@lru_cache(maxsize=1024)
def _names_of_saved(kind: type[Node]) -> list[str]:
    """Under which attributes nodes of a kind show what they have saved."""
    return [n for n in dir(kind) if n.startswith("_saved_") or n == "saved_tensors"]
