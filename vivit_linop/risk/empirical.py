"""The empirical risk: a model, a loss and data, as one function of the parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from vivit_linop.risk.data import (
    Batch,
    as_batches,
    iterate,
    sample_axes,
    select_samples,
    take,
)
from vivit_linop.risk.known_losses import as_output_loss
from vivit_linop.risk.linearization import Linearization
from vivit_linop.risk.losses import LossCallable, OutputLoss
from vivit_linop.risk.model import (
    FunctionalModel,
    ModelFunction,
    Params,
    Predict,
    as_guest,
    random_state,
    strided,
)


class EmpiricalRisk:
    """The empirical risk L(θ) = r Σ_n ℓ(f(x_n, θ), y_n), n = 1..N.

    r is 1/N for ``reduction="mean"`` and 1 for ``"sum"``. Whatever else torch's loss
    divides by (the C outputs of ``nn.MSELoss``, class weights) is part of ℓ_n, summed
    over all of the data: a risk does not depend on how the data are cut into batches.

    The parameters, frozen ones too, are copied at construction. Operators made from a
    risk stay the same matrices when training goes on; for new parameters make a new
    risk. Construction passes over the data once (forward), and keeps the outputs.

    Args:
        model: An ``nn.Module``, or a callable ``(params, x) -> output`` with ``params``
            a dict of tensors. It must treat samples independently (for modules: call
            ``model.eval()``). A module is called with ``model(x)``, ``model(*x)`` for
            a tuple, ``model(**x)`` for a mapping. Of an output with ``.logits`` these
            are taken. ``torch.compile`` and ``DistributedDataParallel`` are unwrapped.
        loss: ``nn.MSELoss``, ``nn.CrossEntropyLoss``, ``nn.NLLLoss`` of
            log-probabilities (with the Hessian of the cross-entropy),
            ``nn.BCEWithLogitsLoss``, ``nn.GaussianNLLLoss`` with targets
            ``torch.stack([y, variance], dim=-1)``, ``nn.PoissonNLLLoss``,
            ``nn.HuberLoss``, ``nn.SmoothL1Loss`` (closed-form Hessians, all options),
            or any callable ``(output, target) -> scalar`` that is a mean or sum over
            samples (Hessians by autograd). Classes are axis 1, as in torch.
        data: One pair ``(X, y)``, or a re-iterable of them such as a ``DataLoader``
            without shuffling. X may be a tensor, a tuple or a mapping.
        params: None for all parameters that require grad, an iterable of the model's
            ``Parameter``s, or a dict from names to tensors.
        reduction: ``"mean"`` or ``"sum"``; needed for a loss without this attribute.
        predict: A function ``(model, X) -> output`` for a module that is to be called,
            or whose output is to be used, in another way; X comes as it is in the data.
        check: Whether to check that samples are independent, in the model and in a
            loss that is not one of torch's above; costs a forward pass of a few
            samples. Without it, what mixes samples gives numbers without a meaning.
        memory: The bytes that kept linearisations of the net may take; those of
            batches beyond it are made anew for each product. By default a quarter of
            the memory that is free on the device.

    Attributes:
        num_params: D, the number of entries of all parameters.
        num_samples: N.
        num_outputs: C, the number of outputs of one sample.
        params: Copies of the parameters, by name.
        dtype: The torch dtype of the parameters.
        device: Their device.
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For empty or inconsistent data, parameters that are not the
            model's, modules in training mode where that matters, NaN or Inf in
            parameters, outputs or loss, a model that draws random numbers, and a model
            whose output is not differentiable in the parameters.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> X, y = torch.rand(8, 3), torch.randint(2, (8,))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 2), nn.CrossEntropyLoss(), (X, y))
        >>> risk.num_params, risk.num_samples, risk.num_outputs
        (8, 8, 2)
    """

    def __init__(
        self,
        model: nn.Module | ModelFunction,
        loss: nn.Module | LossCallable,
        data: Any,
        params: Any | None = None,
        *,
        reduction: str | None = None,
        predict: Predict | None = None,
        check: bool = True,
        memory: int | None = None,
    ) -> None:
        if not isinstance(check, bool):
            raise TypeError(f"check: True or False, got {check!r}.")
        self.by_sample: list[bool] = []
        self._check = check
        self._setup(
            FunctionalModel(model, params, predict),
            as_output_loss(loss, reduction, check),
            as_batches(data),
            memory,
        )

    @torch.inference_mode(mode=False)
    def _setup(
        self,
        model: FunctionalModel,
        loss: OutputLoss,
        batches: Iterable[Any],
        memory: int | None,
    ) -> None:
        if memory is not None and not (isinstance(memory, Real) and memory >= 0):
            raise ValueError(f"memory: a number of bytes, at least 0, got {memory!r}.")
        self.model, self.loss, self.memory = model, loss, memory
        self._kept: dict[int, Linearization] = {}
        self._batches = batches
        self._data_rng = torch.random.get_rng_state()
        self.params: Params = model.params
        first = next(iter(self.params.values()))
        self.dtype, self.device = first.dtype, first.device
        self.reduction = loss.reduction
        self.sizes = [p.numel() for p in self.params.values()]
        self.num_params = sum(self.sizes)
        self._pass_over_data()

    def _pass_over_data(self) -> None:
        """Count, check and evaluate everything once."""
        self.outputs: list[Tensor] = []
        self._targets: list[Tensor] = []
        total = weight = torch.zeros((), dtype=self.dtype, device=self.device)
        unchecked = self._check
        for index, (X, y) in enumerate(self.batches()):
            output = self._checked_output(index, X, y)
            # A tensor that numbers samples does so in every batch.
            axes = sample_axes(X, len(y))
            known = self.by_sample or axes
            self.by_sample = [a and b for a, b in zip(known, axes, strict=True)]
            if unchecked and len(y) > 1:
                unchecked = False
                self._check_independent(X, output)
            self.loss.check(*self._with_previous(output, y))
            with torch.no_grad():
                total = total + self.loss.total(output, y)
                weight = weight + self.loss.weight(output, y)
            self.outputs.append(output)
            self._targets.append(y.clone())  # the user's may change
        if not self.outputs:
            raise ValueError("data: is empty, there is not one batch.")
        self.batch_sizes = [len(output) for output in self.outputs]
        self.num_samples = sum(self.batch_sizes)
        self.num_outputs = self.outputs[0][0].numel()
        if self.reduction == "mean" and not weight > 0:
            raise ValueError(
                "data: the loss divides by zero, every target is ignored or has weight "
                "zero."
            )
        divisor = weight.item() if self.reduction == "mean" else 1.0
        # L = scale Σ ℓ with the unscaled ℓ of the loss; r = reduction_factor.
        self.scale = 1.0 / divisor
        self.reduction_factor = (
            1.0 / self.num_samples if self.reduction == "mean" else 1.0
        )
        self._value = total * self.scale
        if not math.isfinite(self._value.item()):
            raise ValueError(f"loss: its value is {self._value.item()} on the data.")

    def _checked_output(self, index: int, X: Any, y: Tensor) -> Tensor:
        with as_guest(self.device):
            before = random_state(self.device)
            # The first batch also shows whether the output can be differentiated.
            with torch.set_grad_enabled(index == 0):
                output = self.model(self.params, X)
            drawn = not torch.equal(before, random_state(self.device))
        where = f"model: on batch {index} it"
        if drawn:
            raise ValueError(
                f"{where} drew random numbers, so it is not one function. Call "
                "model.eval(), or fix what is random (functional dropout, noise)."
            )
        if output.ndim == 0 or len(output) != len(y) or output.numel() == 0:
            raise ValueError(
                f"{where} returned outputs {list(output.shape)} for {len(y)} samples; "
                "the first axis must count samples."
            )
        if output.dtype != self.dtype or output.device != self.device:
            raise ValueError(
                f"{where} returned {output.dtype} on {output.device}, its parameters "
                f"are {self.dtype} on {self.device}. Convert the model and the data "
                "alike."
            )
        if index == 0 and not self._depends_on_params(output):
            raise ValueError(
                "model: its output is not differentiable in the parameters (it does "
                "not depend on them, or was detached from them)."
            )
        if index and output.shape[1:] != self.outputs[0].shape[1:]:
            raise ValueError(
                f"{where} returned outputs of shape {list(output.shape[1:])} for a "
                f"sample, before it was {list(self.outputs[0].shape[1:])}."
            )
        if not output.detach().isfinite().all():
            bad = ~output.detach().reshape(len(output), -1).isfinite().all(1)
            raise ValueError(
                f"{where} returned NaN or Inf for sample {int(bad.nonzero()[0])}."
            )
        return output.detach()

    def _depends_on_params(self, output: Tensor) -> bool:
        """Whether a backward pass from the output would get to a parameter."""
        params = self.params.values()
        ends = {torch.autograd.graph.get_gradient_edge(p).node for p in params}
        todo, seen = [output.grad_fn], {None, output.grad_fn}
        while todo:
            node = todo.pop()
            if node in ends:
                return True
            following = [] if node is None else [n for n, _ in node.next_functions]
            todo += [n for n in following if n not in seen]
            seen.update(following)
        return False

    def _with_previous(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Put a sample that is alone in its batch beside those of the batch before.

        Whether a loss is a sum over samples cannot be seen on one of them.
        """
        if len(y) > 1 or not self.outputs or self._targets[-1].shape[1:] != y.shape[1:]:
            return output, y
        return torch.cat([self.outputs[-1], output]), torch.cat([self._targets[-1], y])

    def _check_independent(self, X: Any, output: Tensor) -> None:
        """Raise an error if some samples have other outputs without the others."""
        n = len(output)
        some = torch.arange(n // 2, min(n // 2 + 2, n))
        # A model that runs on batches of one size only is asked about one sample
        # among copies of it; if it does not run on these either, it cannot be asked.
        for index in (some, torch.full((n,), n // 2)):
            part = take(X, index, self.by_sample)
            try:
                with as_guest(self.device), torch.no_grad():
                    others = self.model(self.params, part)
            except Exception:
                continue
            if not self._equal(others, output[index.to(self.device)]):
                raise ValueError(
                    "model: its outputs for a sample depend on the other samples of "
                    "the batch, so per-sample curvature is undefined. Look for "
                    "normalisations or means over the batch, and for inputs without a "
                    "sample axis, such as a mask, that are as long as the batch. "
                    "(check=False turns this check off.)"
                )
            return

    # Data -------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Pass over the data.

        Every pass starts from one state of the random number generator, so that a
        shuffling ``DataLoader`` gives the same batches again; the caller's state is
        as before.
        """
        state = self._data_rng
        iterator = iterate(self._batches, self.device, self.dtype)
        while True:
            with torch.random.fork_rng([]):
                torch.random.set_rng_state(state)
                batch = next(iterator, None)
                state = torch.random.get_rng_state()
            if batch is None:
                return
            yield batch

    def _own_batches(self) -> Iterator[Batch]:
        """The batches with the targets of construction."""
        for (X, _), y in zip(self.batches(), self._targets, strict=True):
            yield X, y

    def targets(self) -> list[Tensor]:
        """The targets of each batch."""
        return self._targets

    def subset(self, indices: Sequence[int] | Tensor) -> EmpiricalRisk:
        """Return the risk of some samples only: their mean (or sum).

        Args:
            indices: Distinct numbers of samples, 0..N−1, counted over all batches.

        Raises:
            ValueError: If it is empty, out of range or repeats a sample.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> risk.subset([0, 5]).num_samples
            2
        """
        given = torch.as_tensor(indices)
        if given.numel() == 0:
            raise ValueError("indices: is empty, a subset has at least one sample.")
        if given.ndim != 1 or given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(
                f"indices: a list of integers, got {list(given.shape)} {given.dtype}."
            )
        if given.min() < 0 or given.max() >= self.num_samples:
            raise ValueError(
                f"indices: must lie in 0..{self.num_samples - 1}, got "
                f"{int(given.min())}..{int(given.max())}."
            )
        if len(given.unique()) < len(given):
            raise ValueError("indices: a sample is listed twice.")
        risk = object.__new__(EmpiricalRisk)
        risk.by_sample, risk._check = self.by_sample, self._check
        risk._setup(
            self.model,
            self.loss,
            select_samples(self._own_batches(), given.tolist(), self.by_sample),
            self.memory,
        )
        # Gathering the samples was one more pass over the data.
        if not self._equal(torch.cat(self.outputs)[given], torch.cat(risk.outputs)):
            raise ValueError(
                "data: are not what they were when the risk was built, or the model is "
                "another function. Give data that are the same in every pass."
            )
        return risk

    def linearizations(self) -> Iterator[Linearization]:
        """Yield the linearisation of each batch, kept while the memory budget lasts.

        Raises:
            ValueError: If the outputs differ from those at construction: the data are
                not the same in every pass.
        """
        if len(self._kept) == len(self.batch_sizes):
            yield from self._kept.values()
            return
        budget = self.memory
        if budget is None:
            budget = free_memory(self.device) // 4
        budget -= sum(kept.nbytes for kept in self._kept.values())
        for index, (X, _) in enumerate(self.batches()):
            if index in self._kept:
                yield self._kept[index]
                continue
            linearization = Linearization(
                functools.partial(self._evaluate, X), self.params
            )
            self.check_outputs(index, linearization.outputs)
            # The batches come in order, so the kept ones stay ordered.
            keep = index == len(self._kept) and linearization.nbytes <= budget
            linearization.traced = keep  # a trace pays when it is used again
            if keep:
                self._kept[index] = linearization
                budget -= linearization.nbytes
            yield linearization

    def _evaluate(self, X: Any, params: Params) -> Tensor:
        return self.model(params, X)

    def _equal(self, left: Tensor, right: Tensor) -> bool:
        """Whether outputs are the same but for the order of summation."""
        if left.shape != right.shape:
            return False
        tolerance = 10 * torch.finfo(self.dtype).eps ** 0.5
        size = 1.0 + left.detach().abs().max()
        return bool((left - right).detach().abs().max() <= tolerance * size)

    def check_outputs(
        self, index: int, outputs: Tensor, samples: Tensor | None = None
    ) -> None:
        """Raise an error if outputs differ from those at construction.

        Args:
            index: The batch.
            outputs: Those of the batch.
            samples: The samples of the batch that they belong to, None for all.

        Raises:
            ValueError: If they differ: the data are not the same in every pass.
        """
        before = self.outputs[index] if index < len(self.outputs) else None
        if before is not None and samples is not None:
            before = before[samples.to(before.device)]
        if before is None or not self._equal(before, outputs.reshape(before.shape)):
            raise ValueError(
                f"data: batch {index} is not what it was when the risk was built. An "
                "operator is one matrix: give a loader without shuffling and random "
                "augmentations, and do not change the data in place."
            )

    # Values -------------------------------------------------------------------------

    def value(self) -> Tensor:
        """Return L(θ), a scalar tensor. Known since construction."""
        return self._value.clone()

    def gradient(self) -> Tensor:
        """Return ∇L(θ), ``[D]``. One forward and one backward pass over the data."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return L(θ) and ∇L(θ), ``[D]``, from one pass over the data."""
        value = torch.zeros((), dtype=self.dtype, device=self.device)
        gradient = torch.zeros(self.num_params, dtype=self.dtype, device=self.device)
        parameters = list(self.params.values())
        for index, (X, _) in enumerate(self.batches()):
            with as_guest(self.device):
                output = self.model(self.params, X)
                self.check_outputs(index, output)
                total = self.loss.total(output, self._targets[index]) * self.scale
                gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            value += total.detach()
            gradient += self.flatten(gradients)
        return value, gradient

    # Parameters ---------------------------------------------------------------------

    def flatten(
        self, tensors: Iterable[Tensor | None] | Mapping[str, Tensor | None]
    ) -> Tensor:
        """Turn tensors in the shapes of the parameters into a vector or columns.

        Args:
            tensors: One for each parameter, in the order of ``params`` or by name:
                ``[*p]`` each, or ``[K, *p]`` each. None stands for zeros ``[*p]``.

        Returns:
            ``[D]``, or ``[D, K]``.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> risk.flatten([torch.zeros(5, 1, 3), torch.ones(5, 1)]).shape
            torch.Size([4, 5])
        """
        if isinstance(tensors, Mapping):
            if set(tensors) != set(self.params):
                raise ValueError(
                    f"tensors: names are {list(tensors)}, the parameters are "
                    f"{list(self.params)}."
                )
            tensors = [tensors[name] for name in self.params]
        given = list(tensors)
        if len(given) != len(self.params):
            raise ValueError(
                f"tensors: needs one for each of {len(self.params)} parameters, got "
                f"{len(given)}."
            )
        parts: list[Tensor] = []
        columns: set[int | None] = set()
        for tensor, (name, p) in zip(given, self.params.items(), strict=True):
            tensor = strided(tensor)
            if tensor is None:
                tensor = torch.zeros_like(p)
            if tensor.shape == p.shape:
                parts.append(tensor.reshape(1, -1))
                columns.add(None)
            elif tensor.shape[1:] == p.shape and tensor.ndim > 0:
                parts.append(tensor.reshape(len(tensor), -1))
                columns.add(len(tensor))
            else:
                raise ValueError(
                    f"tensors: for {name!r} needs {list(p.shape)} or "
                    f"[K, …] of that, got {list(tensor.shape)}."
                )
        if len(columns) > 1:
            raise ValueError("tensors: all need the same leading axis, or none.")
        flat = torch.cat(parts, dim=1).detach()
        return flat.squeeze(0) if columns == {None} else flat.T

    def unflatten(self, vec: Tensor) -> list[Tensor]:
        """Turn a vector or columns into tensors in the shapes of the parameters.

        Args:
            vec: ``[D]``, or ``[D, K]``.

        Returns:
            One for each parameter, in order: ``[*p]``, or ``[K, *p]``.
        """
        if vec.ndim not in (1, 2) or len(vec) != self.num_params:
            raise ValueError(
                f"vec: needs [{self.num_params}] or [{self.num_params}, K], got "
                f"{list(vec.shape)}."
            )
        leading = () if vec.ndim == 1 else (vec.shape[1],)
        parts = vec.split(self.sizes)
        return [
            (part if vec.ndim == 1 else part.T).reshape((*leading, *p.shape))
            for part, p in zip(parts, self.params.values(), strict=True)
        ]

    def __repr__(self) -> str:
        """Say what it is made of."""
        return (
            f"<EmpiricalRisk: {self.num_params} parameters, {self.num_samples} samples "
            f"in {len(self.batch_sizes)} batch(es), {self.num_outputs} output(s), "
            f"{type(self.loss).__name__} ({self.reduction}), {self.dtype}, "
            f"{self.device}>"
        )


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def as_risk(
    risk_or_model: Any,
    loss: Any = None,
    data: Any = None,
    params: Any | None = None,
) -> EmpiricalRisk:
    """Return the risk that an operator's constructor was given, or build it.

    Raises:
        TypeError: If it is neither a risk nor a model with a loss and data.
    """
    if isinstance(risk_or_model, EmpiricalRisk):
        if loss is not None or data is not None or params is not None:
            raise TypeError(
                "risk: with an EmpiricalRisk, loss, data and params are already given."
            )
        return risk_or_model
    if loss is None or data is None:
        raise TypeError(
            "risk: an EmpiricalRisk, or a model with a loss and data, got "
            f"{type(risk_or_model).__name__} alone."
        )
    return EmpiricalRisk(risk_or_model, loss, data, params)
