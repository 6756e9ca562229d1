"""The tangent map x ↦ J x of a net, traced: all that does not depend on x is evaluated.

``torch.func.linearize`` does the same, but its map copies each tangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.fx import GraphModule, Node
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.experimental.proxy_tensor import make_fx

from vivit_linop.risk.model.original import Params

_ATEN: Any = torch.ops.aten
# The same operations by Python's own bindings, which take half of the time of a call.
_DIRECT: dict[Any, Any] = {
    _ATEN.add.Tensor: torch.add,
    _ATEN.convolution.default: torch.convolution,
    _ATEN.mm.default: torch.mm,
    _ATEN.mul.Tensor: torch.mul,
    _ATEN.t.default: torch.t,
}


def tangent_map(function: Callable[[Params], Tensor], theta: Params) -> TangentMap:
    """Trace x ↦ J x at θ, with all that does not depend on x evaluated."""

    def image(*tangents: Tensor) -> Tensor:
        named = dict(zip(theta, tangents, strict=True))
        return jvp(function, (theta,), (named,))[1]

    # The model decides on values of θ and of the data only, which are the same in every
    # product: what it branches on may be burnt in.
    trace = make_fx(image, _error_on_data_dependent_ops=False)
    graph = trace(*(torch.zeros_like(p) for p in theta.values()))
    _write_nowhere(graph)
    _scale_once(graph)
    return TangentMap(graph)


class TangentMap:
    """The code of a traced graph with what it reads, all else evaluated.

    The graph itself is a circle of references: what it holds would not be freed with
    the last reference to it.
    """

    def __init__(self, graph: GraphModule) -> None:
        folded = split_const_subgraphs(graph)
        folded.run_folding()
        for node in folded.graph.nodes:
            if node.op == "get_attr":
                name = node.target.partition(".")[0]
                setattr(self, name, getattr(folded, name))
        self._code = type(folded).forward

    def __call__(self, *tangents: Tensor) -> Tensor:
        """Return the image of tangents in the shapes of the parameters."""
        return self._code(self, *tangents)


def _write_nowhere(graph: GraphModule) -> None:
    """Replace operations in place by those that return a new tensor.

    A net has some (``nn.ReLU(inplace=True)``), and so have torch's formulas of forward
    mode (batch norm's), on tensors which would be evaluated and kept, and written to by
    each product. Views of such tensors are not followed: that a trace can be used again
    is checked.
    """
    nodes = list(graph.graph.nodes)
    for position, node in enumerate(nodes):
        library, _, rest = str(node.target).partition(".")
        name, _, overload = rest.partition(".")
        if library != "aten" or not name.endswith("_") or name.endswith("__"):
            continue
        packet = getattr(torch.ops.aten, name[:-1], None)
        if not hasattr(packet, overload):
            continue
        node.target = getattr(packet, overload)
        later = set(nodes[position + 1 :])
        node.args[0].replace_all_uses_with(
            node, lambda user, later=later: user in later
        )
        if name == "copy_":  # as into the order of a primal; torch has no derivative
            node.replace_all_uses_with(node.args[1])
            graph.graph.erase_node(node)
    graph.recompile()


def _scale_once(graph: GraphModule) -> None:
    """Let (x a) b be x (a b), whose second factor is evaluated once.

    Norms in eval mode have such products of whole activations. All calls are then those
    that take Python the least time.
    """
    depend: set[Node] = set()
    for node in list(graph.graph.nodes):
        if node.op == "placeholder" or not depend.isdisjoint(node.all_input_nodes):
            depend.add(node)
        if node in depend and not node.kwargs:
            node.target = _DIRECT.get(node.target, node.target)
            if node.target is torch.mul:
                _merge_scales(node, depend)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _merge_scales(node: Node, depend: set[Node]) -> None:
    """(x a) b as x (a b)."""
    x, b = _tangent_and_scale(node, depend)
    if isinstance(x, Node) and x.target is torch.mul:
        first, a = _tangent_and_scale(x, depend)
        if isinstance(a, Node) and isinstance(b, Node):
            with node.graph.inserting_before(node):
                node.args = first, node.graph.call_function(torch.mul, (a, b))


def _tangent_and_scale(node: Node, depend: set[Node]) -> tuple[Any, Any]:
    """A product's factor that depends on x, and the other if that does not."""
    left, right = node.args
    if left not in depend:
        left, right = right, left
    return left, None if right in depend else right
