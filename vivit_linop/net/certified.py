"""Columns of one part of the data that have stood up to a check, however made.

The ways, each slower than the one before: from the layers' structure as it is known;
from the structure as this part shows it; by vectorised vector–Jacobian products; sample
by sample. A parameter takes the first that gives columns which agree with an ordinary
backward pass, or which a graph shows to be right (:mod:`vivit_linop.net.certificate`);
what fails is remembered for the net.

Columns that are zero but for rounding (a weight that a norm makes irrelevant) do not
show how large rounding is: what has cancelled is not in them. Before they are called
wrong, it is measured.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from vivit_linop.devices import is_out_of_memory, told, tolerated
from vivit_linop.graphs import gradients, used_up
from vivit_linop.modes import as_guest
from vivit_linop.net.capture import Capture, Takes
from vivit_linop.net.certificate import Certificate, norms, roundings
from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.dense import on_the_batch, one_by_one, vectorised
from vivit_linop.net.structure import MOST_VARIANTS, Structure, Variant
from vivit_linop.noise import Noise
from vivit_linop.risk.empirical import EmpiricalRisk

Columns = dict[str, LayerColumns]

# The structure is first looked for on this many samples of the first batch.
_FIRST_SAMPLES = 4
# A run of all samples that keeps no more than this serves as well.
SMALL_RUN = 2**22


class NewlyOpaque(Exception):
    """Columns of some parameters have to be formed, which was not known before."""


class CertifiedColumns:
    """The columns of some samples, for whatever is pulled back.

    Used inside of :func:`~vivit_linop.modes.as_guest`, as what it makes is.

    Args:
        risk: The risk.
        X: The input of the samples.
        capture: The run of the net on them.
        structure: What is known of the net, if it is not that of the risk; it grows.
        room: The parameters whose columns there is room to form; None for all.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        X: Any,
        capture: Capture,
        structure: Structure | None = None,
        room: Set[str] | None = None,
    ) -> None:
        self._room = room
        if structure is None:
            structure = find_structure(risk, capture.num_samples == 1, certify=False)
        self._risk, self._X = risk, X
        self._capture, self._structure = capture, structure
        structure.opaque |= capture.opaque
        known = structure.fitting(capture.uses, capture.num_samples)
        self._found_here = known is None
        self._variant = known or self._find()

    def columns(
        self, cotangents: Tensor, names: Set[str], takes: Takes = "pairs"
    ) -> Columns:
        """Return the columns that cotangents ``[n, C, R]`` are pulled back to.

        By parameter; one that is missing has zero columns.

        Raises:
            ValueError: If no way gives columns that are right.
            NewlyOpaque: If columns would have to be formed that there is no room for.
        """
        structure, done = self._structure, Columns()
        todo = [name for name in self._risk.params if name in names]
        while todo:
            opaque = structure.opaque & names
            if self._room is not None and not opaque <= self._room:
                raise NewlyOpaque
            structured = set(todo) - opaque
            made = self._factors(cotangents, structured, takes)
            if dense := [name for name in todo if name in opaque]:
                made |= self._dense(cotangents, dense)
            failing = self.failing(made, cotangents, todo)
            for name in failing:
                made.pop(name, None)
            done |= made
            if not failing:
                break
            todo = [name for name in todo if name in failing]
            if structured & failing and self._capture.together:
                # Torch's rules for batches are not all right.
                self._variant.together, structured = False, set()
            self._learn(structured & failing, opaque & failing)
        # Columns of nothing show nothing.
        if not structure.certified and names >= self._risk.params.keys():
            if cotangents.any():
                self.note(done)
        return done

    def note(self, columns: Columns) -> None:
        """Note that columns of all parameters have been certified here."""
        capture, structure = self._capture, self._structure
        layers = Columns()
        for name, part in columns.items():
            if name not in structure.opaque:
                layers[name] = capture.formed.get(name) or part.without_data()
        structure.layers = layers
        structure.uses = [*map(attrgetter("key"), capture.uses)]
        structure.certified = True

    def parts(self, cotangents: Tensor, names: Set[str]) -> Iterator[Columns]:
        """Yield the columns in parts, as :meth:`Capture.parts`; the dense ones last.

        What is given away cannot be taken back, so :meth:`certify_layers` comes before.
        """
        opaque = names & self._structure.opaque
        yield from self._capture.parts(cotangents, self._variant, names - opaque)
        yield self.columns(cotangents, opaque)

    def certify_layers(self, cotangents: Tensor, names: Set[str]) -> Columns:
        """Learn which parameters have columns in the structure of their layers.

        Of cotangents ``[n, C, R]`` it takes one column a sample that mixes all of its:
        columns are linear in cotangents. Returned are these, of parameters with such.
        """
        n, _, R = cotangents.shape
        lengths = norms(cotangents, 1).unsqueeze(2)
        mixing = Noise(3)(n, R, 1, like=cotangents)
        cotangents = cotangents @ torch.where(lengths > 0.0, mixing / lengths, 0.0)
        failing, made = names, Columns()
        while failing:
            structured = names - self._structure.opaque
            made = self._factors(cotangents, structured, "factors")
            failing = self.failing(made, cotangents, structured)
            self._learn(failing, set())
        return made

    # Making ---------------------------------------------------------------------------

    def _find(self) -> Variant:
        variant = self._capture.find()
        self._structure.learn(variant)
        return variant

    def _factors(self, cotangents: Tensor, names: Set[str], takes: Takes) -> Columns:
        # A wrong layout may be one that tensors do not have. What is missing is seen
        # when columns are checked, and an error of the net itself there again.
        with tolerated(Exception):
            return self._capture.columns(cotangents, self._variant, names, takes)
        return {}

    @property
    def _shown(self) -> Set[str]:
        """Parameters whose columns the graph shows to be what their layers make.

        Of layers that have been certified, so that they need no check.
        """
        structure, capture = self._structure, self._capture
        if not structure.certified or {*self._variant.layouts} != {"first"}:
            return set()
        known = structure.uses == [*map(attrgetter("key"), capture.uses)]
        return capture.in_layers if known else set()

    def _dense(self, cotangents: Tensor, names: Sequence[str]) -> Columns:
        singly = self._structure.singly
        together = [name for name in names if name not in singly]
        alone = [name for name in names if name in singly]
        columns = Columns()
        if together:
            try:
                columns |= vectorised(self._risk, self._X, cotangents, together)
            # What cannot be vectorised (control flow on values, writing in place) has
            # no columns yet, which is seen when they are checked.
            except Exception as error:
                if is_out_of_memory(error):  # which says nothing about the net
                    alone = list(names)
        if alone:
            try:
                columns |= one_by_one(self._risk, self._X, cotangents, alone)
            # A net may run on batches of one size only; an error of the net itself was
            # seen when it was captured.
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                columns |= on_the_batch(self._capture, self._risk, cotangents, alone)
        return columns

    def _learn(self, structured: Set[str], opaque: Set[str]) -> None:
        """Trust parameters less: those of layers, and those of dense columns."""
        structure = self._structure
        if lost := opaque & structure.singly:
            raise ValueError(self._refusal(min(lost)))
        structure.singly |= opaque
        if structured:
            if self._found_here or len(structure.variants) >= MOST_VARIANTS:
                structure.opaque |= structured
                return
            known, self._variant, self._found_here = self._variant, self._find(), True
            if self._variant == known:
                structure.opaque |= structured

    def _refusal(self, name: str) -> str:
        return (
            f"model: its samples one by one have other derivatives in {name!r} than "
            "together. Either its outputs for a sample depend on the other samples of "
            "the batch, or backward passes through it are not the same each time, or "
            "they give NaN or Inf. Per-sample curvature is undefined then; "
            "params= can leave this parameter out. Or the model computes in a lower "
            f"precision than {self._risk.dtype}, which its casts follow with dtype=."
        )

    # Checking -------------------------------------------------------------------------

    def failing(
        self, columns: Columns, cotangents: Tensor, names: Container[str]
    ) -> set[str]:
        """Return the parameters whose columns are not those of this run.

        They are of cotangents ``[n, C, R]``; missing ones are zero. Costs one backward
        pass, and reading the columns; more only before columns fail that cannot be had
        in a better way.
        """
        params, lenient = self._risk.model.params, self._structure.singly
        wanted, made = dict[str, Tensor](), Columns()
        right = set() if self._capture.together else self._shown & columns.keys()
        if right and not _are_finite(columns[name] for name in right):
            right = set()
        for name, p in params.items():
            if name in names and p.numel() and name not in right:
                wanted[name] = p
                if name in columns:
                    made[name] = columns[name]
        if not wanted:
            return set()
        certificate = Certificate(made, cotangents)
        output = self._capture.output
        cotangent = certificate.cotangent
        try:
            found = gradients(output, [*wanted.values()], cotangent, retain_graph=True)
        # Whatever a net says when it misses what it has let go for the columns.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise used_up(f"fails ({error})") from error
        pulled_back = dict(zip(wanted, found, strict=True))
        errors = certificate.errors(pulled_back, lenient)
        failing = {name for name, error in errors.items() if not error <= 1.0}
        if last := failing & lenient:
            failing -= self._within_rounding(
                {name: part for name, part in pulled_back.items() if name in last},
                certificate,
            )
        return failing

    def _within_rounding(
        self, pulled_back: Mapping[str, Tensor], certificate: Certificate
    ) -> set[str]:
        """Return the parameters whose columns are off by no more than rounding."""
        model, names = self._risk.model, list(pulled_back)
        frozen = {k: p for k, p in model.constants.items() if k not in model.buffers}
        noise, right = dict.fromkeys(names, 0.0), set[str]()

        def again(params: dict[str, Tensor], cotangent: Tensor) -> list[Tensor]:
            wanted = [params[name].requires_grad_() for name in names]
            output = model(params, self._X).reshape(self._capture.output.shape)
            return gradients(output, wanted, cotangent)

        given = frozen | self._risk.params, certificate.cotangent
        for changes in roundings(again, *given, [*pulled_back.values()]):
            for name, change in zip(names, changes, strict=True):
                if change > noise[name]:
                    noise[name] = change
                    part = {name: pulled_back[name]}
                    if certificate.errors(part, {name}, change)[name] <= 1.0:
                        right.add(name)
            if len(right) == len(names):
                break
        return right


def _are_finite(columns: Iterable[LayerColumns]) -> bool:
    sizes = torch.stack([part.sizes().sum() for part in columns])
    ((finite,),) = told([sizes.isfinite().all().view(1)])
    return bool(finite)


def known_structure(risk: EmpiricalRisk, alone: bool = False) -> Structure:
    """Return what is known of a net, which may be nothing yet.

    It may be of runs on one sample alone, where every axis is of that sample.
    """
    return risk.kept.get_everywhere(("structure", alone), Structure)


def find_structure(
    risk: EmpiricalRisk, alone: bool = False, certify: bool = True
) -> Structure:
    """Likewise; what a few samples show when asked first.

    Which of its columns have the structure of layers is certified on these, unless
    columns are certified when they are made: that spares two backward passes, and
    parameters may be opaque that are not known as such.
    """
    structure = known_structure(risk, alone)
    if structure.certified if certify else structure.variants:
        return structure
    with risk.kept.making, as_guest(risk.device):
        # Another thread may have looked.
        if structure.certified if certify else structure.variants:
            return structure
        X, _ = next(risk.passes.batches())
        count = 1 if alone else _FIRST_SAMPLES
        few = _run_on_few(risk, X, count, certify)
        few.keep_sizes(X)
        certified = CertifiedColumns(risk, X, few, structure)
        structure.uses = [use.key for use in few.uses]
        if certify:
            noise = Noise(1)(*few.output.shape, 1, like=few.output)
            certified.note(certified.certify_layers(noise, set(risk.params)))
    return structure


def share_structure(risk: EmpiricalRisk) -> None:
    """Let all ranks start from one structure, and know what any has learnt of the net.

    A rank without samples finds none itself.
    """
    ranks = risk.ranks
    if not ranks.is_many:
        return
    first = ranks.led(find_structure, risk)
    key = "structure", False
    own: Structure | None = risk.kept.everywhere.setdefault(key, first)
    assert own is not None
    for opaque, singly in ranks.gathered((own.opaque, own.singly)):
        own.opaque |= opaque
        own.singly |= singly


def _run_on_few(risk: EmpiricalRisk, X: Any, count: int, certify: bool) -> Capture:
    """Run the net on the first samples of the first batch.

    A run on all of them that has been made serves as well, if backward passes through
    it take no longer than another run, or none is needed.
    """
    n = risk.batch_sizes[0]
    small = risk.kept.run_nbytes <= SMALL_RUN
    if (count > 1 or n == 1) and (small or not certify):
        if (run := risk.kept.use_run(X)) is not None:
            whole = Capture(risk, run.X, n, run)
            if small or whole.met is not None:
                return whole
    return Capture.of_few(risk, X, n, count)
