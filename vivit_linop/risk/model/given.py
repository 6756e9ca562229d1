"""What a user may give as a model: taken out of its wrappers, and what is refused."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vivit_linop.arguments import check_function, check_has_values
from vivit_linop.graphs import leaves_of
from vivit_linop.risk.model.copies import referent
from vivit_linop.risk.model.parameters import HALVES

_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_given(model: Any, predict: Any) -> None:
    """Refuse what is no model, and what cannot call one."""
    wanted = "an nn.Module or a function (params, x) -> output"
    check_function(model, "model", wanted)
    if predict is None:
        return
    check_function(predict, "predict", "a function (model, X) -> output")
    if not isinstance(model, nn.Module):
        raise TypeError(
            "predict: is how a module is called, but the model is a function "
            "(params, x) -> output already; put it into that function."
        )


def unwrapped(model: nn.Module, params: Any | None) -> tuple[nn.Module, Any | None]:
    """Return the module inside of ``torch.compile``, DataParallel and the like.

    Names of parameters may be those of the wrapper or of the module.
    """
    if type(model) in weakref.ProxyTypes:
        model = referent(model)
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            attribute = "module"
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            attribute = "_orig_mod"
        elif isinstance(getattr(model, "_original_module", None), nn.Module):
            attribute = "_original_module"  # Lightning Fabric's
        else:
            return model, params
        if isinstance(params, Mapping):
            prefix = f"{attribute}."
            params = {name.removeprefix(prefix): p for name, p in params.items()}
        model = getattr(model, attribute)


def check_fixed(fixed: Mapping[str, Tensor]) -> None:
    """Refuse what is not over, but in a precision that operators do not have."""
    for name, tensor in fixed.items():
        check_has_values(tensor, f"model: {name!r}")
        if tensor.dtype in HALVES:
            raise TypeError(
                f"model: {name!r} is {tensor.dtype}; also what is frozen must be "
                "float32 or float64. Give dtype=torch.float32: the model is evaluated "
                "in copies of that precision then."
            )


def check_modes(model: nn.Module) -> None:
    """Refuse modules whose outputs depend on the batch or on chance."""
    for name, module in model.named_modules():
        problem = None
        if isinstance(module, _BATCH_NORMS):
            if module.training or module.running_mean is None:
                problem = "normalises with statistics of the batch"
        elif isinstance(module, _DROPOUTS):
            if module.training and module.p > 0.0:
                problem = "drops units at random"
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            if module.training and module.dropout > 0.0:
                problem = "drops units at random"
        if problem is not None:
            advice = (
                "Call model.eval() first."
                if module.training
                else "It keeps no running statistics; use a module that does."
            )
            raise ValueError(
                f"model: {name or 'the model'} ({type(module).__name__}) {problem}, so "
                f"per-sample curvature is undefined. {advice}"
            )


def check_graph(output: Tensor, module: nn.Module | None) -> None:
    """Refuse outputs of a copy whose graph goes on to the user's own parameters."""
    named = module.named_parameters() if module is not None else ()
    own = {id(p): name for name, p in named}
    for leaf in leaves_of(output):
        if (name := own.get(id(leaf))) is not None:
            raise ValueError(
                f"model: its forward pass reaches {name} of your own module, or what "
                "was computed from it before, through an object that is no module, so "
                "derivatives would miss how outputs depend on it. Keep what it uses "
                "as an attribute of the model, compute it in the forward pass, or "
                "detach it if it is a constant."
            )
