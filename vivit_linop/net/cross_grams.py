"""Inner products between the columns of two factors, whichever risks they are of."""

from __future__ import annotations

import torch
from torch import Tensor

from vivit_linop.modes import as_guest
from vivit_linop.net.column_passes import Pass, accumulate
from vivit_linop.net.pieces import Cotangents, Piece
from vivit_linop.net.totals import GramTotal, SampleGrams, Weights
from vivit_linop.ranks.alone import ALONE, Ranks
from vivit_linop.risk.empirical import EmpiricalRisk


def own_gram_rows(left: Cotangents, right: Cotangents) -> Tensor:
    """Return (left columns)ᵀ (right columns) over processes, this one's rows."""
    return _gram_total(left, right, None).rows


def _gram_total(
    left: Cotangents, right: Cotangents, weights: Tensor | Weights | None
) -> GramTotal:
    """Return the Gram matrix, empty in one process, filled over several."""
    _check_same_parameters(left.risk, right.risk)
    ranks, names = left.risk.ranks, list(left.risk.params)
    with ranks.together("Gram matrix"):
        total = GramTotal(left, right, names, weights)
    if not ranks.is_many:
        return total
    if left is right:
        accumulate(left, [total])
        return total
    with as_guest(left.risk.device):
        if right.risk.ranks.is_many:
            _cross_all(total, left, right, ranks)
        else:  # each process has all of its samples
            with ranks.together("samples of a risk without process_group=") as ballot:
                found = right.risk.fingerprint()
                digests = f"{found['samples']}{found['parameters']}".encode()
                ballot.given = (torch.tensor([*digests], device="cpu"),)
                _cross_all(total, left, right, ALONE)
    total.finish(ranks)
    return total


def _cross_all(
    total: GramTotal, left: Cotangents, right: Cotangents, ranks: Ranks
) -> None:
    """Hold as many left columns of this rank as fit; the right ones of all pass by."""
    passing = Pass([right], [total])
    for held in Pass([left], [total]).held_over(ranks):

        def use(b: Piece, held: list[Piece] = held) -> None:
            for a in held:
                total.add(a, b)

        for distance in range(ranks.size):
            ranks.shifted(passing.single(), distance, use)


def cross_gram(
    left: Cotangents, right: Cotangents, weights: Tensor | Weights | None = None
) -> Tensor:
    """Return (left columns)ᵀ diag(w) (right columns) of two factors, ``[R, Q]``."""
    if right.risk.ranks.is_many and not left.risk.ranks.is_many:
        return cross_gram(right, left, weights).T
    total = _gram_total(left, right, weights)
    if left.risk.ranks.is_many:
        return total.matrix
    with as_guest(left.risk.device):
        if left.risk is right.risk:
            _add_of_one_risk(total, left, right)
        else:
            _cross_all(total, left, right, ALONE)
    return total.matrix


def _add_of_one_risk(total: GramTotal, left: Cotangents, right: Cotangents) -> None:
    """Make the columns of both factors of a sample together."""
    columns = Pass([left, right], [total])
    for held in columns.held():
        for a, _ in held:
            for _, b in held:
                total.add(a, b)
        first, last = held[0][1].place.start, held[-1][1].place.stop
        if last - first == right.shape[1]:
            return
        # Cut alike, a piece is among those held or has no sample of them.
        for (b,) in columns.only(right).pieces():
            if not first <= b.place.start <= b.place.stop <= last:
                for a, _ in held:
                    total.add(a, b)


def cross_sample_grams(
    left: Cotangents, right: Cotangents, weights: Tensor | Weights | None = None
) -> Tensor:
    """Return the inner products of each sample's columns of two factors, ``[N, R, Q]``.

    They are of one risk; weights are as for :class:`GramTotal`.
    """
    ranks = left.risk.ranks
    with ranks.together("Gram matrices of samples"), as_guest(left.risk.device):
        total = SampleGrams(left, right, weights)
        for a, b in Pass([left, right], [total]).pieces():
            total.add(a, b)
    total.finish(ranks)
    return total.matrices


def _check_same_parameters(left: EmpiricalRisk, right: EmpiricalRisk) -> None:
    if left is right:
        return
    shapes = [{n: tuple(p.shape) for n, p in r.params.items()} for r in (left, right)]
    if list(shapes[0].items()) != list(shapes[1].items()):
        raise ValueError(
            "Factors of risks with different parameters have no cross-Gram matrix: "
            f"{shapes[0]} and {shapes[1]}."
        )
