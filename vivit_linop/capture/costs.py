"""What the layers of a net cost: operation counts, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vivit_linop.capture.capture import Capture, find_structure
from vivit_linop.capture.layers import KhatriRaoColumns, cotangents_key
from vivit_linop.risk.data import take
from vivit_linop.risk.empirical import EmpiricalRisk


@dataclass(frozen=True)
class LayerCost:
    """What one parameter costs in a Gram matrix with R columns a sample.

    Attributes:
        name: The parameter.
        use: The kinds of its uses, or why it has no structure.
        contraction: ``"pairs"``, ``"blocks"``, ``"inputs"`` or ``"dense"``.
        forward_flops: Floating-point operations of its layer's forward pass, N samples.
        gram_flops: Those of its part of the Gram matrix, with symmetry, counted in
            those of a large matrix product.
        nbytes: What its columns take in the structure of the layer.
    """

    name: str
    use: str
    contraction: str
    forward_flops: float
    gram_flops: float
    nbytes: float


def layer_costs(risk: EmpiricalRisk, width: int) -> list[LayerCost]:
    """Count the operations for each parameter; runs the net on one sample.

    Args:
        risk: The risk.
        width: R.
    """
    X, _ = next(risk.batches())
    structure = find_structure(risk)
    opaque = structure.opaque
    one = Capture(risk, take(X, torch.arange(1), risk.by_sample), 1)
    if not structure.fits(one):
        structure = one.check()
        opaque = opaque | structure.opaque
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(one.output.shape, generator=generator).to(one.output)
    columns = one.columns(noise.unsqueeze(2), structure, set(risk.params))
    kinds: dict[str, list[str]] = {}
    for use in one.uses:
        for name in use.names:
            kinds.setdefault(name, []).append(use.kind)
    costs, seen = [], set()
    for name in risk.params:
        part = columns.get(name)
        key = None if part is None else cotangents_key(part)
        shared = key in seen
        seen.add(key)
        use_kinds = kinds.get(name, [])
        costs.append(
            _cost(risk, name, part, use_kinds, width, structure.opaque, shared)
        )
    return costs


def _cost(
    risk: EmpiricalRisk,
    name: str,
    columns: Any,
    kinds: list[str],
    width: int,
    opaque: set[str],
    shared: bool,
) -> LayerCost:
    samples = risk.num_samples
    rows = samples * width
    itemsize = torch.finfo(risk.dtype).bits // 8
    numel = risk.params[name].numel()
    use = " + ".join(kinds) if kinds and name not in opaque else "no structure"
    if columns is None and name not in opaque:
        return LayerCost(name, "unused", "none", 0.0, 0.0, 0.0)
    if isinstance(columns, KhatriRaoColumns):
        scaled = columns.gram_flops(
            (samples, samples), (width, width), columns.positions
        )
        way = min(scaled, key=lambda key: scaled[key])
        forward = 2.0 * samples * columns.positions * numel
        entries = columns.inputs.numel()
        if not shared:
            entries += width * columns.cotangents.numel()
        return LayerCost(
            name, use, way, forward, scaled[way] / 2, entries * samples * itemsize
        )
    gram = float(rows) ** 2 * numel
    return LayerCost(
        name, use, "dense", 2.0 * samples * numel, gram, rows * numel * itemsize
    )


def as_table(costs: Sequence[LayerCost]) -> str:
    """Lay out costs as a table with a line for each parameter, and the totals."""
    head = ("parameter", "use", "contraction", "GFLOP", "MB")
    lines = [
        (c.name, c.use, c.contraction, _number(c.gram_flops), _megabytes(c.nbytes))
        for c in costs
    ]
    flops, nbytes = sum(c.gram_flops for c in costs), sum(c.nbytes for c in costs)
    lines.append(("total", "", "", _number(flops), _megabytes(nbytes)))
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = []
    for line in (head, *lines):
        left = (cell.ljust(w) for cell, w in zip(line[:3], widths[:3], strict=True))
        right = (cell.rjust(w) for cell, w in zip(line[3:], widths[3:], strict=True))
        text.append("  ".join((*left, *right)))
    return "\n".join(text)


def _number(flops: float) -> str:
    return f"{flops / 1e9:.3g}"


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.3g}"
