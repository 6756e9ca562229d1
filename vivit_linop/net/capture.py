"""The layer structure of a net on one batch, and the columns it gives to parameters."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from functools import cached_property
from itertools import compress, starmap
from operator import attrgetter
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from vivit_linop.devices import (
    columns_at_a_time,
    explained,
    is_out_of_memory,
    told,
    tolerated,
)
from vivit_linop.graphs import batched_gradients
from vivit_linop.net.certificate import Meeting, in_layers, met_apart
from vivit_linop.net.columns.base import DenseColumns, LayerColumns
from vivit_linop.net.columns.stacked import Place, assembled
from vivit_linop.net.kinds import View
from vivit_linop.net.recorder import Recorder
from vivit_linop.net.structure import Layout, Use, Variant, fitting, overlapping
from vivit_linop.noise import Noise
from vivit_linop.risk.data.containers import leaves
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.kept import Run

# Where one sample leaves a choice between layouts, so many are asked.
_TELLING_SAMPLES = 4
# How columns are taken: in parts as they are made, for sums over all of them
# ("stream"), and as factors also where formed columns are smaller ("factors"); those of
# a piece of samples together ("columns"), formed side by side ("rows"), or with those
# of other pieces ("pairs").
Takes = Literal["stream", "factors", "columns", "rows", "pairs"]
_IN_FACTORS: set[Takes] = {"stream", "factors"}
Maker = Callable[[Tensor], list[tuple[View, LayerColumns]]]


class PlacedUse(NamedTuple):
    """A use whose columns are wanted, where its samples are, and R of each."""

    use: Use
    layout: Layout
    width: int


class SampleSizes(NamedTuple):
    """How many entries the columns of one sample take.

    Attributes:
        fixed: Those of inputs, and of the signals of one backward pass.
        by_column: Those of each column a sample.
        signal: Those of the largest signal.
        overlapping: Those of parameters that are used in ways that overlap, whose
            columns are formed.
    """

    fixed: int
    by_column: int
    signal: int
    overlapping: dict[str, int]

    def entries(self, width: int, formed: Mapping[str, int]) -> int:
        """Count all for R columns, with those of parameters that are formed."""
        each = self.by_column + sum({**formed, **self.overlapping}.values())
        return self.fixed + width * each


class Capture:
    """The uses of the parameters in one forward pass, with their graph.

    Of an input X with n samples, of which there may have been a run already. Made and
    used inside of :func:`~vivit_linop.modes.as_guest`, which is entered once for a pass
    over the data.

    Attributes:
        output: The outputs, ``[n, C]``, with their graph.
        uses: The recorded uses.
        formed: Of columns that were formed, as they were before, without data.
        opaque: Parameters with a use that has no known structure.
        together: Whether the last columns were pulled back together, by torch's rules
            for batches.
        met: Where leaves come into the graph, if backward passes leave samples apart as
            it shows.
        in_layers: Parameters that it then has in recorded layers of torch's alone.
    """

    def __init__(
        self, risk: EmpiricalRisk, X: Any, num_samples: int, run: Run | None = None
    ) -> None:
        self._risk, self.num_samples, self.together = risk, num_samples, False
        record = None if run is None else run.record
        if run is not None and isinstance(record, Recorder) and not record.has_folded:
            recorder, output = record, run.output
        else:
            with Recorder(risk.model.params) as recorder:
                output = risk.model(risk.model.params, X)
        self.output = output.reshape(num_samples, -1)
        self.uses, self.opaque = recorder.uses, recorder.opaque
        self._has_hooks = recorder.has_hooks
        if risk.model.foreign.parts:  # columns that are kept do not change with it
            for use in self.uses:
                use.arguments.update(risk.model.foreign.copied_from(use.arguments))
        self.formed: dict[str, LayerColumns] = {}

    @classmethod
    def of_few(
        cls, risk: EmpiricalRisk, X: Any, n: int, count: int, batch: int = 0
    ) -> Self:
        """Run a net on the first ``count`` of n samples of a batch.

        Nets that run on whole batches only are run on all of them.
        """
        if count < n:
            index = torch.arange(count, device="cpu")
            # In whatever way it fails, it may run on the batch; an error of its own is
            # seen there again. The batch takes more memory.
            with tolerated(Exception):
                with explained(risk.does_not_fit, X, count):
                    few = cls(risk, risk.samples.take(X, index), count)
                risk.check_outputs(batch, few.output.detach(), samples=index)
                return few
        return cls(risk, X, n)

    def columns(
        self,
        cotangents: Tensor,
        variant: Variant,
        names: Set[str],
        takes: Takes = "pairs",
    ) -> dict[str, LayerColumns]:
        """Return the columns that parameters have if a variant is that of this run.

        Those that cotangents ``[n, C, R]`` are pulled back to.
        """
        width = cotangents.shape[2]
        placed = self._placed(variant, names, width)
        stacked = self._pulled_together(placed, cotangents, variant)
        if stacked:
            makers = starmap(Use.columns, placed)
            return self._assembled(placed, makers, stacked, names, takes)
        # What is formed in any case is formed as cotangents come: they take more.
        forms = width > 1 and takes not in _IN_FACTORS

        def is_apart(use: Use) -> bool:
            return forms and use.is_smaller_formed(self.num_samples)

        *parts, columns = self._one_by_one(placed, is_apart, cotangents, names, takes)
        return columns | _beside(parts)

    @cached_property
    def met(self) -> list[Meeting] | None:
        """Only of several samples, which alone can meet."""
        n = self.num_samples
        return met_apart(self.output, n) if n > 1 and not self._has_hooks else None

    @cached_property
    def in_layers(self) -> Set[str]:
        """See the class."""
        met = self.met
        return (
            set() if met is None else in_layers(met, self.uses, self._risk.model.params)
        )

    def parts(
        self, cotangents: Tensor, variant: Variant, names: Set[str]
    ) -> Iterator[dict[str, LayerColumns]]:
        """Yield the columns in parts, for what is summed over all columns.

        Those of layers with many positions come one of each sample at a time, and only
        one is in memory: they have the same inputs, one object. Those of all others
        come together, in the last part. They are of cotangents ``[n, C, R]``.
        """
        width = cotangents.shape[2]
        placed = self._placed(variant, names, width)

        def is_apart(use: Use) -> bool:
            return use.is_wide(self.num_samples, width)

        yield from self._one_by_one(placed, is_apart, cotangents, names, "stream")

    def _one_by_one(
        self,
        placed: list[PlacedUse],
        is_apart: Callable[[Use], bool],
        cotangents: Tensor,
        names: Set[str],
        takes: Takes,
    ) -> Iterator[dict[str, LayerColumns]]:
        """Yield columns of some uses for each cotangent of the samples, then the rest.

        The columns of uses that alone use their parameters come one of each sample at a
        time, if they may; those of all others at once, in the last part.
        """
        used = Counter(name for each in placed for name in each.use.names)
        apart: list[PlacedUse] = []
        together: list[PlacedUse] = []
        for each in placed:
            alone = all(used[name] == 1 for name in each.use.names)
            (apart if alone and is_apart(each.use) else together).append(each)
        makers, stacked = [*starmap(Use.columns, apart)], list[Tensor]()
        placed, width = apart + together, cotangents.shape[2]
        uses = [each.use for each in placed]
        for r in range(width if placed else 0):
            signals = self._backward(uses, cotangents[:, :, r].contiguous())
            for index, each in enumerate(placed):
                signals[index] = each.layout(signals[index]).unsqueeze(1)
            if apart:  # whose signals are taken away
                yield self._assembled(apart, makers, signals, names, takes)
            _stack(stacked, signals, r, width)
            del signals  # before those of the next are there
        last = starmap(Use.columns, together)
        yield self._assembled(together, last, stacked, names, takes)

    def comes_in_parts(self, width: int) -> bool:
        """Whether :meth:`parts` has more than one for R columns a sample.

        Not where all are pulled back at once: they fit into a cache, and no part would
        come before the others.
        """
        return self._at_a_time(self.uses) < width and any(
            use.is_wide(self.num_samples, width) for use in self.uses
        )

    def _at_a_time(self, uses: Sequence[Use]) -> int:
        """How many cotangents are pulled back to some uses at a time."""
        entries = 0
        for use in uses:
            entries += use.output_shape.numel()
        nbytes = entries * self.output.element_size()
        return columns_at_a_time(self.output.device, nbytes)

    def _placed(self, variant: Variant, names: Set[str], width: int) -> list[PlacedUse]:
        """The uses of some parameters, with where their samples are."""
        placed = []
        for use, layout in zip(self.uses, variant.layouts, strict=True):
            # Of an output without entries the columns are zero.
            if layout is None or use.output_shape.numel() == 0:
                continue
            if not names.isdisjoint(use.names):
                place = Layout(layout, self.num_samples)
                placed.append(PlacedUse(use, place, width))
        return placed

    def _pulled_together(
        self, placed: Sequence[PlacedUse], cotangents: Tensor, variant: Variant
    ) -> list[Tensor]:
        """Pull cotangents ``[n, C, R]`` back together, to ``[n, R, …]`` at each use.

        As many columns in a backward pass as memory bears. None where that is one, or
        where an operation of the net has no rule for batches.
        """
        uses, width = [each.use for each in placed], cotangents.shape[2]
        few = self._at_a_time(uses) if variant.together else 1
        stacked: list[Tensor] = []
        self.together = few > 1 < width and bool(uses)
        if not self.together:
            return stacked
        try:
            for start in range(0, width, few):
                rows = cotangents[:, :, start : start + few].permute(2, 0, 1)
                found = self._backward(uses, rows.contiguous())
                for index, each in enumerate(placed):
                    found[index] = each.layout.of_columns(found[index])
                _stack(stacked, found, start, width)
        except RuntimeError as error:
            # What does not fit says nothing of the net.
            self.together, variant.together = False, is_out_of_memory(error)
            return []
        return stacked

    def _assembled(
        self,
        placed: Sequence[PlacedUse],
        makers: Iterable[Maker],
        signals: list[Tensor],
        wanted: Set[str],
        takes: Takes,
    ) -> dict[str, LayerColumns]:
        """Return the columns of parameters from signals, which it takes away."""
        used = Counter(name for each in placed for name in each.use.names)
        compacts = takes not in _IN_FACTORS
        parts: dict[str, list[tuple[Place, LayerColumns]]] = {}
        columns: dict[str, LayerColumns] = {}
        with torch.no_grad():
            for make in makers:
                signal = signals.pop(0)
                try:
                    found = make(signal)
                # A rule may be wrong, or a layout one that tensors do not have: what is
                # missing is seen when columns are checked.
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    continue
                for view, part in found:
                    if view.name not in wanted or part.numel != view.shape.numel():
                        continue
                    if view.transposed:
                        part = part.transposed(view.shape)
                    known = parts.setdefault(view.name, [])
                    known.append((view.place, part))
                    if len(known) == used[view.name]:
                        del parts[view.name]
                        columns[view.name] = self._whole(view.name, known, compacts)
        return columns

    def _whole(
        self, name: str, parts: list[tuple[Place, LayerColumns]], compacts: bool
    ) -> LayerColumns:
        """Columns of all uses, formed where that is smaller; then others are noted."""
        whole = assembled(parts, self._risk.params[name].numel())
        formed = whole.compacted() if compacts else whole
        if formed is not whole:
            self.formed[name] = whole.without_data()
        return formed

    def keep_sizes(self, X: Any) -> SampleSizes:
        """Tell what the columns of a sample take, for all of the shape of a batch's."""
        n, fixed, each, signal = self.num_samples, 0, 0, 0
        for use in self.uses:
            without = use.entries(n, 0)
            fixed, each = fixed + without, each + use.entries(n, 1) - without
            signal = max(signal, use.output_shape.numel() // n)
        sizes = self._risk.params
        formed = {name: sizes[name].numel() for name in overlapping(self.uses)}
        found = SampleSizes(fixed, each, signal, formed)
        key = _key_of_sizes(self._risk, X)
        return self._risk.kept.everywhere.setdefault(key, found)

    def _backward(self, uses: Sequence[Use], cotangent: Tensor) -> list[Tensor]:
        """Pull cotangents ``[n, C]`` or ``[K, n, C]`` back to the outputs of uses."""
        edges = [*map(attrgetter("edge"), uses)]
        found: Sequence[Tensor | None]
        if several := cotangent.shape[:-2]:
            found = batched_gradients(self.output, edges, [cotangent])
        else:
            found = torch.autograd.grad(
                self.output, edges, cotangent, retain_graph=True, allow_unused=True
            )
        signals = []
        for use, signal in zip(uses, found, strict=True):
            if signal is None:
                signal = cotangent.new_zeros((*several, *use.output_shape))
            signals.append(signal.detach())
        return signals

    def find(self) -> Variant:
        """Return the way that the net has taken, with the axis of samples in each use.

        Where a cotangent of one sample alone arrives is where that sample is. Of uses
        that no cotangent reaches, the layouts are guesses.
        """
        n, keys = self.num_samples, [*map(attrgetter("key"), self.uses)]
        possible = [use.layouts(n) for use in self.uses]
        if self.met is not None:  # the graph shows where they are wherever one arrives
            known = ("first", "merged")
            layouts = [
                next((c for c in names if c in known), None) for names in possible
            ]
            return Variant(keys, layouts, False)
        noise = Noise().like(self.output)
        pending, order = list(range(len(self.uses))), deque(reversed(range(n)))
        while pending and order:
            sample = order.popleft()
            cotangent = torch.zeros_like(self.output)
            cotangent[sample] = noise[sample]
            uses = [*map(self.uses.__getitem__, pending)]
            flags = []
            for i, signal in zip(pending, self._backward(uses, cotangent), strict=True):
                flags.append(fitting(possible[i], signal, sample, n))
            silent, undecided = [], []
            for i, (heard, *fits) in zip(pending, told(flags), strict=True):
                possible[i] = [*compress(possible[i], fits)]
                if n > 1 and possible[i] and not heard:
                    silent.append(i)
                elif len(possible[i]) > 1 and sample > n - _TELLING_SAMPLES:
                    undecided.append(i)
            # Most often no sample reaches what the last one does not. Which one does is
            # seen if its layout is guessed.
            if sample == n - 1 and silent:
                signals = self._backward([self.uses[i] for i in silent], noise)
                flags = []
                for i, signal in zip(silent, signals, strict=True):
                    guess = Layout(possible[i][0], n)
                    flags.append(guess(signal).reshape(n, -1).any(1))
                reached = [*zip(silent, told(flags), strict=True)]
                silent = [i for i, heard in reached if any(heard)]
                # A wrong guess may name the last one, which is not asked twice.
                first = {heard.index(True) for _, heard in reached if any(heard)}
                order.extendleft(first - {sample})
            pending = sorted(silent + undecided)
        layouts = [next(iter(names), None) for names in possible]
        return Variant(keys, layouts, n == 1)


def sample_sizes(risk: EmpiricalRisk, batch: int, X: Any, n: int) -> SampleSizes:
    """Return the sizes for the samples of a batch; runs the net once for each shape."""
    known: SampleSizes | None = risk.kept.everywhere.get(_key_of_sizes(risk, X))
    return known or Capture.of_few(risk, X, n, 1, batch).keep_sizes(X)


def _key_of_sizes(risk: EmpiricalRisk, X: Any) -> Hashable:
    axes = risk.samples.axes(X)
    shapes = []
    for at, leaf in enumerate(leaves(X)):
        shape, axis = list(leaf.shape), None if axes is None else axes[at]
        if axis is not None:
            del shape[axis]
        shapes.append(tuple(shape))
    return "sample sizes", *shapes


def _beside(parts: Sequence[dict[str, LayerColumns]]) -> dict[str, LayerColumns]:
    """Put columns for one cotangent of each sample beside those for the others."""
    columns: dict[str, LayerColumns] = {}
    for name in [*parts[0]] if parts else ():
        rows = [part.pop(name).rows() for part in parts]  # twice of one only
        columns[name] = DenseColumns(torch.stack(rows, dim=1))
    return columns


def _is_dense(signal: Tensor) -> bool:
    """Whether the entries of a signal ``[n, k, …]`` fill memory sample by sample."""
    if signal.is_contiguous():
        return True
    channels_last = torch.channels_last
    if signal.ndim != 5 or signal.shape[1] != 1:
        return False
    return signal.squeeze(1).is_contiguous(memory_format=channels_last)


def _stack(
    stacked: list[Tensor], signals: Sequence[Tensor], start: int, width: int
) -> None:
    """Put signals ``[n, k, …]`` beside those of the ``start`` cotangents before."""
    for index, signal in enumerate(signals):
        # There are no others; neither are entries repeated along an axis.
        if signal.shape[1] == width and _is_dense(signal):
            stacked.append(signal)
            continue
        if start == 0:
            shape = len(signal), width, *signal.shape[2:]
            stacked.append(signal.new_empty(shape))
        stacked[index][:, start : start + signal.shape[1]] = signal
