"""The tangent map x ↦ J x of a net: how it is traced, and whether products are right.

For convolutions torch's backward pass through a backward pass takes twice as long as it
should. In the trace of a net of these all that does not depend on x is evaluated and
kept. (``torch.func.linearize`` does the same, but its map copies each tangent.) Tracing
takes seconds, so it is not done for a trace that would be used only once, nor for nets
of linear layers and attention, where a trace is no faster. A trace may be wrong in many
ways, and so may second derivatives by torch: products are compared with Jᵀ u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.fx import GraphModule, Node
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from vivit_linop.graphs import nodes
from vivit_linop.risk.model.functional import Params

# One convolution in this many matrix products makes a trace worth its time.
_PER_CONVOLUTION = 4
_ATEN: Any = torch.ops.aten
# The same operations by Python's own bindings, which take half of the time of a call.
_DIRECT: dict[Any, Any] = {
    _ATEN.add.Tensor: torch.add,
    _ATEN.convolution.default: torch.convolution,
    _ATEN.mm.default: torch.mm,
    _ATEN.mul.Tensor: torch.mul,
    _ATEN.t.default: torch.t,
}
_OUT_OF_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.__iadd__: torch.add,
    Tensor.__isub__: torch.sub,
    Tensor.__imul__: torch.mul,
    Tensor.add_: torch.add,
    Tensor.mul_: torch.mul,
    Tensor.relu_: torch.relu,
    torch.relu_: torch.relu,
}
Product = Callable[[Tensor], Tensor]


def tracing_pays(output: Tensor) -> bool:
    """Whether a net has many convolutions, seen from the graph of its output."""
    counts = {"conv": 0, "mm": 0}
    for node in nodes(output):
        name = node.name().lower()
        for kind in counts:
            counts[kind] += kind in name
    return _PER_CONVOLUTION * counts["conv"] > counts["mm"]


def tangent_map(function: Callable[[Params], Tensor], theta: Params) -> TangentMap:
    """Trace x ↦ J x, with all that does not depend on x evaluated.

    Args:
        function: Maps parameters, by name, to outputs.
        theta: θ, where J is taken.

    Returns:
        A function of as many tensors as there are parameters.
    """

    def image(*tangents: Tensor) -> Tensor:
        named = dict(zip(theta, tangents, strict=True))
        result: Tensor = jvp(function, (theta,), (named,))[1]
        return result

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

    Args:
        graph: The graph.
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
        image: Tensor = self._code(self, *tangents)
        return image


class TracedTangents:
    """J x by the traced tangent map.

    Args:
        tangent_map: A linear function of as many tensors as there are parameters.
    """

    method = "trace"

    def __init__(self, tangent_map: Callable[..., Tensor]) -> None:
        self._map = tangent_map

    def __call__(self, tangents: list[Tensor], batched: bool) -> Tensor:
        """Return J x for x in the shapes of the parameters, or for K of them."""
        with torch.no_grad():
            apply = vmap(self._map) if batched else self._map
            image: Tensor = apply(*tangents)
        return image


def _write_nowhere(graph: GraphModule) -> None:
    """Replace operations in place by those that return a new tensor.

    torch's formulas of forward mode have some (batch norm's), on tensors of their own,
    which would be evaluated and kept, and written to by each product. Views of such
    tensors are not followed: that a trace can be used again is checked.
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


class OutOfPlace(TorchFunctionMode):
    """Runs activations and augmented assignments that work in place out of place.

    A trace of a net with ``nn.ReLU(inplace=True)`` or ``x += y`` is then one that can
    be used again.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function that returns a new tensor instead."""
        kwargs = dict(kwargs or {})
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        return _OUT_OF_PLACE.get(func, func)(*args, **kwargs)


# Whether products are right ----------------------------------------------------------


class Probe(NamedTuple):
    """Random vectors, and what an ordinary backward pass makes of one.

    Attributes:
        x: ``[D]``.
        u: ``[n C]``.
        pulled_back: Jᵀ u, by the first backward pass of the graph, ``[D]``.
    """

    x: Tensor
    u: Tensor
    pulled_back: Tensor


def agree(
    probe: Probe,
    jvp: Product,
    vjp: Product,
    traced: Product | None,
    is_rounding: Callable[[Tensor, Tensor, Tensor], bool],
) -> bool:
    """Whether products are those of the Jacobian, and stay so when used.

    ⟨u, J x⟩ must equal ⟨Jᵀ u, x⟩ for a random u, where a large error of J x may be
    hidden among many outputs, and for u = J x, where its square is seen. Of a trace,
    Jᵀ u must also be what an ordinary backward pass gives, and all this again: what it
    keeps is changed by its use if the model works in place.

    Args:
        probe: The random vectors.
        jvp: J x, as it would be used.
        vjp: Jᵀ u by an ordinary backward pass.
        traced: Jᵀ u by a trace, None where J x is none.
        is_rounding: Whether ⟨u, J x⟩ − ⟨Jᵀ u, x⟩ is, given also u and Jᵀ u. A trace is
            let go without that question.
    """
    x, u, expected = probe
    eps = torch.finfo(x.dtype).eps
    tolerance = 100 * eps**0.75
    facts = []
    for _ in range(2 if traced else 1):
        image = jvp(x)
        if traced:
            error = traced(u) - expected
            facts.append(error.norm() <= tolerance * expected.norm())
        slope = torch.dot(image, u) - torch.dot(expected, x)
        size = image.norm() * u.norm() + expected.norm() * x.norm()
        facts.append(slope.abs() <= tolerance * size)
    pulled_back = vjp(image)
    norm = torch.dot(image, image)
    square = norm - torch.dot(pulled_back, x)
    tolerated = tolerance * norm
    tolerated += 100 * eps * pulled_back.norm() * x.norm()
    facts.append(square.abs() <= tolerated)
    # The host waits for all of them together.
    right = torch.stack(facts).tolist()
    if traced:
        return all(right)
    return (right[0] or is_rounding(slope, u, expected)) and (
        right[1] or is_rounding(square, image, pulled_back)
    )
