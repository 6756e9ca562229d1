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
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.fx import GraphModule
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from vivit_linop.risk.memory import batch_does_not_fit, explained
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


class Linearization:
    """The Jacobian of a function of parameters, ready for products.

    Args:
        function: Maps parameters, by name, to outputs ``[n, …]``.
        params: θ, by name; tensors that require grad.

    Attributes:
        outputs: The outputs at θ, ``[n, …]``.
        nbytes: The memory that the graph of the outputs keeps, beyond θ.
        traced: Whether J x may be traced; else it is a backward pass.
    """

    def __init__(self, function: Callable[[Params], Tensor], params: Params) -> None:
        self._function, self._params = function, params
        self._shapes = [p.shape for p in params.values()]
        self._sizes = [p.numel() for p in params.values()]
        first = next(iter(params.values()))
        self._dtype, self.device = first.dtype, first.device
        self.traced = True
        self._method: str | None = None
        self._batches = True
        self._tangent_map: Callable[..., Tensor] | None = None
        # Jᵀ u is the gradient of the image in the arguments, along u.
        self._arguments = list(params.values())
        with as_guest(self.device):
            self.nbytes, self._image = _saved_bytes(lambda: function(params))
        self.outputs = self._image.detach()

    @property
    def kept_bytes(self) -> int:
        """About what it takes at most once J x is possible."""
        return _KEPT_GRAPHS * self.nbytes

    @property
    def method(self) -> str:
        """How J x is computed, decided when needed: "trace" or "reverse"."""
        if self._method is None:
            self._prepare()
        assert self._method is not None
        return self._method

    def _prepare(self) -> None:
        """Make J x possible."""
        with as_guest(self.device):
            if not self.traced:
                self._reverse()
            elif tracing_pays(self._image):
                if not self._trace_somehow() and not self._reverse():
                    self._refuse()
            elif not self._reverse_if_possible() and not self._trace_somehow():
                # Whatever has failed is to be seen.
                if not self._reverse():
                    self._refuse()

    def _trace_somehow(self) -> bool:
        return self._trace(contextlib.nullcontext()) or self._trace(OutOfPlace())

    def _reverse_if_possible(self) -> bool:
        try:
            return self._reverse()
        # Operations without a second derivative may have a forward mode.
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False

    def _trace(self, mode: contextlib.AbstractContextManager[object]) -> bool:
        """Trace the tangent map; returns whether it turned out to be right."""
        graph, parameters = self._image, self._arguments
        theta = {name: p.detach() for name, p in self._params.items()}
        right = False
        try:
            with warnings.catch_warnings(), mode:
                warnings.filterwarnings("ignore", message=".*get_attr Node.*")
                warnings.filterwarnings("ignore", category=FutureWarning)
                self._tangent_map = tangent_map(self._function, theta)
            self._arguments = [p.detach().clone().requires_grad_() for p in parameters]
            self._image = self._tangent_map(*self._arguments)
            right = self._agrees(graph)
        # Any failure of the tracer, of which there are many kinds, only means that
        # another way must be taken; an error of the model itself was seen before.
        except Exception:
            pass
        # Also if the user interrupts: half of a trace would give wrong products.
        finally:
            if not right:
                self._image, self._arguments = graph, parameters
                self._tangent_map = None
        if right:
            self._method = "trace"
        return right

    def _agrees(self, graph: Tensor) -> bool:
        """Whether products are those of the Jacobian, and stay so when used.

        ⟨u, J x⟩ must equal ⟨Jᵀ u, x⟩. Of a trace, Jᵀ u must also be what an ordinary
        backward pass gives, and all this again: what it keeps is changed by its use if
        the model works in place.
        """
        generator = torch.Generator().manual_seed(0)

        def draw(like: Tensor) -> Tensor:
            noise = torch.randn(like.shape, generator=generator, dtype=like.dtype)
            return noise.to(like.device)

        u, parameters = draw(graph), list(self._params.values())
        x = torch.cat([draw(p).reshape(-1) for p in parameters])
        expected = self._flat(
            torch.autograd.grad(
                graph, parameters, u, retain_graph=True, allow_unused=True
            )
        )
        tolerance = 100 * torch.finfo(self._dtype).eps ** 0.75
        traced = self._tangent_map is not None
        for _ in range(1 + traced):
            image = self._jvp(x)
            if traced:
                error = self._vjp(u.reshape(-1)) - expected
                if not error.norm() <= tolerance * expected.norm():
                    return False
            slope = (image * u.reshape(-1)).sum() - (expected * x).sum()
            size = image.norm() * u.norm() + expected.norm() * x.norm()
            if not slope.abs() <= tolerance * size:
                return False
        return True

    def _reverse(self) -> bool:
        """Keep the graph of u ↦ Jᵀ u; returns whether it turned out to be right."""
        self._dual = torch.zeros_like(self._image, requires_grad=True)
        gradients = torch.autograd.grad(
            self._image,
            self._arguments,
            self._dual,
            create_graph=True,
            allow_unused=True,
        )
        self._pulled_back = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(map(strided, gradients), self._arguments, strict=True)
        ]
        right = not self.traced or self._agrees(self._image)
        if right:
            self._method = "reverse"
        return right

    def _refuse(self) -> None:
        raise ValueError(
            "model: its derivatives by torch disagree, J x is not the slope that a "
            "backward pass gives. An operation of the model has a wrong second "
            "derivative (replace it by an equivalent one), or computes in a lower "
            "precision than that of the parameters (give the model in that one)."
        )

    def release(self) -> None:
        """Let go of the graph, also where this object is still referred to."""
        for name in ("_image", "_dual", "_pulled_back", "_tangent_map", "_function"):
            self.__dict__.pop(name, None)

    def column_chunk(self) -> int:
        """How many columns to multiply at a time."""
        budget = _CPU_COLUMN_BYTES
        if self.device.type == "cuda":
            budget = torch.cuda.mem_get_info(self.device)[0] // 4
        per_column = self.nbytes + self.outputs.element_size() * sum(self._sizes)
        return max(1, budget // max(per_column, 1))

    def jvp(self, X: Tensor) -> Tensor:
        """Return J X, ``[D, K] -> [n C, K]``."""
        if self._method is None:
            with explained(self._does_not_fit):
                self._prepare()
        return self._by_rows(self._jvp, X, self.outputs.numel())

    def vjp(self, U: Tensor) -> Tensor:
        """Return Jᵀ U, ``[n C, K] -> [D, K]``."""
        return self._by_rows(self._vjp, U, sum(self._sizes))

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
            return product(X.squeeze(1)).unsqueeze(1)
        rows = X.T.contiguous()
        result = X.new_empty(X.shape[1], size)
        chunk = self.column_chunk() if self._batches else 1
        for part, images in zip(rows.split(chunk), result.split(chunk), strict=True):
            if len(part) > 1 and self._batches:
                try:
                    images.copy_(product(part))
                    continue
                # Not all operations can be batched; all can be done row by row.
                except (RuntimeError, NotImplementedError):
                    self._batches = False
            for row, image in zip(part, images, strict=True):
                image.copy_(product(row))
        return result.T

    def _does_not_fit(self) -> str:
        samples = len(self.outputs)
        return batch_does_not_fit(self.device, samples, self.nbytes / samples)

    def _jvp(self, rows: Tensor) -> Tensor:
        """``[D] -> [n C]`` or ``[K, D] -> [K, n C]``."""
        leading = rows.shape[:-1]
        tangents = [
            part.reshape((*leading, *shape))
            for part, shape in zip(
                rows.split(self._sizes, dim=-1), self._shapes, strict=True
            )
        ]
        with as_guest(self.device):
            if self._tangent_map is None:
                image = self._jvp_reverse(tangents, batched=rows.ndim == 2)
            else:
                with torch.no_grad():
                    batched = vmap(self._tangent_map)
                    apply = batched if rows.ndim == 2 else self._tangent_map
                    image = apply(*tangents)
        return image.reshape(*leading, -1)

    def _jvp_reverse(self, tangents: list[Tensor], batched: bool) -> Tensor:
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

    def _vjp(self, rows: Tensor) -> Tensor:
        """``[n C] -> [D]`` or ``[K, n C] -> [K, D]``."""
        leading = rows.shape[:-1]
        with as_guest(self.device):
            gradients = torch.autograd.grad(
                self._image,
                self._arguments,
                rows.reshape((*leading, *self.outputs.shape)),
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=rows.ndim == 2,
            )
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


def tangent_map(function: Callable[[Params], Tensor], theta: Params) -> GraphModule:
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
    return split_const_subgraphs(graph)


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
