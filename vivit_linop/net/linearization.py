"""The linearisation of a net at θ on one batch: J x and Jᵀ u without a forward pass.

Jᵀ u is an ordinary backward pass through the kept graph of one forward pass. J x is the
derivative of Jᵀ u in u, along x: a backward pass through the backward pass, whose graph
is kept as well. One product with J and one with Jᵀ are the arithmetic of 4/3 of a
gradient.

For convolutions torch's backward pass through the backward pass takes twice as long as
it should. In a net of these the tangent map x ↦ J x is traced instead: all in it that
does not depend on x is evaluated and kept, and Jᵀ u then is the backward pass through
that linear map. (``torch.func.linearize`` does the same, but its map copies each
tangent.) Tracing takes seconds, so it is not done for a trace that would be used only
once, nor for nets of linear layers and attention, where a trace is no faster. Each way
stands in where the other fails: control flow that depends on values and kernels without
forward mode, or derivatives that torch does not have or has wrong.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.fx import GraphModule
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from vivit_linop.risk.memory import (
    batch_does_not_fit,
    explained,
    is_out_of_memory,
)
from vivit_linop.risk.model import Params, as_guest, strided

Result = TypeVar("Result")

# What K columns of tangents may take together on the CPU. More would not be faster:
# columns one by one use the caches better.
_CPU_COLUMN_BYTES = 4 * 2**20
# What a net's trace keeps, or the graph of a backward pass, in graphs of its outputs:
# measured 1.4 for a net of linear layers, 1.8 for attention, 2.9 for convolutions.
_KEPT_GRAPHS = 3
# One convolution in this many matrix products makes a trace worth its time.
_PER_CONVOLUTION = 4
# The tracer changes things that all threads see.
_TRACING = threading.Lock()


class NoTangentError(ValueError):
    """J x cannot be had from torch's derivatives; Jᵀ u can, and columns made of it."""


class Graph(NamedTuple):
    """An output with its graph; Jᵀ u is its gradient in the arguments, along u.

    Attributes:
        output: The output, or its tangent as a linear function of the arguments.
        arguments: One for each parameter.
    """

    output: Tensor
    arguments: list[Tensor]

    def pull_back(self, cotangents: Tensor, batched: bool) -> Sequence[Tensor | None]:
        """Return Jᵀ u for a cotangent in the output's shape, or for K of them."""
        return torch.autograd.grad(
            self.output,
            self.arguments,
            cotangents,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )


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


class ReverseTangents:
    """J x as a backward pass through the kept backward pass u ↦ Jᵀ u.

    Args:
        graph: The net's.
    """

    method = "reverse"

    def __init__(self, graph: Graph) -> None:
        self._dual = torch.zeros_like(
            graph.output, requires_grad=True, memory_format=torch.contiguous_format
        )
        gradients = torch.autograd.grad(
            graph.output,
            graph.arguments,
            self._dual,
            create_graph=True,
            allow_unused=True,
        )
        self._pulled_back = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(map(strided, gradients), graph.arguments, strict=True)
        ]

    def __call__(self, tangents: list[Tensor], batched: bool) -> Tensor:
        """Return J x for x in the shapes of the parameters, or for K of them."""
        used = [
            (z, t)
            for z, t in zip(self._pulled_back, tangents, strict=True)
            if z.requires_grad
        ]
        (image,) = torch.autograd.grad(
            [z for z, _ in used],
            self._dual,
            [t for _, t in used],
            retain_graph=True,
            is_grads_batched=batched,
        )
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


class Linearization:
    """The Jacobian of a function of parameters, ready for products.

    Several threads may multiply at once. It holds graphs, which cannot be copied:
    whoever is copied makes it anew.

    Args:
        function: Maps parameters, by name, to outputs ``[n, …]``.
        params: θ, by name; tensors that require grad.

    Attributes:
        outputs: The outputs at θ, ``[n, …]``.
        nbytes: The memory that the graph of the outputs keeps, beyond θ.
        kept: Whether it is used again; else tracing J x would not pay.
        checked: Whether J x has been seen to be right for this function and θ.
    """

    def __init__(self, function: Callable[[Params], Tensor], params: Params) -> None:
        self._function, self._params = function, params
        self._shapes = [p.shape for p in params.values()]
        self._sizes = [p.numel() for p in params.values()]
        first = next(iter(params.values()))
        self._dtype, self.device = first.dtype, first.device
        self.kept, self.checked = True, False
        self._batches = True
        self._tangents: ReverseTangents | TracedTangents | None = None
        self._preparing = threading.Lock()
        self._failure = ""
        self._probe: Probe | None = None
        self._repeats = self._spent = False
        self._together: set[str] = set()
        with as_guest(self.device):
            self.nbytes, output = _saved_bytes(lambda: function(params))
        self._graph = Graph(output, list(params.values()))
        self.outputs = output.detach()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError("A linearisation holds graphs; copy the risk, which makes it.")

    @property
    def kept_bytes(self) -> int:
        """About what it takes at most once J x is possible."""
        return _KEPT_GRAPHS * self.nbytes

    @property
    def method(self) -> str:
        """How J x is computed, decided when needed: "trace" or "reverse".

        Raises:
            NoTangentError: If J x is impossible.
        """
        return self._prepared().method

    def _prepared(self) -> ReverseTangents | TracedTangents:
        """Make J x possible, once."""
        with self._preparing, as_guest(self.device):
            if self._tangents is None:
                if not self.checked:
                    self._probed()
                ways = [self._reverse]
                if self.kept:
                    first = tracing_pays(self._graph.output)
                    ways.insert(0 if first else 1, self._trace_somehow)
                for way in ways:
                    if way():
                        break
                else:
                    self._refuse()
                self.checked = self._repeats = True
                self._probe = None
        assert self._tangents is not None
        return self._tangents

    def _probed(self) -> Probe:
        # Before anything else: a net may do other things the second time.
        if self._probe is None:
            x, u = self._noise(0)
            self._probe = Probe(x, u, self._vjp(u))
        return self._probe

    def _trace_somehow(self) -> bool:
        right = self._trace(contextlib.nullcontext()) or self._trace(OutOfPlace())
        # The tracer leaves circles of references, to its callers too, which would keep
        # the data of this risk until Python's collector happens to run.
        gc.collect()
        return right

    def _trace(self, mode: contextlib.AbstractContextManager[object]) -> bool:
        """Trace the tangent map; returns whether it turned out to be right."""
        theta = {name: p.detach() for name, p in self._params.items()}
        try:
            with _TRACING, warnings.catch_warnings(), mode:
                warnings.filterwarnings("ignore", message=".*get_attr Node.*")
                warnings.filterwarnings("ignore", category=FutureWarning)
                tangents = tangent_map(self._function, theta)
            arguments = [p.clone().requires_grad_() for p in theta.values()]
            graph = Graph(tangents(*arguments), arguments)
            right = self._agree(graph, TracedTangents(tangents))
        # Any failure of the tracer, of which there are many kinds, only means that
        # another way must be taken; an error of the model itself was seen before.
        except Exception:
            return False
        if right:
            self._graph, self._tangents = graph, TracedTangents(tangents)
        return right

    def _reverse(self) -> bool:
        """Keep the graph of u ↦ Jᵀ u; returns whether it turned out to be right."""
        try:
            tangents = ReverseTangents(self._graph)
            right = self.checked or self._agree(self._graph, tangents)
        # Some operations have no second derivative.
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            self._failure = f" ({error})"
            return False
        if right:
            self._tangents = tangents
        return right

    def _agree(self, graph: Graph, tangents: ReverseTangents | TracedTangents) -> bool:
        """Whether products are those of the Jacobian, and stay so when used.

        ⟨u, J x⟩ must equal ⟨Jᵀ u, x⟩ for a random u, where a large error of J x may be
        hidden among many outputs, and for u = J x, where its square is seen. Of a
        trace, Jᵀ u must also be what an ordinary backward pass gives, and all this
        again: what it keeps is changed by its use if the model works in place.
        """
        x, u, expected = self._probed()
        eps = torch.finfo(self._dtype).eps
        tolerance = 100 * eps**0.75
        traced = graph is not self._graph
        for _ in range(1 + traced):
            image = self._jvp(x, tangents)
            if traced:
                error = self._vjp(u, graph) - expected
                if not error.norm() <= tolerance * expected.norm():
                    return False
            slope = (image * u).sum() - (expected * x).sum()
            size = image.norm() * u.norm() + expected.norm() * x.norm()
            if not slope.abs() <= tolerance * size:
                return False
        pulled_back = self._vjp(image)
        slope = (image * image).sum() - (pulled_back * x).sum()
        rounding = 100 * eps * pulled_back.norm() * x.norm()
        return bool(slope.abs() <= tolerance * image.square().sum() + rounding)

    def _noise(self, seed: int) -> tuple[Tensor, Tensor]:
        """Random x ``[D]`` and u ``[n C]``."""
        generator = torch.Generator().manual_seed(seed)
        u, x = (
            torch.randn(size, generator=generator, dtype=self._dtype, device="cpu").to(
                self.device
            )
            for size in (self.outputs.numel(), sum(self._sizes))
        )
        return x, u

    def _refuse(self) -> NoReturn:
        """Say why torch's J x fails or is wrong.

        Columns, which are made of backward passes, can stand in for it if these are
        linear. Rounding to a lower precision is not, nor is a coarse iteration.
        """
        _, u, once = self._probed()
        self._check_repeats(u, once)
        _, v = self._noise(1)
        error = once + self._vjp(v) - self._vjp(u + v)
        if error.norm() <= torch.finfo(self._dtype).eps ** 0.5 * once.norm():
            raise NoTangentError(
                "model: torch has no second derivative of an operation of it, or a "
                f"wrong one{self._failure}, so J x is impossible."
            )
        raise ValueError(
            "model: its derivatives by torch disagree, J x is not the slope that a "
            f"backward pass gives{self._failure}. An operation of the model has a "
            "wrong second derivative (replace it by an equivalent one), or computes "
            "in a lower precision than that of the parameters (give the model in that "
            "one), or iterates in its backward pass and stops early (let it iterate "
            "until it has converged)."
        )

    def release(self) -> None:
        """Let go of the graph, also where this object is still referred to."""
        for name in ("_graph", "_tangents", "_function"):
            self.__dict__.pop(name, None)

    def column_chunk(self) -> int:
        """How many columns to multiply at a time."""
        budget = _CPU_COLUMN_BYTES
        if self.device.type == "cuda":
            budget = torch.cuda.mem_get_info(self.device)[0] // 4
        per_column = self.nbytes + self.outputs.element_size() * sum(self._sizes)
        return max(1, budget // max(per_column, 1))

    def jvp(self, X: Tensor) -> Tensor:
        """Return J X, ``[D, K] -> [n C, K]``.

        Raises:
            NoTangentError: If J x is impossible.
        """
        if self._tangents is None:
            with explained(self._does_not_fit):
                self._prepared()
        return self._by_rows(self._jvp, X, self.outputs.numel())

    def vjp(self, U: Tensor) -> Tensor:
        """Return Jᵀ U, ``[n C, K] -> [D, K]``.

        Raises:
            ValueError: If the graph cannot be used more than once.
        """
        if not self._repeats and (self.kept or U.shape[1] > 1):
            with explained(self._does_not_fit):
                self._check_repeats(U[:, 0].contiguous())
        return self._by_rows(self._vjp, U, sum(self._sizes))

    def _check_repeats(self, u: Tensor, once: Tensor | None = None) -> None:
        """Raise an error if a second backward pass gives another Jᵀ u.

        Args:
            u: ``[n C]``.
            once: What the first backward pass of the graph gave, if it was for u.
        """
        once = self._vjp(u) if once is None else once
        twice = self._vjp(u)
        size = once.nan_to_num(0.0, 0.0, 0.0).norm()
        tolerance = float(torch.finfo(self._dtype).eps ** 0.5 * size)
        # What is not finite is so again. Later, all passes might agree.
        self._spent = self._spent or not torch.allclose(
            once, twice, 0.0, tolerance, equal_nan=True
        )
        if self._spent:
            raise ValueError(
                "model: a second backward pass through the same graph gives another "
                "result. Hooks that remove themselves, and functions that free or "
                "change what they have saved, do so; use ones that can be used again."
            )
        self._repeats = bool(once.any())

    def _by_rows(
        self, product: Callable[[Tensor], Tensor], X: Tensor, size: int
    ) -> Tensor:
        """Apply a product to the columns of a matrix, some of them at a time.

        The products take and give rows, whose parts lie together in memory.
        """
        with explained(self._does_not_fit):
            return self._by_some_rows(product, X, size)

    def _by_some_rows(
        self, product: Callable[[Tensor], Tensor], X: Tensor, size: int
    ) -> Tensor:
        if X.shape[1] == 1:
            return product(X.squeeze(1).contiguous()).unsqueeze(1)
        rows = X.T.contiguous()
        result = X.new_empty(X.shape[1], size)
        chunk = self.column_chunk() if self._batches else 1
        for part, images in zip(rows.split(chunk), result.split(chunk), strict=True):
            if len(part) > 1 and self._batches:
                try:
                    if self._is_right(product, part, images.copy_(product(part))):
                        continue
                # Not all operations can be batched; all can be done row by row.
                except (RuntimeError, NotImplementedError):
                    pass
                self._batches = False
            for row, image in zip(part, images, strict=True):
                image.copy_(product(row))
        return result.T

    def _is_right(
        self, product: Callable[[Tensor], Tensor], rows: Tensor, images: Tensor
    ) -> bool:
        """Whether images of rows together are those of rows alone; checked once.

        By the image of a random combination. Rules of torch for batches are not all
        right.
        """
        if product.__name__ in self._together:
            return True
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(len(rows), generator=generator, dtype=self._dtype)
        weights = weights.to(self.device)
        error = weights @ images - product(weights @ rows)
        size = (weights * images.norm(dim=1)).norm()
        if not error.norm() <= 100 * torch.finfo(self._dtype).eps ** 0.75 * size:
            return False
        self._together.add(product.__name__)
        return True

    def _does_not_fit(self) -> str:
        samples = len(self.outputs)
        return batch_does_not_fit(self.device, samples, self.nbytes / samples)

    def _jvp(
        self, rows: Tensor, tangents: ReverseTangents | TracedTangents | None = None
    ) -> Tensor:
        """``[D] -> [n C]`` or ``[K, D] -> [K, n C]``, rows contiguous."""
        tangents = tangents or self._tangents
        assert tangents is not None
        leading = rows.shape[:-1]
        # Kernels of a model may walk through memory: parts of several rows are copied,
        # those of one row lie together already.
        parts = [
            part.contiguous().view((*leading, *shape))
            for part, shape in zip(
                rows.split(self._sizes, dim=-1), self._shapes, strict=True
            )
        ]
        with as_guest(self.device):
            image = tangents(parts, batched=rows.ndim == 2)
        return image.reshape(*leading, -1)

    def _vjp(self, rows: Tensor, graph: Graph | None = None) -> Tensor:
        """``[n C] -> [D]`` or ``[K, n C] -> [K, D]``, rows contiguous."""
        leading = rows.shape[:-1]
        cotangents = rows.view((*leading, *self.outputs.shape))
        with as_guest(self.device):
            gradients = (graph or self._graph).pull_back(cotangents, rows.ndim == 2)
        return self._flat(gradients, leading)

    def _flat(
        self, gradients: Sequence[Tensor | None], leading: Sequence[int] = ()
    ) -> Tensor:
        """Put gradients in the shapes of the parameters together, None for zero."""
        parts = [
            torch.zeros(*leading, size, dtype=self._dtype, device=self.device)
            if gradient is None
            else gradient.reshape(*leading, size)
            for gradient, size in zip(map(strided, gradients), self._sizes, strict=True)
        ]
        return torch.cat(parts, dim=-1)


def tracing_pays(output: Tensor) -> bool:
    """Whether a net has many convolutions, seen from the graph of its output."""
    counts = {"conv": 0, "mm": 0}
    todo, seen = [output.grad_fn], {None, output.grad_fn}
    while todo:
        node = todo.pop()
        if node is None:
            continue
        name = node.name().lower()
        for kind in counts:
            counts[kind] += kind in name
        following = [n for n, _ in node.next_functions if n not in seen]
        todo += following
        seen.update(following)
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


_OUT_OF_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.__iadd__: torch.add,
    Tensor.__isub__: torch.sub,
    Tensor.__imul__: torch.mul,
    Tensor.add_: torch.add,
    Tensor.mul_: torch.mul,
    Tensor.relu_: torch.relu,
    torch.relu_: torch.relu,
}


def _saved_bytes(build: Callable[[], Result]) -> tuple[int, Result]:
    """Run a function and count the bytes that autograd saves for its backward pass."""
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> tuple[Tensor, int]:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        # The graph owns what it saves: the tensor itself, if it is an output, owns its
        # graph, and neither would ever be freed.
        return tensor.detach(), tensor._version

    def unchanged(saved: tuple[Tensor, int]) -> Tensor:
        # With hooks, torch leaves this check to them.
        tensor, version = saved
        if tensor._version != version:
            raise RuntimeError(
                "model: a tensor that its backward pass needs, "
                f"{list(tensor.shape)}, was changed in place by a later operation."
            )
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(count, unchanged):
            result = build()
        return sum(seen.values()), result
    # Transformations inside of the model do not bear hooks; then nobody counts.
    except RuntimeError:
        return 0, build()
