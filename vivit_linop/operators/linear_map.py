"""Products as nodes of autograd: gradients pass through them to what is multiplied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LinearMap(torch.autograd.Function):
    """A product as a node of autograd: linear, with the adjoint for its gradients.

    With rules for forward mode and ``torch.func``, which would else be cut off.
    """

    @staticmethod
    def forward(X: Tensor, operator: Any) -> Tensor:
        """Multiply."""
        return operator.apply(X.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        """Keep the operator, and where its argument was."""
        X, ctx.operator = inputs
        ctx.place = X.device, X.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Multiply by the adjoint."""
        (gradient,) = gradients
        return ctx.operator.T._product(gradient).to(*ctx.place), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Multiply the tangents."""
        return ctx.operator._product(tangents[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, X: Tensor, operator: Any) -> tuple[Tensor, int]:
        """Multiply all columns of a batch together."""
        columns = X.movedim(in_dims[0], 1)
        product = operator._product(columns.flatten(1))
        return product.unflatten(1, columns.shape[1:]), 1
