"""What the layers of a net cost: operation counts, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add

import torch

from vivit_linop.net.certified import find_structure
from vivit_linop.net.columns.base import LayerColumns
from vivit_linop.net.columns.joins import StackedColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
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


def layer_costs(risk: EmpiricalRisk, width: int) -> list[LayerCost]:
    """Count the operations for each parameter, from what a few samples show, once.

    Args:
        risk: The risk.
        width: R.
    """
    return risk.kept.get_everywhere(
        ("layer costs", width), lambda: _layer_costs(risk, width)
    )


def _layer_costs(risk: EmpiricalRisk, width: int) -> list[LayerCost]:
    # Of one sample all axes are its own, so its structure is another.
    structure = find_structure(risk, alone=risk.batch_sizes[0] == 1)
    costs, seen = [], set()
    itemsize = torch.finfo(risk.dtype).bits // 8
    for name, p in risk.params.items():
        kinds = [
            kind for kind, *used in structure.uses for other in used if other == name
        ]
        columns = structure.layers.get(name)
        if name in structure.opaque:
            kinds, columns = ["no structure"], None
        elif columns is None:
            costs.append(LayerCost(name, "unused", "none", 0.0, 0.0, 0.0, 0.0))
            continue
        parts: list[LayerColumns | None] = [columns]
        if isinstance(columns, StackedColumns):
            parts = [*columns.parts.values()]
        shared = columns is not None and columns.cotangents_key in seen
        seen.add(columns and columns.cotangents_key)
        ways, counts = dict[str, None](), [0.0] * 4
        for part in parts:
            sizes = risk.num_samples, width, shared, len(kinds)
            way, *found = _cost_of_part(part, p.numel(), *sizes)
            ways[way], counts = None, list(map(add, counts, found))
        forward, gram, product, entries = counts
        use, way, nbytes = " + ".join(kinds), " + ".join(ways), entries * itemsize
        costs.append(LayerCost(name, use, way, forward, gram, product, nbytes))
    return costs


def _cost_of_part(
    columns: LayerColumns | None,
    numel: int,
    samples: int,
    width: int,
    shared: bool,
    uses: int,
) -> tuple[str, float, float, float, float]:
    """Return the contraction, all counts of operations, and the number of entries."""
    rows = float(samples * width)
    if not isinstance(columns, KhatriRaoColumns):
        numel = numel if columns is None else columns.numel
        formed = rows * numel
        return "dense", 2.0 * samples * numel, rows * formed, 2 * formed, formed
    scaled = columns.gram_flops((samples,) * 2, (width,) * 2, columns.positions)
    way = min(scaled, key=scaled.__getitem__)
    forward = float(samples * columns.forward_flops)
    gram = scaled[way] / 2
    factors = columns.factor_entries(0 if shared else width) / columns.num_samples
    formed = columns.formed_entries(width) / columns.num_samples
    if uses == 1 and columns.positions > 1 and formed <= factors:
        entries = float(samples * formed)
        return "blocks", forward, gram, 2 * entries, entries
    entries = float(samples * factors)
    return way, forward, gram, forward + 2 * entries, entries


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
