"""A risk as a function of its parameters: its samples, its value and its gradient.

What J, G and all other operators ask of a risk is here; how a user's arguments become
one is in ``empirical.py``, which risks follow from one in ``derived.py``.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vivit_linop.devices import explained
from vivit_linop.modes import as_guest, ordinary_mode
from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.checks import agree, read
from vivit_linop.risk.data import fingerprint
from vivit_linop.risk.data.batches import Batch
from vivit_linop.risk.data.distributed import by_items, check_parts
from vivit_linop.risk.data.samples import Samples
from vivit_linop.risk.first_pass import first_pass
from vivit_linop.risk.kept import Store
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.derived import LossOfItems
from vivit_linop.risk.model.functional import FunctionalModel
from vivit_linop.risk.model.original import Params
from vivit_linop.risk.model.parameters import ParameterVectors, check_finite
from vivit_linop.risk.model.same_function import check_alike, digests_of
from vivit_linop.risk.passes import Passes, does_not_fit
from vivit_linop.risk.row_layout import RowLayout


class Risk(ParameterVectors):
    """L(θ) = r Σ_n ℓ(f(x_n, θ), y_n), after a first pass over the data.

    Args are those of :class:`EmpiricalRisk`, made ready. With ``check_data`` it is an
    error, too, if ranks have the same data.

    Attributes:
        outputs: The outputs of each batch.
        all_targets: The targets of each batch.
        num_rows: How many outputs all samples have: the rows of J.
        batch_sizes: How many samples each batch has.
        sizes: How many entries each parameter has.
        scale: L = scale Σ ℓ, with the loss as torch has it without its divisor.
        reduction_factor: r.
        has_tangents: Whether J x is possible, as far as is known: not all operations
            have second derivatives in torch.
        graph_bytes: What the graph of each batch's outputs takes, beyond θ.
        kept: What is made once, for all operators of the risk.
        example: Outputs and targets of the first batch.
    """

    @ordinary_mode()
    def __init__(
        self,
        model: FunctionalModel,
        loss: OutputLoss,
        passes: Passes,
        ranks: Ranks,
        memory: int | None,
        *,
        check: bool,
        check_data: bool,
    ) -> None:
        self.model, self.loss, self.memory, self.passes = model, loss, memory, passes
        self.ranks, self.progress, self._check = ranks, passes.progress, check
        self.has_tangents = True
        self._take_parameters()
        self.complex_names = model.complex_names
        self.dtype, self.device = model.dtype, model.device
        self.kept = Store(memory, self.device)
        self.reduction = loss.reduction
        if self.ranks.is_many:
            self.ranks = self.ranks.on(self.device)
            check_alike(self.ranks, self._digests_of_all)
        twice = check_data and not isinstance(passes.data, (list, tuple))
        with self.ranks.together("EmpiricalRisk"):
            seen = first_pass(model, loss, passes, check, twice)
        self.loss, self.outputs = seen.loss, seen.outputs
        self.all_targets = seen.targets
        # A run that is kept is that of the only batch.
        self._run_serves = len(seen.outputs) == 1 and seen.run is not None
        if self._run_serves:
            self.kept.keep_run(seen.run)
        self.graph_bytes, self._sums = seen.graph_bytes, seen.sums
        self.batch_sizes = [*map(len, seen.outputs)]
        each = tuple(output[0].numel() for output in seen.outputs)
        self.layout = RowLayout(tuple(self.batch_sizes), each)
        self._count(check_data)
        self._normalise(seen.total, seen.weight)
        model.foreign.settle()

    def _take_parameters(self) -> None:
        """Show the parameters of the model, without their graph."""
        model = self.model.params
        self.params: Params = {name: p.detach() for name, p in model.items()}
        self.sizes = [*map(Tensor.numel, model.values())]
        self.num_params = sum(self.sizes)

    def _count(self, check_data: bool) -> None:
        """Count the samples and outputs of all ranks, which may have to differ."""
        counts = self.ranks.gathered(sum(self.batch_sizes))
        self.num_samples = sum(counts)
        if not self.num_samples:
            raise ValueError("data: is empty, there is not one batch.")
        self.ranks = self.ranks.counted(counts)
        if self.ranks.is_many:
            seen = self.outputs, self.all_targets, self.passes.data
            check_parts(self.ranks, *seen, check_data)
            own = self.model.count is not None if self.outputs else None
            if by_items(self.ranks, own) and not self.outputs:
                self.loss = LossOfItems(self.loss)
        # This rank may have none.
        self.example = self.ranks.led(self._first_outputs)
        if not self.outputs:
            self.layout = RowLayout.uniform((), self.example[0][0].numel())
        self.layout = self.layout.over(self.ranks)
        self.num_rows = self.layout.among(self.num_samples)
        uniform = self.layout.is_uniform
        self.num_outputs = self.layout.width if uniform else self.num_rows

    def _normalise(self, total: Tensor, weight: Tensor) -> None:
        """Divide by what the reduction says, from Σ ℓ and the weights of this rank."""
        if self.ranks.is_many:
            both = torch.stack([total, weight]).to(self.device)
            total, weight = self.ranks.total(both).unbind()
        # Together, since the host waits for the device to read them.
        value, divisor = torch.stack([total, weight.to(total)]).tolist()
        if not self.model.is_finite:
            check_finite(self.params, "params")
        self.model.is_finite = True
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
        return self.outputs[0], self.all_targets[0]

    # Data -------------------------------------------------------------------------

    @property
    def samples(self) -> Samples:
        """Where the samples of its inputs are."""
        return self.passes.search.samples

    def batches(self, what: str | None = None) -> Iterator[Batch]:
        """Pass over the data.

        Every pass starts from one state of the random number generator, so that what a
        loader draws from it is the same again; the caller's state is as before.

        Args:
            what: What the pass is for, for its progress bar; None for no bar.

        Raises:
            ValueError: If there are fewer batches than at construction.
        """
        return self.passes.batches(what)

    def targets(self) -> list[Any]:
        """The targets of each batch."""
        return self.all_targets

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
            found = self.passes.digests()
        return fingerprint.joined(self.ranks.gathered(found))

    def does_not_fit(self, X: Any, n: int) -> str:
        """What to say of a batch of n samples that is too large for the device."""
        return does_not_fit(self.model, self.passes.search, X, n)

    def check_outputs(
        self,
        index: int,
        outputs: Tensor,
        differ: Sequence[Tensor] = (),
        samples: Tensor | None = None,
    ) -> None:
        """Raise a ``ValueError`` if outputs are not those at construction.

        Args:
            index: The batch.
            outputs: Those of the batch.
            differ: What :meth:`inputs_differ` has said of its input.
            samples: The samples of the batch that they belong to, None for all.
        """
        right = self.has_outputs(index, outputs, samples)
        if read([right, *differ]) != [True, *[False] * len(differ)]:
            raise self.other_data(index)

    def has_outputs(
        self, index: int, outputs: Tensor, samples: Tensor | None = None
    ) -> Tensor:
        """Whether outputs are those at construction, not read by the host; as above."""
        before = self.outputs[index] if index < len(self.outputs) else None
        if before is not None and samples is not None:
            before = before[samples.to(before.device)]
        if before is None or before.numel() != outputs.numel():
            return outputs.new_zeros((), dtype=torch.bool)
        return agree(before, outputs.reshape(before.shape))

    def inputs_differ(self, index: int, X: Any) -> list[Tensor]:
        """Whether sums over the input of a batch are others; not read by the host.

        Outputs do not show all of it, where weights are zero. It is asked of the whole
        input before the model has it, which may spoil it.
        """
        if index >= len(self._sums):
            return []
        return fingerprint.Sums(X).differ_from(self._sums[index])

    @staticmethod
    def other_data(index: int) -> ValueError:
        """What to say where the data or the outputs of a batch are others."""
        return ValueError(
            f"data: batch {index} is not what it was when the risk was built: its "
            "inputs, targets or outputs are others. An operator is one matrix: give a "
            "loader without shuffling and random augmentations, and do not change the "
            "data in place; nor what the model reaches through a global variable or an "
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
        for index, (X, _) in enumerate(self.passes.batches("gradient")):
            n = self.batch_sizes[index] if index < len(self.batch_sizes) else 1
            with explained(self.does_not_fit, X, n), as_guest(self.device):
                run = self.kept.use_run(X)
                if run is None:
                    differ = self.inputs_differ(index, X)
                    output = self.model(self.model.params, X)
                    self.check_outputs(index, output, differ)
                else:
                    output = run.output
                total = self.loss.total(output, self.all_targets[index]) * self.scale
                gradients = torch.autograd.grad(
                    total, parameters, allow_unused=True, retain_graph=run is not None
                )
            both[:-1] += self.flatten(gradients)
            both[-1] += total.detach()
        return both

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
            f"<{type(self).__name__}: {self.num_params} parameters, "
            f"{self.num_samples} samples in {len(self.batch_sizes)} batch(es), "
            f"{self.num_outputs} output(s), {loss} ({self.reduction}), {self.dtype}, "
            f"{self.device}{self.ranks}>"
        )
