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
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from vivit_linop.linalg.decompositions import GramEigenpairs, orthonormalised
from vivit_linop.operators import verbs
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.damped import Damped
from vivit_linop.operators.eigenpairs import Eigenpairs
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.operators.scalars import Scalar
from vivit_linop.operators.verbs import eigh, eigh_near

# Half-steps after which the operators are not near enough.
_HALF_STEPS = 12
# Of the vector of the check: random numbers beside what is known, by their norms. They
# show errors in components that the half-step has none in.
_NOISE = 0.01


# Above this part of the largest square, vectors are orthonormal as they come.
_CLEAR = 1e-2


class NotNear(Exception):
    """The iteration does not end, or its products do not agree with each other."""


class Block(NamedTuple):
    """Orthonormal vectors on one side of a factor V.

    Attributes:
        vectors: ``[D, B]``, or ``[R, B]`` on the far side.
        far: Whether they are on the far side.
    """

    vectors: Tensor
    far: bool


class TrackedEigenpairs(Eigenpairs):
    """Eigenpairs of a block iteration, and where it goes on.

    Args:
        eigenvalues: ``[K]``, ascending.
        eigenvectors: ``[D, K]``.
        block: What to begin from at the next operator.
        half_steps: How many half-steps were taken.
        missing: What another half-step would raise the sum of the eigenvalues by, as a
            random vector tells, in units of the largest.
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        eigenvectors: Tensor,
        block: Block,
        half_steps: int,
        missing: float,
    ) -> None:
        super().__init__(eigenvalues, eigenvectors)
        self.block, self.half_steps, self.missing = block, half_steps, missing
        self.route = "tracked"


@eigh_near.register
def eigenpairs_near_low_rank(
    op: LowRank, k: int, start: Eigenpairs, tol: float
) -> Eigenpairs:
    """By half-steps; from nothing if that does not end."""
    block = beginning(start, op.factor)
    few = block.vectors.shape[1] < min(op.factor.shape)
    if op.scale > 0 and few and op.semidefinite:
        try:
            with verbs.few_products(op.factor) as factor:
                return followed(factor, op.scale, k, block, tol)
        except NotNear:
            pass
    return eigh(op, k)


@eigh_near.register
def eigenpairs_near_damped(
    op: Damped, k: int, start: Eigenpairs, tol: float
) -> Eigenpairs:
    """Those of what is damped, shifted."""
    pairs = eigh_near(op.operator, k, start, tol)
    pairs.eigenvalues = pairs.eigenvalues + op.damping
    return pairs


@singledispatch
def beginning(start: Eigenpairs, factor: TorchLinearOperator) -> Block:
    """Return the vectors to begin from."""
    vectors = start.eigenvectors
    if len(vectors) != factor.shape[0]:
        raise ValueError(
            f"start: pairs of an operator with {factor.shape[0]} rows, these have "
            f"vectors with {len(vectors)} entries. Give those of the same model at "
            "other parameters."
        )
    own = vectors.to(factor.torch_dtype, copy=True)
    return Block(orthonormalised(own, start.eigenvalues), far=False)


@beginning.register
def beginning_of_tracked(
    start: TrackedEigenpairs, factor: TorchLinearOperator
) -> Block:
    """Those that are nearer by half a step."""
    vectors, far = start.block
    if len(vectors) != factor.shape[far]:
        return beginning_of_pairs(start, factor)
    return Block(vectors.to(factor.torch_dtype), far)


@beginning.register
def beginning_of_gram(start: GramEigenpairs, factor: TorchLinearOperator) -> Block:
    """Those on the far side, if that has as many rows here."""
    if len(start.gram_eigenvectors) != factor.shape[1]:
        return beginning_of_pairs(start, factor)
    return Block(start.gram_eigenvectors.to(factor.torch_dtype), far=True)


beginning_of_pairs = beginning.dispatch(Eigenpairs)


def followed(
    factor: TorchLinearOperator, scale: Scalar, k: int, block: Block, tol: float
) -> TrackedEigenpairs:
    """Return the k largest eigenpairs of c V Vᵀ.

    Args:
        factor: V, ``[D, R]``.
        scale: c, positive.
        k: How many, at most the vectors of the block.
        block: Where to begin.
        tol: When to stop.

    Raises:
        NotNear: If that is not soon, or products with V and Vᵀ do not agree.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    vectors, far = block
    for count in range(1, _HALF_STEPS + 1):
        onward = factor if far else factor.T
        image = onward.apply(vectors)
        squares, z = torch.linalg.eigh(image.T @ image)
        largest = squares[-1].clone()
        if not squares[0] > torch.finfo(vectors.dtype).eps * largest:
            raise NotNear  # there are fewer pairs than vectors
        sigma = squares.sqrt()
        # Products with V take vectors as rows that lie together.
        here, there = (z.T @ vectors.T).T, ((z / sigma).T @ image.T).T
        rise = _rise(onward, here, sigma, there, generator)
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
            )
    raise NotNear


def _rise(
    onward: TorchLinearOperator,
    here: Tensor,
    sigma: Tensor,
    there: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Estimate what another half-step would raise the sum of the squares by.

    Raises:
        NotNear: If the product back is not the adjoint of the one onward.
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
        raise NotNear
    return (back - here @ inside).square().sum()
