"""The empirical risk: a model, a loss and data, as one function of the parameters."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vivit_linop.modes import as_given, ordinary_mode, replayed
from vivit_linop.ranks.group import as_ranks
from vivit_linop.risk import fingerprint
from vivit_linop.risk.checks import (
    agree,
    independent_samples,
    same_outputs,
)
from vivit_linop.risk.containers import copied
from vivit_linop.risk.cuts import Cuts, Evaluated, ItemByItem
from vivit_linop.risk.data import (
    Batch,
    Target,
    as_batches,
    iterate,
    joined_targets,
    select_samples,
    without_targets,
)
from vivit_linop.risk.kept import Kept
from vivit_linop.risk.losses.autograd import LossCallable
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.certificates import check_loss, targets_of
from vivit_linop.risk.losses.items import LossOfItems
from vivit_linop.risk.losses.none import NoLoss
from vivit_linop.risk.losses.registry import as_output_loss
from vivit_linop.risk.memory import (
    batch_does_not_fit,
    explained,
    is_out_of_memory,
    saved_bytes,
)
from vivit_linop.risk.model import (
    FunctionalModel,
    ModelFunction,
    Params,
    Predict,
    as_guest,
)
from vivit_linop.risk.model_loss import ModelLoss
from vivit_linop.risk.moved import evaluated, moved
from vivit_linop.risk.parameters import ParameterVectors, all_finite, check_finite
from vivit_linop.risk.progress import shown
from vivit_linop.risk.rows import RowLayout
from vivit_linop.risk.samples import Count, Samples, Take
from vivit_linop.risk.shards import (
    check_alike,
    check_is_whole,
    check_parts,
    without_padding,
)
from vivit_linop.risk.ways import Search, number_without_targets

Item = TypeVar("Item")


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
            unwrapped.
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
        self._search, self._cuts = Search(sample_axis, take, count), Cuts()
        self._target, self._check, self._check_parts = target, check, check_data
        self.ranks = as_ranks(process_group)
        self.progress = progress and self.ranks.rank == 0
        self._check_data = check_data and not isinstance(data, (list, tuple))
        of_model: ModelLoss | None = None
        with self.ranks.together("EmpiricalRisk"):
            if isinstance(loss, str):
                given = model, params, predict, target, dtype
                of_model = _loss_of_model(loss, data, *given)
                loss, predict = of_model.form.loss, of_model.predict
                target = self._target = of_model.target
            function = FunctionalModel(model, params, predict, dtype)
            output_loss = as_output_loss(loss, reduction, function.originals(model))
            batches = as_batches(data, target)
        if self.ranks.is_many:
            batches = without_padding(batches, self.ranks)
        self._setup(function, output_loss, batches, memory)
        if not self.ranks.is_many:
            check_is_whole(data, self.num_samples)
        if of_model is not None:
            self._check_loss_of_model(of_model)

    @ordinary_mode()
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
        self.has_tangents = True
        self._batches = batches
        self._data_rng = torch.random.get_rng_state()
        self._take_parameters()
        self.complex_names = model.complex_names
        first = next(iter(self.params.values()))
        self.dtype, self.device = first.dtype, first.device
        self.kept = Kept(memory, self.device)
        self.reduction = loss.reduction
        self.sizes = [p.numel() for p in self.params.values()]
        self.num_params = sum(self.sizes)
        if self.ranks.is_many:
            self.ranks = self.ranks.on(self.device)
            check_alike(self.ranks, self._function_digests())
        with self.ranks.together("EmpiricalRisk"):
            seen = self._fingerprints() if self._check_data else None
            try:
                total, weight = self._pass_over_data(seen)
            except ItemByItem:  # so do those of the batches before
                self._cuts = Cuts(by_items=True)
                total, weight = self._pass_over_data(seen)
        self._count(total, weight)

    def _take_parameters(self) -> None:
        """Show the parameters of the model, without their graph."""
        self.params: Params = {
            name: p.detach() for name, p in self.model.params.items()
        }

    def _pass_over_data(
        self, fingerprints: list[bytes] | None
    ) -> tuple[Tensor, Tensor]:
        """Check and evaluate this rank's samples once.

        Args:
            fingerprints: What the batches must be, if that has been seen.

        Returns:
            Σ ℓ without a scale, and the sum of the weights.
        """
        self.outputs: list[Tensor] = []
        self.graph_bytes: list[int] = []
        self._targets: list[Any] = []
        self._sums: list[list[Tensor]] = []
        total = weight = torch.zeros((), dtype=self.dtype, device=self.device)
        example: tuple[Any, Tensor] | None = None
        for X, y, nbytes, output in self._evaluated(fingerprints):
            n = len(output)
            if not self.outputs and self.model.tree is not None:
                self.loss = self.loss.of_several(self.model.tree)
            y = targets_of(self.loss, y, output)
            # The largest batch shows the most of what mixes samples.
            if n > (1 if example is None else len(example[1])):
                example = X, output
            check_loss(self.loss, *self._with_previous(output, y), self._check)
            with torch.no_grad():
                total = total + self.loss.total(output, y)
                weight = weight + self.loss.weight(output, y)
            self.outputs.append(output)
            self.graph_bytes.append(nbytes)
            self._targets.append(copied(y))  # the user's may change
            self._sums.append(fingerprint.sums(X))
        # All batches together show where samples may be.
        if self._check and example is not None:
            X, output = example
            with explained(self.does_not_fit, X, len(output)):
                found = independent_samples(self.model, X, output, self._search.ways)
            self._search = Search.known(found)
        self.batch_sizes = [len(output) for output in self.outputs]
        each = tuple(output[0].numel() for output in self.outputs)
        self.layout = RowLayout(tuple(self.batch_sizes), each)
        return total, weight

    def _count(self, total: Tensor, weight: Tensor) -> None:
        """Count the samples of all ranks, and normalise by them.

        Args:
            total: Σ ℓ over this rank's samples.
            weight: The sum of their weights.
        """
        counts = self.ranks.gathered(sum(self.batch_sizes))
        self.num_samples = sum(counts)
        if not self.num_samples:
            raise ValueError("data: is empty, there is not one batch.")
        self.ranks = self.ranks.counted(counts)
        if self.ranks.is_many:
            seen = self.outputs, self._targets
            check_parts(self.ranks, *seen, self._batches, self._check_parts)
            own = set(self.layout.each)
            if self.model.count is not None:
                own.add(0)  # no other has this many
            widths = self.ranks.gathered(own)
            if len(set().union(*widths)) > 1:
                raise ValueError(
                    "data: samples have different numbers of outputs, or outputs come "
                    "item by item, which a process group does not support. Pad them to "
                    "one number, with targets that are ignored."
                )
        # This rank may have none.
        self.example = self.ranks.led(self._first_outputs)
        if not self.outputs:
            self.layout = RowLayout.uniform((), self.example[0][0].numel())
        self.num_outputs = self.layout.width
        if not self.layout.is_uniform:
            self.num_outputs = self.layout.total
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

    def _evaluated(self, fingerprints: list[bytes] | None) -> Iterator[Evaluated]:
        """Evaluate all batches, cut where samples have outputs of several shapes."""
        for number, (X, y) in enumerate(self.batches("risk", fingerprints)):
            n = self._search.number(number, X, y)
            done = len(self.outputs)
            with explained(self.does_not_fit, X, n):
                for evaluated in self._cuts.found(
                    self.model, self._search, number, (X, y), n, done, self._check
                ):
                    if self.model.count and not isinstance(self.loss, LossOfItems):
                        self.loss = LossOfItems(self.loss)
                    yield evaluated

    def _check_loss_of_model(self, of_model: ModelLoss) -> None:
        """See on all batches that the loss is what the model says."""
        with self.ranks.together("EmpiricalRisk"):
            for index, (X, _) in enumerate(self.batches("loss")):
                seen = self.outputs[index], self._targets[index]
                weight = self.loss.weight(*seen)
                if weight > 0:
                    of_model.check(index, X, self.loss.total(*seen) / weight)

    def _with_previous(self, output: Tensor, y: Any) -> tuple[Tensor, Any]:
        """Put a sample that is alone in its batch beside those of the batch before.

        Whether a loss is a sum over samples cannot be seen on one of them.
        """
        if len(output) > 1 or not self.outputs:
            return output, y
        try:
            outputs = torch.cat([self.outputs[-1], output])
            return outputs, joined_targets([self._targets[-1], y])
        except RuntimeError:  # their shapes differ
            return output, y

    # Data -------------------------------------------------------------------------

    @property
    def samples(self) -> Samples:
        """Where the samples of its inputs are."""
        return self._search.samples

    def batches(
        self, what: str | None = None, fingerprints: list[bytes] | None = None
    ) -> Iterator[Batch]:
        """Pass over the data.

        Every pass starts from one state of the random number generator, so that what a
        loader draws from it is the same again; the caller's state is as before.

        Args:
            what: What the pass is for, for its progress bar; None for no bar.
            fingerprints: Those that the batches must have, if they are to be checked.

        Raises:
            ValueError: If the batches are others.
        """
        raw = self._batches
        if fingerprints is not None:
            raw = self._compared(raw, fingerprints)
        batches = iterate(raw, self.device, self.dtype, self._target)
        count = 0
        passed = self._shown(_replayed(batches, self._data_rng), what)
        for batch in self._cuts.applied(passed, self._search):
            count += 1
            yield batch
        known = len(getattr(self, "batch_sizes", ()))
        if count < known:
            raise ValueError(
                f"data: there are {count} batches, when the risk was built there were "
                f"{known}. Give data that are the same in every pass."
            )

    def _shown(self, batches: Iterable[Item], what: str | None) -> Iterator[Item]:
        if what is None or not self.progress:
            return iter(batches)
        known = len(getattr(self, "batch_sizes", ()))
        return shown(batches, what, known or operator.length_hint(self._batches))

    def _fingerprints(self) -> list[bytes]:
        """Pass over the data without the model, from another state of the generator."""
        other = torch.Generator(device="cpu").manual_seed(
            (torch.initial_seed() + 1) % 2**63
        )
        batches = _replayed(self._batches, other.get_state())
        return [
            fingerprint.of_batch(batch) for batch in self._shown(batches, "check_data")
        ]

    def _compared(
        self, batches: Iterable[Any], fingerprints: list[bytes]
    ) -> Iterator[Any]:
        """Yield batches that are those of the pass before."""
        count = 0
        for count, batch in enumerate(batches, 1):
            known = fingerprints[count - 1 : count]
            if known != [fingerprint.of_batch(batch)]:
                raise ValueError(self._not_the_same(f"batch {count - 1} is another"))
            yield batch
        if count < len(fingerprints):
            seen = f"{count} batches, after {len(fingerprints)},"
            raise ValueError(self._not_the_same(f"there are {seen}"))

    def _not_the_same(self, difference: str) -> str:
        return (
            f"data: {difference} in a second pass over the data, but an operator is "
            "one matrix and numbers its samples. Give a loader with shuffle=False and "
            "a dataset without random augmentations, or list(loader) for one draw of "
            "them. What depends on torch's global generator only is drawn alike in "
            "every pass with check_data=False."
        )

    def _own_batches(self) -> Iterator[Batch]:
        """The batches with the targets of construction."""
        batches = self.batches("subset")
        for (X, _), y in zip(batches, self._targets, strict=True):
            yield X, y

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

    @functools.cached_property
    def _samples_digest(self) -> str:
        with self.ranks.together("fingerprint"):
            # On the host, where data come from, and the digest is made.
            host = iterate(self._batches, torch.device("cpu"), self.dtype, self._target)
            batches = self._shown(_replayed(host, self._data_rng), "fingerprint")
            cut = self._cuts.applied(batches, self._search)
            found = fingerprint.of_samples(cut, self._search)
        return fingerprint.joined(self.ranks.gathered(found))

    def subset(self, indices: Sequence[int] | Tensor) -> EmpiricalRisk:
        """Return the risk of some samples only: their mean (or sum).

        Args:
            indices: Distinct numbers of samples, 0..N−1, counted over all batches.

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
        given = as_given(indices)
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
        own = self._own_numbers(given)
        risk = object.__new__(EmpiricalRisk)
        risk._target, risk._check = None, self._check
        risk._cuts = Cuts(final=True)
        risk.progress, risk.ranks = self.progress, self.ranks
        risk._check_data = risk._check_parts = False  # they are in memory
        parts: list[Batch] = []
        with self.ranks.together("subset"):
            risk._search = Search()
            if self.batch_sizes:
                risk._search = Search.known(self.samples)
            if len(own):
                parts = select_samples(
                    self._own_batches(), self.batch_sizes, own.tolist(), self.samples
                )
        try:
            risk._setup(self.model, self.loss, parts, self.memory)
        except Exception as error:
            self._explain_size(parts, error)
            raise
        with self.ranks.together("subset"):
            self._check_selected(own, risk)
        return risk

    def _own_numbers(self, given: Tensor) -> Tensor:
        """Which of some samples are this rank's, numbered from its first one."""
        if not self.ranks.is_many:
            return given
        if (given.diff() < 0).any():
            raise ValueError(
                "indices: samples are numbered rank by rank, so over several processes "
                "they must ascend."
            )
        own = given - self.ranks.first
        return own[(own >= 0) & (own < sum(self.batch_sizes))]

    def _check_selected(self, own: Tensor, risk: EmpiricalRisk) -> None:
        """Raise an error unless a subset has the outputs that its samples had."""
        if not len(own):
            return
        # Gathering the samples was one more pass over the data.
        old, found = (torch.cat([o.flatten() for o in r.outputs]) for r in (self, risk))
        if not same_outputs(old[self.layout.of(own).to(old.device)], found):
            raise ValueError(
                "data: are not what they were when the risk was built, or the model is "
                "another function. Give data that are the same in every pass."
            )

    def _failure(self, X: Any) -> Exception | None:
        """How the model fails on a batch, None if it does not."""
        try:
            with as_guest(self.device):
                self.model(self.model.params, X)
        # Errors of the model are of any kind.
        except Exception as error:
            return error
        return None

    def _explain_size(self, parts: Sequence[Batch], error: Exception) -> None:
        """Say so if a subset has failed because the model takes no such batch."""
        number = self.samples.number
        others = [X for X, _ in parts if number(X) not in self.batch_sizes]
        if not others or is_out_of_memory(error):
            return
        failure = self._failure(others[0])
        own, _ = next(self._own_batches())
        if failure is None or self._failure(own) is not None:
            return
        sizes = ", ".join(map(str, sorted(set(self.batch_sizes))))
        raise ValueError(
            "indices: the model does not run on batches of another size than those of "
            f"the risk ({sizes} samples; {type(failure).__name__}: {failure}). Take as "
            "many samples as fill such batches, or build a risk of them with a model "
            "that takes them."
        ) from failure

    def does_not_fit(self, X: Any, samples: int) -> str:
        """What to say of a batch that is too large, by what two samples of it take."""
        take = self.samples.take
        try:
            one, two = (
                self._graph_bytes(take(X, torch.arange(count, device="cpu")))
                for count in (1, min(2, samples))
            )
        # A model may run on no other batch; what is to be said is said without sizes.
        except Exception:
            return batch_does_not_fit(self.device, samples, None)
        per_sample = two - one if samples > 1 else one
        return batch_does_not_fit(self.device, samples, per_sample)

    def _graph_bytes(self, X: Any) -> int:
        with as_guest(self.device):
            return saved_bytes(lambda: self.model(self.model.params, X))[0]

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
        """Return L(θ), a scalar tensor. Known since construction."""
        return self._value.clone()

    def gradient(self) -> Tensor:
        """Return ∇L(θ), ``[D]``. One forward and one backward pass over the data."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[Tensor, Tensor]:
        """Return L(θ) and ∇L(θ), ``[D]``, from one pass over the data."""
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
        """Return it as a function of some of its parameters, the others constant.

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
                check_alike(self.ranks, risk._function_digests())
            risk.example = self.ranks.led(risk._first_outputs)
            risk._value = self.ranks.total(total) * self.scale
        return risk

    def __repr__(self) -> str:
        """Say what it is made of."""
        loss = type(getattr(self.loss, "loss", self.loss)).__name__
        return (
            f"<EmpiricalRisk: {self.num_params} parameters, {self.num_samples} samples "
            f"in {len(self.batch_sizes)} batch(es), {self.num_outputs} output(s), "
            f"{loss} ({self.reduction}), {self.dtype}, "
            f"{self.device}{self.ranks}>"
        )


def _loss_of_model(
    loss: str, data: Any, model: Any, params: Any, predict: Any, target: Any, dtype: Any
) -> ModelLoss:
    """Find what the loss is that a model returns."""
    if loss != "model":
        raise TypeError(
            f"loss: a torch.nn loss, a function (output, target) -> scalar or 'model', "
            f"got {loss!r}."
        )
    batches = as_batches(data, target)
    first = next(_replayed(batches, torch.random.get_rng_state()), None)
    if first is None:
        raise ValueError("data: is empty, there is not one batch.")
    return ModelLoss(model, params, predict, target, dtype, first)


def _replayed(items: Iterable[Item], state: Tensor) -> Iterator[Item]:
    """Iterate with the generator in a given state; the caller's is left alone."""
    iterator: Iterator[Item] | None = None
    while True:
        with replayed(state):
            try:
                iterator = iter(items) if iterator is None else iterator
                item = next(iterator)
            except StopIteration:
                return
            state = torch.random.get_rng_state()
        yield item


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
