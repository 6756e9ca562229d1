"""Which of the library's losses a user's loss is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.risk.copies import Copies
from vivit_linop.risk.losses.base import (
    AutogradLoss,
    CrossEntropy,
    KullbackLeibler,
    LossCallable,
    NegativeLogLikelihood,
    OutputLoss,
    leaves_of,
    parts_of,
    uses_parameters,
)
from vivit_linop.risk.losses.elementwise import (
    BinaryCrossEntropy,
    GaussianNLL,
    Huber,
    PoissonNLL,
    SmoothL1,
    SquaredError,
)


def as_output_loss(
    loss: Any,
    reduction: str | None,
    check: bool = True,
    parameters: Sequence[Tensor] = (),
) -> OutputLoss:
    """Find what a user's loss is.

    It stays as it is now: a module, or a function that leads to modules and tensors, is
    copied with these.

    Args:
        loss: A ``torch.nn`` loss or a callable.
        reduction: What the user says it is; needed for a callable without the
            attribute.
        check: Whether to check that a loss without a closed form is a sum over samples.
        parameters: Those of the user's model, which it must not use.

    Raises:
        TypeError: If it cannot be called.
        ValueError: If its reduction is missing, contradictory or ``"none"``; if it
            holds what was computed from parameters of the model.
    """
    if not callable(loss):
        raise TypeError(
            "loss: a torch.nn loss or a function (output, target) -> scalar, got "
            f"{type(loss).__name__}."
        )
    own = getattr(loss, "reduction", None)
    if own is not None and reduction is not None and own != reduction:
        raise ValueError(
            f"reduction: {reduction!r} was given, but the loss has reduction={own!r}."
        )
    reduction = own if own is not None else reduction
    name = type(loss).__name__ if isinstance(loss, nn.Module) else _name(loss)
    if type(loss) in _SEVERAL_INPUTS:
        raise TypeError(
            f"loss: {name} takes {_SEVERAL_INPUTS[type(loss)]}, but a risk has one "
            "output and one target for each sample. Let the model return all of them "
            "along a new axis, torch.stack([…], dim=1), and give a function with "
            "reduction=, such as lambda output, target: loss(*output.unbind(1), "
            "target)."
        )
    if type(loss) is nn.CTCLoss:
        raise TypeError(
            "loss: CTCLoss takes lengths of inputs and targets, and torch has no "
            "second derivative of it. For curvature write it with differentiable "
            "operations, as a function (output, target) -> scalar with the lengths "
            "among the targets."
        )
    if type(loss) is nn.KLDivLoss and reduction == "batchmean":
        reduction = "mean"
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction: {name} has reduction={reduction!r}; it must be 'mean' or "
            "'sum'. For a function, say which it is: EmpiricalRisk(…, "
            "reduction='mean')."
        )
    frozen, own = _frozen(loss, name, parameters)
    result = _output_loss(frozen, reduction, name, check)
    if isinstance(result, AutogradLoss):
        result.watch(parameters, own)
    elif isinstance(frozen, nn.Module) and parts_of(frozen.buffers(), parameters):
        raise uses_parameters(name)
    result.source = frozen
    return result


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
        return copies.of(loss), own


def _output_loss(loss: Any, reduction: str, name: str, check: bool) -> OutputLoss:
    # Exact types: a subclass may compute something else.
    if type(loss) is nn.MSELoss:
        return SquaredError(reduction)
    if type(loss) is nn.BCEWithLogitsLoss:
        return BinaryCrossEntropy(reduction, loss.weight, loss.pos_weight)
    if type(loss) is nn.CrossEntropyLoss:
        return CrossEntropy(
            reduction, loss.weight, loss.ignore_index, loss.label_smoothing
        )
    if type(loss) is nn.NLLLoss:
        return NegativeLogLikelihood(reduction, loss.weight, loss.ignore_index)
    if type(loss) is nn.GaussianNLLLoss:
        return GaussianNLL(reduction, loss.full, loss.eps)
    if type(loss) is nn.PoissonNLLLoss:
        return PoissonNLL(reduction, loss.log_input, loss.full, loss.eps)
    if type(loss) is nn.HuberLoss:
        return Huber(reduction, loss.delta)
    if type(loss) is nn.SmoothL1Loss:
        return SmoothL1(reduction, loss.beta)
    if type(loss) is nn.KLDivLoss:
        return KullbackLeibler(
            reduction, loss.log_target, loss.reduction == "batchmean"
        )
    if type(loss) is nn.MultiMarginLoss:
        # Torch's own has no second derivative.
        return AutogradLoss(_multi_margin(loss), reduction, name, check)
    return AutogradLoss(loss, reduction, name, check)


# Losses of torch that are no functions of one output, and what of.
_SEVERAL_INPUTS: dict[type, str] = {
    nn.CosineEmbeddingLoss: "two embeddings",
    nn.MarginRankingLoss: "two scores",
    nn.TripletMarginLoss: "an anchor, a positive and a negative",
    nn.TripletMarginWithDistanceLoss: "an anchor, a positive and a negative",
}


def _multi_margin(loss: nn.MultiMarginLoss) -> LossCallable:
    """``nn.MultiMarginLoss``: Σ_{i≠y} w_y max(0, m − f_y + f_i)^p / C."""

    def function(output: Tensor, target: Tensor) -> Tensor:
        own = target.unsqueeze(1)
        violation = (loss.margin + output - output.gather(1, own)).clamp(min=0.0)
        violation = violation.scatter(1, own, 0.0) ** loss.p
        if loss.weight is not None:
            violation = violation * loss.weight.to(output)[own]
        losses = violation.mean(1)
        return losses.mean() if loss.reduction == "mean" else losses.sum()

    return function


def _name(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))
