"""Which loss in output space stands for a user's loss: a table by exact type."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vivit_linop.arguments import check_choice, check_function
from vivit_linop.graphs import leaves_of
from vivit_linop.risk.losses.autograd import AutogradLoss, parts_of, uses_parameters
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.cross_entropy import (
    CrossEntropy,
    KullbackLeibler,
    NegativeLogLikelihood,
)
from vivit_linop.risk.losses.elementwise import (
    BinaryCrossEntropy,
    GaussianNLL,
    Huber,
    PoissonNLL,
    SmoothL1,
    SquaredError,
)
from vivit_linop.risk.losses.own import Loss, OwnLoss
from vivit_linop.risk.model.copies import (
    BACKWARD_HOOKS,
    FORWARD_HOOKS,
    Copies,
    has_hooks_on_all,
)

# Takes a copy of the user's loss.
Builder = Callable[[Any], OutputLoss]
_Builder = TypeVar("_Builder", bound=Builder)


def _rows(output: Tensor) -> int:
    """How many rows of classes outputs have."""
    return output[..., 0].numel()


_BUILDERS: dict[type, Builder] = {
    Loss: OwnLoss,
    nn.MSELoss: lambda loss: SquaredError(),
    nn.BCEWithLogitsLoss: lambda loss: BinaryCrossEntropy(loss.weight, loss.pos_weight),
    nn.CrossEntropyLoss: lambda loss: CrossEntropy(
        loss.weight, loss.ignore_index, loss.label_smoothing
    ),
    nn.NLLLoss: lambda loss: NegativeLogLikelihood(loss.weight, loss.ignore_index),
    nn.GaussianNLLLoss: lambda loss: GaussianNLL(loss.full, loss.eps),
    nn.PoissonNLLLoss: lambda loss: PoissonNLL(loss.log_input, loss.full, loss.eps),
    nn.HuberLoss: lambda loss: Huber(loss.delta),
    # With β = 0 it is the absolute error.
    nn.SmoothL1Loss: lambda loss: (
        SmoothL1(loss.beta) if loss.beta else AutogradLoss(loss, Tensor.numel)
    ),
    nn.KLDivLoss: lambda loss: KullbackLeibler(
        loss.log_target, loss.reduction == "batchmean"
    ),
    # Means over entries, which batches may have in several numbers a sample.
    **dict.fromkeys(
        (nn.L1Loss, nn.BCELoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss),
        partial(AutogradLoss, count=Tensor.numel),
    ),
    nn.MultiLabelSoftMarginLoss: partial(AutogradLoss, count=_rows),
    # Torch's own has no second derivative.
    nn.MultiMarginLoss: lambda loss: AutogradLoss(partial(_multi_margin, loss)),
}

# Functions that are what a module is, in every respect, with the same options. Of
# log-probabilities a function is linear, where the module is a likelihood.
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.mse_loss: nn.MSELoss,
    F.cross_entropy: nn.CrossEntropyLoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    F.huber_loss: nn.HuberLoss,
    F.l1_loss: nn.L1Loss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.soft_margin_loss: nn.SoftMarginLoss,
}


def register(kind: type[nn.Module]) -> Callable[[_Builder], _Builder]:
    """Say what a loss of the user is in output space, by its type.

    The decorated function takes a copy of the loss, with the tensors that it has when
    the risk is built, and returns an :class:`OutputLoss`. It is called once for each
    risk. Subclasses of ``kind`` may compute something else: they are not taken for it.
    A type that is registered again, one of torch's too, has the new function.

    Args:
        kind: The class of the loss.

    Raises:
        TypeError: If it is no subclass of ``nn.Module``.

    Example:
        >>> import torch, vivit_linop as vl
        >>> class Cosh(torch.nn.Module):
        ...     reduction = "sum"
        ...     def forward(self, output, target):
        ...         return (output - target).cosh().sum()
        >>> class OutputCosh(vl.losses.ElementwiseLoss):
        ...     def total(self, output, target):
        ...         return (output - target).cosh().sum()
        ...     def slope(self, output, target):
        ...         return (output - target).sinh()
        ...     def curvature(self, output, target):
        ...         return (output - target).cosh()
        >>> @vl.losses.register(Cosh)
        ... def output_cosh(loss):
        ...     return OutputCosh()
        >>> data = torch.zeros(2, 3), torch.zeros(2, 1)
        >>> vl.LossHessian(torch.nn.Linear(3, 1, bias=False), Cosh(), data).shape
        (2, 2)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(
            f"kind: a subclass of torch.nn.Module, got {kind!r}. Make the loss a "
            "module; a function has no type of its own."
        )

    def registered(builder: _Builder) -> _Builder:
        _BUILDERS[kind] = builder
        return builder

    return registered


def as_output_loss(
    loss: Any, reduction: str | None, parameters: Sequence[Tensor] = ()
) -> OutputLoss:
    """Find what a user's loss is.

    It stays as it is now: a module, or a function that leads to modules and tensors, is
    copied with these.

    Args:
        loss: A ``torch.nn`` loss or a callable.
        reduction: What the user says it is; needed for a callable without the
            attribute.
        parameters: Those of the user's model, which it must not use.

    Raises:
        TypeError: If it cannot be called, or what is registered for it returns
            something else than an :class:`OutputLoss`.
        ValueError: If its reduction is missing, contradictory or ``"none"``; if it
            holds what was computed from parameters of the model.
    """
    loss = as_module(loss)
    reduction = checked_reduction(loss, reduction)
    name = _name(loss)
    frozen, own = _frozen(loss, name, parameters)
    result = built(frozen, reduction)
    result.watch(parameters, own)
    if not isinstance(result, AutogradLoss):
        if parts_of([*frozen.parameters(), *frozen.buffers()], parameters):
            raise uses_parameters(name)
    return result


def as_module(loss: Any) -> Any:
    """Return the module that a function of torch is, other losses as they are.

    Also of one with options, by ``functools.partial``. Compiled losses have no second
    derivatives: it is what was compiled.
    """
    loss = _uncompiled(loss)
    function, options = loss, dict[str, Any]()
    if type(loss) is partial and not loss.args:
        function, options = _uncompiled(loss.func), loss.keywords
    if not isinstance(function, FunctionType) or function not in _FUNCTIONS:
        return loss
    module = _FUNCTIONS[function]
    # Functions have more options than modules.
    known = options.keys() <= inspect.signature(module).parameters.keys()
    return module(**options) if known else loss


def _uncompiled(loss: Any) -> Any:
    """Return what ``torch.compile`` has compiled."""
    while True:
        if isinstance(getattr(loss, "_orig_mod", None), nn.Module):
            loss = loss._orig_mod
        elif _is_of_compiler(loss) and callable(getattr(loss, "__wrapped__", None)):
            loss = loss.__wrapped__
        else:
            return loss


def _is_of_compiler(loss: Any) -> bool:
    """Whether it is a function that the compiler has made, not a decorator's."""
    module = loss.__globals__.get("__name__") if isinstance(loss, FunctionType) else ""
    return str(module).startswith("torch._dynamo")


def built(loss: Any, reduction: str) -> OutputLoss:
    """Return what stands for a loss, which is taken as it is."""
    # A type says what a loss computes unless this one computes something else.
    builder = AutogradLoss if _is_changed(loss) else _BUILDERS.get(type(loss))
    result = (builder or AutogradLoss)(loss)
    if not isinstance(result, OutputLoss):
        raise TypeError(
            f"loss: the function that is registered for {_name(loss)} must return a "
            f"vl.losses.OutputLoss, got {type(result).__name__}."
        )
    result.source, result.reduction = loss, reduction
    result.name = result.name or _name(loss)
    return result


def checked_reduction(loss: Any, reduction: str | None) -> str:
    """Return ``"mean"`` or ``"sum"``, if this can be a loss.

    Raises:
        TypeError: If it cannot be called with outputs and targets.
        ValueError: If its reduction is missing, contradictory or ``"none"``.
    """
    check_function(
        loss, "loss", "a torch.nn loss or a function (output, target) -> scalar"
    )
    own = getattr(loss, "reduction", None)
    if type(loss) is nn.KLDivLoss and own == "batchmean":
        own = "mean"
    if reduction is not None:
        check_choice(reduction, "reduction", ("mean", "sum"))
    if own is not None and reduction is not None and own != reduction:
        raise ValueError(
            f"reduction: {reduction!r} was given, but the loss has reduction={own!r}."
        )
    reduction = own if own is not None else reduction
    name = _name(loss)
    if type(loss) in _SEVERAL_INPUTS:
        raise TypeError(
            f"loss: {name} takes {_SEVERAL_INPUTS[type(loss)]}, but a risk has one "
            "output and one target for each sample. Let the model return all of them, "
            "as a tuple, and give a function with reduction=, such as lambda outputs, "
            "target: loss(*outputs, target)."
        )
    if type(loss) is nn.CTCLoss:
        raise TypeError(
            "loss: CTCLoss takes lengths of inputs and targets, and torch has no "
            "second derivative of it. For curvature write it with differentiable "
            "operations, as a function (output, target) -> scalar with the lengths "
            "among the targets."
        )
    if not isinstance(reduction, str) or reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction: {name} has reduction={reduction!r}; it must be 'mean' or "
            "'sum'. For a function, say which it is: EmpiricalRisk(…, "
            "reduction='mean')."
        )
    return reduction


def _frozen(
    loss: Any, name: str, parameters: Sequence[Tensor]
) -> tuple[Any, list[Tensor]]:
    """Copy a loss, and return the copies of tensors that are in it."""
    own: list[Tensor] = []

    def freeze(tensor: Tensor) -> Tensor:
        if parts_of(leaves_of(tensor), parameters):
            raise uses_parameters(name)
        own.append(tensor.detach().clone())
        return own[-1]

    if isinstance(loss, nn.Module) and any(
        isinstance(part, torch.jit.ScriptModule) for part in loss.modules()
    ):
        return loss, own
    copies = Copies(((p, p) for p in parameters), other=freeze, frozen=True)
    with torch.inference_mode(False):
        return copies.of_called(loss), own


def _is_changed(loss: Any) -> bool:
    """Whether a loss has a forward method of its own, or hooks on it or on all."""
    if not isinstance(loss, nn.Module):
        return False
    hooks = FORWARD_HOOKS(loss) + BACKWARD_HOOKS(loss)
    return "forward" in vars(loss) or any(hooks) or has_hooks_on_all()


# Losses of torch that are no functions of one output, and what of.
_SEVERAL_INPUTS: dict[type, str] = {
    nn.CosineEmbeddingLoss: "two embeddings",
    nn.MarginRankingLoss: "two scores",
    nn.TripletMarginLoss: "an anchor, a positive and a negative",
    nn.TripletMarginWithDistanceLoss: "an anchor, a positive and a negative",
}


def _multi_margin(loss: nn.MultiMarginLoss, output: Tensor, target: Tensor) -> Tensor:
    """``nn.MultiMarginLoss``: Σ_{i≠y} w_y max(0, m − f_y + f_i)^p / C."""
    own = target.unsqueeze(1)
    violation = (loss.margin + output - output.gather(1, own)).clamp(min=0.0)
    violation = violation.scatter(1, own, 0.0) ** loss.p
    if loss.weight is not None:
        violation = violation * loss.weight.to(output)[own]
    losses = violation.mean(1)
    return losses.mean() if loss.reduction == "mean" else losses.sum()


def _name(loss: Any) -> str:
    if isinstance(loss, nn.Module):
        return type(loss).__name__
    return str(getattr(loss, "__name__", type(loss).__name__))
