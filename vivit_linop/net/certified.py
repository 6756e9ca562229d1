"""Columns of one part of the data that have stood up to a check, however made.

The ways, each slower than the one before: from the layers' structure as it is known;
from the structure as this part shows it; by vectorised vector–Jacobian products; sample
by sample. A parameter takes the first that gives columns which agree with an ordinary
backward pass (:mod:`vivit_linop.net.certificate`); what fails is remembered for the
net.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from vivit_linop.net.capture import Capture
from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.dense import on_the_batch, one_by_one, vectorised
from vivit_linop.net.structure import Structure, Variant
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.memory import is_out_of_memory

Columns = dict[str, LayerColumns]

# The structure is first looked for on this many samples of the first batch.
_FIRST_SAMPLES = 4


class CertifiedColumns:
    """The columns of some samples, for whatever is pulled back.

    Args:
        risk: The risk.
        X: The input of the samples.
        capture: The run of the net on them.
        structure: What is known of the net, if it is not that of the risk; it grows.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        X: Any,
        capture: Capture,
        structure: Structure | None = None,
    ) -> None:
        structure = structure or find_structure(risk, capture.num_samples == 1)
        self._risk, self._X = risk, X
        self._capture, self._structure = capture, structure
        structure.opaque |= capture.opaque
        known = structure.fitting(capture.uses, capture.num_samples)
        self._found_here = known is None
        self._variant = known or self._find()

    def columns(self, cotangents: Tensor, names: Set[str]) -> Columns:
        """Return the columns that are pulled back, formed where that is smaller.

        Args:
            cotangents: ``[n, C, R]``.
            names: The parameters of interest.

        Returns:
            By parameter; one that is missing has zero columns.

        Raises:
            ValueError: If no way gives columns that are right.
        """
        structure, done = self._structure, Columns()
        todo = [name for name in self._risk.params if name in names]
        while todo:
            opaque = structure.opaque & names
            structured = set(todo) - opaque
            made = self._factors(cotangents, structured, compact=True)
            made |= self._dense(cotangents, [name for name in todo if name in opaque])
            failing = self._capture.failing(made, cotangents, todo, structure.singly)
            done |= {name: part for name, part in made.items() if name not in failing}
            todo = [name for name in todo if name in failing]
            self._learn(structured & failing, opaque & failing)
        return done

    def parts(
        self, cotangents: Tensor, names: Set[str]
    ) -> Iterator[tuple[Columns, bool]]:
        """Yield the columns in parts, as :meth:`Capture.parts`; the dense ones last.

        What is given away cannot be taken back, so :meth:`certify_layers` comes before.
        """
        opaque = names & self._structure.opaque
        yield from self._capture.parts(cotangents, self._variant, names - opaque)
        yield self.columns(cotangents, opaque), False

    def certify_layers(self, cotangents: Tensor, names: Set[str]) -> Columns:
        """Learn which parameters have columns in the structure of their layers.

        It takes one column a sample that mixes all of its: columns are linear in
        cotangents.

        Args:
            cotangents: ``[n, C, R]``.
            names: The parameters of interest.

        Returns:
            These columns, of the parameters that have such.
        """
        generator = torch.Generator().manual_seed(3)
        n, _, R = cotangents.shape
        mixing = torch.randn(
            n, R, 1, generator=generator, dtype=torch.float64, device="cpu"
        ).to(cotangents)
        norms = torch.linalg.vector_norm(cotangents, dim=1).unsqueeze(2)
        cotangents = cotangents @ torch.where(norms > 0.0, mixing / norms, 0.0)
        failing, made = names, Columns()
        while failing:
            structured = names - self._structure.opaque
            made = self._factors(cotangents, structured, compact=False)
            failing = self._capture.failing(made, cotangents, structured)
            self._learn(failing, set())
        return made

    def _find(self) -> Variant:
        variant = self._capture.find()
        self._structure.learn(variant)
        return variant

    def _factors(self, cotangents: Tensor, names: Set[str], compact: bool) -> Columns:
        try:
            return self._capture.columns(cotangents, self._variant, names, compact)
        # A wrong layout may be one that tensors do not have. What is missing is seen
        # when columns are checked, and an error of the net itself there again.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return {}

    def _dense(self, cotangents: Tensor, names: Sequence[str]) -> Columns:
        if not names:
            return {}
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
            except Exception:
                columns |= on_the_batch(self._capture, self._risk, cotangents, alone)
        return columns

    def _learn(self, structured: Set[str], opaque: Set[str]) -> None:
        """Trust parameters less: those of layers, and those of dense columns."""
        structure = self._structure
        if lost := opaque & structure.singly:
            raise ValueError(self._refusal(min(lost)))
        structure.singly |= opaque
        if structured:
            if self._found_here or structure.is_full:
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
            "params= can leave this parameter out."
        )


def find_structure(risk: EmpiricalRisk, alone: bool = False) -> Structure:
    """Return what is known of a net; what a few samples show when asked first.

    Args:
        risk: The risk.
        alone: Whether of runs on one sample, where every axis is of that sample.
    """
    count = 1 if alone else _FIRST_SAMPLES
    return risk.kept.get_everywhere(
        ("structure", alone), lambda: _find_structure(risk, count)
    )


def _find_structure(risk: EmpiricalRisk, count: int) -> Structure:
    X, y = next(risk.batches())
    few, structure = Capture.of_few(risk, X, len(y), count), Structure()
    few.keep_sizes(X)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(
        *few.output.shape, 1, generator=generator, dtype=few.output.dtype, device="cpu"
    ).to(few.output)
    certified = CertifiedColumns(risk, X, few, structure)
    columns = certified.certify_layers(noise, set(risk.params))
    structure.layers = {name: part.without_data() for name, part in columns.items()}
    structure.uses = [use.key for use in few.uses]
    return structure
