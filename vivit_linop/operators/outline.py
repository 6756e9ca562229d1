"""Expressions as trees: each node with its shape and what a product with it costs.

What notebooks show of an operator. ``outline`` is a verb: a rule says of a type of node
how it is written, what it is made of and what one product costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import singledispatch
from html import escape
from typing import Any

from scipy.sparse.linalg import LinearOperator

from vivit_linop.operators.dispatch import Operator

_MOST_PARTS, _MOST_DEEP = 8, 12
_GREY = "1px solid rgba(128, 128, 128, 0.5)"  # seen on light and on dark ground


@dataclass(frozen=True)
class Cost:
    """What a product with one vector costs.

    Attributes:
        gradients: Passes over the data, in gradients of the risk: a forward and a
            backward pass.
        flops: Floating-point operations beside them.

    Example:
        >>> from fractions import Fraction
        >>> print(Cost(Fraction(2, 3), 100) + 2 * Cost(flops=1000))
        2/3 gradient + 2.1 kFLOP
    """

    gradients: Fraction = Fraction(0)
    flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of one after the other."""
        return Cost(self.gradients + other.gradients, self.flops + other.flops)

    def __rmul__(self, times: int) -> Cost:
        """Return the cost of several."""
        return Cost(times * self.gradients, times * self.flops)

    def __str__(self) -> str:
        """Say it in units that a reader has a feeling for."""
        said = []
        if self.gradients:
            plural = "" if self.gradients <= 1 else "s"
            said.append(f"{self.gradients} gradient{plural}")
        if self.flops:
            said.append(_with_unit(self.flops))
        return " + ".join(said) or "nothing"


@dataclass(frozen=True)
class Outline:
    """What is shown of a node.

    Attributes:
        formula: How it is written, by the names of its parts; may be empty.
        parts: The names and nodes of what it is made of.
        cost: Of a product with one vector; None where nothing is known.
    """

    formula: str = ""
    parts: Sequence[tuple[str, Operator]] = ()
    cost: Cost | None = None


@singledispatch
def outline(op: Any) -> Outline:
    """Return what is shown of an operator.

    Costs are those of a second product, when what is kept has been made; of products on
    the linearisation, which stored columns only make cheaper. Without a rule, the parts
    that a node says it is made of, and the sum of their costs.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from vivit_linop.operators.outline import outline
        >>> A = vl.Dense(torch.rand(50, 4))
        >>> damped = A @ A.T + 0.1 * vl.Identity(50)
        >>> outline(damped).formula, str(outline(damped).cost)
        ('A + δ I, δ = 0.1', '900 FLOP')
    """
    parts = [part for part in op._made_of() if isinstance(part, LinearOperator)]
    cost = total(parts) if parts else None
    return Outline("", tuple(("", part) for part in parts), cost)


def total(parts: Iterable[Operator], times: int = 1, flops: float = 0.0) -> Cost | None:
    """Return the cost of products with each of some parts, and of what is beside."""
    cost = Cost(flops=flops)
    for part in parts:
        of_part = outline(part).cost
        if of_part is None:
            return None
        cost = cost + times * of_part
    return cost


def as_html(op: Operator) -> str:
    """Return the tree of an expression, for notebooks: text that folds, no scripts."""
    return (
        '<div style="font-family: monospace; line-height: 1.6; overflow-x: auto">'
        f"{_node('', op, 0)}</div>"
    )


def _node(name: str, op: Operator, depth: int) -> str:
    shown = outline(op)
    rows, columns = op.shape
    cost = "" if shown.cost is None else str(shown.cost)
    if depth == 0:
        place = f"{getattr(op, 'torch_dtype', '')}, {getattr(op, 'device', '')}"
        cost = f"{place}; a product costs {cost}" if cost else place
    words = [
        f"{escape(name)} = " if name else "",
        f"<b>{escape(type(op).__name__)}</b> {rows} × {columns}",
        f" &nbsp;{escape(shown.formula)}" if shown.formula else "",
        f' &nbsp;<span style="opacity: 0.7">{escape(cost)}</span>' if cost else "",
    ]
    head = "".join(words)
    if not shown.parts:
        return f'<div style="padding-left: 1.1em">{head}</div>'
    if depth == _MOST_DEEP:
        return f'<div style="padding-left: 1.1em">{head} …</div>'
    inner = [_node(name, part, depth + 1) for name, part in shown.parts[:_MOST_PARTS]]
    if len(shown.parts) > _MOST_PARTS:
        more = len(shown.parts) - _MOST_PARTS
        inner.append(f'<div style="padding-left: 1.1em">… and {more} more</div>')
    return (
        f'<details open><summary style="cursor: pointer">{head}</summary>'
        f'<div style="margin-left: 0.4em; padding-left: 0.9em; border-left: {_GREY}">'
        f"{''.join(inner)}</div></details>"
    )


def _with_unit(flops: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if flops < 999.5 or unit == "T":
            break
        flops /= 1000
    return f"{flops:.3g} {unit}FLOP"
