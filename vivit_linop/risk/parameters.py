"""Which parameters an operator is over: what a user may give as ``params``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def chosen_of_module(model: nn.Module, params: Any | None) -> dict[str, Tensor]:
    """Return the parameters of a module that a user has chosen, by name.

    Args:
        model: The module.
        params: None, an iterable of its parameters, or a dict of tensors.

    Raises:
        TypeError: If it is none of these.
        ValueError: If one is foreign, frozen, listed twice or of another shape.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise ValueError(
                "params: no parameter of the model requires grad. Call "
                "requires_grad_(True) on those of interest, or pass them as params."
            )
        return dict(chosen)
    if isinstance(params, Mapping):
        foreign = [name for name in params if name not in named]
        if foreign:
            raise ValueError(
                f"params: {foreign[0]!r} is not the name of a parameter of the model. "
                "Use names of model.named_parameters()."
            )
        for name, value in params.items():
            if not isinstance(value, Tensor) or value.shape != named[name].shape:
                raise ValueError(
                    f"params: {name!r} must be a tensor {list(named[name].shape)}, got "
                    f"{list(value.shape) if isinstance(value, Tensor) else value!r}."
                )
        return dict(params)
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "params: None, an iterable of Parameters or a dict of tensors, got "
            f"{type(params).__name__}."
        )
    names = {id(p): name for name, p in named.items()}
    result: dict[str, Tensor] = {}
    for position, p in enumerate(params):
        if id(p) not in names:
            raise ValueError(
                f"params: number {position} is not a parameter of the model. Take it "
                "from model.parameters()."
            )
        name = names[id(p)]
        if name in result:
            raise ValueError(f"params: {name!r} is listed twice.")
        if not p.requires_grad:
            raise ValueError(
                f"params: {name!r} has requires_grad=False. Leave it out, or call "
                "requires_grad_(True) on it."
            )
        result[name] = p
    return result


def chosen_of_function(params: Any | None) -> dict[str, Tensor]:
    """Return the parameters of a function model, which must be a dict of tensors."""
    if not isinstance(params, Mapping):
        raise TypeError(
            "params: a function model needs a dict from names to tensors, got "
            f"{type(params).__name__}."
        )
    for name, value in params.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"params: {name!r} must be a tensor, got {type(value).__name__}."
            )
    return dict(params)


def check_chosen(params: dict[str, Tensor]) -> None:
    """Refuse parameters without values, a common dtype and device, or with NaN."""
    for name, p in params.items():
        if is_lazy(p) or p.is_meta:
            raise ValueError(
                f"params: {name!r} has no values yet. Call a lazy model once, "
                "model(X), or load the values of one on device 'meta', before the risk "
                "is built."
            )
    """Refuse parameters without a common dtype and device, or with NaN or Inf."""
    if not params or not sum(p.numel() for p in params.values()):
        raise ValueError("params: is empty; at least one parameter is needed.")
    for what, values in (
        ("dtypes", {p.dtype for p in params.values()}),
        ("devices", {p.device for p in params.values()}),
    ):
        if len(values) > 1:
            raise ValueError(
                f"params: have several {what}, {sorted(map(str, values))}. Convert the "
                "model with model.to(…), or choose parameters of one of them."
            )
    name, first = next(iter(params.items()))
    if first.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"params: {name!r} is {first.dtype}; curvature is computed in float32 or "
            "float64. Convert the model with model.float() or model.double()."
        )
    for name, p in params.items():
        # A sum is one pass; only where it overflows must the entries be looked at.
        if not p.detach().sum().isfinite() and not p.detach().isfinite().all():
            raise ValueError(f"params: {name!r} holds NaN or Inf.")
