"""Risks from what the constructors of operators are given."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from vivit_linop.risk.data import without_targets
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.losses.none import NoLoss
from vivit_linop.risk.model import ModelFunction
from vivit_linop.risk.ways import number_without_targets


def risk_of_inputs(
    model: nn.Module | ModelFunction,
    inputs: Any,
    params: Any | None = None,
    **options: Any,
) -> EmpiricalRisk:
    """Return a risk without a loss, for what needs none: the Jacobian.

    Args:
        model: As for :class:`EmpiricalRisk`.
        inputs: One batch, a tensor, a tuple or a mapping; or a list or a loader of
            batches.
        params: As for :class:`EmpiricalRisk`.
        **options: What else :class:`EmpiricalRisk` takes by name.
    """
    axis = options.get("sample_axis")
    count = options.get("count") or functools.partial(
        number_without_targets, sample_axis=axis
    )
    data = without_targets(inputs, count)
    return EmpiricalRisk(model, NoLoss(), data, params, **options)


def as_risk(
    risk_or_model: Any,
    loss: Any = None,
    data: Any = None,
    params: Any | None = None,
    **options: Any,
) -> EmpiricalRisk:
    """Return the risk that an operator's constructor was given, or build it.

    Args:
        risk_or_model: The risk, or what it is made of: a model.
        loss: The loss.
        data: The data.
        params: The parameters.
        **options: What else :class:`EmpiricalRisk` takes by name.

    Raises:
        TypeError: If it is neither a risk nor a model with a loss and data.
    """
    if isinstance(risk_or_model, EmpiricalRisk):
        if loss is not None or data is not None or params is not None:
            raise TypeError(
                "risk: with an EmpiricalRisk, loss, data and params are already given."
            )
        if options:
            raise TypeError(
                f"{next(iter(options))}: is an option of the EmpiricalRisk that was "
                "given; give it there."
            )
        return risk_or_model
    if loss is None or data is None:
        raise TypeError(
            "risk: an EmpiricalRisk, or a model with a loss and data, got "
            f"{type(risk_or_model).__name__} alone."
        )
    return EmpiricalRisk(risk_or_model, loss, data, params, **options)
