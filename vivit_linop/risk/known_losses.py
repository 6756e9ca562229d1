"""Which of the library's losses a user's loss is."""

from __future__ import annotations

from typing import Any

from torch import nn

from vivit_linop.risk.elementwise import (
    BinaryCrossEntropy,
    GaussianNLL,
    Huber,
    PoissonNLL,
    SmoothL1,
    SquaredError,
)
from vivit_linop.risk.losses import (
    AutogradLoss,
    CrossEntropy,
    NegativeLogLikelihood,
    OutputLoss,
)


def as_output_loss(loss: Any, reduction: str | None, check: bool = True) -> OutputLoss:
    """Find what a user's loss is.

    Args:
        loss: A ``torch.nn`` loss or a callable.
        reduction: What the user says it is; needed for a callable without the
            attribute.
        check: Whether to check that a loss without a closed form is a sum over samples.

    Raises:
        TypeError: If it cannot be called.
        ValueError: If its reduction is missing, contradictory or ``"none"``.
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
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction: {name} has reduction={reduction!r}; it must be 'mean' or "
            "'sum'. For a function, say which it is: EmpiricalRisk(…, "
            "reduction='mean')."
        )
    result = _output_loss(loss, reduction, name, check)
    result.source = loss
    return result


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
    return AutogradLoss(loss, reduction, name, check)


def _name(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))
