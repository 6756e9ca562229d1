"""What the layers of a net cost: operation counts, from shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from vivit_linop.net.certified import find_structure
from vivit_linop.net.columns.base import ColumnCost
from vivit_linop.risk.empirical import EmpiricalRisk

# Of more uses of a parameter, those of each kind are counted.
_FEW_USES = 3


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
        product_flops: Those of a product with the stored columns V, or with Vᵀ.
        inner_flops: Those of a product with VᵀV on them.
        nbytes: What its columns take: as factors, or formed where that is smaller.
    """

    name: str
    use: str
    contraction: str
    forward_flops: float
    gram_flops: float
    product_flops: float
    inner_flops: float
    nbytes: float


def layer_costs(risk: EmpiricalRisk, width: int) -> list[LayerCost]:
    """Count the operations for each parameter, from what a few samples show, once."""
    key = "layer costs", width
    return risk.kept.get_everywhere(key, _layer_costs, risk, width)


def _layer_costs(risk: EmpiricalRisk, width: int) -> list[LayerCost]:
    # Of one sample all axes are its own, so its structure is another.
    structure = find_structure(risk, alone=risk.batch_sizes[0] == 1)
    costs, counted, samples = [], set[Hashable](), risk.num_samples
    kinds: dict[str | None, list[str]] = {}
    for kind, *names in structure.uses:
        for used in names:
            kinds.setdefault(used, []).append(kind)
    for name, numel in zip(risk.params, risk.sizes, strict=True):
        columns, uses = structure.layers.get(name), kinds.get(name, [])
        if name in structure.opaque:
            uses, cost = ["no structure"], ColumnCost.of_formed(numel, samples, width)
        elif columns is None:
            uses, cost = ["unused"], ColumnCost("none", 0.0, 0.0, 0.0, 0.0, 0.0)
        else:
            key = columns.cotangents_key
            cost = columns.cost(samples, width, key in counted)
            counted.add(key)
        way, forward, gram, product, inner, entries = cost
        if len(uses) > _FEW_USES:
            uses = [f"{count} {kind}" for kind, count in Counter(uses).items()]
        use, nbytes = " + ".join(uses), entries * risk.dtype.itemsize
        costs.append(LayerCost(name, use, way, forward, gram, product, inner, nbytes))
    return costs


def as_table(costs: Sequence[LayerCost]) -> str:
    """Lay out costs as a table with a line for each parameter, and the totals."""
    head = ("parameter", "use", "contraction", "GFLOP", "MB")
    flops, nbytes = sum(c.gram_flops for c in costs), sum(c.nbytes for c in costs)
    counts = [(c.name, c.use, c.contraction, c.gram_flops, c.nbytes) for c in costs]
    counts.append(("total", "", "", flops, nbytes))
    lines = [(*words, f"{f / 1e9:.3g}", f"{b / 1e6:.3g}") for *words, f, b in counts]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    text = []
    for line in (head, *lines):
        left = (cell.ljust(w) for cell, w in zip(line[:3], widths[:3], strict=True))
        right = (cell.rjust(w) for cell, w in zip(line[3:], widths[3:], strict=True))
        text.append("  ".join((*left, *right)))
    return "\n".join(text)
