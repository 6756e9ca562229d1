"""Which operation of a net has a wrong second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from vivit_linop.graphs import gradients, nodes
from vivit_linop.noise import Noise
from vivit_linop.risk.data.containers import leaves, map_leaves
from vivit_linop.risk.model.original import Params

# Steps and tolerances of differences of one operation's gradients.
_STEPS = {torch.float64: 1e-6, torch.float32: 1e-2}
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 5e-2}


def at_fault(outputs: Callable[[Params], Tensor], theta: Params) -> str:
    """Say which operation has a wrong second derivative, of a net on some samples."""
    params = {name: p.detach().requires_grad_() for name, p in theta.items()}
    calls = _Calls()
    with calls:
        output = outputs(params)
    if calls.wrong is not None:
        return f"At fault is {calls.wrong}."
    written_in_python = "torch.autograd.function"
    own = [n.name() for n in nodes(output) if type(n).__module__ == written_in_python]
    if own:
        names = " or ".join(dict.fromkeys(n.removesuffix("Backward") for n in own))
        if names == "BackwardHookFunction":  # torch's
            return "At fault is a hook on gradients (register_full_backward_hook)."
        return (
            f"At fault is the hand-written autograd Function {names}, whose backward "
            "pass is not differentiable or has a wrong derivative."
        )
    return (
        "Which operation is at fault could not be told (a custom kernel, a "
        "straight-through estimator, a hook on gradients, numbers of a lower "
        "precision?)."
    )


class _Calls(TorchFunctionMode):
    """Finds the first call of torch's functions with a wrong second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: str | None = None
        self._seen: set[Any] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        tensors = list(leaves(given))
        # It may write to its arguments.
        copies = map_leaves(lambda t: t.detach().clone(), given)
        active = [t.requires_grad and t.is_floating_point() for t in tensors]
        result = func(*args, **(kwargs or {}))
        key = (func, tuple(t.shape for t in tensors))
        if self.wrong is None and any(active) and key not in self._seen:
            if any(t.requires_grad for t in leaves(result)):
                self._seen.add(key)
                if _is_wrong(func, copies, active):
                    self.wrong = resolve_name(func) or f"torch's {func.__name__}"
                    self.wrong += _lower_precision(tensors, list(leaves(result)))
        return result


def _lower_precision(given: list[Tensor], made: list[Tensor]) -> str:
    """Say whether a call leaves the precision of what it is given."""
    before = [t.dtype for t in given if t.is_floating_point()]
    after = [t.dtype for t in made if t.is_floating_point()]
    bits = [max(torch.finfo(d).bits for d in dtypes) for dtypes in (before, after)]
    if bits[1] >= bits[0]:
        return ""
    dtype = before[0]
    return (
        f", which goes to {after[0]} (with dtype={dtype} the risk lets the model "
        "compute in that throughout)"
    )


def _is_wrong(func: Any, given: Any, active: list[bool]) -> bool:
    """Whether a call's second derivative is not the slope of its first one."""
    chosen = [t for t, a in zip(leaves(given), active, strict=True) if a]
    dtype, noise = chosen[0].dtype, Noise().like
    if dtype not in _STEPS:
        return False
    h, weights = _STEPS[dtype], list[tuple[Tensor, Tensor]]()

    def gradient(step: float, graph: bool) -> tuple[list[Tensor], list[Tensor]]:
        """A step along x from what is given, and the gradient there."""
        moved = [t + step * v for t, v in zip(chosen, x, strict=True)]
        values = [t.requires_grad_() for t in moved]
        places, flags = iter(values), iter(active)
        # Copies, since a function that works in place does not take leaves.
        args, kwargs = map_leaves(
            lambda t: (next(places) if next(flags) else t).clone(), given
        )
        results = [r for r in leaves(func(*args, **kwargs)) if r.requires_grad]
        if not weights:
            weights.extend((noise(r), r.detach().clone()) for r in results)
        total = torch.zeros((), dtype=dtype, device=chosen[0].device)
        for r, (u, r0) in zip(results, weights, strict=True):
            total = total + (u * r).sum() + 0.5 * (r - r0).square().sum()
        return values, gradients(total, values, create_graph=graph)

    try:
        x = [noise(t) for t in chosen]
        here, slope = gradient(0.0, graph=True)
        found = gradients(slope, here, x)
        sides = [gradient(step, graph=False)[1] for step in (h, -h)]
    # What cannot be differentiated apart, for want of memory too, is not named by the
    # error for which it is looked.
    except Exception:
        return False
    slopes = [(f, (a - b) / (2 * h)) for f, a, b in zip(found, *sides, strict=True)]
    off = sum(float((f - d).norm()) for f, d in slopes)
    size = sum(float(f.norm() + d.norm()) for f, d in slopes)
    return not off <= _TOLERANCE[dtype] * size
