"""The linearisation of a net at θ on one batch: J x and Jᵀ u without a forward pass.

The tangent map x ↦ J x is traced once by ``torch.func.linearize``, which evaluates
all that does not depend on x and keeps it. The adjoint u ↦ Jᵀ u is the backward pass
through that linear map, so both share what is kept. One product with J and one with
Jᵀ are the arithmetic of 4/3 of a gradient.

Where a model cannot be traced (control flow that depends on values, kernels without
forward mode), the two products are backward passes: J x is the derivative of Jᵀ u in
u, along x.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import linearize, vmap
from torch.overrides import TorchFunctionMode

from vivit_linop.risk.model import Params, as_guest

Result = TypeVar("Result")

# What K columns of tangents may take together on the CPU. More would not be faster:
# beyond the caches, columns one by one are as good.
_CPU_COLUMN_BYTES = 64 * 2**20


class Linearization:
    """The Jacobian of a function of parameters, ready for products.

    Args:
        function: Maps parameters, by name, to outputs ``[n, …]``.
        params: θ, by name; tensors that require grad.

    Attributes:
        outputs: The outputs at θ, ``[n, …]``.
        nbytes: The memory that the linearisation keeps, beyond θ.
        method: ``"linearize"`` or ``"reverse"``, how J x is computed.
    """

    def __init__(self, function: Callable[[Params], Tensor], params: Params) -> None:
        self._function = function
        self._tangent_map: Callable[[Params], Tensor] | None = None
        self._shapes = [p.shape for p in params.values()]
        self._sizes = [p.numel() for p in params.values()]
        self._names = list(params)
        first = next(iter(params.values()))
        self._dtype, self.device = first.dtype, first.device
        with as_guest(self.device):
            outputs = function(params)
            self.outputs = outputs.detach()
            if not self._trace(
                outputs, params, contextlib.nullcontext()
            ) and not self._trace(outputs, params, OutOfPlace()):
                self._reverse(function(params), params)

    def _trace(
        self,
        outputs: Tensor,
        params: Params,
        mode: contextlib.AbstractContextManager[object],
    ) -> bool:
        """Trace the tangent map; returns whether it turned out to be right."""
        theta = {name: p.detach() for name, p in params.items()}
        self.method = "linearize"
        self._tangents = [p.detach().clone().requires_grad_() for p in params.values()]
        try:
            with warnings.catch_warnings(), mode:
                warnings.filterwarnings("ignore", message=".*get_attr Node.*")
                warnings.filterwarnings("ignore", category=FutureWarning)
                _, self._tangent_map = linearize(self._function, theta)
            self.nbytes, _ = _saved_bytes(self._image)
            self._linear_image = self._image()
            return self._agrees(outputs, params)
        # Any failure of the tracer, of which there are many kinds, only means that
        # another way must be taken; an error of the model itself was seen before.
        except Exception:
            return False

    def _image(self) -> Tensor:
        assert self._tangent_map is not None
        return self._tangent_map(dict(zip(self._names, self._tangents, strict=True)))

    def _agrees(self, outputs: Tensor, params: Params) -> bool:
        """Whether the traced map is the Jacobian, and stays it when used.

        Jᵀ u by the trace must be what an ordinary backward pass gives, and ⟨u, J x⟩
        must equal ⟨Jᵀ u, x⟩, also when asked again: what the trace keeps is changed by
        its use if the model works in place.
        """
        generator = torch.Generator().manual_seed(0)

        def draw(like: Tensor) -> Tensor:
            noise = torch.randn(like.shape, generator=generator, dtype=like.dtype)
            return noise.to(like.device)

        u, parameters = draw(outputs), list(params.values())
        x = torch.cat([draw(p).reshape(-1) for p in parameters]).unsqueeze(1)
        backward = torch.autograd.grad(
            outputs, parameters, u, retain_graph=True, allow_unused=True
        )
        expected = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for g, p in zip(backward, parameters, strict=True)
            ]
        )
        tolerance = 100 * torch.finfo(self._dtype).eps ** 0.75
        for _ in range(2):
            image = self.jvp(x).squeeze(1)
            pulled_back = self.vjp(u.reshape(-1, 1)).squeeze(1)
            slope = (image * u.reshape(-1)).sum() - (expected * x.squeeze(1)).sum()
            if not (pulled_back - expected).norm() <= tolerance * expected.norm():
                return False
            size = image.norm() * u.norm() + expected.norm() * x.norm()
            if not slope.abs() <= tolerance * size:
                return False
        return True

    def _reverse(self, outputs: Tensor, params: Params) -> None:
        """Keep the graph of u ↦ Jᵀ u, which is linear in u."""
        self.method = "reverse"
        self._tangent_map = None
        self._parameters = list(params.values())
        self._dual = torch.zeros_like(outputs, requires_grad=True)
        self.nbytes, self._linear_image = 0, outputs

        def pull_back() -> list[Tensor]:
            gradients = torch.autograd.grad(
                outputs,
                self._parameters,
                self._dual,
                create_graph=True,
                allow_unused=True,
            )
            return [
                g if g is not None else torch.zeros_like(p)
                for g, p in zip(gradients, self._parameters, strict=True)
            ]

        self.nbytes, self._pulled_back = _saved_bytes(pull_back)
        self._tangents = self._parameters

    def column_chunk(self, budget: int | None = None) -> int:
        """How many columns to multiply at a time.

        Args:
            budget: The bytes that their tangents may take, or None for a default.
        """
        if budget is None:
            budget = _CPU_COLUMN_BYTES
            if self.device.type == "cuda":
                budget = torch.cuda.mem_get_info(self.device)[0] // 4
        itemsize = self.outputs.element_size()
        per_column = self.nbytes + itemsize * sum(self._sizes)
        return max(1, budget // max(per_column, 1))

    def jvp(self, X: Tensor) -> Tensor:
        """Return J X, ``[D, K] -> [n C, K]``."""
        chunks = X.split(self.column_chunk(), dim=1)
        return torch.cat([self._jvp(chunk) for chunk in chunks], dim=1)

    def vjp(self, U: Tensor) -> Tensor:
        """Return Jᵀ U, ``[n C, K] -> [D, K]``."""
        chunks = U.split(self.column_chunk(), dim=1)
        if len(chunks) == 1:
            return self._vjp(U)
        result = U.new_empty(sum(self._sizes), U.shape[1])
        for columns, chunk in zip(
            result.split(self.column_chunk(), dim=1), chunks, strict=True
        ):
            columns.copy_(self._vjp(chunk))
        return result

    def _jvp(self, X: Tensor) -> Tensor:
        one = X.shape[1] == 1
        leading = () if one else (X.shape[1],)
        rows = X.squeeze(1) if one else X.T
        tangents = [
            part.reshape(*leading, *shape)
            for part, shape in zip(
                rows.split(self._sizes, dim=-1), self._shapes, strict=True
            )
        ]
        with as_guest(self.device):
            if self._tangent_map is None:
                image = self._jvp_reverse(tangents, batched=not one)
            else:
                named = dict(zip(self._names, tangents, strict=True))
                with torch.no_grad():
                    mapped = self._tangent_map if one else vmap(self._tangent_map)
                    image = mapped(named)
        return image.reshape(-1, 1) if one else image.reshape(X.shape[1], -1).T

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

    def _vjp(self, U: Tensor) -> Tensor:
        one = U.shape[1] == 1
        if one:
            cotangents = U.reshape(self.outputs.shape)
        else:
            cotangents = U.T.reshape(U.shape[1], *self.outputs.shape)
        with as_guest(self.device):
            gradients = torch.autograd.grad(
                self._linear_image,
                self._tangents,
                cotangents,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=not one,
            )
        leading = () if one else (U.shape[1],)
        parts = [
            U.new_zeros(*leading, size)
            if gradient is None
            else gradient.reshape(*leading, size)
            for gradient, size in zip(gradients, self._sizes, strict=True)
        ]
        flat = torch.cat(parts, dim=-1)
        return flat.unsqueeze(1) if one else flat.T


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

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = build()
    return sum(seen.values()), result
