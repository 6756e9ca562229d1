"""The layer structure of a net on one batch, and the columns it gives to parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vivit_linop.capture.layers import LayerColumns, compacted
from vivit_linop.capture.layouts import Layout, candidates
from vivit_linop.capture.recorder import Recorder, Use
from vivit_linop.capture.stacked import assembled
from vivit_linop.capture.uses import (
    columns_of_use,
    entries_of_use,
    is_wide,
    overlapping,
)
from vivit_linop.capture.views import View
from vivit_linop.risk.data import take
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.model import as_guest, strided

# The structure is checked on this many samples of the first batch.
_CHECK_SAMPLES = 4
_NOISE = 65_537


Kind = tuple[str, list[str]]


@dataclass
class Structure:
    """What a net does with its parameters, as far as it has been verified.

    Attributes:
        layouts: For each recorded use, where its samples are; None where unknown.
        opaque: Parameters whose columns need a vector–Jacobian product by sample.
        single: Whether it was found on one sample, where every axis is of that sample.
        kinds: For each recorded use, what it is and of which parameters.
        unseen: The numbers of uses that no cotangent reached, so that their layouts
            are guesses.
    """

    layouts: list[str | None]
    opaque: set[str]
    single: bool
    kinds: list[Kind]
    unseen: set[int]

    def fits(self, capture: Capture) -> bool:
        """Whether it is that of a capture, as far as can be seen from outside.

        A net that decides on values takes other ways on other samples.
        """
        same = self.kinds == capture.kinds and capture.opaque <= self.opaque
        return same and self.single == (capture.num_samples == 1)


class UnseenUseError(RuntimeError):
    """A cotangent reaches a use that none reached when the structure was found."""


class Kept(NamedTuple):
    """A use whose columns are wanted.

    Attributes:
        use: The use.
        layout: Where its samples are.
        unseen: Whether the layout is a guess.
    """

    use: Use
    layout: Layout
    unseen: bool


class Capture:
    """The uses of the parameters in one forward pass, with their graph.

    Args:
        risk: The risk.
        X: The input of n samples.
        num_samples: n.

    Attributes:
        num_samples: n.
        output: The outputs, ``[n, C]``, with their graph.
        uses: The recorded uses.
        opaque: Parameters with a use that has no known structure.
    """

    def __init__(self, risk: EmpiricalRisk, X: Any, num_samples: int) -> None:
        self._risk, self.num_samples = risk, num_samples
        recorder = Recorder(risk.params)
        with as_guest(risk.device), recorder:
            output = risk.model(risk.params, X)
        with as_guest(risk.device):
            self.output = output.reshape(num_samples, -1)
        self.uses, self.opaque = recorder.uses, recorder.opaque

    @property
    def kinds(self) -> list[Kind]:
        """What each use is, and of which parameters."""
        return [(use.kind, use.names) for use in self.uses]

    def columns(
        self,
        cotangents: Tensor,
        structure: Structure,
        names: Set[str],
        compact: bool = True,
    ) -> dict[str, LayerColumns]:
        """Return the columns of parameters that are not opaque.

        Args:
            cotangents: ``[n, C, R]``.
            structure: The verified structure of the net.
            names: The parameters of interest.
            compact: Whether to form columns that are smaller than their factors.

        Raises:
            UnseenUseError: If the structure must be found again, on this capture.
        """
        kept = self._kept(structure, names)
        stacked: list[Tensor] = []
        for r, signals in enumerate(self._signals(kept, cotangents)):
            for index, signal in enumerate(signals):
                if r == 0:
                    stacked.append(_stack(signal, cotangents.shape[2]))
                stacked[index][:, r] = signal
        makers = (columns_of_use(each.use, each.layout) for each in kept)
        return self._assembled(kept, makers, stacked, names - structure.opaque, compact)

    def parts(
        self, cotangents: Tensor, structure: Structure, names: Set[str]
    ) -> Iterator[tuple[dict[str, LayerColumns], bool]]:
        """Yield the columns in parts, for what is summed over all columns.

        Those of layers with many positions come one of each sample at a time, and only
        one is in memory; those of all others come together, in the last part.

        Args:
            cotangents: ``[n, C, R]``.
            structure: The verified structure of the net.
            names: The parameters of interest.

        Yields:
            Columns, and whether their inputs have been those of a part before.
        """
        wanted, kept = names - structure.opaque, self._kept(structure, names)
        counts = Counter(name for each in kept for name in each.use.names)
        width = cotangents.shape[2]
        apart: list[Kept] = []
        together: list[Kept] = []
        for each in kept:
            alone = all(counts[name] == 1 for name in each.use.names)
            wide = alone and is_wide(each.use, self.num_samples, width)
            (apart if wide else together).append(each)
        makers = [columns_of_use(each.use, each.layout) for each in apart]
        stacked: list[Tensor] = []
        for r, signals in enumerate(self._signals(apart + together, cotangents)):
            single = [signal.unsqueeze(1) for signal in signals[: len(apart)]]
            yield self._assembled(apart, makers, single, wanted, compact=False), r > 0
            for index, signal in enumerate(signals[len(apart) :]):
                if r == 0:
                    stacked.append(_stack(signal, width))
                stacked[index][:, r] = signal
        last = (columns_of_use(each.use, each.layout) for each in together)
        yield self._assembled(together, last, stacked, wanted, compact=False), False

    def _kept(self, structure: Structure, names: Set[str]) -> list[Kept]:
        """The uses of some parameters."""
        wanted = names - structure.opaque
        return [
            Kept(use, Layout(layout, self.num_samples), number in structure.unseen)
            for number, (use, layout) in enumerate(
                zip(self.uses, structure.layouts, strict=True)
            )
            if layout is not None and not wanted.isdisjoint(use.names)
        ]

    def _signals(
        self, kept: Sequence[Kept], cotangents: Tensor
    ) -> Iterator[list[Tensor]]:
        """Pull cotangents ``[n, C, R]`` back one by one, to ``[n, …]`` at each use."""
        uses = [each.use for each in kept]
        for r in range(cotangents.shape[2] if kept else 0):
            signals = self._backward(uses, cotangents[:, :, r])
            found = list(zip(kept, signals, strict=True))
            if any(each.unseen and signal.any() for each, signal in found):
                raise UnseenUseError
            yield [each.layout(signal.detach()) for each, signal in found]

    def _assembled(
        self,
        kept: Sequence[Kept],
        makers: Iterable[Callable[[Tensor], list[tuple[View, LayerColumns]]]],
        signals: list[Tensor],
        wanted: Set[str],
        compact: bool,
    ) -> dict[str, LayerColumns]:
        """Return the columns of parameters from signals, which it takes away."""
        counts = Counter(name for each in kept for name in each.use.names)
        parts: dict[str, list[tuple[View, LayerColumns]]] = {}
        with torch.no_grad():
            for make in makers:
                for view, part in make(signals.pop(0)):
                    if view.name in wanted:
                        if compact and counts[view.name] == 1:
                            part = compacted(part)
                        parts.setdefault(view.name, []).append((view, part))
            return {
                name: assembled(found, self._risk.params[name].numel())
                for name, found in parts.items()
            }

    def bytes_per_sample(self, width: int, structure: Structure) -> int:
        """Estimate what the columns of one sample take."""
        n, params = self.num_samples, self._risk.params
        formed = structure.opaque | overlapping(self.uses)
        entries = sum(entries_of_use(use, n, width) for use in self.uses)
        entries += width * sum(params[name].numel() for name in formed)
        return entries * self.output.element_size()

    @property
    def largest_signal(self) -> int:
        """The bytes of the largest output of a use."""
        entries = max((use.output_shape.numel() for use in self.uses), default=0)
        return entries * self.output.element_size()

    def _backward(self, uses: list[Use], cotangent: Tensor) -> list[Tensor]:
        """Pull a cotangent back to the outputs of uses."""
        with as_guest(self._risk.device):
            signals = torch.autograd.grad(
                self.output,
                [use.edge for use in uses],
                cotangent,
                retain_graph=True,
                allow_unused=True,
            )
        return [
            cotangent.new_zeros(use.output_shape) if signal is None else signal
            for use, signal in zip(uses, signals, strict=True)
        ]

    # Finding and checking the structure ---------------------------------------------

    def find_layouts(self) -> tuple[list[str | None], set[int]]:
        """Find the axis of the samples at each use.

        Where a cotangent of one sample alone arrives is where that sample is.

        Returns:
            The layouts, and the numbers of the uses that no cotangent reaches.
        """
        n = self.num_samples
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.output.shape, generator=generator).to(self.output)
        possible = [candidates(use, n) for use in self.uses]
        pending, unseen = list(range(len(self.uses))), set[int]()
        for sample in reversed(range(n)):
            if not pending:
                break
            cotangent = torch.zeros_like(self.output)
            cotangent[sample] = noise[sample]
            signals = self._backward([self.uses[i] for i in pending], cotangent)
            silent, undecided = [], []
            for i, signal in zip(pending, signals, strict=True):
                possible[i] = [
                    name for name in possible[i] if self._is_at(name, signal, sample)
                ]
                if n > 1 and possible[i] and not signal.any():
                    silent.append(i)
                elif len(possible[i]) > 1 and sample > n - _CHECK_SAMPLES:
                    undecided.append(i)
            # Most often no sample reaches what the last one does not.
            if sample == n - 1 and silent:
                signals = self._backward([self.uses[i] for i in silent], noise)
                reached = [signal.any() for signal in signals]
                unseen = {i for i, r in zip(silent, reached, strict=True) if not r}
                silent = [i for i in silent if i not in unseen]
            pending = sorted(silent + undecided)
        return [next(iter(names), None) for names in possible], unseen

    def _is_at(self, layout: str, signal: Tensor, sample: int) -> bool:
        """Whether a layout has the signal of one sample at that sample alone."""
        by_sample = Layout(layout, self.num_samples)(signal)
        return not (by_sample[:sample].any() or by_sample[sample + 1 :].any())

    def check(self) -> Structure:
        """Return the structure of the net, as far as it stands up to a check.

        A net without second derivatives, or with transformations inside, cannot be
        checked; then nothing is taken for granted.
        """
        try:
            with as_guest(self._risk.device):
                return self._check()
        except (RuntimeError, NotImplementedError):
            nothing: list[str | None] = [None] * len(self.uses)
            return Structure(
                nothing,
                set(self._risk.params),
                self.num_samples == 1,
                self.kinds,
                set(),
            )

    def _check(self) -> Structure:
        """Compare columns with products through the whole net.

        For random u and x, the columns pulled back from u must add up to the gradient
        Jᵀu of each parameter, and their products with x to u_n · (J x)_n for each
        sample. A parameter that fails the former is opaque; if the latter fails, all
        are.
        """
        risk = self._risk
        layouts, unseen = self.find_layouts()
        unknown = {
            name
            for use, layout in zip(self.uses, layouts, strict=True)
            if layout is None
            for name in use.names
        }
        structure = Structure(
            layouts,
            self.opaque | unknown,
            self.num_samples == 1,
            self.kinds,
            unseen,
        )
        generator = torch.Generator().manual_seed(1)

        noise = torch.randn(_NOISE, generator=generator)

        def draw(like: Tensor) -> Tensor:
            # Large parameters get the same noise again and again: drawing takes long.
            repeats = like.numel() // _NOISE + 1
            return noise.repeat(repeats)[: like.numel()].view(like.shape).to(like)

        u = torch.randn(self.output.shape, generator=generator)
        u = u.to(self.output).requires_grad_()
        x = {name: draw(p) for name, p in risk.params.items()}
        with as_guest(risk.device):
            gradients = torch.autograd.grad(
                self.output,
                list(risk.params.values()),
                u,
                create_graph=True,
                allow_unused=True,
            )
        pulled_back = dict(zip(risk.params, map(strided, gradients), strict=True))
        columns = self.columns(u.detach().unsqueeze(2), structure, set(risk.params))
        tolerance = 10 * torch.finfo(risk.dtype).eps ** 0.5
        # Of a gradient that is zero, as that of a key's bias in attention, rounding is
        # left, and that may differ.
        found = {n: g.detach() for n, g in pulled_back.items() if g is not None}
        norms = {name: gradient.norm() for name, gradient in found.items()}
        square = sum((norm.square() for norm in norms.values()), torch.zeros(()))
        rounding = 100 * torch.finfo(risk.dtype).eps * square.sqrt()
        by_sample = torch.zeros_like(self.output[:, 0])
        checked: dict[str, Tensor] = {}
        for name, gradient in pulled_back.items():
            if name in structure.opaque:
                continue
            if name not in columns:  # not seen: it must not matter
                if gradient is not None:
                    structure.opaque.add(name)
                continue
            part = columns[name]
            # Columns of a table of words are too long to be formed.
            error = part.entry_sums()
            size = error.norm()
            if gradient is not None:
                error -= found[name].reshape(-1)
                size += norms[name]
            if not error.norm() <= tolerance * size + rounding:
                structure.opaque.add(name)
                continue
            images = part.images(x[name].reshape(1, -1))
            by_sample += part.components(images).view(-1)
            if gradient is not None and gradient.requires_grad:
                checked[name] = gradient
        if checked:
            with as_guest(risk.device):
                (products,) = torch.autograd.grad(
                    list(checked.values()), u, [x[name] for name in checked]
                )
            expected = (products * u).sum(1).detach()
            error = (by_sample - expected).norm()
            if not error <= tolerance * (by_sample.norm() + expected.norm()):
                structure.opaque = set(risk.params)
        return structure


def _stack(signal: Tensor, width: int) -> Tensor:
    """Return the place for as many signals as a sample has columns."""
    return signal.new_empty(len(signal), width, *signal.shape[1:])


_STRUCTURES: WeakKeyDictionary[EmpiricalRisk, Structure] = WeakKeyDictionary()


def find_structure(risk: EmpiricalRisk) -> Structure:
    """Record the net on a few samples and check what was recorded, once for a risk."""
    if risk not in _STRUCTURES:
        _STRUCTURES[risk] = _find_structure(risk)
    return _STRUCTURES[risk]


def _find_structure(risk: EmpiricalRisk) -> Structure:
    X, y = next(risk.batches())
    size = min(len(y), _CHECK_SAMPLES)
    return Capture(risk, take(X, torch.arange(size), risk.by_sample), size).check()
