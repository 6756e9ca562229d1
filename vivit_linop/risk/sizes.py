"""Batches of sizes that a device or a model does not bear: what to say of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vivit_linop.devices import free_memory, is_out_of_memory, saved_bytes
from vivit_linop.risk.data import Batch
from vivit_linop.risk.model import FunctionalModel, as_guest
from vivit_linop.risk.ways import Search


def does_not_fit(model: FunctionalModel, search: Search, X: Any, n: int) -> str:
    """What to say of a batch that is too large, by what two samples of it take.

    Args:
        model: The model.
        search: Where samples are.
        X: The inputs of the batch.
        n: How many samples it has.
    """
    device = model.device

    def graph_bytes(some: int) -> int:
        part = search.samples.take(X, torch.arange(some, device="cpu"))
        with as_guest(device):
            return saved_bytes(lambda: model(model.params, part))[0]

    try:
        one, two = graph_bytes(1), graph_bytes(min(2, n))
    # A model may run on no other batch; what is to be said is said without sizes.
    except Exception:
        return batch_does_not_fit(device, n, None)
    return batch_does_not_fit(device, n, two - one if n > 1 else one)


def batch_does_not_fit(
    device: torch.device, samples: int, per_sample: float | None
) -> str:
    """Return what to say of a batch whose linearisation does not fit.

    Args:
        device: The device.
        samples: How many the batch has.
        per_sample: The bytes that the linearisation keeps for each of them, None where
            nobody knows.
    """
    free = free_memory(device)
    takes, advice = "", "Give smaller batches, or"
    if per_sample is not None:
        # A product needs about as much again as what is kept.
        takes = (
            ": linearising the net on it takes about "
            f"{2 * samples * per_sample / 1e9:.3g} GB"
        )
        fitting = max(1, min(samples // 2, int(free / (2 * max(per_sample, 1.0)))))
        advice = f"Give batches of up to {fitting} samples (batch_size={fitting}), or"
    if samples == 1:
        advice = "Make the sample smaller,"
    return (
        f"data: a batch of {samples} samples does not fit on {device}{takes}, and "
        f"{free / 1e9:.3g} GB are free. {advice} keep fewer linearisations of other "
        "batches with EmpiricalRisk(..., memory=0)."
    )


def check_size(
    model: FunctionalModel,
    search: Search,
    sizes: Sequence[int],
    own: Any,
    parts: Sequence[Batch],
    error: Exception,
) -> None:
    """Raise an error if the model has failed because it takes no batch of a size.

    Args:
        model: The model.
        search: Where samples are.
        sizes: How many samples the batches of the risk have.
        own: The inputs of one of these.
        parts: Batches of some of its samples, of which one has failed.
        error: How.

    Raises:
        ValueError: If the model runs on ``own``, and not on a batch of another size.
    """
    others = [X for X, _ in parts if search.samples.number(X) not in sizes]
    if not others or is_out_of_memory(error):
        return
    failure = _failure(model, others[0])
    if failure is None or _failure(model, own) is not None:
        return
    listed = ", ".join(map(str, sorted(set(sizes))))
    raise ValueError(
        "indices: the model does not run on batches of another size than those of "
        f"the risk ({listed} samples; {type(failure).__name__}: {failure}). Take as "
        "many samples as fill such batches, or build a risk of them with a model "
        "that takes them."
    ) from failure


def _failure(model: FunctionalModel, X: Any) -> Exception | None:
    """How the model fails on a batch, None if it does not."""
    try:
        with as_guest(model.device):
            model(model.params, X)
    # Errors of the model are of any kind.
    except Exception as error:
        return error
    return None
