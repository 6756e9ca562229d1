"""What a model must be before anything that is computed with it is believed.

One function of the parameters and of each sample: the same whenever it is evaluated,
and whatever other samples stand in the batch. The model is asked by running it, with
gradients as in every product, so that one that differentiates inside can be asked too.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vivit_linop.devices import is_out_of_memory
from vivit_linop.graphs import nodes
from vivit_linop.risk.data.containers import leaves
from vivit_linop.risk.data.samples import Samples
from vivit_linop.risk.first_run import Run, run_of
from vivit_linop.risk.model.functional import FunctionalModel, as_guest, random_state
from vivit_linop.risk.model.outputs import RaggedOutputs
from vivit_linop.risk.model.parameters import check_finite

# From how many states of the generators a model that draws is evaluated on the first
# batch. A coin that is used falls alike in all of them once in 2⁸ times.
_STATES = 9


def same_outputs(left: Tensor, right: Tensor) -> bool:
    """Whether outputs are the same but for the order of summation.

    The measure is the largest of them, and rounding errors of terms of about 1: outputs
    may be differences of these.
    """
    return left.shape == right.shape and bool(agree(left, right))


def agree(left: Tensor, right: Tensor) -> Tensor:
    """:func:`same_outputs` of outputs of one shape, not read by the host."""
    left, right = left.detach(), right.detach()
    eps = torch.finfo(left.dtype).eps
    error, size = _largest(left - right), _largest(right)
    return error <= 10 * eps**0.5 * size + 10 * eps


def _largest(tensor: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(tensor, math.inf)
    return largest


@dataclass
class Checked:
    """A batch's outputs.

    Attributes:
        outputs: They, without a graph.
        graph_bytes: What their graph takes.
        run: The run that gave them, if it may serve as another.
    """

    outputs: Tensor
    graph_bytes: int
    run: Run | None


def checked_outputs(
    model: FunctionalModel, index: int, X: Any, n: int, items: int = 0
) -> Checked:
    """Return the outputs of a batch.

    Args:
        model: The model.
        index: The batch; the first is looked at more closely.
        X: Its inputs.
        n: How many samples it has.
        items: How many outputs it has where these come item by item.

    Raises:
        ValueError: If the outputs are not one differentiable function of parameters and
            input, or have not the form that they must have.
        RaggedOutputs: If samples have outputs of several shapes.
    """
    where = f"model: on batch {index} it"
    with as_guest(model.device):
        buffers = {} if index else model.buffers
        kept = {name: buffer.clone() for name, buffer in buffers.items()}
        before = random_state(model.device)
        try:
            run = run_of(model, X, n)
        except Exception as error:
            check_finite(model.params, "params")  # which may be why
            if isinstance(error, RuntimeError) and "type" in str(error):
                _check_dtypes(model, index, X)
            raise
        drawn = not torch.equal(before, random_state(model.device))
    output = run.output
    same = [
        torch.isclose(kept[name], buffer, 0.0, 0.0, equal_nan=True).all()
        for name, buffer in buffers.items()
    ]
    if items and output.ndim and len(output) == items:
        raise RaggedOutputs(output.detach())
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
    if index == 0 and not _depends_on_params(model, output):
        raise ValueError(
            "model: its output is not differentiable in the parameters (it does "
            "not depend on them, or was detached from them)."
        )
    # From here on the activations are free: the copy does not lie beyond them, where
    # one for each batch would let the heap of the process grow.
    output = output.detach()
    output = output.clone()
    finite, *parts = read([output.isfinite().all(), *same, *run.written])
    for name, is_same in zip(buffers, parts[: len(same)], strict=True):
        if not is_same:
            raise ValueError(
                f"model: its forward pass changes the buffer {name!r} (the power "
                "iteration of spectral_norm in training mode, or statistics that "
                "are kept), so it is not one function. Call model.eval() first."
            )
    writes = any(parts[len(same) :])
    if writes:
        model.writes()
    if drawn:
        _check_unmoved(model, index, X, output)
    if not finite:
        check_finite(model.params, "params")
        bad = ~output.reshape(len(output), -1).isfinite().all(1)
        raise ValueError(
            f"{where} returned NaN or Inf for sample {int(bad.nonzero()[0])}."
        )
    serves = run.record is not None and not (writes or drawn)
    return Checked(output, run.graph_bytes, run if serves else None)


def _check_dtypes(model: FunctionalModel, index: int, X: Any) -> None:
    """Raise an error if inputs are in another precision than the parameters."""
    found = [leaf.dtype for leaf in leaves(X) if isinstance(leaf, Tensor)]
    # Integers beside numbers in the right precision are indices.
    found.sort(key=lambda dtype: not dtype.is_floating_point)
    if found and model.dtype not in found:
        raise TypeError(
            f"data: the inputs of batch {index} are {found[0]}, the parameters "
            f"{model.dtype}, and the model fails. Convert one to the other, "
            "model.double() or X.float()."
        )


def _depends_on_params(model: FunctionalModel, output: Tensor) -> bool:
    """Whether a backward pass from the output would get to a parameter."""
    # A graph ends in nodes that have the tensors to which gradients are added.
    ends = (getattr(node, "variable", None) for node in nodes(output))
    return not {*map(id, model.params.values())}.isdisjoint(map(id, ends))


def _check_unmoved(model: FunctionalModel, index: int, X: Any, output: Tensor) -> None:
    """Raise an error if outputs depend on what the model draws.

    Many models draw and do not use it: decisions of training mode, or random numbers
    after a seed of their own. The same arithmetic gives the same outputs, but for
    kernels that sum in any order.
    """
    tolerance = 100 * torch.finfo(output.dtype).eps * _largest(output)
    for seed in range(1, _STATES if index == 0 else 2):
        with as_guest(output.device):
            _seed(seed, output.device)
            again = model(model.params, X).detach()
        if again.shape != output.shape or _largest(again - output) > tolerance:
            raise ValueError(
                f"model: on batch {index} it drew random numbers, so it is not one "
                "function. Call model.eval(), or fix what is random (functional "
                "dropout, noise)."
            )


def independent_samples(
    model: FunctionalModel, X: Any, output: Tensor, ways: Sequence[Samples]
) -> Samples:
    """Return where samples are, such that they have the same outputs beside others.

    Two groups of samples are evaluated alone. A model that does not run on these, since
    it runs on batches of one size only, is evaluated on the whole batch with samples of
    the group in all places of others, which costs two forward passes of the batch.

    Args:
        model: The model.
        X: The inputs of a batch of two samples at least.
        output: Its outputs.
        ways: Where samples may be, the likeliest first.

    Raises:
        ValueError: If samples depend on each other in all ways, or if the model can be
            asked in none.
    """
    n, device = len(output), output.device
    failures: dict[Samples, Exception] = {}
    asked = list(ways)
    with as_guest(device):
        # Draws from a fork of the generator, which nobody sees, are found out as well.
        _seed(0, device)
        for questions in (_alone, _in_company):
            for samples in list(asked):
                try:
                    answers = [
                        _same_among(model, X, output, samples, index, places)
                        for index, places in questions(n)
                    ]
                    if all(read(answers)):
                        return samples
                # Whatever it raises: it may be since it takes other batches only.
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    failures[samples] = error
                    continue
                asked.remove(samples)
        model(model.params, X)  # an error that it always raises is to be seen
        if ways[0] not in asked:
            raise _dependent(model, X, output)
    failure = failures[ways[0]]
    raise ValueError(
        "model: it does not run on its batch when samples stand in the places of "
        f"others ({type(failure).__name__}: {failure}), so nobody can tell whether it "
        "treats samples independently. If samples are not where they were looked for, "
        "say where: sample_axis=, or take= and count=. If it is known to, give "
        "check=False."
    ) from failure


def _dependent(model: FunctionalModel, X: Any, output: Tensor) -> ValueError:
    """What to say of a model whose samples have other outputs beside others."""
    if not same_outputs(model(model.params, X), output):
        return ValueError(
            "model: it has other outputs when it is evaluated a second time, "
            "so it is not one function. Look for a generator of its own, and "
            "for what it counts or keeps from call to call."
        )
    return dependent()


def dependent() -> ValueError:
    """What to say of samples that have other outputs beside others."""
    return ValueError(
        "model: its outputs for a sample depend on the other samples of the "
        "batch, so per-sample curvature is undefined. Look for normalisations "
        "or means over the batch, and for inputs without a sample axis, such "
        "as a mask, that are as long as the batch: sample_axis= says where samples "
        "are. (check=False turns this check off.)"
    )


def _same_among(
    model: FunctionalModel,
    X: Any,
    output: Tensor,
    samples: Samples,
    index: Tensor,
    places: Tensor | slice,
) -> Tensor:
    """Whether samples put together have their outputs, in some places of that batch."""
    found = model(model.params, samples.take(X, index)).detach()
    if len(found) != len(index):
        raise ValueError(
            f"it returned outputs {list(found.shape)} for {len(index)} samples"
        )
    if found.shape[1:] != output.shape[1:]:
        raise ValueError(
            f"it returned outputs of shape {list(found.shape[1:])} for some samples, "
            f"and of {list(output.shape[1:])} among others. Where it pads them to the "
            "longest of its batch, let it return a list with those of each sample, or "
            "pad to one length"
        )
    own = index[places].to(output.device)
    if isinstance(places, Tensor):
        places = places.to(output.device)
    return agree(found[places], output[own])


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


# Samples to be put together, and the places of them whose outputs are compared.
Question = tuple[Tensor, Tensor | slice]


def _alone(n: int) -> Iterator[Question]:
    """Two groups without a sample in common, an eighth of the batch each.

    At most one of them holds the largest entry of anything. No sample of theirs stands
    beside its neighbour, its mirror image, or the one half of the batch further.
    """
    for group in _groups(n):
        yield torch.tensor(group, device="cpu"), slice(None)


@functools.lru_cache(maxsize=16)
def _groups(n: int) -> tuple[list[int], list[int]]:
    more = max(1, n // 8 - 1)
    inner = range(2, max(n - 2, 2))
    chosen = random.Random(0).sample(inner, min(2 * more + 1, len(inner)))
    chosen = [i for i in chosen if i != n // 2]
    # Some models take sorted batches only.
    first, second = [0, *chosen[:more]], [*chosen[more : 2 * more], n - 1]
    return sorted(first), sorted(second)


def _in_company(n: int) -> Iterator[Question]:
    """The two halves of the batch, each in its places, with repetitions in the others.

    Places stay, and batches sorted by anything stay sorted.
    """
    mine = torch.zeros(n, dtype=torch.bool, device="cpu")
    mine[random.Random(0).sample(range(n), n // 2)] = True
    mine[0], mine[1], mine[n // 2], mine[n - 1] = True, False, False, False
    places = torch.arange(n, device="cpu")
    first, second = places[mine], places[~mine]
    yield first[torch.searchsorted(first, places, right=True) - 1], first
    yield second[torch.searchsorted(second, places)], second


def _seed(seed: int, device: torch.device) -> None:
    """Put the generators of torch, which a guest puts back, into another state."""
    # Not by torch.manual_seed, which reaches the generators of all devices.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    torch.random.set_rng_state(generator.get_state())
    if device.type == "cuda":
        own = torch.Generator(device=device).manual_seed(seed)
        torch.cuda.set_rng_state(own.get_state(), device)
