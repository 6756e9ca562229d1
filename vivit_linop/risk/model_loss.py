"""The loss that a model computes itself, from the labels in its batch: which it is.

Models of language libraries return ``.loss`` beside ``.logits``. That value alone has
no Hessian in the outputs. But it is one of a few losses of torch, of the logits and
labels in one of a few forms. The one that has the model's value is taken; on every
batch it must have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.devices import tolerated
from vivit_linop.modes import as_guest
from vivit_linop.risk.data.batches import LABELS, Target, as_batches
from vivit_linop.risk.data.containers import described
from vivit_linop.risk.model.functional import FunctionalModel, elsewhere
from vivit_linop.risk.model.original import Params, Predict
from vivit_linop.risk.passes import iterate, replay


@dataclass(frozen=True)
class Form:
    """A loss of logits and labels that are brought into its form.

    Attributes:
        loss: The loss.
        shifted: Whether logits are those of the next label.
        classes_last: Whether classes are their last axis, instead of axis 1.
        single: Whether their last axis has one entry, which labels have not.
    """

    loss: nn.Module
    shifted: bool = False
    classes_last: bool = False
    single: bool = False

    def outputs(self, logits: Tensor) -> Tensor:
        """Return the outputs that the loss takes."""
        if self.shifted:
            logits = logits[:, :-1]
        if self.classes_last:
            logits = logits.movedim(-1, 1)
        return logits.squeeze(-1) if self.single else logits

    def targets(self, labels: Tensor) -> Tensor:
        """Return the targets that it takes."""
        return labels[:, 1:] if self.shifted else labels


@dataclass(frozen=True)
class OutputOf:
    """How a model is called for something that it returns.

    Attributes:
        predict: How it is called, if the user says it.
        name: What of its output is wanted.
        form: What becomes of logits.
    """

    predict: Predict | None
    name: str
    form: Form | None = None

    def __call__(self, model: nn.Module, X: Any) -> Tensor:
        """Return it, the loss as ``[1]``."""
        if self.predict is not None:
            output = self.predict(model, X)
        else:
            output = model(**X) if isinstance(X, Mapping) else model(X)
        found = getattr(output, self.name, None)
        if found is None and isinstance(output, Mapping):
            found = output.get(self.name)
        if not isinstance(found, Tensor):
            raise TypeError(
                "loss: 'model' is for models that return an object with .loss and "
                ".logits, or a mapping with both, where their batch has labels, got "
                f"{described(output)}."
            )
        if self.name == "loss":
            return found.reshape(1)
        return found if self.form is None else self.form.outputs(found)


@dataclass(frozen=True)
class Labels:
    """Where the targets are in a batch.

    Attributes:
        target: What finds them, if the user says it.
        form: What becomes of them.
    """

    target: Target | None
    form: Form | None = None

    def __call__(self, batch: Any) -> Any:
        """Return the targets."""
        if self.target is not None:
            labels = self.target(batch)
        elif isinstance(batch, Mapping) and LABELS in batch:
            labels = batch[LABELS]
        else:
            raise TypeError(
                "loss: 'model' needs batches that are mappings with 'labels', or "
                f"target=, got {described(batch)}."
            )
        return labels if self.form is None else self.form.targets(labels)


def forms_of(logits: Tensor, labels: Tensor) -> Iterator[Form]:
    """Yield what a loss of logits and labels may be, by their shapes."""
    one_more = logits.ndim == labels.ndim + 1
    if labels.is_floating_point():
        single = one_more and logits.shape[-1] == 1
        if single or logits.shape == labels.shape:
            yield Form(nn.MSELoss(), single=single)
            yield Form(nn.BCEWithLogitsLoss(), single=single)
    elif one_more and logits.shape[:-1] == labels.shape:
        last = logits.ndim > 2
        yield Form(nn.CrossEntropyLoss(), classes_last=last)
        if last:
            yield Form(nn.CrossEntropyLoss(), shifted=True, classes_last=True)


class ModelLoss:
    """The loss of a model, found on its first batch; arguments are those of a risk.

    Attributes:
        form: What the loss is.
        predict: Calls the model for the outputs that the loss takes.
        target: Finds the targets that it takes.
    """

    def __init__(
        self,
        loss: str,
        data: Any,
        model: Any,
        params: Any,
        predict: Predict | None,
        target: Target | None,
        dtype: torch.dtype | None,
    ) -> None:
        if loss != "model" or not isinstance(model, nn.Module):
            raise TypeError(
                "loss: a torch.nn loss, a function (output, target) -> scalar or, for "
                f"a module, 'model', got {loss!r}."
            )
        batches = replay(as_batches(data, target), torch.random.get_rng_state())
        batch = next(batches, None)
        if batch is None:
            raise ValueError("data: is empty, there is not one batch.")
        self._value = FunctionalModel(model, params, OutputOf(predict, "loss"), dtype)
        logits_of = FunctionalModel(model, params, OutputOf(predict, "logits"), dtype)
        first = next(iter(self._value.params.values()))
        self._device, whole = first.device, Labels(target)
        ((batch, labels),) = iterate([batch], first.device, first.dtype, whole)
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"loss: labels must be one tensor, got {described(labels)}."
            )
        shape, forms = self._forms(logits_of, batch, labels)
        if not forms:
            raise ValueError(
                f"loss: that of the model, {float(self.value(batch)):.6g} on the first "
                "batch, is neither cross-entropy (nor that of the next label), mean "
                f"squared error nor binary cross-entropy of its logits {shape} and "
                f"labels {list(labels.shape)}, at these parameters and others. Give "
                "the loss, and target= for the labels."
            )
        self.form = forms[0]
        self.predict = OutputOf(predict, "logits", self.form)
        self.target = Labels(target, self.form)

    def _forms(
        self, logits_of: FunctionalModel, batch: Any, labels: Tensor
    ) -> tuple[list[int], list[Form]]:
        """Return the shape of the logits, and which forms have the model's value.

        Elsewhere too: terms beside them, and what tells them apart, may vanish where
        parameters are zero.
        """
        params = self._value.params
        logits = self._logits(logits_of, params, batch)
        forms = [*forms_of(logits, labels)]
        forms = self._fitting(forms, logits, labels, self.value(batch))
        # Whatever a model says to parameters that it has not.
        with tolerated(Exception):
            params = elsewhere(params)
            value = self.value(batch, params)
            if value.isfinite():
                found = self._logits(logits_of, params, batch)
                forms = self._fitting(forms, found, labels, value)
        return list(logits.shape), forms

    def _logits(self, model: FunctionalModel, params: Params, batch: Any) -> Tensor:
        with as_guest(self._device):
            return model(params, batch).detach()

    def _fitting(
        self, forms: list[Form], logits: Tensor, labels: Tensor, value: Tensor
    ) -> list[Form]:
        return [
            form
            for form in forms
            if _same(form.loss(form.outputs(logits), form.targets(labels)), value)
        ]

    def value(self, batch: Any, params: Params | None = None) -> Tensor:
        """Return what the model says, by default at the parameters of the risk."""
        params = self._value.params if params is None else params
        with as_guest(self._device):
            return self._value(params, batch).detach().squeeze(0)

    def check(self, index: int, batch: Any, found: Tensor) -> None:
        """Raise an error if the model says something else of a batch."""
        value = self.value(batch)
        if not _same(found, value):
            raise ValueError(
                f"loss: that of the model is {float(value):.6g} on batch {index}, "
                f"where {self.form.loss} is {float(found):.6g}; on the first batch "
                "they are the same. Give the loss, and target= for the labels."
            )


def _same(found: Tensor, value: Tensor) -> bool:
    # The same sum in another order: more is another term, such as those that balance
    # experts, with a small factor.
    tolerance = 100 * torch.finfo(value.dtype).eps
    return bool((found - value).abs() <= tolerance * (1.0 + value.abs()))
