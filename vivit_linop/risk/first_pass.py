"""The first pass over the data: the outputs of the model, checked, and the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vivit_linop.devices import explained, tolerated
from vivit_linop.modes import guests_to_come
from vivit_linop.risk.data import fingerprint
from vivit_linop.risk.data.batches import joined_targets
from vivit_linop.risk.data.containers import copied
from vivit_linop.risk.data.sample_search import Search
from vivit_linop.risk.independence import OutputsOfOtherOrder, independent_samples
from vivit_linop.risk.kept import Run
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.certificates import check_loss, targets_of
from vivit_linop.risk.losses.derived import LossOfItems
from vivit_linop.risk.model.functional import FunctionalModel
from vivit_linop.risk.model.memory_format import image_shapes
from vivit_linop.risk.passes import Cuts, Evaluated, ItemByItem, Passes, does_not_fit


@dataclass
class Seen:
    """What one process has seen of its samples.

    Attributes:
        loss: The loss, in the form that the outputs need.
        total: Σ ℓ without a scale.
        weight: The sum of the weights.
        outputs: Those of each batch.
        targets: Those of each batch; copies, since the user's may change.
        graph_bytes: What the graph of each batch's outputs takes.
        run: The run of the net on the only batch, if it may serve as another.
        sums: Sums over the inputs of each batch, by which a change of them is seen.
    """

    loss: OutputLoss
    total: Tensor
    weight: Tensor
    outputs: list[Tensor] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    graph_bytes: list[int] = field(default_factory=list)
    sums: list[fingerprint.Sums] = field(default_factory=list)
    run: Run | None = None


def first_pass(
    model: FunctionalModel, loss: OutputLoss, passes: Passes, check: bool, twice: bool
) -> Seen:
    """Evaluate a model and a loss on all batches, and learn where samples are.

    Raises:
        ValueError: If the data (passed over twice, if wanted), the outputs or the loss
            are not what they must be.
    """
    fingerprints = passes.fingerprints() if twice else None
    with guests_to_come(model.device):
        # Samples are checked as they are given, which shows what an order does.
        model.channels_last &= check
        try:
            seen = _evaluate(model, loss, passes, check, fingerprints)
        except (ItemByItem, OutputsOfOtherOrder) as found:
            # Outputs of the batches before come in that way, too.
            passes.cuts = Cuts(by_items=isinstance(found, ItemByItem))
            model.channels_last = False
            seen = _evaluate(model, loss, passes, check, fingerprints)
    passes.number = len(seen.outputs)
    return seen


def _evaluate(
    model: FunctionalModel,
    loss: OutputLoss,
    passes: Passes,
    check: bool,
    fingerprints: list[bytes] | None,
) -> Seen:
    # Of no samples, and not for a GPU to be told.
    zero = torch.zeros((), dtype=model.dtype, device="cpu")
    seen = Seen(loss, zero, zero)
    example: tuple[Any, Tensor] | None = None
    shapes = set[tuple[torch.Size, ...]]()
    for X, y, checked in _evaluated(model, seen, passes, check, fingerprints):
        if model.channels_last:
            shapes.add(image_shapes(X))
            if len(shapes) > 1:
                raise OutputsOfOtherOrder  # of one of these nothing would be shown
        output = checked.outputs
        n = len(output)
        # The largest batch shows the most of what mixes samples.
        if n > (1 if example is None else len(example[1])):
            # Loaders may have the next batch in the same memory.
            example = X if isinstance(passes.data, list) else copied(X), output
        y = copied(y)  # before the loss has it, which may write into it
        check_loss(seen.loss, *_with_previous(seen, output, y), check)
        with torch.no_grad():
            total, weight = (
                of(output, y) for of in (seen.loss.total, seen.loss.weight)
            )
        seen.total = seen.total + total if seen.outputs else total
        seen.weight = seen.weight + weight if seen.outputs else weight
        seen.outputs.append(output)
        seen.graph_bytes.append(checked.graph_bytes)
        # Nobody else has it, so that it goes before the next batch is evaluated.
        seen.run, checked.run = checked.run, None
        seen.targets.append(y)
        seen.sums.append(fingerprint.Sums(X))
    # All batches together show where samples may be.
    if example is None and model.channels_last:
        raise OutputsOfOtherOrder  # which nothing has shown not to be
    if check and example is not None:
        X, output = example
        with explained(does_not_fit, model, passes.search, X, len(output)):
            found = independent_samples(model, X, output, passes.search.ways)
        passes.search = Search.known(found)
    return seen


def _evaluated(
    model: FunctionalModel,
    seen: Seen,
    passes: Passes,
    check: bool,
    fingerprints: list[bytes] | None,
) -> Iterator[Evaluated]:
    """Evaluate all batches, cut where samples have outputs of several shapes.

    Targets are as the loss computes with them.
    """
    search = passes.search
    for number, (X, y) in enumerate(passes.batches("risk", fingerprints)):
        seen.run = None  # several would take more memory than one
        n = search.number(number, X, y)
        done = len(seen.outputs)
        with (
            explained(does_not_fit, model, search, X, n),
            search.agreeing(number, n, y),
        ):
            for part, targets, checked in passes.cuts.found(
                model, search, number, (X, y), n, done, check
            ):
                if model.count and not isinstance(seen.loss, LossOfItems):
                    seen.loss = LossOfItems(seen.loss)
                if not seen.outputs and model.tree is not None:
                    seen.loss = seen.loss.of_several(model.tree)
                yield part, targets_of(seen.loss, targets, checked.outputs), checked


def _with_previous(seen: Seen, output: Tensor, y: Any) -> tuple[Tensor, Any]:
    """Put a sample that is alone in its batch beside those of the batch before.

    Whether a loss is a sum over samples cannot be seen on one of them.
    """
    if len(output) > 1 or not seen.outputs:
        return output, y
    with tolerated(RuntimeError):  # their shapes may differ
        outputs = torch.cat([seen.outputs[-1], output])
        return outputs, joined_targets([seen.targets[-1], y])
    return output, y
