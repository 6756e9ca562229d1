"""Eigenpairs that are followed from operator to operator, as through training.

Subspace iteration on c V Vᵀ by half-steps. A block B of vectors on one side of V goes
to the other side, W = Vᵀ B or V B. The eigenpairs (σ², z) of WᵀW are the Rayleigh–Ritz
values of B, with the vectors B z, and (W z)/σ are the vectors on the other side, nearer
by half a step: from these the next half-step begins. So it takes one product with a
block where pairs have moved by little.

What a further half-step would change is known without it. With T the way from B to W,
r_i = Tᵀ (W z_i)/σ_i − σ_i B z_i is orthogonal to B, and the Rayleigh quotient of
the i-th vector would rise by |r_i|² (Golub & Van Loan, *Matrix Computations*, §10.4).
For random signs y, |Σ y_i r_i|² is Σ |r_i|² in expectation, and takes one product with
one vector, which also is a check: its part in B must be what the half-step gave.

Where products with K = VᵀV are the cheaper ones, two half-steps are one product. For Q
on the side of K and W = K Q, the vectors V Q z with WᵀW z = σ² QᵀW z are the
Rayleigh–Ritz vectors of V Q, with (W z)/σ on the other side; V is needed only when the
eigenvectors are asked for. With d_i = (W z_i)/σ_i − σ_i Q z_i, the r_i are V d_i. They
are orthogonal to V Q, so that Σ |r_i|² ≤ (tr K − Σ σ_i²) Σ |d_i|²: where that is
little, nothing else is multiplied. If one product is not enough, Q is joined by those
directions of the d_i that have most of their squares: block Lanczos.

At the edge of stability training goes to and fro, and the pairs with it. Those of the
step before the last are the nearer ones then, and the next iteration begins there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial, singledispatch
from typing import NamedTuple, Self

import torch
from torch import Tensor

from vivit_linop.arguments import Scalar
from vivit_linop.linalg.decompositions import GramEigenpairs, orthonormalised
from vivit_linop.linalg.leading import led
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import Damped
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.lowrank import LowRank

# Half-steps after which the operators are not near enough.
_HALF_STEPS = 12
# Of the vector of the check: random numbers beside what is known, by their norms. They
# show errors in components that the half-step has none in.
_NOISE = 0.01
# What may be missing in directions that do not join a block, of what is tolerated.
_LEFT_OUT = 0.5
# Above this part of the largest square, vectors are orthonormal as they come.
_CLEAR = 1e-2


class NotNear(Exception):
    """The iteration does not end, or its products do not agree with each other."""


@singledispatch
def prepared_gram(factor: Op, vectors: int) -> bool:
    """Whether products with VᵀV are to take the place of those with V and Vᵀ.

    A rule that says so has prepared the factor for them.

    Args:
        factor: V.
        vectors: How many are multiplied together.
    """
    return False


class Block(NamedTuple):
    """Orthonormal vectors on one side of a factor V.

    Attributes:
        vectors: ``[D, B]``, or ``[R, B]`` on the far side.
        far: Whether they are on the far side.
    """

    vectors: Tensor
    far: bool

    def is_beside(self, other: Block) -> bool:
        """Whether both are on the far side, of factors with as many columns."""
        return self.far and other.far and len(self.vectors) == len(other.vectors)


class TrackedEigenpairs(Eigenpairs):
    """Eigenpairs of a block iteration, and where it goes on.

    Args:
        eigenvalues: ``[K]``, ascending.
        eigenvectors: ``[D, K]``, or a function that forms them when first asked.
        block: The vectors that the iteration ended with.
        half_steps: How many half-steps were taken.
        missing: What another half-step would raise the sum of the eigenvalues by, as a
            random vector tells, or at most; in units of the largest.

    Attributes:
        before: The block of the operator before, if it is known and on the far side.
        following: What to begin from at the next operator.
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        eigenvectors: Tensor | Callable[[], Tensor],
        block: Block,
        half_steps: int,
        missing: float,
        rows: int,
    ) -> None:
        super().__init__(eigenvalues, eigenvectors)
        self._rows = rows
        self.block, self.half_steps, self.missing = block, half_steps, missing
        self.before: Block | None = None
        self.following = block
        self.route = "tracked"

    def _size(self) -> int:
        return self._rows

    def came_from(self, start: Eigenpairs) -> Self:
        """Guess where the next ones are, from how these lie to those before."""
        if isinstance(start, TrackedEigenpairs) and start.block.is_beside(self.block):
            self.before, own = start.block, self.block.vectors[:, -len(self) :]
            if start.before is not None and start.before.is_beside(self.block):
                # How much of the eigenvalues these vectors have within those.
                last, other = (
                    self.eigenvalues @ (block.vectors.T.to(own) @ own).square().sum(0)
                    for block in (start.block, start.before)
                )
                if other > last:
                    self.following = start.block
        return self


@verbs.eigh_near.register
def eigenpairs_near_low_rank(
    op: LowRank, k: int, start: Eigenpairs, tol: float
) -> Eigenpairs:
    """By half-steps; from nothing if that does not end."""
    if start._size() != op.shape[0]:
        raise ValueError(
            f"start: pairs of an operator with {op.shape[0]} rows, these have vectors "
            f"with {start._size()} entries. Give those of the same model at other "
            "parameters."
        )
    block = beginning(start, op.factor)
    few = block.vectors.shape[1] < min(op.factor.shape)
    if op.scale > 0 and few and op.semidefinite:
        try:
            if op.by_gram and prepared_gram(op.factor, block.vectors.shape[1]):
                return followed_on_gram(op, k, block, tol).came_from(start)
            with verbs.few_products(op.factor) as factor:
                found = led(partial(followed, op.scale, k, block, tol), factor)
                if found is None:
                    raise NotNear
                return found.came_from(start)
        except NotNear:
            pass
    return verbs.eigh(op, k)


@verbs.eigh_near.register
def eigenpairs_near_damped(
    op: Damped, k: int, start: Eigenpairs, tol: float
) -> Eigenpairs:
    """Those of what is damped, shifted."""
    pairs = verbs.eigh_near(op.operator, k, start, tol)
    pairs.eigenvalues = pairs.eigenvalues + op.damping
    return pairs


@singledispatch
def beginning(start: Eigenpairs, factor: Op) -> Block:
    """Return the vectors to begin from."""
    vectors = start.eigenvectors
    if not (vectors.isfinite().all() and start.eigenvalues.isfinite().all()):
        raise ValueError("start: holds NaN or Inf; leave it out to begin anew.")
    own = vectors.to(factor.torch_dtype, copy=True)
    return Block(orthonormalised(own, start.eigenvalues), far=False)


@beginning.register
def beginning_of_tracked(start: TrackedEigenpairs, factor: Op) -> Block:
    """Those that are nearer by half a step."""
    vectors, far = start.following
    if len(vectors) != factor.shape[far]:
        return beginning_of_pairs(start, factor)
    return Block(vectors.to(factor.torch_dtype), far)


@beginning.register
def beginning_of_gram(start: GramEigenpairs, factor: Op) -> Block:
    """Those on the far side, if that has as many rows here."""
    if len(start.gram_eigenvectors) != factor.shape[1]:
        return beginning_of_pairs(start, factor)
    return Block(start.gram_eigenvectors.to(factor.torch_dtype), far=True)


beginning_of_pairs = beginning.dispatch(Eigenpairs)


def followed(
    scale: Scalar, k: int, block: Block, tol: float, factor: Op
) -> TrackedEigenpairs | None:
    """Return the k largest eigenpairs of c V Vᵀ, of at most as many as a block has.

    None if they are not soon there, or products with V and Vᵀ do not agree.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    vectors, far = block
    rows = factor.shape[0]
    for count in range(1, _HALF_STEPS + 1):
        onward = factor if far else factor.T
        image = onward.apply(vectors)
        squares, z = torch.linalg.eigh(image.T @ image)
        largest = squares[-1].clone()
        if not squares[0] > torch.finfo(vectors.dtype).eps * largest:
            return None  # there are fewer pairs than vectors
        sigma = squares.sqrt()
        # Products with V take vectors as rows that lie together.
        here, there = (z.T @ vectors.T).T, ((z / sigma).T @ image.T).T
        rise = _rise(onward, here, sigma, there, generator)
        if rise is None:
            return None
        if squares[0] < _CLEAR * largest:
            there = orthonormalised(there, squares)
        vectors, far = there, not far
        if rise <= tol * largest:
            return TrackedEigenpairs(
                scale * squares[-k:],
                (here if far else vectors)[:, -k:],
                Block(vectors, far),
                half_steps=count,
                missing=float(rise / largest),
                rows=rows,
            )
    return None


def followed_on_gram(
    op: LowRank, k: int, block: Block, tol: float
) -> TrackedEigenpairs:
    """Return these by products with VᵀV, which the factor is prepared for.

    Raises:
        NotNear: If that is not soon.
    """
    factor, scale = op.factor, op.scale
    new, far = block
    if not far:
        new = torch.linalg.qr(factor.T.apply(new)).Q
    krylov = Krylov(factor, new)
    for count in range(1, _HALF_STEPS // 2 + 1):
        rise, told_by = krylov.rise(tol)
        if rise <= tol:
            values, chosen = krylov.squares[-k:].clone(), krylov.here[:, -k:]
            vectors = orthonormalised(krylov.there, krylov.squares)
            return TrackedEigenpairs(
                scale * values,
                partial(_formed, factor, chosen, values),
                Block(vectors, far=True),
                half_steps=2 * count,
                missing=rise,
                rows=op.shape[0],
            )
        if not math.isfinite(rise):
            raise NotNear
        krylov.widen(tol / rise, told_by)
    raise NotNear


# Rows ``[b, R]``, and their images under K; None for none.
Directions = tuple[Tensor, Tensor] | None


class Krylov:
    """Vectors Q on the far side of V, their images K Q, and the best pairs in V Q.

    Args:
        factor: V.
        vectors: Q to begin with, orthonormal, ``[R, B]``.

    Attributes:
        squares: The largest σ², ascending, ``[B]``.
        here: Q z, whose images under V are the Ritz vectors.
        there: (K Q z)/σ.
        short: d = there − σ here.

    Raises:
        NotNear: If fewer vectors of V Q are independent up to rounding.
    """

    def __init__(self, factor: Op, vectors: Tensor) -> None:
        self._factor, self._gram = factor, verbs.gram(factor)
        self._generator = torch.Generator("cpu").manual_seed(0)
        # Products take vectors as rows that lie together.
        self._rows, self._images = vectors.T, self._gram.apply(vectors).T
        self._size = vectors.shape[1]
        self._solve()

    @cached_property
    def _trace(self) -> float:
        return float(verbs.column_norms_squared(self._factor).sum())

    def _solve(self) -> None:
        rows, images = self._rows, self._images
        self.squares, z = _ritz(rows @ images.T, images @ images.T, self._size)
        sigma = self.squares.sqrt()
        self.here, self.there = (z.T @ rows).T, ((z / sigma).T @ images).T
        self.short = self.there - sigma * self.here

    def rise(self, tol: float) -> tuple[float, Directions]:
        """What another half-step would raise the sum of the squares by.

        In units of the largest. The bound by the trace of K, where that is at most
        ``tol``; else what a random vector tells.

        Args:
            tol: What is small enough.

        Returns:
            The number, and the vector that has told it, if one has.
        """
        squares, size = self.squares, self.short.square().sum()
        # Together, since the host waits for the device to read them.
        known = torch.stack([squares[0], squares[-1], squares.sum(), size])
        least, largest, total, short = known.tolist()
        # The trace is taken only where a rest of one such square would be tolerated.
        if short * least <= tol * largest:
            rest = max(self._trace - total, 0.0)
            if rest * short <= tol * largest:
                return rest * short / largest, None
        signs = torch.rand(self._size, generator=self._generator, device="cpu") - 0.5
        d = (self.short @ signs.sign().to(squares)).unsqueeze(0)
        image = self._gram.apply(d.T).T
        return float((d * image).sum()) / largest, (d, image)

    def widen(self, tolerated: float, told_by: Directions) -> None:
        """Multiply the directions of ``short`` that have most of its squares.

        Args:
            tolerated: Which part of what is missing may be.
            told_by: The vector that has told what is missing; it joins Q, too.
        """
        if told_by is not None:
            d, image = told_by
            inside = d @ self._rows.T
            d, image = d - inside @ self._rows, image - inside @ self._images
            self._join(d / d.norm(), image / d.norm())
        parts, directions = torch.linalg.eigh(self.short.T @ self.short)
        outside = parts.cumsum(0) <= _LEFT_OUT * tolerated * parts.sum()
        # One of them is there by the vector that told so.
        first = max(told_by is not None, int(outside.sum()))
        new = (self.short @ directions[:, first:]).T
        for _ in range(2):  # once leaves rounding errors
            new = torch.linalg.qr((new - new @ self._rows.T @ self._rows).T).Q.T
        self._join(new, self._gram.apply(new.T).T)
        self._solve()

    def _join(self, rows: Tensor, images: Tensor) -> None:
        self._rows = torch.cat([self._rows, rows])
        self._images = torch.cat([self._images, images])


def _formed(factor: Op, chosen: Tensor, values: Tensor) -> Tensor:
    return orthonormalised(factor.apply(chosen), values)


def _ritz(inner: Tensor, image: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The largest solutions of ``image z = σ² inner z``, ``zᵀ inner z = I``, ascending.

    Args:
        inner: Bᵀ K B for a basis B of vectors on the side of K.
        image: Bᵀ K² B.
        size: How many.

    Raises:
        NotNear: If so many are not independent up to rounding.
    """
    dtype, eps = inner.dtype, torch.finfo(inner.dtype).eps
    values, vectors = torch.linalg.eigh(((inner + inner.T) / 2).double())
    clear = values > eps * values[-1]
    if clear.sum() < size:
        raise NotNear
    root = vectors[:, clear] / values[clear].sqrt()
    squares, turned = torch.linalg.eigh(root.T @ image.double() @ root)
    return squares[-size:].to(dtype), (root @ turned[:, -size:]).to(dtype)


def _rise(
    onward: Op, here: Tensor, sigma: Tensor, there: Tensor, generator: torch.Generator
) -> Tensor | None:
    """Estimate what another half-step would raise the sum of the squares by.

    None if the product back is not the adjoint of the one onward.
    """
    draws = torch.rand(len(sigma) + len(there), generator=generator, device="cpu")
    signs, noise = (draws - 0.5).to(here).split([len(sigma), len(there)])
    signs = signs.sign()
    noise = _NOISE * signs.norm() / noise.norm() * noise
    back = onward.T.apply((there @ signs + noise).unsqueeze(1)).squeeze(1)
    inside = here.T @ back
    expected = sigma * (signs + there.T @ noise)
    eps = torch.finfo(here.dtype).eps
    if not (inside - expected).norm() <= 100 * eps**0.75 * back.norm():
        return None
    return (back - here @ inside).square().sum()
