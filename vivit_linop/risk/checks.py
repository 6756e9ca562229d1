"""What a model must be before anything that is computed with it is believed.

One function of the parameters: the same whenever it is evaluated. The model is asked by
running it, with gradients as in every product, so that one that differentiates inside
can be asked too. Whether it is one function of each sample is asked next
(:mod:`vivit_linop.risk.independence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivit_linop.graphs import leaves_of
from vivit_linop.modes import (
    as_guest,
    numbers_put_back,
    random_states,
    seeded,
    set_random_states,
)
from vivit_linop.risk.data.containers import described, leaves
from vivit_linop.risk.data.fingerprint import largest
from vivit_linop.risk.kept import Run, run_of
from vivit_linop.risk.model.functional import FunctionalModel
from vivit_linop.risk.model.original import Params
from vivit_linop.risk.model.outputs import RaggedOutputs
from vivit_linop.risk.model.parameters import (
    check_finite,
    largest_entries,
    other_entries,
)

# From how many states of the generators a model that draws is evaluated on the first
# batch. A coin that is used falls alike in all of them once in 2⁸ times.
_STATES = 9
# Beyond may be logits that are masked, which say nothing of how large the others are.
MASKED = 10.0


def same_outputs(left: Tensor, right: Tensor) -> bool:
    """Whether outputs are the same but for the order of summation.

    The measure is the largest of them, and rounding errors of terms of about 1: outputs
    may be differences of these.
    """
    return left.shape == right.shape and bool(agree(left, right))


def agree(left: Tensor, right: Tensor) -> Tensor:
    """:func:`same_outputs` of outputs of one shape, not read by the host."""
    return apart(left, right) <= 10 * torch.finfo(left.dtype).eps ** 0.5


def apart(left: Tensor, right: Tensor) -> Tensor:
    """How far outputs of one shape are apart, in proportion to their size.

    Outputs may be differences of terms of about 1. Where these round to √ε, they are
    believed to have no size below that.
    """
    off, size = difference_and_size(left, right)
    return off / (size + torch.finfo(right.dtype).eps ** 0.5)


def difference_and_size(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The largest difference of outputs, and the largest of these.

    What is the same to the last digit has no part in it: logits that are masked by −1e9
    would hide what becomes of all others.
    """
    off, right = left.detach() - right.detach(), right.detach()
    return largest(off), largest(right * off.bool())


@dataclass
class Checked:
    """A batch's outputs without their graph, and the run if it may serve as another."""

    outputs: Tensor
    graph_bytes: int
    run: Run | None


def checked_outputs(
    model: FunctionalModel, index: int, X: Any, n: int, items: int = 0
) -> Checked:
    """Return the outputs of a batch of n samples; the first is looked at more closely.

    Where outputs may come item by item, a batch has as many of these as ``items``.

    Raises:
        ValueError: If the outputs are not one differentiable function of parameters and
            input, or have not the form that they must have.
        RaggedOutputs: If samples have outputs of several shapes.
    """
    where = f"model: on batch {index} it"
    with as_guest(model.device):
        buffers = {} if index else model.buffers
        kept = {name: buffer.clone() for name, buffer in buffers.items()}
        before = random_states(model.device)
        numbers = nullcontext([False]) if index else numbers_put_back()
        try:
            with numbers as used:
                run = run_of(model, X, n)
        except Exception as error:
            check_finite(model.params, "params")  # which may be why
            if isinstance(error, RuntimeError) and "type" in str(error):
                _check_dtypes(model, index, X)
            if isinstance(error, TypeError) and type(X) in (tuple, list):
                raise TypeError(
                    f"data: the model fails on the inputs of batch {index}, "
                    f"{described(X)}: {error}. (A tuple of two is one pair (X, y), a "
                    "list holds batches.)"
                ) from error
            error.add_note(
                f"data: the model was given the inputs of batch {index}, "
                f"{described(X)}. predict= says how else it is to be called."
            )
            raise
        after = random_states(model.device)
        model.draws |= used[0]
        drawn = model.draws or not all(map(torch.equal, before, after))
    output = run.output
    moved = [other_entries(kept[name], buffer) for name, buffer in buffers.items()]
    if items and output.ndim and len(output) == items:
        raise RaggedOutputs(output.detach())
    _check_form(model, where, output, n)
    parameters = {*map(id, model.params.values())}
    if index == 0 and parameters.isdisjoint(map(id, leaves_of(output))):
        raise ValueError(
            "model: its output is not differentiable in the parameters (it does "
            "not depend on them, or was detached from them)."
        )
    # From here on the activations are free: the copy does not lie beyond them, where
    # one for each batch would let the heap of the process grow.
    output = output.detach()
    output = output.clone()
    of_params = list[Tensor]()
    if not (index or model.is_finite):
        sizes = largest_entries(model.params)
        of_params = [sizes.isfinite().all(), *(sizes == 0.0)]
    outputs_finite, *parts = read(
        [output.isfinite().all(), *of_params, *moved, *run.written]
    )
    _note(model, parts[: len(of_params)])
    parts = parts[len(of_params) :]
    changed = [name for name, has in zip(buffers, parts, strict=False) if has]
    if changed:
        model.restore({name: kept[name] for name in changed})
        now = {name: buffers[name] for name in changed}
        if not _has_outputs(model, {**model.params, **now}, X, output):
            raise ValueError(
                f"model: its forward pass changes the buffer {changed[0]!r} (the power "
                "iteration of spectral_norm in training mode, or statistics that "
                "are kept), and has other outputs then, so it is not one function. "
                "Call model.eval(), or do without that in evaluation mode."
            )
    writes = any(parts[len(moved) :])
    model.writes |= writes
    if drawn:
        _check_unmoved(model, index, X, output)
    if not outputs_finite:
        check_finite(model.params, "params")
        bad = ~output.reshape(len(output), -1).isfinite().all(1)
        raise ValueError(
            f"{where} returned NaN or Inf for sample {int(bad.nonzero()[0])}. What is "
            "masked may be a large number, such as -1e9."
        )
    serves = run.record is not None and not (writes or drawn or changed)
    return Checked(output, run.graph_bytes, run if serves else None)


def _note(model: FunctionalModel, answers: Sequence[bool]) -> None:
    """Keep what was read of the parameters: whether all are finite, which are zero."""
    if answers:
        model.is_finite, *are_zero = answers
        model.zeros = [
            name
            for (name, p), is_zero in zip(model.params.items(), are_zero, strict=True)
            if is_zero and p.numel() and "bias" not in name.rpartition(".")[2]
        ]


def _check_form(model: FunctionalModel, where: str, output: Tensor, n: int) -> None:
    """Raise an error unless outputs are numbers like the parameters, by sample."""
    if output.ndim == 0 or len(output) != n or output.numel() == 0:
        raise ValueError(
            f"{where} returned outputs {list(output.shape)} for {n} samples; "
            "the first axis must count samples."
        )
    if output.is_complex():
        raise ValueError(
            f"{where} returned complex numbers, {output.dtype}; losses take real ones. "
            "Say which with predict=, for example predict=lambda model, X: "
            "torch.view_as_real(model(X))."
        )
    if output.dtype != model.dtype or output.device != model.device:
        raise ValueError(
            f"{where} returned {output.dtype} on {output.device}, its parameters "
            f"are {model.dtype} on {model.device}. Convert the model and the data "
            "alike."
        )


def _check_dtypes(model: FunctionalModel, index: int, X: Any) -> None:
    """Raise an error if inputs are in another precision than the parameters."""
    found = [leaf.dtype for leaf in leaves(X)]
    # Integers beside numbers in the right precision are indices.
    found.sort(key=lambda dtype: not dtype.is_floating_point)
    if found and model.dtype not in found:
        raise TypeError(
            f"data: the inputs of batch {index} are {found[0]}, the parameters "
            f"{model.dtype}, and the model fails. Convert one to the other, "
            "model.double() or X.float()."
        )


def _check_unmoved(model: FunctionalModel, index: int, X: Any, output: Tensor) -> None:
    """Raise an error if outputs depend on what the model draws.

    Many models draw and do not use it: decisions of training mode, or random numbers
    after a seed of their own. The same arithmetic gives the same outputs, but for
    kernels that sum in any order.
    """
    for seed in range(1, _STATES if index == 0 else 2):
        numbers = numbers_put_back(seed) if model.draws else nullcontext()
        with as_guest(output.device), numbers:
            set_random_states(seeded(seed, output.device), output.device)
            moved = not _has_outputs(model, model.params, X, output)
        if moved:
            raise ValueError(
                f"model: on batch {index} it drew random numbers, so it is not one "
                "function. Call model.eval(), or fix what is random (functional "
                "dropout, noise)."
            )


def _has_outputs(
    model: FunctionalModel, params: Params, X: Any, output: Tensor
) -> bool:
    """Whether a model has these outputs again, but for sums in another order."""
    with as_guest(output.device):
        again = model(params, X).detach()
    if again.shape != output.shape:
        return False
    off = again - output
    size = largest(output * (off.bool() | (output.abs() <= MASKED)))
    return bool(largest(off) <= 100 * torch.finfo(output.dtype).eps * size)


def read(answers: Sequence[Tensor]) -> list[bool]:
    """Read truth values of any devices; the host waits once for each device."""
    places: dict[torch.device, list[int]] = {}
    for place, answer in enumerate(answers):
        places.setdefault(answer.device, []).append(place)
    values = [False] * len(answers)
    for there in places.values():
        found = torch.stack([answers[place] for place in there]).tolist()
        for place, value in zip(there, found, strict=True):
            values[place] = value
    return values
