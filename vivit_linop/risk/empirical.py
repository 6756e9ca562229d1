"""The empirical risk: a model, a loss and data, as one function of the parameters."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from vivit_linop.indices import Index, as_index
from vivit_linop.modes import ordinary_mode
from vivit_linop.ranks.group import as_ranks
from vivit_linop.risk import fingerprint
from vivit_linop.risk.alike import check_alike, digests_of
from vivit_linop.risk.checks import agree
from vivit_linop.risk.cuts import Cuts
from vivit_linop.risk.data import Batch, Target, as_batches, select_samples
from vivit_linop.risk.first_pass import first_pass
from vivit_linop.risk.kept import Kept
from vivit_linop.risk.losses.autograd import LossCallable
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.items import LossOfItems
from vivit_linop.risk.losses.registry import as_output_loss
from vivit_linop.risk.memory import explained
from vivit_linop.risk.model import (
    FunctionalModel,
    ModelFunction,
    Params,
    Predict,
    as_guest,
)
from vivit_linop.risk.model_loss import ModelLoss, loss_of_model
from vivit_linop.risk.moved import evaluated, moved
from vivit_linop.risk.parameters import ParameterVectors, all_finite, check_finite
from vivit_linop.risk.passes import Passes
from vivit_linop.risk.rows import RowLayout
from vivit_linop.risk.samples import Count, Samples, Take
from vivit_linop.risk.shards import (
    by_items,
    check_is_whole,
    check_parts,
    without_padding,
)
from vivit_linop.risk.sizes import check_size, does_not_fit
from vivit_linop.risk.subsets import check_selected, own_samples
from vivit_linop.risk.ways import Search


class EmpiricalRisk(ParameterVectors):
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

    Args:
        model: An ``nn.Module``, or a callable ``(params, x) -> output`` with ``params``
            a dict of tensors. It must treat samples independently (for modules: call
            ``model.eval()``). A module is called with ``model(x)``, ``model(*x)`` for
            a tuple, ``model(**x)`` for a mapping; a tuple or mapping that its signature
            does not take so, and all else, comes as it is, but a list of what a
            module takes one by one. Of an output with ``.logits`` these
            are taken; several outputs, in a tuple, a mapping or an object, go to the
            loss as they are. ``torch.compile`` and ``DistributedDataParallel`` are
            unwrapped. The risk is of the model as it is now, parameters, buffers, modes
            and attributes; see :meth:`at`.
        loss: ``nn.MSELoss``, ``nn.CrossEntropyLoss``, ``nn.NLLLoss`` of
            log-probabilities (with the Hessian of the cross-entropy),
            ``nn.BCEWithLogitsLoss``, ``nn.GaussianNLLLoss`` with targets
            ``torch.stack([y, variance], dim=-1)`` or of a model that returns (mean,
            variance), ``nn.PoissonNLLLoss``, ``nn.HuberLoss``, ``nn.SmoothL1Loss``,
            ``nn.KLDivLoss`` of log-probabilities (closed-form Hessians, all options);
            any callable ``(output, target) -> scalar`` that is a mean or sum over
            samples (Hessians by autograd); a :class:`vivit_linop.Loss`, which says more
            of it, or a :class:`vivit_linop.losses.Weighted` one. Classes are axis 1, as
            in torch. ``"model"`` for a model that returns an object with ``.loss`` and
            ``.logits`` for batches with ``labels``: that loss, which must be the mean
            cross-entropy (also of the next label), squared error or binary
            cross-entropy of them; seen on each batch, by one more forward pass.
        data: One pair ``(X, y)``, or a re-iterable of them such as a ``DataLoader``
            without shuffling. X is whatever holds tensors, and reaches the model as the
            type that it is: a list, a named tuple, a dataclass, a ``PackedSequence``,
            a mapping of any kind, a graph. So may be y, for a loss that takes it. A
            batch may also hold its targets: ``labels`` in a mapping, which the model
            then does not see, or an attribute ``y``. For a model on a GPU let the
            loader pin its batches (``pin_memory=True``): they are copied without
            waiting.
        params: None for all parameters that require grad, an iterable of parameters
            of the model, or a dict from names to tensors.
        reduction: ``"mean"`` or ``"sum"``; needed for a loss without this attribute.
        predict: A function ``(model, X) -> output`` for a module that is to be called,
            or whose output is to be used, in another way; X comes as it is in the data.
        target: A function ``batch -> y`` for batches that hold their targets in
            another way; the whole batch is X then.
        sample_axis: The axis of samples in X: an integer, or a tree like X of integers
            and None, for what is the same for all samples. By default it is found: the
            first axis that is as long as there are targets, with which the model
            treats samples independently. So are bags with offsets, graphs with
            the numbers of their nodes, and lists with a tensor for each sample.
        take: A function ``(X, index) -> X`` that takes some samples of an input, also
            of one that it has returned, where there is no such axis. ``index`` is a
            vector of integers on the host.
        count: With ``take``, a function ``X -> int`` that counts samples.
        check: Whether to check that samples are independent, in the model and in a
            loss that is not one of torch's above; costs a forward pass of a quarter of
            the largest batch, or two passes of all of it for a model that runs on
            batches of one size only. Without it, what mixes samples gives numbers
            without a meaning.
        memory: The bytes that kept linearisations of the net may take; those of
            batches beyond it are made anew for each product. By default a quarter of
            the memory that is free on the device. Also the bytes that the columns of
            a Gram matrix may take at a time; by default a twelfth, and 64 MiB at least.
            Whatever it is, one batch must fit: where it does not, make the batches
            smaller.
        check_data: Whether to pass over the data once more, before anything else, to
            see that they are the same in every pass: a shuffled loader and random
            augmentations are refused, because an operator is one matrix and numbers
            its samples. Lists of batches are not read twice. Without the check, each
            pass starts from one state of torch's generator, so that what is drawn
            from that is the same every time; other changes are found by the passes
            that meet other outputs.
        progress: Whether passes over the data, and the products of an iterative
            ``eigh``, show progress bars (on stderr).
        dtype: float32 or float64, for a model in another precision such as bfloat16:
            copies of its parameters and buffers, inputs and targets are in this one,
            integers stay. By default that of the parameters.
        process_group: The processes that share the samples: a group of
            ``torch.distributed``, or a ``DeviceMesh`` with one dimension. Each then
            gives its own part of the data (of any size; ``[]`` for none), and every
            operator is the matrix of all samples, numbered rank by rank: N, r and the
            sum of weights count over all. All ranks must do the same with the same
            vectors, and an error of one of them is an error on all. Samples that
            ``DistributedSampler`` or Accelerate repeat are taken once. None for one
            process.

    Attributes:
        num_params: D, the number of entries of all parameters, two for a complex one.
        num_samples: N.
        num_outputs: C, the number of outputs of one sample; where samples have
            different numbers of them, that of all samples together.
        layout: Which outputs belong to which sample: they are listed sample by sample.
        params: Copies of the parameters, by name, without a graph; of complex ones the
            real and the imaginary parts, ``[*p, 2]``.
        complex_names: The names of complex ones.
        dtype: The torch dtype of ``params``.
        device: Their device.
        reduction: ``"mean"`` or ``"sum"``.
        has_tangents: Whether J x is possible, as far as is known: not all operations
            have second derivatives in torch.
        graph_bytes: What the graph of each batch's outputs takes, beyond θ.
        kept: What is made once, for all operators of the risk.
        ranks: The processes that share the samples.
        example: Outputs and targets of the first batch.

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
        memory: int | None = None,
        check_data: bool = True,
        progress: bool = False,
        dtype: torch.dtype | None = None,
        process_group: Any | None = None,
    ) -> None:
        if not isinstance(check, bool):
            raise TypeError(f"check: True or False, got {check!r}.")
        if target is not None and not callable(target):
            raise TypeError(f"target: a function, got {type(target).__name__}.")
        search = Search(sample_axis, take, count)
        self._check, self._check_parts = check, check_data
        self._check_data = check_data and not isinstance(data, (list, tuple))
        self.ranks = as_ranks(process_group)
        self.progress = progress and self.ranks.rank == 0
        of_model: ModelLoss | None = None
        with self.ranks.together("EmpiricalRisk"):
            if isinstance(loss, str):
                of_model = loss_of_model(
                    loss, data, model, params, predict, target, dtype
                )
                loss, predict = of_model.form.loss, of_model.predict
                target = of_model.target
            function = FunctionalModel(model, params, predict, dtype)
            output_loss = as_output_loss(loss, reduction, function.originals(model))
            batches = as_batches(data, target)
        if self.ranks.is_many:
            batches = without_padding(batches, self.ranks)
        passes = Passes(batches, function, search, target, Cuts(), self.progress)
        self._setup(function, output_loss, passes, memory)
        if not self.ranks.is_many:
            check_is_whole(data, self.num_samples)
        if of_model is not None:
            self._check_loss_of_model(of_model)

    @ordinary_mode()
    def _setup(
        self,
        model: FunctionalModel,
        loss: OutputLoss,
        passes: Passes,
        memory: int | None,
    ) -> None:
        if memory is not None and not (isinstance(memory, Real) and memory >= 0):
            raise ValueError(f"memory: a number of bytes, at least 0, got {memory!r}.")
        self.model, self.loss, self.memory, self._passes = model, loss, memory, passes
        self.has_tangents = True
        self._take_parameters()
        self.complex_names = model.complex_names
        self.dtype, self.device = model.dtype, model.device
        self.kept = Kept(memory, self.device)
        self.reduction = loss.reduction
        self.sizes = [p.numel() for p in self.params.values()]
        self.num_params = sum(self.sizes)
        if self.ranks.is_many:
            self.ranks = self.ranks.on(self.device)
            check_alike(self.ranks, self._digests_of_all)
        with self.ranks.together("EmpiricalRisk"):
            passed = model, loss, passes
            seen = first_pass(*passed, self._check, self._check_data)
        self.loss, self.outputs, self._targets = seen.loss, seen.outputs, seen.targets
        self.graph_bytes, self._sums = seen.graph_bytes, seen.sums
        self.batch_sizes, self.layout = seen.batch_sizes, seen.layout
        self._count()
        self._normalise(seen.total, seen.weight)

    def _take_parameters(self) -> None:
        """Show the parameters of the model, without their graph."""
        self.params: Params = {
            name: p.detach() for name, p in self.model.params.items()
        }

    def _count(self) -> None:
        """Count the samples and outputs of all ranks."""
        counts = self.ranks.gathered(sum(self.batch_sizes))
        self.num_samples = sum(counts)
        if not self.num_samples:
            raise ValueError("data: is empty, there is not one batch.")
        self.ranks = self.ranks.counted(counts)
        if self.ranks.is_many:
            seen = self.outputs, self._targets, self._passes.data
            check_parts(self.ranks, *seen, self._check_parts)
            own = self.model.count is not None if self.outputs else None
            if by_items(self.ranks, own) and not self.outputs:
                self.loss = LossOfItems(self.loss)
        # This rank may have none.
        self.example = self.ranks.led(self._first_outputs)
        if not self.outputs:
            self.layout = RowLayout.uniform((), self.example[0][0].numel())
        self.layout = self.layout.over(self.ranks)
        self.num_outputs = self.layout.width
        if not self.layout.is_uniform:
            self.num_outputs = self.layout.among(self.num_samples)

    def _normalise(self, total: Tensor, weight: Tensor) -> None:
        """Divide by what the reduction says.

        Args:
            total: Σ ℓ over this rank's samples.
            weight: The sum of their weights.
        """
        total, weight = self.ranks.total(torch.stack([total, weight])).unbind()
        # Together, since the host waits for the device to read them.
        known = [total, weight.to(total), all_finite(self.params).to(total)]
        value, divisor, is_finite = torch.stack(known).tolist()
        if not is_finite:
            check_finite(self.params, "params")
        if self.reduction != "mean":
            divisor = 1.0
        elif not divisor > 0:
            raise ValueError(
                "data: the loss divides by zero, every target is ignored or has weight "
                "zero."
            )
        # L = scale Σ ℓ with the unscaled ℓ of the loss; r = reduction_factor.
        self.scale = 1.0 / divisor
        self.reduction_factor = (
            1.0 / self.num_samples if self.reduction == "mean" else 1.0
        )
        self._value = total * self.scale
        if not math.isfinite(value * self.scale):
            raise ValueError(f"loss: its value is {value * self.scale} on the data.")

    def _first_outputs(self) -> tuple[Tensor, Any]:
        return self.outputs[0], self._targets[0]

    def _check_loss_of_model(self, of_model: ModelLoss) -> None:
        """See on all batches that the loss is what the model says."""
        with self.ranks.together("EmpiricalRisk"):
            for index, (X, _) in enumerate(self.batches("loss")):
                seen = self.outputs[index], self._targets[index]
                weight = self.loss.weight(*seen)
                if weight > 0:
                    of_model.check(index, X, self.loss.total(*seen) / weight)

    # Data -------------------------------------------------------------------------

    @property
    def samples(self) -> Samples:
        """Where the samples of its inputs are."""
        return self._passes.search.samples

    def batches(self, what: str | None = None) -> Iterator[Batch]:
        """Pass over the data.

        Every pass starts from one state of the random number generator, so that what a
        loader draws from it is the same again; the caller's state is as before.

        Args:
            what: What the pass is for, for its progress bar; None for no bar.

        Raises:
            ValueError: If there are fewer batches than at construction.
        """
        return self._passes.batches(what)

    def targets(self) -> list[Any]:
        """The targets of each batch."""
        return self._targets

    def fingerprint(self) -> dict[str, str | float]:
        """Return what tells this risk from others: digests, and numbers of it.

        The digest of the samples takes a pass over the data, once; it does not depend
        on how they are cut into batches. The numbers are equal up to rounding errors
        if the model and the loss are the same functions.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> net, (X, y) = nn.Linear(3, 1), (torch.rand(8, 3), torch.rand(8, 1))
            >>> whole = vl.EmpiricalRisk(net, nn.MSELoss(), (X, y))
            >>> halves = [(X[:4], y[:4]), (X[4:], y[4:])]
            >>> cut = vl.EmpiricalRisk(net, nn.MSELoss(), halves)
            >>> whole.fingerprint()["samples"] == cut.fingerprint()["samples"]
            True
        """
        norms = [output.norm().item() for output in self.outputs]
        return {
            **self._function_digests(),
            "samples": self._samples_digest,
            "value of the loss": self._value.item(),
            "outputs of the model": math.hypot(
                *self.ranks.gathered(math.hypot(*norms))
            ),
        }

    def _function_digests(self) -> dict[str, str]:
        """What tells one function of the parameters from another, without data."""
        return {
            "parameters": fingerprint.of_tensors(self.params.items()),
            "buffers or frozen parameters": fingerprint.of_tensors(
                self.model.constants.items()
            ),
            "loss": f"{type(self.loss).__name__}, {self.reduction}",
        }

    def _digests_of_all(self) -> dict[str, str]:
        """Those, and what the loss is made of."""
        own = self._function_digests()
        parts = digests_of(self.loss.source, "loss")
        return {**own, **parts, "loss": f"{own['loss']}, {parts['loss']}"}

    @functools.cached_property
    def _samples_digest(self) -> str:
        with self.ranks.together("fingerprint"):
            found = self._passes.digests()
        return fingerprint.joined(self.ranks.gathered(found))

    def subset(self, indices: Index) -> EmpiricalRisk:
        """Return the risk of some samples only: their mean (or sum).

        Costs a pass over the data that picks them, without the model, and the checks of
        a new risk on them: a forward pass.

        Args:
            indices: Distinct numbers of samples, 0..N−1, counted over all batches, or
                a mask of them.

        Raises:
            ValueError: If it is empty, out of range or repeats a sample, or if the
                model runs on batches of other sizes only.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> risk.subset([0, 5]).num_samples
            2
        """
        given = as_index(indices, self.num_samples, "indices").cpu()
        own = own_samples(given, self.ranks, sum(self.batch_sizes))
        risk = object.__new__(EmpiricalRisk)
        risk.progress, risk.ranks = self.progress, self.ranks
        risk._check = self._check
        risk._check_data = risk._check_parts = False  # they are in memory
        parts: list[Batch] = []
        search = Search.known(self.samples) if self.batch_sizes else Search()
        with self.ranks.together("subset"):
            if len(own):
                parts = select_samples(
                    self._own_batches(), self.batch_sizes, own.tolist(), self.samples
                )
        try:
            cuts = Cuts(final=True)
            passes = Passes(parts, self.model, search, None, cuts, self.progress)
            risk._setup(self.model, self.loss, passes, self.memory)
        except Exception as error:
            if parts:
                mine, _ = next(self._own_batches())
                known = self.model, self._passes.search, self.batch_sizes
                check_size(*known, mine, parts, error)
            raise
        with self.ranks.together("subset"):
            if len(own):
                check_selected(self.layout.of(own), self.outputs, risk.outputs)
        return risk

    def _own_batches(self) -> Iterator[Batch]:
        """The batches with the targets of construction."""
        batches = self.batches("subset")
        for (X, _), y in zip(batches, self._targets, strict=True):
            yield X, y

    def does_not_fit(self, X: Any, n: int) -> str:
        """What to say of a batch of n samples that is too large for the device."""
        return does_not_fit(self.model, self._passes.search, X, n)

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
        if not self.has_outputs(index, outputs, samples):
            raise self.other_data(index)

    def has_outputs(
        self, index: int, outputs: Tensor, samples: Tensor | None = None
    ) -> Tensor:
        """Whether outputs are those at construction, not read by the host.

        Args:
            index: The batch.
            outputs: Those of the batch.
            samples: The samples of the batch that they belong to, None for all.
        """
        before = self.outputs[index] if index < len(self.outputs) else None
        if before is not None and samples is not None:
            before = before[samples.to(before.device)]
        if before is None or before.numel() != outputs.numel():
            return outputs.new_zeros((), dtype=torch.bool)
        return agree(before, outputs.reshape(before.shape))

    def other_data(self, index: int) -> ValueError:
        """What to say where the outputs of a batch are others."""
        return ValueError(
            f"data: batch {index} is not what it was when the risk was built: its "
            "outputs are others. An operator is one matrix: give a loader without "
            "shuffling and random augmentations, and do not change the data in "
            "place; nor what the model reaches through a global variable or an "
            "object that is no module. Keep that as an attribute of a module."
        )

    # Values -------------------------------------------------------------------------

    def value(self) -> Tensor:
        """Return L(θ), a scalar tensor. Costs nothing; see :meth:`gradient`."""
        return self._value.clone()

    def gradient(self) -> Tensor:
        """Return ∇L(θ), ``[D]``. One forward and one backward pass over the data.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> net, data = nn.Linear(3, 1), (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(net, nn.MSELoss(), data)
            >>> value, gradient = risk.value_and_gradient()
            >>> weight, bias = risk.unflatten(risk.gradient())
            >>> weight.shape, torch.equal(value, risk.value()), gradient.shape
            (torch.Size([1, 3]), True, torch.Size([4]))
        """
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return L(θ) and ∇L(θ), ``[D]``, from one pass over the data; see gradient."""
        both = self.ranks.summed(self._own_gradient_and_value)
        return both[-1], both[:-1]

    def _own_gradient_and_value(self) -> Tensor:
        """Those of this rank's samples, ``[D + 1]``."""
        both = torch.zeros(self.num_params + 1, dtype=self.dtype, device=self.device)
        parameters = list(self.model.params.values())
        for index, (X, _) in enumerate(self.batches("gradient")):
            n = self.batch_sizes[index] if index < len(self.batch_sizes) else 1
            with (
                explained(self.does_not_fit, X, n),
                as_guest(self.device),
            ):
                output = self.model(self.model.params, X)
                self.check_outputs(index, output)
                total = self.loss.total(output, self._targets[index]) * self.scale
                gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            both[:-1] += self.flatten(gradients)
            both[-1] += total.detach()
        return both

    def over(self, names: Iterable[str]) -> EmpiricalRisk:
        """Return it as a function of some of its parameters, ``[d]`` of D.

        Costs nothing: the same data, outputs and value. For a last layer, or others
        that a curvature is to be taken of alone.

        Args:
            names: Those of the parameters; they keep their order.

        Raises:
            ValueError: If one is none of the risk's, or there are none.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> data = (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
            >>> risk.over(["weight"]).num_params
            3
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise TypeError(f"names: a list of names of parameters, got {names!r}.")
        chosen = list(names)
        foreign = [name for name in chosen if name not in self.params]
        if foreign or not chosen:
            found = repr(foreign[0]) if foreign else "none"
            raise ValueError(f"names: some of {list(self.params)}, found {found}.")
        risk = copy.copy(self)
        risk.model, risk.kept = self.model.over(chosen), Kept(self.memory, self.device)
        risk.params = risk.model.params
        risk.sizes = [p.numel() for p in risk.params.values()]
        risk.num_params = sum(risk.sizes)
        return risk

    def at(
        self,
        parameters: Tensor | Iterable[Tensor] | Mapping[str, Tensor] | None = None,
    ) -> EmpiricalRisk:
        """Return the risk of the same data at other parameters, without validation.

        For every step of training: it costs one forward pass, and what is known of the
        net (the structure of its layers, costs) is kept. That the data are those of
        construction is seen by their targets and by sums over the inputs. The
        modes of the modules (``train``, ``eval``) are those of construction.

        Args:
            parameters: None for those that the model has now, and for its present
                buffers and frozen parameters; everything else of it stays as it was.
                Else a vector ``[D]``, or tensors in the order of ``params`` or by name.

        Raises:
            ValueError: If they have other shapes, or hold NaN or Inf, or the outputs
                do; if the data have changed; or if the model is gone.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> net, data = nn.Linear(3, 1), (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(net, nn.MSELoss(), data)
            >>> risk.at(torch.zeros(4)).value().allclose(data[1].square().mean())
            True
        """
        risk = copy.copy(self)
        with ordinary_mode():
            with self.ranks.together("at"):
                risk.model = moved(self.model, parameters)
                risk._take_parameters()
                risk.kept = self.kept.elsewhere()
                known = list(zip(self._sums, self._targets, self.outputs, strict=True))
                batches = self.batches("at")
                risk.outputs, total = evaluated(risk.model, self.loss, batches, known)
            if self.ranks.is_many:
                check_alike(self.ranks, risk._function_digests)
            risk.example = self.ranks.led(risk._first_outputs)
            risk._value = self.ranks.total(total) * self.scale
        return risk

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive, also in inference mode, whose tensors autograd refuses."""
        self.__dict__.update(state)
        if any(p.is_inference() for p in self.params.values()):
            with torch.inference_mode(False):
                self.__dict__.update(copy.deepcopy(self.__dict__))

    def __repr__(self) -> str:
        """Say what it is made of."""
        loss = type(getattr(self.loss, "loss", self.loss)).__name__
        return (
            f"<EmpiricalRisk: {self.num_params} parameters, {self.num_samples} samples "
            f"in {len(self.batch_sizes)} batch(es), {self.num_outputs} output(s), "
            f"{loss} ({self.reduction}), {self.dtype}, "
            f"{self.device}{self.ranks}>"
        )
