"""The empirical risk: what a user gives, and what it becomes."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.arguments import check_flag, check_function, check_real
from vivit_linop.modes import uncompiled
from vivit_linop.ranks.group import as_ranks
from vivit_linop.risk.data.batches import Target, as_batches, without_targets
from vivit_linop.risk.data.containers import leaves
from vivit_linop.risk.data.distributed import check_is_whole, without_padding
from vivit_linop.risk.data.sample_search import Search, number_without_targets
from vivit_linop.risk.data.samples import Count, Take
from vivit_linop.risk.derived import DerivableRisk
from vivit_linop.risk.losses.autograd import LossCallable
from vivit_linop.risk.losses.registry import as_output_loss
from vivit_linop.risk.model.functional import FunctionalModel
from vivit_linop.risk.model.original import ModelFunction, Predict
from vivit_linop.risk.model_loss import ModelLoss
from vivit_linop.risk.passes import Cuts, Passes


class EmpiricalRisk(DerivableRisk):
    """The empirical risk L(θ) = r Σ_n ℓ(f(x_n, θ), y_n), n = 1..N.

    r is 1/N for ``reduction="mean"`` and 1 for ``"sum"``. Whatever else torch's loss
    divides by (the C outputs of ``nn.MSELoss``, class weights) is part of ℓ_n, summed
    over all of the data: a risk does not depend on how the data are cut into batches.

    The parameters, frozen ones too, are copied at construction. Operators made from a
    risk stay the same matrices when training goes on; :meth:`at` gives the risk at new
    ones. Construction passes over the data once (forward), and keeps the outputs
    ``[N, C]`` and the targets, but not the inputs: what is streamed may be of any
    length. Construction, ``gradient()`` and products with J, H and G need no other
    memory that grows with N, once the linearisations that are kept fill ``memory``.

    ``docs/models_and_losses.md`` lists all models, losses and data that it takes.

    Args:
        model: An ``nn.Module`` in evaluation mode, or a callable
            ``(params, x) -> output`` with ``params`` a dict of tensors. It must treat
            samples independently. A module is called with ``model(x)``, ``model(*x)``
            for a tuple, ``model(**x)`` for a mapping. Of an output with ``.logits``
            these are taken; several outputs go to the loss as they are. The risk is
            of the model as it is now, parameters, buffers, modes and attributes.
        loss: A loss of torch with a closed-form Hessian: ``nn.MSELoss``,
            ``nn.CrossEntropyLoss``, ``nn.NLLLoss``, ``nn.BCEWithLogitsLoss``,
            ``nn.GaussianNLLLoss``, ``nn.PoissonNLLLoss``, ``nn.HuberLoss``,
            ``nn.SmoothL1Loss``, ``nn.KLDivLoss``, or a function such as
            ``F.cross_entropy``, with options by ``functools.partial``; any callable
            ``(output, target) -> scalar`` that is a mean or sum over samples (Hessians
            by autograd); a :class:`vivit_linop.Loss`, which says more of it, or a
            :class:`vivit_linop.losses.Weighted` one. Classes are axis 1, as in torch.
            ``"model"`` for a model that computes its loss from ``labels``.
        data: One pair ``(X, y)``, or a re-iterable of them such as a ``DataLoader``
            without shuffling. X is whatever holds tensors, and reaches the model as the
            type that it is. A batch may also hold its targets: ``labels`` in a mapping,
            which the model then does not see, or an attribute ``y``.
        params: None for all parameters that require grad, an iterable of parameters
            of the model, or a dict from names to tensors.
        reduction: ``"mean"`` or ``"sum"``; needed for a loss without this attribute.
        predict: A function ``(model, X) -> output`` for a module that is to be called,
            or whose output is to be used, in another way.
        target: A function ``batch -> y`` for batches that hold their targets in
            another way; the whole batch is X then.
        sample_axis: The axis of samples in X: an integer, or a tree like X of integers
            and None, for what is the same for all samples. By default it is found.
        take: A function ``(X, index) -> X`` that takes some samples of an input, also
            of one that it has returned, where there is no such axis. ``index`` is a
            vector of integers on the host.
        count: With ``take``, a function ``X -> int`` that counts samples.
        check: Whether to check that samples are independent, in the model and in a
            loss that is not one of torch's above; costs a forward pass of a quarter of
            the largest batch, or two passes of all of it for a model that runs on
            batches of one size only; and gradients of two samples for one that
            detaches values, has hooks on gradients or backward passes of its own.
            Without it, what mixes samples gives numbers without a meaning.
        memory: The bytes that kept linearisations of the net may take, by default a
            quarter of the memory that is free on the device; also those of the columns
            of a Gram matrix at a time, by default a twelfth, and 64 MiB at least; and
            as much for the run of the net on an only batch, which is kept for the
            first quantity or until another risk is built. One batch must fit.
        check_data: Whether to pass over the data once more, before anything else, to
            see that they are the same in every pass: a shuffled loader and random
            augmentations are refused. Lists of batches are not read twice. Without
            the check, each pass starts from one state of torch's generator.
        progress: Whether passes over the data, and the products of an iterative
            ``eigh``, show progress bars (on stderr).
        dtype: float32 or float64, for a model in another precision such as bfloat16:
            copies of its parameters and buffers, inputs and targets are in this one,
            integers stay, and where the model casts to a lower one, it casts to this.
            By default that of the parameters.
        process_group: The processes that share the samples: a group of
            ``torch.distributed``, or a ``DeviceMesh`` with one dimension. Each gives
            its own part of the data (``[]`` for none), and every operator is the matrix
            of all samples, numbered rank by rank (``docs/many_processes.md``). None
            for one process.

    Attributes:
        num_params: D, the number of entries of all parameters, two for a complex one.
        num_samples: N.
        num_outputs: C, the number of outputs of one sample; where samples have
            different numbers of them, that of all samples together.
        layout: Which outputs belong to which sample: they are listed sample by sample.
        params: Copies of the parameters, by name, without a graph; of complex ones the
            real and the imaginary parts, ``[*p, 2]``.
        dtype: The torch dtype of ``params``.
        device: Their device.
        reduction: ``"mean"`` or ``"sum"``.
        ranks: The processes that share the samples.

    Raises:
        TypeError: For arguments of a wrong type.
        ValueError: For empty or inconsistent data, parameters that are not the
            model's, modules in training mode where that matters, NaN or Inf in
            parameters, outputs or loss, a model that draws random numbers, a model
            whose output is not differentiable in the parameters, and data that are
            not the same in every pass.
        MemoryError: Where a batch does not fit on the device.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> X, y = torch.rand(8, 3), torch.randint(2, (8,))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 2), nn.CrossEntropyLoss(), (X, y))
        >>> risk.num_params, risk.num_samples, risk.num_outputs
        (8, 8, 2)
    """

    @uncompiled
    def __init__(
        self,
        model: nn.Module | ModelFunction,
        loss: nn.Module | LossCallable | str,
        data: Any,
        params: Any | None = None,
        *,
        reduction: str | None = None,
        predict: Predict | None = None,
        target: Target | None = None,
        sample_axis: Any = None,
        take: Take | None = None,
        count: Count | None = None,
        check: bool = True,
        memory: float | None = None,
        check_data: bool = True,
        progress: bool = False,
        dtype: torch.dtype | None = None,
        process_group: Any | None = None,
    ) -> None:
        ranks = as_ranks(process_group)
        of_model: ModelLoss | None = None
        budget: int | None = None
        with ranks.together("EmpiricalRisk"):
            check_flag(check, "check")
            check_flag(check_data, "check_data")
            check_flag(progress, "progress")
            if target is not None:
                check_function(target, "target")
            if memory is not None:
                check_real(memory, "memory")
                if not memory >= 0:
                    raise ValueError(f"memory: bytes, at least 0, got {memory!r}.")
                budget = int(min(float(memory), sys.maxsize))
            if isinstance(params, Iterator):  # asked several times for "model"
                params = list(params)
            search = Search(sample_axis, take, count)
            if isinstance(loss, str):
                of_model = ModelLoss(loss, data, model, params, predict, target, dtype)
                loss, predict = of_model.form.loss, of_model.predict
                target = of_model.target
            function = FunctionalModel(model, params, predict, dtype)
            output_loss = as_output_loss(loss, reduction, function.originals(model))
            batches = as_batches(data, target)
        if ranks.is_many:
            batches = without_padding(batches, ranks)
        progress = progress and ranks.rank == 0
        passes = Passes(batches, function, search, target, Cuts(), progress)
        super().__init__(
            *(function, output_loss, passes, ranks, budget),
            check=check,
            check_data=check_data,
        )
        if not ranks.is_many:
            check_is_whole(data, self.num_samples)
        if of_model is not None:
            self._check_loss_of_model(of_model)

    def _check_loss_of_model(self, of_model: ModelLoss) -> None:
        """See on all batches that the loss is what the model says."""
        with self.ranks.together("EmpiricalRisk"):
            for index, (X, _) in enumerate(self.passes.batches("loss")):
                seen = self.outputs[index], self.all_targets[index]
                weight = self.loss.weight(*seen)
                if weight > 0:
                    of_model.check(index, X, self.loss.total(*seen) / weight)


class NoLoss(nn.Module):
    """A loss that is zero, and has no derivatives."""

    reduction = "sum"

    def forward(self, output: Any, target: Tensor) -> Tensor:
        """Zero, for outputs in any container; an error where derivatives are wanted."""
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        if any(tensor.requires_grad for tensor in tensors):
            raise ValueError(
                "loss: there is none, the operator was made of a model and inputs "
                "alone, vl.Jacobian(model, X). Give it a risk, "
                "vl.EmpiricalRisk(model, loss, (X, y))."
            )
        return tensors[0].new_zeros(())


def risk_of_inputs(
    model: nn.Module | ModelFunction,
    inputs: Any,
    params: Any | None = None,
    **options: Any,
) -> EmpiricalRisk:
    """Return a risk without a loss, for what needs none: the Jacobian.

    Of one batch of inputs, a tensor, a tuple or a mapping; or of a list or a loader of
    batches. All else is as for :class:`EmpiricalRisk`.
    """
    axis = options.get("sample_axis")
    count = options.get("count") or functools.partial(
        number_without_targets, sample_axis=axis
    )
    data = without_targets(inputs, count)
    return EmpiricalRisk(model, NoLoss(), data, params, **options)


def check_risk(risk: Any, name: str = "risk") -> None:
    """Raise a ``TypeError`` for what is no risk."""
    if not isinstance(risk, EmpiricalRisk):
        raise TypeError(f"{name}: an EmpiricalRisk, got {type(risk).__name__}.")


def as_risk(
    risk_or_model: Any,
    loss: Any = None,
    data: Any = None,
    params: Any | None = None,
    **options: Any,
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
        if options:
            name = next(iter(options))
            known = name in inspect.signature(EmpiricalRisk).parameters
            found = "is an option of the EmpiricalRisk that was given; give it there"
            other = "no argument of this operator, nor of EmpiricalRisk"
            raise TypeError(f"{name}: {found if known else other}.")
        return risk_or_model
    if loss is None or data is None:
        raise TypeError(
            "risk: an EmpiricalRisk, or a model with a loss and data, got "
            f"{type(risk_or_model).__name__} alone."
        )
    return EmpiricalRisk(risk_or_model, loss, data, params, **options)
