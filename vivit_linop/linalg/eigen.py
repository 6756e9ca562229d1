"""Eigenvalues and eigenpairs: the rules of ``eigvalsh`` and ``eigh``.

Pairs at the ends of a spectrum exist for every self-adjoint operator: what has no
closed form gets them by products.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from scipy.sparse.linalg import ArpackError
from torch import Tensor

from vivit_linop.arguments import (
    as_float,
    as_numbers,
    check_choice,
    check_has_values,
    check_k,
    check_real,
)
from vivit_linop.linalg.decompositions import (
    DenseDecomposition,
    LowRankDecomposition,
    MergedDecomposition,
    ScaledShifted,
    complement,
    krylov_products,
)
from vivit_linop.linalg.krylov import (
    SOLVERS,
    NotConverged,
    Wanted,
    by_arpack,
    by_lanczos,
    failed,
    solver_on,
    start_of,
)
from vivit_linop.linalg.leading import led
from vivit_linop.linalg.reductions import narrowest_low_rank
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import Damped, DampedInverse
from vivit_linop.operators.dispatch import NoClosedForm, no_eigenpairs
from vivit_linop.operators.eigenpairs import Eigendecomposition, Eigenpairs, Select
from vivit_linop.operators.elementary import (
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
    as_multiple,
)
from vivit_linop.operators.kronecker import BlockDiagonal, CorrectedKronecker, Kronecker
from vivit_linop.operators.lowrank import DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.symmetric import symmetric_eigenpairs, symmetric_eigenvalues

WHICH = ("LA", "SA", "LM")
# Up to so many rows the matrix is formed: for all pairs, and where solvers fail.
DENSE_ROWS = 2000
# Restarts after which the spectrum is shifted, and how well its norm is to be known.
_FIRST_RESTARTS, _ROUGHLY = 50, 0.1


# Eigenpairs --------------------------------------------------------------------------


@verbs.eigh.register
def eigenpairs_of_operator(
    op: Op, k: int | None = None, select: Select = None, rcond: float | None = None
) -> Eigenpairs:
    """Where there is no closed form, the k largest by ARPACK."""
    try:
        decomposition = verbs.eigendecomposition(op)
    except NoClosedForm as error:
        if k is not None and select is None:
            return verbs.extreme_eigenpairs(op, k)
        decomposition = DenseDecomposition(_of_few_rows(op, error), op.ranks)
    return decomposition.pairs(decomposition.choose(k, select, rcond))


def _of_few_rows(op: Op, error: NoClosedForm) -> Tensor:
    """The matrix, which all pairs come from where there is no closed form."""
    if op.shape[0] > DENSE_ROWS:
        raise error
    return _symmetric(op)


def _symmetric(op: Op) -> Tensor:
    matrix = verbs.to_dense(op)
    return (matrix + matrix.T) / 2


@verbs.eigh.register
def eigenpairs_of_multiple(
    op: Scaled | Damped,
    k: int | None = None,
    select: Select = None,
    rcond: float | None = None,
) -> Eigenpairs:
    """The k largest of c A + δ I are those of A, found in the same way, if c > 0."""
    A, factor = as_multiple(op.operator if isinstance(op, Damped) else op)
    if k is None or select is not None or not factor > 0:
        return eigenpairs_of_operator(op, k, select, rcond)
    pairs = verbs.eigh(A, k, rcond=rcond)
    evals = factor * pairs.eigenvalues
    if isinstance(op, Damped):
        evals = evals + op.damping
    others = Eigenpairs(evals, lambda: pairs.eigenvectors)
    others.route = pairs.route
    return others


@verbs.eigh.register
def eigenpairs_of_product(
    op: Product, k: int | None = None, select: Select = None, rcond: float | None = None
) -> Eigenpairs:
    """The k largest by products, where no factor narrows what would be a large matrix.

    Between the ends of S S with S = (c V Vᵀ + δ I)⁻¹ nothing has fewer rows.
    """
    narrow = narrowest_low_rank(op) or any(f.shape != op.shape for f in op.factors)
    small = narrow or op.shape[0] <= DENSE_ROWS
    if k is None or select is not None or small or op.requires_grad:
        return eigenpairs_of_operator(op, k, select, rcond)
    return verbs.extreme_eigenpairs(op, k, route=solver_on(op.device))


# Eigenvalues -------------------------------------------------------------------------


@verbs.eigvalsh.register
def eigenvalues_of_operator(op: Op) -> Tensor:
    try:
        return verbs.eigendecomposition(op).eigenvalues
    except NoClosedForm as error:
        return op.ranks.led(symmetric_eigenvalues, _of_few_rows(op, error))


@verbs.eigvalsh.register
def eigenvalues_of_dense(op: Dense) -> Tensor:
    return op.ranks.led(symmetric_eigenvalues, op.matrix)


@verbs.eigvalsh.register
def eigenvalues_of_gram(op: Gram) -> Tensor:
    return op.eigenvalues


@verbs.eigvalsh.register
def eigenvalues_of_low_rank(op: LowRank) -> Tensor:
    """The min(D, R) eigenvalues of the smaller side; the others are zero."""
    evals = op.small.eigenvalues
    return op.scale * evals[-min(op.factor.shape) :]


@verbs.eigvalsh.register
def eigenvalues_of_scaled(op: Scaled) -> Tensor:
    evals = op.factor * verbs.eigvalsh(op.operator)
    return evals if op.factor > 0 else evals.flip(0)


@verbs.eigvalsh.register
def eigenvalues_of_damped(op: Damped) -> Tensor:
    """All n eigenvalues: those of A, its zeros included, shifted by δ."""
    evals = verbs.eigvalsh(op.operator)
    zeros = evals.new_zeros(op.shape[0] - len(evals))
    return torch.cat([zeros, evals]).sort().values + op.damping


@verbs.eigvalsh.register
def eigenvalues_of_inverse(op: DampedInverse | Woodbury) -> Tensor:
    return (1.0 / verbs.eigvalsh(Damped(op.operator, op.damping))).sort().values


@verbs.eigvalsh.register
def eigenvalues_of_damped_root(op: DampedRoot) -> Tensor:
    roots = verbs.eigvalsh(Damped(op.operator, op.damping)).sqrt()
    return (1.0 / roots).flip(0) if op.inverse else roots


@verbs.eigvalsh.register
def eigenvalues_of_product(op: Product) -> Tensor:
    """Of functions of one V Vᵀ, products of theirs: each rises or falls with it."""
    inner = [
        f.operator
        for f in op.factors
        if isinstance(f, (Damped, DampedInverse, DampedRoot, Woodbury))
        and isinstance(f.operator, LowRank)
        and f.operator.semidefinite
    ]
    one = len(inner) == len(op.factors)
    if not one or not all(verbs.same(A.factor, inner[0].factor) for A in inner):
        try:
            return verbs.eigvalsh(op.reduced_or(no_eigenpairs(op)))
        except NoClosedForm as error:
            return op.ranks.led(symmetric_eigenvalues, _of_few_rows(op, error))
    evals = [
        verbs.eigvalsh(f).flip(0) if _falls(f) else verbs.eigvalsh(f)
        for f in op.factors
    ]
    return torch.stack(evals).prod(0).sort().values


def _falls(op: Op) -> bool:
    """Whether an inverse or a root of A + δ I is smaller where A is larger."""
    return op.inverse if isinstance(op, DampedRoot) else not isinstance(op, Damped)


@verbs.eigvalsh.register
def eigenvalues_of_block_diagonal(op: BlockDiagonal) -> Tensor:
    return torch.cat([block.eigvalsh() for block in op.blocks]).sort().values


# Decompositions ----------------------------------------------------------------------


@verbs.eigendecomposition.register
def decomposition_of_dense(op: Dense | Gram) -> Eigendecomposition:
    return DenseDecomposition(op.matrix, op.ranks)


@verbs.eigendecomposition.register
def decomposition_of_dense_inverse(op: DenseInverse) -> Eigendecomposition:
    """Of the inverted matrix: positive where that is positive definite."""
    evals, evecs = op.ranks.led(symmetric_eigenpairs, op.operator.matrix.double())
    vectors = evecs.to(op.torch_dtype)
    inverse = (1.0 / (evals + op.damping)).to(op.torch_dtype)
    return MergedDecomposition(inverse, lambda order: vectors[:, order])


@verbs.eigendecomposition.register
def decomposition_of_function(
    op: DampedInverse | DampedRoot | Woodbury,
) -> Eigendecomposition:
    """The pairs of A, of a function of A + δ I, and what is orthogonal to them."""
    inner, rows = verbs.eigendecomposition(op.operator), op.shape[0]
    if inner.rest is not None and rows > DENSE_ROWS:
        raise no_eigenpairs(op)
    pairs = inner.pairs(inner.default())
    known = len(pairs)
    evals = pairs.eigenvalues.new_full((rows,), as_float(inner.rest or 0.0))
    evals[:known] = pairs.eigenvalues
    evals = evals + op.damping
    if isinstance(op, DampedRoot):
        evals = evals.sqrt()

    def vectors(order: Tensor) -> Tensor:
        columns, found = pairs.eigenvectors, order[order >= known]
        if len(found):
            others = complement(columns, rows - known, op.ranks)
            columns = torch.cat([columns, others], dim=1)
        return columns[:, order]

    return MergedDecomposition(1.0 / evals if _falls(op) else evals, vectors)


@verbs.eigendecomposition.register
def decomposition_of_identity(op: Identity) -> Eigendecomposition:
    return verbs.eigendecomposition(Diagonal(verbs.diagonal(op)))


@verbs.eigendecomposition.register
def decomposition_of_diagonal(op: Diagonal) -> Eigendecomposition:
    def vectors(order: Tensor) -> Tensor:
        columns = op.entries.new_zeros(len(op.entries), len(order))
        columns[order, torch.arange(len(order), device=order.device)] = 1.0
        return columns

    return MergedDecomposition(op.entries, vectors)


@verbs.eigendecomposition.register
def decomposition_of_low_rank(op: LowRank) -> Eigendecomposition:
    return LowRankDecomposition(op)


@verbs.eigendecomposition.register
def decomposition_of_scaled(op: Scaled) -> Eigendecomposition:
    return ScaledShifted(verbs.eigendecomposition(op.operator), factor=op.factor)


@verbs.eigendecomposition.register
def decomposition_of_damped(op: Damped) -> Eigendecomposition:
    return ScaledShifted(verbs.eigendecomposition(op.operator), shift=op.damping)


@verbs.eigendecomposition.register
def decomposition_of_product(op: Product) -> Eigendecomposition:
    return verbs.eigendecomposition(op.reduced_or(no_eigenpairs(op)))


@verbs.eigendecomposition.register
def decomposition_of_block_diagonal(op: BlockDiagonal) -> Eigendecomposition:
    """The pairs of the blocks, padded with zeros."""
    parts = [verbs.eigendecomposition(block) for block in op.blocks]
    wanted = [
        torch.isin(torch.arange(part.count, device="cpu"), part.default().cpu())
        for part in parts
    ]
    rests = [part.rest for part in parts if part.rest is not None]
    places = op.split(torch.arange(op.shape[0], device=op.device))

    def vectors(order: Tensor) -> Tensor:
        columns = torch.zeros(
            op.shape[0], len(order), dtype=op.torch_dtype, device=op.device
        )
        start = 0
        for part, place in zip(parts, places, strict=True):
            mine = (
                ((order >= start) & (order < start + part.count)).nonzero().squeeze(1)
            )
            if len(mine):
                vectors = part.pairs(order[mine] - start).eigenvectors
                columns[place[:, None], mine] = vectors.to(columns)
            start += part.count
        return columns

    return MergedDecomposition(
        torch.cat([part.eigenvalues for part in parts]).to(op.torch_dtype),
        vectors,
        torch.cat(wanted).to(op.device),
        max(rests, default=None),
    )


@verbs.eigendecomposition.register
def decomposition_of_kronecker(
    op: Kronecker | CorrectedKronecker,
) -> Eigendecomposition:
    """Products of the factors' eigenvalues, Kronecker products of their vectors."""
    parts = op.factor_eigenpairs

    def vectors(order: Tensor) -> Tensor:
        columns = torch.ones(1, len(order), dtype=op.torch_dtype, device=op.device)
        for _, evecs in reversed(parts):
            part = evecs[:, order % len(evecs)]
            order = order // len(evecs)
            columns = (part[:, None, :] * columns[None, :, :]).flatten(0, 1)
        return columns

    return MergedDecomposition(op.eigenvalues, vectors)


# Ends of spectra ---------------------------------------------------------------------


@verbs.extreme_eigenpairs.register
def extreme_eigenpairs_of_operator(
    op: Op,
    k: int,
    which: str = "LA",
    tol: float | None = None,
    v0: Any = None,
    route: str | None = None,
) -> Eigenpairs:
    """By the decomposition where there is one and nothing is said of iterations."""
    k = _checked(op, k, which, tol)
    if tol is None and v0 is None and route is None:
        try:
            decomposition = verbs.eigendecomposition(op)
        except NoClosedForm:
            pass
        else:
            return decomposition.pairs(decomposition.outmost(k, which))
    if op.requires_grad:
        raise TypeError(
            f"eigh: a tensor of this {type(op).__name__} requires grad, which an "
            "iteration does not pass. Take .detach()ed tensors."
        )
    wanted = Wanted(k, _start(op, v0), which, tol or 0.0)
    pairs: Eigenpairs | None = None
    if op.shape[0] > krylov_products(k):  # of fewer rows the matrix is cheaper
        pairs = _by_iteration(op, wanted, route or solver_on(op.device))
    if pairs is None:
        dense = DenseDecomposition(_symmetric(op), op.ranks)
        pairs = dense.pairs(dense.outmost(k, which))
    return pairs


def _solved(solver: str, wanted: Wanted, A: Op) -> tuple[Tensor, Tensor] | None:
    """What a solver finds, soon or where rows are many."""
    with contextlib.suppress(NotConverged):
        return SOLVERS[solver](A, replace(wanted, restarts=_FIRST_RESTARTS))
    if A.shape[0] <= DENSE_ROWS:
        return None
    return _PATIENT[solver](A, wanted)


def _by_iteration(op: Op, wanted: Wanted, solver: str) -> Eigenpairs | None:
    """None where few rows have a spectrum that no iteration separates."""
    try:
        found = led(partial(_solved, solver, wanted), op)
    except (NotConverged, ArpackError) as error:
        raise failed(error, wanted.k, op, solver) from error
    if found is None:
        return None
    pairs = Eigenpairs(*(part.to(op.device, op.torch_dtype) for part in found))
    pairs.route = f"{solver} on {type(op).__name__}"
    return pairs


def _patient_arpack(A: Op, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """ARPACK on a shifted spectrum.

    ARPACK compares residuals with eigenvalues, and of small ones nothing is enough.
    Shifted by their norm, all are compared with that; up to what ARPACK itself takes
    for zero.
    """
    if wanted.which == "LM":
        return by_arpack(A, wanted)
    norm = replace(wanted, k=1, which="LM", tol=_ROUGHLY)
    size = float(by_arpack(A, norm)[0].abs())
    shift = size if wanted.which == "LA" else -size
    outmost = replace(wanted, which="LM", tol=_enough(A, wanted.tol))
    values, vectors = by_arpack(Damped(A, shift), outmost)
    return values - shift, vectors


def _patient_lanczos(A: Op, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Lanczos with residuals as large as ARPACK lets them be then."""
    return by_lanczos(A, wanted, hidden=_enough(A, wanted.tol))


_PATIENT = {"ARPACK": _patient_arpack, "Lanczos": _patient_lanczos}


def _enough(A: Op, tol: float) -> float:
    return max(tol, torch.finfo(A.torch_dtype).eps ** (2 / 3))


def _checked(op: Op, k: Any, which: str, tol: float | None) -> int:
    check_choice(which, "which", WHICH)
    check_k(k, op.shape[0])
    if tol is not None:
        check_real(tol, "tol")
        if not tol >= 0.0:
            raise ValueError(f"tol: a number of at least 0, got {tol!r}.")
    return int(k)


def _start(op: Op, v0: Any) -> Tensor:
    """The vector that the iteration begins with; the same for each call."""
    if v0 is None:
        return start_of(op)
    start, n = as_numbers(v0, "v0").detach(), op.shape[0]
    check_has_values(start, "v0: a tensor")
    if start.shape != (n,) or not start.isfinite().all() or not start.any():
        raise ValueError(
            f"v0: a vector of {n} finite numbers, not all 0, got shape "
            f"{list(start.shape)}."
        )
    return start.to(op.torch_dtype)
