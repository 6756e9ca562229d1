"""A risk at other parameters: one forward pass, on data that have been validated."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vivit_linop.risk import fingerprint
from vivit_linop.risk.checks import same_outputs
from vivit_linop.risk.containers import leaves
from vivit_linop.risk.data import Batch
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.certificates import targets_of
from vivit_linop.risk.model import FunctionalModel, as_guest
from vivit_linop.risk.parameters import ParameterVectors

# Of a batch: the sums over its inputs, its targets, and the outputs for them before.
Known = tuple[list[Tensor], Any, Tensor]


def moved(model: FunctionalModel, parameters: Any) -> FunctionalModel:
    """Return a model at other parameters.

    Args:
        model: The model.
        parameters: ``[D]``, tensors in the order of its parameters or by name; None for
            those that the user's model has now.
    """
    if parameters is None:
        return model.at(*model.present())
    vectors = ParameterVectors()
    vectors.params, vectors.complex_names = model.params, model.complex_names
    if isinstance(parameters, str) or not isinstance(parameters, Iterable):
        raise TypeError(
            "parameters: one vector [D], or a tensor for each, got "
            f"{type(parameters).__name__}."
        )
    if not isinstance(parameters, (Tensor, Mapping)):
        parameters = list(parameters)
    if not isinstance(parameters, Tensor):
        parameters = vectors.flatten(parameters)
    if parameters.ndim != 1:
        raise ValueError(
            f"parameters: one vector [D], or a tensor for each, got "
            f"{list(parameters.shape)}."
        )
    return model.at(vectors.unflatten_real(parameters), {})


def evaluated(
    model: FunctionalModel,
    loss: OutputLoss,
    batches: Iterable[Batch],
    known: Sequence[Known],
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of all batches and the sum of all losses.

    Args:
        model: The model at other parameters.
        loss: The loss.
        batches: The data.
        known: What the data were before, by batch.

    Raises:
        ValueError: If the data are others, or outputs are NaN or Inf.
    """
    outputs: list[Tensor] = []
    total = torch.zeros((), dtype=model.dtype, device=model.device)
    for index, (X, y) in enumerate(batches):
        where = f"batch {index}"
        if index == len(known):
            raise ValueError(
                f"data: there were {index} batches when the risk was made."
            )
        sums, targets, before = known[index]
        with as_guest(model.device):
            output = model(model.params, X).detach()
        if output.shape != before.shape:
            raise ValueError(
                f"model: on {where} it returned outputs {list(output.shape)}, before "
                f"they were {list(before.shape)}."
            )
        if not _same(fingerprint.sums(X), sums) or not _equal(
            targets_of(loss, y, output), targets
        ):
            raise ValueError(
                f"data: {where} is not what it was when the risk was made, and only "
                "the parameters may change. Give a loader without shuffling and "
                "random augmentations, and do not change the data in place; or make "
                "a new risk."
            )
        if not output.isfinite().all():
            raise ValueError(f"parameters: on {where} the outputs hold NaN or Inf.")
        with torch.no_grad():
            total = total + loss.total(output, targets)
        outputs.append(output.clone())
    if not total.isfinite():
        raise ValueError(f"parameters: the loss is {total.item()} there.")
    return outputs, total


def _same(sums: list[Tensor], before: list[Tensor]) -> bool:
    return len(sums) == len(before) and all(map(same_outputs, sums, before))


def _equal(targets: Any, before: Any) -> bool:
    pairs = itertools.zip_longest(leaves(targets), leaves(before))
    return all(
        a is not None
        and b is not None
        and a.shape == b.shape
        and torch.allclose(a, b, 0.0, 0.0, equal_nan=True)
        for a, b in pairs
    )
