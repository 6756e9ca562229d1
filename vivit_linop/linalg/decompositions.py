"""Decompositions: where the eigenpairs of an operator come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from vivit_linop.arguments import Scalar
from vivit_linop.modes import is_followed
from vivit_linop.operators.base import Op
from vivit_linop.operators.eigenpairs import Eigendecomposition, Eigenpairs, Select
from vivit_linop.operators.lowrank import Gram, LowRank
from vivit_linop.operators.scipy_base import LinearOperator
from vivit_linop.operators.symmetric import (
    Tridiagonal,
    largest_eigenpairs,
    symmetric_eigenpairs,
)
from vivit_linop.ranks.alone import ALONE, Ranks

# How far from orthonormal vectors may be for a single step to correct them.
_NEARLY = 0.1
# How far rounding in the vectors leaves them from that, in units of its own: what is
# nearer is not brought nearer by a correction, which rounds as well.
_ORTHONORMAL = 32
# How many entries of each vector are worked on at a time: with one thread what its
# cache holds, with several more, because they wait for each other each time.
_PART, _THREADS_PART = 2**14, 2**18
# Sums over so many entries lose no digits that matter.
_SHORT_SUM = 2**13
# Steps that show whether a solver has passed over some pair: with 12 some were not seen
# that are a twentieth of the spectrum further out, with 16 all.
PROBE = 16
# Of so small a part of the eigenpairs it is worth to compute only them.
FEW = 0.25
# Relative to the largest eigenvalue, rounding errors along vectors of larger ones than
# λ are about eps √(λ_max / λ). They matter where λ is below this part of λ_max.
_SMALL = 1e-4


def krylov_products(k: int) -> int:
    """How many products ARPACK and Lanczos take for k pairs, in the mean (measured)."""
    return 20 + 4 * k + PROBE


class GramEigenpairs(Eigenpairs):
    """Eigenpairs of c V Vᵀ that stand for e_k = V q_k √(c/λ_k), unformed.

    What is computed from them stays on the small side: along e_k, the columns of a
    factor W have the components Wᵀe_k = (WᵀV) q_k √(c/λ_k).

    Args:
        eigenvalues: λ, ``[K]``, positive.
        operator: c V Vᵀ.
        gram_eigenvectors: q, orthonormal columns ``[R, K]``.
        larger: Pairs of larger eigenvalues that are not among these, if there are any:
            rounding errors along them must be taken out of the vectors.
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        operator: LowRank,
        gram_eigenvectors: Tensor,
        larger: GramEigenpairs | None = None,
    ) -> None:
        self.eigenvalues, self.route = eigenvalues, "dense"
        self.operator = operator
        self.gram_eigenvectors = gram_eigenvectors
        self._larger = larger
        # Vectors are formed later, and the user may have written into the others.
        self._values = eigenvalues.clone()

    @cached_property
    def coefficients(self) -> Tensor:
        """What V is multiplied by to give the eigenvectors, ``[R, K]``."""
        # Of very small eigenvalues the quotient would be no number.
        root = self.operator.scale**0.5 / self._values.sqrt()
        C = self.gram_eigenvectors * root
        if not self._overlaps_known(C):
            return C
        # What is made orthonormal here need not be where it has D entries.
        overlaps = C.T @ self.operator.gram.times(C)
        off = _off(overlaps)
        return C @ _to_unit(overlaps, self._values).T if off < _NEARLY else C

    def _overlaps_known(self, C: Tensor) -> bool:
        """Whether K has the overlaps of the eigenvectors, as exactly as these are."""
        gram, values = self.operator.gram, self._values
        if gram.kept.matrix is None or C.device.type != "cpu" or not len(values):
            return False
        if C.requires_grad or is_followed(C):
            return False
        return bool(values.max() <= _ORTHONORMAL * values.min())

    def _form(self) -> Tensor:
        V = self.operator.factor
        (rows,) = self.lifted(
            lambda X: [V.apply(X).T], lambda parts: V.T.apply(parts[0].T)
        )
        return rows.T

    def lifted(
        self,
        multiply: Callable[[Tensor], list[Tensor]],
        multiply_adjoint: Callable[[list[Tensor]], Tensor],
    ) -> list[Tensor]:
        """Form the eigenvectors as rows, in parts of their entries.

        Args:
            multiply: Returns (V X)ᵀ for ``[R, K]``, as parts ``[K, d]`` in memory of
                their own.
            multiply_adjoint: Returns Vᵀ times what such parts are.

        Returns:
            The parts.
        """
        parts = multiply(self.coefficients)
        if self._larger is not None:
            others = self._larger.coefficients
            overlaps = others.T @ multiply_adjoint(parts)
            larger = self._larger.eigenvalues[:, None] > self._values
            wrong = multiply(others @ (overlaps * larger))
            for part, error in zip(parts, wrong, strict=True):
                part -= error
        orthonormalise_rows(parts, self._values)
        return parts

    def _size(self) -> int:
        return self.operator.shape[0]

    def _combination(self, weights: Tensor) -> Tensor:
        """By one product with V."""
        combined = (self.coefficients @ weights).unsqueeze(1)
        return self.operator.factor.apply(combined).squeeze(1)

    def _components(self, factor: LinearOperator) -> Tensor:
        """Through the (cross-)Gram matrix."""
        if not isinstance(factor, Op):
            return super()._components(factor)
        if factor is self.operator.factor:
            return self.operator.gram.times(self.coefficients)
        gram = Gram(factor, self.operator.factor)
        return gram.times(self.coefficients.to(gram.torch_dtype))


class DenseDecomposition(Eigendecomposition):
    """The decomposition of a dense symmetric matrix, which some processes have."""

    def __init__(self, matrix: Tensor, ranks: Ranks = ALONE) -> None:
        self._matrix, self.count, self._ranks = matrix, len(matrix), ranks

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        evals, evecs = self._ranks.led(symmetric_eigenpairs, self._matrix)
        return evals, evecs

    @property
    def eigenvalues(self) -> Tensor:
        """All, numerical zeros of a low-rank operator included."""
        return self._eigh[0]

    def pairs(self, indices: Tensor) -> Eigenpairs:
        """Return columns of the dense eigenvectors."""
        evals, evecs = self._eigh
        return Eigenpairs(evals[indices], evecs[:, indices])


class LowRankDecomposition(DenseDecomposition):
    """The decomposition of c V Vᵀ through its smaller side: min(D, R) eigenvalues."""

    def __init__(self, operator: LowRank) -> None:
        if operator.requires_grad:
            raise TypeError(
                "eigh: the factor of a low-rank operator requires grad, and gradients "
                "would not reach it. Use eigvalsh, or .detach()ed tensors."
            )
        self._operator = operator
        self._few: Tridiagonal | None = None
        self.count = min(operator.factor.shape)
        self.rest = 0.0 if self.count < operator.shape[0] else None

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        evals, evecs = self._operator.small.eigenpairs
        evals = self._operator.scale * evals
        # The larger side, where that is wanted, has more zeros.
        return evals[-self.count :], evecs[:, -self.count :]

    @property
    def eigenvalues(self) -> Tensor:
        """All, without vectors where few of these may be wanted."""
        if self._few is not None:
            return self._operator.scale * self._few.eigenvalues[-self.count :]
        return super().eigenvalues

    def choose(self, k: int | None, select: Select, rcond: float | None) -> Tensor:
        """A criterion chooses from the eigenvalues, before there are vectors."""
        op = self._operator
        if select is not None and k is None and op.by_gram and not op.ranks.is_many:
            self._few = op.small.tridiagonal
        return super().choose(k, select, rcond)

    @cached_property
    def rounding_error(self) -> float:
        """Eigenvalues of a Gram matrix are known to about this absolute error."""
        largest, dtype = self.eigenvalues.max().item(), coarsest(self._operator)
        return _rounding_error(largest, dtype, self.count)

    def default(self) -> Tensor:
        """Those that are not numerically zero."""
        return (self.eigenvalues > self.rounding_error).nonzero().squeeze(1)

    def largest(self, k: int) -> Eigenpairs:
        """The k largest pairs, without the other vectors where k is small."""
        few = k <= FEW * self.count and not self._operator.kept.decomposed
        if self._operator.by_gram and few:
            found = self._operator.small.on_matrix(partial(largest_eigenpairs, k=k))
            evals, gram_evecs = self._operator.scale * found[0], found[1]
            # In ascending order, and read by the host at once.
            least, most = torch.stack((evals[0], evals[-1])).tolist()
            if least > _rounding_error(most, coarsest(self._operator), self.count):
                return GramEigenpairs(evals, self._operator, gram_evecs)
        return self.pairs(self.outmost(k))

    def pairs(self, indices: Tensor) -> Eigenpairs:
        """Lift columns of the Gram matrix's eigenvectors, lazily."""
        if not self._operator.by_gram:
            return super().pairs(indices)
        if self._few is not None:
            if (found := self._few_pairs(self._few, indices)) is not None:
                return found
            self._few = None
        evals, gram_evecs = self._eigh
        chosen = evals[indices]
        if (chosen > self.rounding_error).all():
            return self._lifted(indices, gram_evecs)
        return Eigenpairs(chosen, lambda: self._with_null_space(indices))

    def _few_pairs(self, few: Tridiagonal, indices: Tensor) -> GramEigenpairs | None:
        """The pairs; None if they, and larger ones that they need, are many or null."""
        evals = self.eigenvalues
        if not len(indices):
            return None
        least = evals[indices].min()
        if not least > self.rounding_error:
            return None
        first = int(indices.min())
        needs_larger = least <= _SMALL * evals[-1]
        last = self.count - 1 if needs_larger else int(indices.max())
        if last - first >= FEW * self.count:
            return None
        shift = len(few.eigenvalues) - self.count
        vectors = few.eigenvectors(first + shift, last + shift)
        return None if vectors is None else self._lifted(indices, vectors, first)

    def _lifted(
        self, indices: Tensor, vectors: Tensor, first: int = 0
    ) -> GramEigenpairs:
        """Pairs from Gram eigenvectors, of which these are those from the first on.

        With those that are larger than the smallest of them, and not among them, where
        rounding errors along these matter.
        """
        evals = self.eigenvalues[first : first + vectors.shape[1]]
        places, larger = indices - first, None
        chosen = evals[places]
        if len(chosen) and chosen.min() <= _SMALL * self.eigenvalues[-1]:
            others = (evals > chosen.min()).index_fill_(0, places, False)
            if others.any():
                larger = GramEigenpairs(
                    evals[others], self._operator, vectors[:, others]
                )
        return GramEigenpairs(chosen, self._operator, vectors[:, places], larger)

    def _with_null_space(self, indices: Tensor) -> Tensor:
        """Form eigenvectors of which some belong to numerically zero eigenvalues.

        The Gram matrix does not know these: any orthonormal vectors in the orthogonal
        complement of all others will do.
        """
        evals, gram_evecs = self._eigh
        nonzero = (evals > self.rounding_error).nonzero().squeeze(1)
        span = GramEigenpairs(
            evals[nonzero], self._operator, gram_evecs[:, nonzero]
        ).eigenvectors
        null = indices[evals[indices] <= self.rounding_error]
        fill = complement(span, len(null), self._operator.ranks)
        vectors = torch.cat([span, fill], dim=1)
        position = {int(i): at for at, i in enumerate(torch.cat([nonzero, null]))}
        return vectors[:, [position[int(i)] for i in indices]]


def complement(span: Tensor, count: int, ranks: Ranks) -> Tensor:
    """Any orthonormal vectors ``[n, count]`` that are orthogonal to some."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = len(span), count
    fill = torch.randn(shape, generator=generator, device="cpu").to(span)
    # A column is only orthogonal to working precision after the second time.
    for _ in range(2):
        fill = ranks.led(_orthonormal, fill - span @ (span.T @ fill))
    return fill


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


class ScaledShifted(Eigendecomposition):
    """The decomposition of a A + δ I from that of A."""

    def __init__(
        self, inner: Eigendecomposition, factor: Scalar = 1.0, shift: Scalar = 0.0
    ) -> None:
        self._inner, self._factor, self._shift = inner, factor, shift
        self.count = inner.count
        self.rest = None if inner.rest is None else factor * inner.rest + shift

    @property
    def eigenvalues(self) -> Tensor:
        """All eigenvalues of A, scaled and shifted."""
        evals = self._factor * self._inner.eigenvalues + self._shift
        return evals if self._factor > 0 else evals.flip(0)

    def default(self) -> Tensor:
        """Those of A."""
        indices = self._inner.default()
        return indices if self._factor > 0 else self._reversed(indices).flip(0)

    def pairs(self, indices: Tensor) -> Eigenpairs:
        """Return A's eigenvectors with the eigenvalues of the whole."""
        inner = indices if self._factor > 0 else self._reversed(indices)
        pairs = self._inner.pairs(inner)
        return Eigenpairs(self.eigenvalues[indices], lambda: pairs.eigenvectors)

    def _reversed(self, indices: Tensor) -> Tensor:
        return self.count - 1 - indices


class MergedDecomposition(Eigendecomposition):
    """A decomposition whose eigenvectors are made of those of smaller parts.

    Args:
        eigenvalues: All eigenvalues, in the order in which the parts give them.
        vectors: A function of indices into that order that forms the columns.
        wanted: For each of them, whether it is wanted by default; all if None.
        rest: The largest eigenvalue that is not among them, or None.
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        vectors: Callable[[Tensor], Tensor],
        wanted: Tensor | None = None,
        rest: Scalar | None = None,
    ) -> None:
        self._sorted, self._order = eigenvalues.sort()
        self._vectors, self.count = vectors, len(eigenvalues)
        self._wanted, self.rest = wanted, rest

    @property
    def eigenvalues(self) -> Tensor:
        """Those of all parts, sorted."""
        return self._sorted

    def default(self) -> Tensor:
        """Those that the parts want."""
        if self._wanted is None:
            return super().default()
        return self._wanted[self._order].nonzero().squeeze(1)

    def pairs(self, indices: Tensor) -> Eigenpairs:
        """Form the columns when asked for."""
        order = self._order[indices]
        return Eigenpairs(self._sorted[indices], lambda: self._vectors(order))


def orthonormalised(vectors: Tensor, eigenvalues: Tensor) -> Tensor:
    """Make nearly orthonormal eigenvectors orthonormal to working precision.

    As :func:`orthonormalise_rows` does; writes to ``vectors``.
    """
    orthonormalise_rows([vectors.T], eigenvalues)
    return vectors


def orthonormalise_rows(parts: Sequence[Tensor], eigenvalues: Tensor) -> None:
    """Make nearly orthonormal rows orthonormal to working precision, in place.

    Lifted from a Gram matrix, vectors of small eigenvalues carry the largest errors;
    so the vectors of large eigenvalues are kept and the others corrected. What is
    orthonormal as it comes is read once, and not written.

    Args:
        parts: The vectors as rows, in parts of their entries, ``[K, d]`` each.
        eigenvalues: ``[K]``.
    """
    if not len(eigenvalues):
        return
    overlaps = torch.stack([*map(_overlaps, parts)]).sum(0)
    off = _off(overlaps)
    if off <= _ORTHONORMAL * torch.finfo(overlaps.dtype).eps:
        return
    if off < _NEARLY:
        # Cholesky QR: two passes over the vectors, as exact as QR if they are nearly
        # right.
        weights = _to_unit(overlaps, eigenvalues)
        # In place, some entries at a time: fresh memory of that size takes long.
        at_a_time = _PART if torch.get_num_threads() == 1 else _THREADS_PART
        for part in parts:
            for some in part.split(at_a_time, dim=1):
                some.copy_(weights @ some)
        return
    order = eigenvalues.argsort(descending=True)
    back = order.argsort()
    Q, R = torch.linalg.qr(torch.cat([*parts], dim=1)[order].T)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)
    result = (Q * signs).T[back].split([part.shape[1] for part in parts], dim=1)
    for part, found in zip(parts, result, strict=True):
        part.copy_(found)


def _off(overlaps: Tensor) -> float:
    """How far vectors with these overlaps are from orthonormal."""
    unit = torch.eye(len(overlaps), dtype=overlaps.dtype, device=overlaps.device)
    return (overlaps - unit).abs().sum(1).max().item()


def _to_unit(overlaps: Tensor, eigenvalues: Tensor) -> Tensor:
    """The weights ``[K, K]`` that make rows with these overlaps orthonormal."""
    order = eigenvalues.argsort(descending=True)
    back = order.argsort()
    unit = torch.eye(len(order), dtype=overlaps.dtype, device=overlaps.device)
    cholesky = torch.linalg.cholesky(overlaps[order][:, order])
    weights = torch.linalg.solve_triangular(cholesky, unit, upper=False)
    return weights[back][:, back]


def _overlaps(rows: Tensor) -> Tensor:
    """Rows times their transpose: short sums, which lose fewer digits than long ones.

    They are one operation for the most part, each sum in one thread.
    """
    whole = rows.shape[1] // _SHORT_SUM * _SHORT_SUM
    rest = rows[:, whole:]
    overlaps = rest @ rest.T
    if whole:
        sums = rows[:, :whole].unflatten(1, (-1, _SHORT_SUM)).transpose(0, 1)
        overlaps += torch.bmm(sums, sums.mT).sum(0)
    return overlaps


def coarsest(op: Op) -> torch.dtype:
    """The least precise dtype of an operator and its parts, whose rounding it has."""
    parts, seen = [op], {id(op)}
    for part in parts:
        if part._own_dtype == torch.float32:
            return torch.float32
        for inner in part._made_of():
            if isinstance(inner, Op) and id(inner) not in seen:
                seen.add(id(inner))
                parts.append(inner)
    return op.torch_dtype


def gram_rounding_error(eigenvalues: Tensor, count: int) -> float:
    """The absolute error of the eigenvalues of a Gram matrix with ``count`` rows."""
    return _rounding_error(eigenvalues.max().item(), eigenvalues.dtype, count)


def _rounding_error(largest: float, dtype: torch.dtype, count: int) -> float:
    """What is smaller than the smallest normal number is rounded as that is."""
    info = torch.finfo(dtype)
    return max(10.0, count**0.5) * info.eps * max(largest, info.tiny)
