"""What the layers of a net cost: operation counts, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from vivit_linop.net.capture import Capture
from vivit_linop.net.certified import find_structure
from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.stacked import StackedColumns
from vivit_linop.risk.empirical import EmpiricalRisk


@dataclass(frozen=True)
class LayerCost:
    """What one parameter costs in a Gram matrix with R columns a sample.

    Attributes:
        name: The parameter.
        use: The kinds of its uses, or why it has no structure.
        contraction: ``"pairs"``, ``"blocks"``, ``"inputs"``, ``"rows"`` or ``"dense"``;
            where parts of the parameter are used for themselves, those of the parts.
        forward_flops: Floating-point operations of its layer's forward pass, N samples.
        gram_flops: Those of its part of the Gram matrix, with symmetry, counted in
            those of a large matrix product.
        product_flops: Those of a product with the stored columns.
        nbytes: What its columns take: as factors, or formed where that is smaller.
    """

    name: str
    use: str
    contraction: str
    forward_flops: float
    gram_flops: float
    product_flops: float
    nbytes: float


_COSTS: WeakKeyDictionary[EmpiricalRisk, dict[int, list[LayerCost]]] = (
    WeakKeyDictionary()
)


def layer_costs(risk: EmpiricalRisk, width: int) -> list[LayerCost]:
    """Count the operations for each parameter; runs the net on two samples, once.

    Args:
        risk: The risk.
        width: R.
    """
    known = _COSTS.setdefault(risk, {})
    if width not in known:
        known[width] = _layer_costs(risk, width)
    return known[width]


def _layer_costs(risk: EmpiricalRisk, width: int) -> list[LayerCost]:
    X, y = next(risk.batches())
    # Of one sample all axes are its own, so its structure would be another.
    capture = Capture.of_few(risk, X, len(y), 2)
    structure = find_structure(risk, alone=capture.num_samples == 1)
    variant = structure.fitting(capture.uses, capture.num_samples) or capture.find()
    opaque = structure.opaque | capture.opaque | variant.unknown
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(
        capture.output.shape,
        generator=generator,
        dtype=capture.output.dtype,
        device="cpu",
    ).to(capture.output)
    columns = capture.columns(
        noise.unsqueeze(2), variant, set(risk.params) - opaque, compact=False
    )
    kinds: dict[str, list[str]] = {}
    for use in capture.uses:
        for name in use.names:
            kinds.setdefault(name, []).append(use.kind.name)
    costs, seen = [], set()
    for name in risk.params:
        part = columns.get(name)
        key = None if part is None else part.cotangents_key
        shared = key in seen
        seen.add(key)
        use_kinds = kinds.get(name, [])
        costs.append(_cost(risk, name, part, use_kinds, width, opaque, shared))
    return costs


def _cost(
    risk: EmpiricalRisk,
    name: str,
    columns: LayerColumns | None,
    kinds: list[str],
    width: int,
    opaque: set[str],
    shared: bool,
) -> LayerCost:
    itemsize = torch.finfo(risk.dtype).bits // 8
    if name in opaque:
        use, columns = "no structure", None
    elif columns is None:
        return LayerCost(name, "unused", "none", 0.0, 0.0, 0.0, 0.0)
    else:
        use = " + ".join(kinds)
    parts = columns.parts.values() if isinstance(columns, StackedColumns) else [columns]
    costs = [
        _cost_of_part(
            part,
            risk.params[name].numel() if part is None else part.numel,
            risk.num_samples,
            width,
            shared,
            compact=len(kinds) == 1,
        )
        for part in parts
    ]
    ways = " + ".join(dict.fromkeys(way for way, _ in costs))
    forward, gram, product, entries = map(sum, zip(*(c for _, c in costs), strict=True))
    return LayerCost(name, use, ways, forward, gram, product, entries * itemsize)


def _cost_of_part(
    columns: LayerColumns | None,
    numel: int,
    samples: int,
    width: int,
    shared: bool,
    compact: bool,
) -> tuple[str, tuple[float, float, float, float]]:
    """Return the contraction, all counts of operations, and the number of entries."""
    rows = float(samples * width)
    if not isinstance(columns, KhatriRaoColumns):
        formed = rows * numel
        return "dense", (2.0 * samples * numel, rows * formed, 2 * formed, formed)
    scaled = columns.gram_flops((samples,) * 2, (width,) * 2, columns.positions)
    way = min(scaled, key=lambda key: scaled[key])
    forward = float(samples * columns.forward_flops)
    gram = scaled[way] / 2
    factors = columns.factor_entries(0 if shared else width) / columns.num_samples
    formed = columns.formed_entries(width) / columns.num_samples
    if compact and columns.positions > 1 and formed <= factors:
        entries = float(samples * formed)
        return "blocks", (forward, gram, 2 * entries, entries)
    entries = float(samples * factors)
    return way, (forward, gram, forward + 2 * entries, entries)


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
