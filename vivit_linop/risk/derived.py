"""Risks that follow from one: of some samples, of some parameters, at others."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from vivit_linop.arguments import Index, as_index, as_list, check_has_values
from vivit_linop.devices import is_out_of_memory
from vivit_linop.modes import as_guest, ordinary_mode, uncompiled
from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.base import Risk
from vivit_linop.risk.checks import agree, read
from vivit_linop.risk.data import fingerprint
from vivit_linop.risk.data.batches import Batch, select_samples
from vivit_linop.risk.data.containers import leaves
from vivit_linop.risk.data.sample_search import Search
from vivit_linop.risk.kept import Run, Store, next_run
from vivit_linop.risk.losses.base import OutputLoss
from vivit_linop.risk.losses.certificates import targets_of
from vivit_linop.risk.model.functional import FunctionalModel
from vivit_linop.risk.model.parameters import have_equal_entries
from vivit_linop.risk.model.same_function import check_alike
from vivit_linop.risk.model_loss import OutputOf
from vivit_linop.risk.passes import Cuts, Passes

# Of a batch: the sums over its inputs, its targets, and the outputs for them before.
Known = tuple[fingerprint.Sums, Any, Tensor]


class DerivableRisk(Risk):
    """A risk, and those of the same model and loss that follow from it."""

    @uncompiled
    def subset(self, indices: Index) -> Self:
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
        with self.ranks.together("subset") as ballot:
            given = as_index(indices, self.num_samples, "indices").cpu()
            own = _own_samples(given, self.ranks, sum(self.batch_sizes))
            ballot.given = (given,)
        parts: list[Batch] = []
        differ: list[Tensor] = []  # of batches, read at the end
        search = Search.known(self.samples) if self.batch_sizes else Search()
        with self.ranks.together("subset"), ordinary_mode():
            if len(own):
                batches, sizes = self._own_batches(differ), self.batch_sizes
                parts = select_samples(batches, sizes, own.tolist(), self.samples)
        try:
            cuts = Cuts(final=True)
            model = copy.copy(self.model)  # which learns from other batches
            passes = Passes(parts, model, search, None, cuts, self.progress)
            risk = self._of(model, passes, check=self._check)
        except Exception as error:
            if parts:
                mine, _ = next(self._own_batches([]))
                known = self.model, self.passes.search, self.batch_sizes
                _check_size(*known, mine, parts, error)
            raise
        with self.ranks.together("subset"):
            if len(own):
                rows = self.layout.of(own)
                _check_selected(rows, self.outputs, risk.outputs, differ)
        return risk

    def _of(
        self,
        model: FunctionalModel,
        passes: Passes,
        *,
        check: bool,
        check_data: bool = False,
    ) -> Self:
        """Return a risk of the same loss; data in memory stay what they are."""
        risk = type(self).__new__(type(self))
        Risk.__init__(
            risk,
            *(model, self.loss, passes, self.ranks, self.memory),
            check=check,
            check_data=check_data,
        )
        risk._check = self._check
        return risk

    def _own_batches(self, differ: list[Tensor]) -> Iterator[Batch]:
        """The batches with targets of construction; ``differ`` must not hold then."""
        batches = zip(self.passes.batches("subset"), self.all_targets, strict=True)
        for index, ((X, _), y) in enumerate(batches):
            differ += self.inputs_differ(index, X)
            yield X, y

    @uncompiled
    def over(self, names: Iterable[str]) -> Self:
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
        chosen = as_list(names, "names", "names of parameters")
        with self.ranks.together(f"over {chosen}"):
            foreign = [name for name in chosen if name not in list(self.params)]
            if foreign or not chosen:
                found = repr(foreign[0]) if foreign else "none"
                raise ValueError(f"names: some of {list(self.params)}, found {found}.")
        risk = copy.copy(self)
        risk.model, risk.kept = self.model.over(chosen), Store(self.memory, self.device)
        risk._take_parameters()
        return risk

    @uncompiled
    def at(
        self, parameters: Tensor | Iterable[Tensor] | Mapping[str, Tensor] | None = None
    ) -> Self:
        """Return the risk of the same data at other parameters.

        For every step of training: it costs one forward pass, and what is known of the
        net (the structure of its layers, costs) is kept. That the data are those of
        construction is seen by their targets and by sums over the inputs. The
        modes of the modules (``train``, ``eval``) are those of construction.

        Args:
            parameters: None for the model as it is now: its present parameters, frozen
                ones and buffers; if attributes, hooks or submodules have changed, it is
                validated as for a new risk, which costs as much. Else a vector ``[D]``,
                or tensors in the order of ``params`` or by name; everything but these
                is as it was then.

        Raises:
            ValueError: If they have other shapes, or hold NaN or Inf, or the outputs
                do; if the data have changed; if the model is gone, or has parameters
                that it had not.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> net, data = nn.Linear(3, 1), (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(net, nn.MSELoss(), data)
            >>> risk.at(torch.zeros(4)).value().allclose(data[1].square().mean())
            True
        """
        if parameters is None:
            with self.ranks.together("at") as ballot:
                ballot.flag = self.model.has_changed()
            if ballot.flag:
                return self._anew()
        risk = copy.copy(self)
        with ordinary_mode():
            with self.ranks.together("at"):
                risk.model = self._moved(parameters)
                risk._take_parameters()
                risk.kept = self.kept.elsewhere()
                known = list(
                    zip(self._sums, self.all_targets, self.outputs, strict=True)
                )
                batches = self.passes.batches("at")
                serves = self._run_serves and risk.kept.wants_runs
                graph_bytes = self.graph_bytes[0] if serves else None
                risk.outputs, total, run = _evaluated(
                    risk.model, self.loss, batches, known, graph_bytes
                )
                risk.kept.keep_run(run)
            if self.ranks.is_many:
                check_alike(self.ranks, risk._function_digests)
            risk.example = self.ranks.led(risk._first_outputs)
            risk._value = self.ranks.total(total) * self.scale
        return risk

    def _moved(self, parameters: Any) -> FunctionalModel:
        """Return the model at parameters as :meth:`at` takes them."""
        if parameters is None:
            return self.model.at(*self.model.present())
        if not isinstance(parameters, Tensor):
            parameters = self.flattened(parameters, "parameters")
        check_has_values(parameters, "parameters: a vector")
        if parameters.ndim != 1:
            raise ValueError(
                f"parameters: one vector [D], or a tensor for each, got "
                f"{list(parameters.shape)}."
            )
        return self.model.at(self.unflatten_real(parameters, "parameters"), {})

    @uncompiled
    def on(self, data: Any, *, check_data: bool = True) -> Self:
        """Return the risk of other data, any number of samples, at these parameters.

        For one batch after the other: it costs a forward pass, and what is known of the
        net is kept. What depends on the data is checked as for a new risk; that samples
        are independent is not looked at again.

        Args:
            data: As for a new risk, in the form of this one's (``[n, …]``).
            check_data: Likewise.

        Raises:
            ValueError: As a new risk of these data; if the loss is the model's own, of
                which each risk needs its own copy.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> X, y = torch.rand(8, 3), torch.rand(8, 1)
            >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), (X[:4], y[:4]))
            >>> other = risk.on((X[4:], y[4:]))
            >>> whole = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), (X, y))
            >>> both = (risk.value() + other.value()) / 2
            >>> both.allclose(whole.at(risk.flatten(risk.params)).value())
            True
        """
        if isinstance(self.model.original.predict, OutputOf):
            raise ValueError(
                "data: the loss is the model's own, so the risk of other data is "
                "another function. Make a new risk."
            )
        with self.ranks.together("on"):
            passes = self.passes.of(data, self.model)
        risk = self._of(
            *(copy.copy(self.model), passes), check=False, check_data=check_data
        )
        risk.kept.everywhere.update(self.kept.structures())
        return risk

    def is_current(self) -> bool:
        """Whether the user's model is what it was, at the same parameters and buffers.

        The modes of its modules (``train``, ``eval``) are not looked at. Over several
        processes it is asked of the models of all. Costs reading its D numbers, and no
        pass over the data.

        Example:
            >>> import torch, vivit_linop as vl
            >>> from torch import nn
            >>> net, data = nn.Linear(3, 1), (torch.rand(8, 3), torch.rand(8, 1))
            >>> risk = vl.EmpiricalRisk(net, nn.MSELoss(), data)
            >>> before = risk.is_current()
            >>> _ = nn.init.zeros_(net.bias)
            >>> before, risk.is_current(), risk.at().is_current()
            (True, False, True)
        """
        with self.ranks.together("is_current") as ballot:
            try:
                is_same = not self.model.has_changed() and self.model.is_at_present()
            except ValueError:  # it is gone, or has other parameters
                is_same = False
            ballot.flag = not is_same
        return not ballot.flag

    def _anew(self) -> Self:
        """Return the risk of the same data for what the user's model is now."""
        with self.ranks.together("at"), ordinary_mode():
            model, passes = self.model.anew(), copy.copy(self.passes)
            if isinstance(model.original.predict, OutputOf):
                raise ValueError(
                    "model: more has changed of it than parameters and buffers, and "
                    "its loss may have, too. Make a new risk."
                )
        passes.search, passes.cuts = copy.copy(passes.search), Cuts()
        passes.number = 0
        risk = self._of(model, passes, check=self._check)
        with self.ranks.together("at"):
            batches = zip(self._sums, self.all_targets, strict=False)
            for index, (sums, targets) in enumerate(batches):
                if (
                    index >= len(risk._sums)
                    or any(risk._sums[index].differ_from(sums))
                    or not _same_targets(risk.all_targets[index], targets)
                ):
                    raise self.other_data(index)
        return risk


# Some samples ------------------------------------------------------------------------


def _own_samples(given: Tensor, ranks: Ranks, own: int) -> Tensor:
    """Return which of some samples of all ranks are this one's, numbered in it."""
    if not ranks.is_many:
        return given
    if (given.diff() < 0).any():
        raise ValueError(
            "indices: samples are numbered rank by rank, so over several processes "
            "they must ascend."
        )
    local = given - ranks.first
    return local[(local >= 0) & (local < own)]


def _check_selected(
    rows: Tensor,
    before: Sequence[Tensor],
    found: Sequence[Tensor],
    differ: Sequence[Tensor],
) -> None:
    """Raise an error unless samples have the inputs and outputs that they had.

    Gathering them was one more pass over the data. Their outputs were ``rows`` of all;
    ``differ`` says whether inputs are others.
    """
    old, new = (torch.cat([o.flatten() for o in each]) for each in (before, found))
    old = old[rows.to(old.device)]
    same = old.shape == new.shape and read([agree(old, new), *differ])
    if same != [True, *[False] * len(differ)]:
        raise ValueError(
            "data: are not what they were when the risk was built, or the model is "
            "another function. Give data that are the same in every pass."
        )


# Other parameters --------------------------------------------------------------------


def _evaluated(
    model: FunctionalModel,
    loss: OutputLoss,
    batches: Iterable[Batch],
    known: Sequence[Known],
    graph_bytes: int | None,
) -> tuple[list[Tensor], Tensor, Run | None]:
    """Return the outputs of all batches, the sum of all losses, and a run to keep.

    Of the only batch, if it is known what its graph takes. Data that are not those that
    are known, by batch, are refused.
    """
    outputs: list[Tensor] = []
    run: Run | None = None
    total = torch.zeros((), dtype=model.dtype, device=model.device)
    for index, (X, y) in enumerate(batches):
        where = f"batch {index}"
        sums, targets, before = known[index]
        with as_guest(model.device):
            if graph_bytes is not None:
                run = next_run(model, X, graph_bytes)
            output = (run.output if run else model(model.params, X)).detach()
        if output.shape != before.shape:
            raise ValueError(
                f"model: on {where} it returned outputs {list(output.shape)}, before "
                f"they were {list(before.shape)}."
            )
        if any(fingerprint.Sums(X).differ_from(sums)) or not _same_targets(
            targets_of(loss, y, output), targets
        ):
            raise Risk.other_data(index)
        if not output.isfinite().all():
            raise ValueError(f"parameters: on {where} the outputs hold NaN or Inf.")
        with torch.no_grad():
            total = total + loss.total(output, targets)
        outputs.append(output.clone())
    if not total.isfinite():
        raise ValueError(f"parameters: the loss is {total.item()} there.")
    return outputs, total, run


def _same_targets(targets: Any, before: Any) -> bool:
    now, then = [*leaves(targets)], [*leaves(before)]
    return len(now) == len(then) and all(map(have_equal_entries, now, then))


# Batches of other sizes --------------------------------------------------------------


def _check_size(
    model: FunctionalModel,
    search: Search,
    sizes: Sequence[int],
    own: Any,
    parts: Sequence[Batch],
    error: Exception,
) -> None:
    """Raise a ``ValueError`` if the model has failed because it takes no such batches.

    It runs on ``own``, of one of the sizes of the risk, and not on a part of another.
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
        if is_out_of_memory(error):
            raise
        return error
    return None
