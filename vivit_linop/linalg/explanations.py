"""What an operator does for each verb, and why: the rules of ``explain``.

Those of operators c V Vᵀ, which choose by what ways cost, stand in
:mod:`vivit_linop.curvature.routes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vivit_linop.linalg.decompositions import krylov_products
from vivit_linop.linalg.iterative import IterativeInverse
from vivit_linop.linalg.krylov import solver_on
from vivit_linop.linalg.reductions import narrowest_low_rank
from vivit_linop.linalg.sandwiches import may_lose_digits
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import (
    Damped,
    DiagonallyDamped,
    DiagonalWoodbury,
)
from vivit_linop.operators.elementary import (
    Adjoint,
    Product,
    Scaled,
    Sum,
)
from vivit_linop.operators.kronecker import BlockDiagonal, CorrectedKronecker, Kronecker
from vivit_linop.operators.lowrank import Gram, LowRank
from vivit_linop.operators.sandwich import Sandwich


@dataclass(frozen=True)
class Explanation:
    """What an operator does for each verb, and why.

    Attributes:
        operator: What it is.
        ways: By verb, the way and the reason.
        parts: What is said of the operators that it is made of.
    """

    operator: str
    ways: Mapping[str, str]
    parts: tuple[Any, ...] = field(default=())

    def __str__(self) -> str:
        """The operator, and a line for each verb."""
        width = max(map(len, self.ways), default=0)
        lines = [f"  {verb:{width}}  {way}" for verb, way in self.ways.items()]
        return "\n".join([self.operator, *lines])


def _said(
    op: Op, ways: Mapping[str, str], *parts: Op, k: int | None = None
) -> Explanation:
    """Print what is said of an operator, and then of its parts."""
    print(Explanation(repr(op), ways))
    return Explanation(repr(op), ways, tuple(verbs.explain(part, k) for part in parts))


@verbs.explain.register
def explain_operator(op: Op, k: int | None = None) -> Explanation:
    return _said(op, _by_rules(op, k))


def _by_rules(op: Op, k: int | None = None) -> dict[str, str]:
    ways: dict[str, str] = {}
    if op.shape[0] != op.shape[1]:
        return {"products": f"those of {type(op).__name__}"}
    if op.self_adjoint:
        ways[_eigh(k)] = _rule(verbs.eigendecomposition, op) or iterates(op, k)
    ways["solve"] = _rule(verbs.inv, op) or _iterated(op)
    ways["diagonal"] = (
        _rule(verbs.diagonal, op) or f"{op.shape[0]} products with columns"
    )
    return ways


def _eigh(k: int | None) -> str:
    return "eigh(k)" if k is None else f"eigh(k={k})"


def _rule(verb: Any, op: Op) -> str | None:
    """What a verb's rule says of itself; None where that of all operators is taken."""
    rule: Callable[..., Any] = verb.dispatch(type(op))
    if rule in (verb.dispatch(Op), verb.dispatch(object)):
        return None
    name = rule.__name__.replace("_", " ")
    summary = (rule.__doc__ or "").strip().split("\n")[0]
    return f"{name}: {summary}" if summary else name


def iterates(op: Op, k: int | None = None) -> str:
    """Which solver finds eigenpairs, and that there is nothing better."""
    n, solver = op.shape[0], solver_on(op.device)
    products = krylov_products(min(10, n) if k is None else k)
    if n <= products:
        return f"LAPACK on its matrix, made by {n} products: there are few rows"
    name = type(op).__name__
    return f"{solver} on {name}, some {products} products: no closed form"


def _iterated(op: Op) -> str:
    if not op.self_adjoint:
        return "GMRES: no closed form, not self-adjoint"
    return "conjugate gradients, MINRES where it is indefinite: no closed form"


# By what nodes are made of ----------------------------------------------------------


@verbs.explain.register
def explain_adjoint(op: Adjoint, k: int | None = None) -> Explanation:
    return _said(op, {"all": "as the operator that it is the adjoint of"}, op.parent)


@verbs.explain.register
def explain_scaled(op: Scaled, k: int | None = None) -> Explanation:
    return _said(op, {"all": "as what is scaled"}, op.operator, k=k)


@verbs.explain.register
def explain_damped(op: Damped, k: int | None = None) -> Explanation:
    A = op.operator
    ways = {_eigh(k): "as of what is damped, shifted"}
    if isinstance(A, LowRank):
        ways["solve"] = f"Woodbury's identity, {_small_side(A)}"
        ways["logdet"] = "the eigenvalues of that side, for all dampings"
    else:
        ways["solve"] = _rule(verbs.damped_inv, A) or _iterated(op)
    ways["diagonal"] = "as of what is damped"
    return _said(op, ways, A, k=k)


def _small_side(op: LowRank) -> str:
    D, R = op.factor.shape
    rows, name = (R, "Gram matrix") if op.by_gram else (D, "V Vᵀ")
    why = f"{R} columns of {D} entries" if op.route is None else "asked for"
    known = "decomposed" if op.kept.decomposed else "factorised"
    return f"the {rows} x {rows} {name} {known}: {why}"


@verbs.explain.register
def explain_diagonally_damped(
    op: DiagonallyDamped | DiagonalWoodbury, k: int | None = None
) -> Explanation:
    inner = op if isinstance(op, DiagonallyDamped) else op.operator
    ways = {
        "solve": "Woodbury's identity for P^-½ V (an entry of P for each row), "
        + _small_side(inner.whitened),
        "logdet": "log det P, and that of I + VᵀP⁻¹V",
    }
    if op is inner and op.self_adjoint:
        ways[_eigh(k)] = iterates(op, k)
    return _said(op, ways)


@verbs.explain.register
def explain_sum(op: Sum, k: int | None = None) -> Explanation:
    ways = _by_rules(op, k)
    if "gradients" in ways.get("solve", ""):
        ways["solve"] += "; (A + p̄ I)⁻¹ preconditions a sum A + P with a diagonal P > 0"
    return _said(op, ways)


@verbs.explain.register
def explain_product(op: Product, k: int | None = None) -> Explanation:
    ways = {"products": "factor by factor, the last first"}
    if narrowest_low_rank(op) is not None:
        ways["trace"] = "on the small side: tr(A V Vᵀ B) = tr(VᵀB A V)"
    if not op.self_adjoint:
        return _said(op, ways | ({} if op.shape[0] != op.shape[1] else _by_rules(op)))
    # Nothing is computed to say so.
    if op.factors[len(op.factors) // 2].shape[0] > op.shape[0]:
        ways["all else"] = f"LAPACK on A B Aᵀ, {op.shape[0]} x {op.shape[0]}"
    else:
        ways["all else"] = "as V Vᵀ with V = A √B, where B has a root"
        ways["without"] = iterates(op, k)
    return _said(op, ways)


@verbs.explain.register
def explain_sandwich(op: Sandwich, k: int | None = None) -> Explanation:
    left, D, right = op.shape[0], op.factors[1].shape[0], op.shape[1]
    form, V = op.form, op.form.factor
    if V is None:
        way = "AᵀP B, a Gram matrix with weights"
    elif op.factor is V or op.other is V:
        way = "functions of VᵀV, as V stands beside its own inverse"
    else:
        way = f"VᵀA and VᵀB, {V.shape[1]} x {left} and {V.shape[1]} x {right}, and AᵀB"
    ways = {
        "to_dense": f"the small side: {way}; nothing has {D} rows",
        "diagonal": "as the matrix, without what is beside the diagonal of AᵀB",
    }
    if may_lose_digits(op, form):
        ways["digits"] = (
            f"λ_max/δ is {form.condition:.1e}: entries that lose more than half of "
            "their digits are made by products with S"
        )
    return _said(op, ways)


@verbs.explain.register
def explain_gram(op: Gram, k: int | None = None) -> Explanation:
    size = f"{op.shape[0]} x {op.shape[1]}"
    if op.known:
        ways = {"products": f"its matrix, {size}, which is known"}
    else:
        ways = {"products": f"through its factors; the {size} matrix is not known yet"}
    if op.left is op.right:
        ways[f"{_eigh(k)}, solve"] = "LAPACK on its matrix, which is made once"
    return _said(op, ways)


@verbs.explain.register
def explain_block_diagonal(op: BlockDiagonal, k: int | None = None) -> Explanation:
    first = {type(block): block for block in reversed(op.blocks)}
    names = [type(block).__name__ for block in op.blocks]
    counts = ", ".join(
        f"{names.count(name)} of type {name}" for name in dict.fromkeys(names)
    )
    ways = {"all": f"block by block: {counts}"}
    return _said(op, ways, *reversed(first.values()))


@verbs.explain.register
def explain_kronecker(
    op: Kronecker | CorrectedKronecker, k: int | None = None
) -> Explanation:
    sizes = ", ".join(f"{a.shape[0]} x {a.shape[1]}" for a in op.basis.factors)
    return _said(op, {"all": f"factor by factor, {sizes}"})


@verbs.explain.register
def explain_iterative_inverse(
    op: IterativeInverse, k: int | None = None
) -> Explanation:
    with_M = f", preconditioned by {op.M!r}" if op.M is not None else ""
    way = f"{_iterated(op.operator)}; to a residual of {op.rtol:.1e}{with_M}"
    return _said(op, {"products": way})
