"""Operators made of smaller ones: block-diagonal, Kronecker and Khatri–Rao."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivit_linop.arguments import as_list, as_numbers
from vivit_linop.operators import verbs
from vivit_linop.operators.base import (
    Op,
    TorchLinearOperator,
    in_common,
    settle,
    settled,
)
from vivit_linop.operators.elementary import Dense, _as_tensor, mirrored
from vivit_linop.operators.symmetric import symmetric_eigenpairs


class BlockDiagonal(TorchLinearOperator):
    """A block-diagonal operator.

    Args:
        blocks: Operators, tensors or arrays.
        indices: For blocks that are not contiguous: the rows (and columns) of each
            block, index tensors that together number ``range(n)``. The blocks are
            square then. By default the blocks follow each other.

    Attributes:
        blocks: The operators.
        indices: The rows of each block, or None.

    Example:
        >>> import torch, vivit_linop as vl
        >>> A = vl.BlockDiagonal([torch.eye(2), 3 * torch.eye(1)])
        >>> A @ torch.ones(3)
        tensor([1., 1., 3.])
    """

    def __init__(
        self,
        blocks: Sequence[Op | Tensor | np.ndarray],
        indices: Sequence[Tensor] | None = None,
    ) -> None:
        self.blocks = settled(as_operators(blocks, "blocks"))
        self.indices = None
        if indices is not None:
            listed = as_list(indices, "indices", "places, one for each block")
            self.indices = [as_numbers(index, "indices") for index in listed]
        rows = sum(block.shape[0] for block in self.blocks)
        columns = sum(block.shape[1] for block in self.blocks)
        if self.indices is not None:
            _check_partition(self.blocks, self.indices)
        super().__init__((rows, columns), *in_common(*self.blocks))

    @functools.cached_property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether all blocks are."""
        return all(block.self_adjoint for block in self.blocks)

    @property
    def has_square_blocks(self) -> bool:
        """Whether each block is square, so that verbs act block by block."""
        return all(block.shape[0] == block.shape[1] for block in self.blocks)

    def split(self, X: Tensor, axis: int = 1) -> list[Tensor]:
        """Cut the rows of a matrix into what each block multiplies.

        Args:
            X: ``[n, K]``, or ``[n]``.
            axis: 1 for the columns of the blocks, 0 for their rows.
        """
        if self.indices is not None:
            return [X[index] for index in self.indices]
        return list(X.split([block.shape[axis] for block in self.blocks]))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put the rows of the blocks' results together; the opposite of ``split``."""
        if self.indices is None:
            return torch.cat(list(parts))
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        result = parts[0].new_empty(self.shape[0], *parts[0].shape[1:], dtype=dtype)
        for index, part in zip(self.indices, parts, strict=True):
            result[index] = part.to(dtype)
        return result

    def like(self, blocks: Sequence[Op]) -> BlockDiagonal:
        """Return the operator of other blocks at the same places."""
        return BlockDiagonal(blocks, self.indices)

    def _mirrors(self, other: Op) -> bool:
        return (
            isinstance(other, BlockDiagonal)
            and self.has_places_of(other)
            and _all_mirrored(self.blocks, other.blocks)
        )

    def has_places_of(self, other: BlockDiagonal) -> bool:
        """Whether the blocks of another one have the same rows."""
        if self.indices is None or other.indices is None:
            return self.indices is other.indices
        return len(self.indices) == len(other.indices) and all(
            map(torch.equal, self.indices, other.indices)
        )

    def _settled(
        self, dtype: torch.dtype | None, device: torch.device | None
    ) -> BlockDiagonal:
        return self.like([settle(block, dtype, device) for block in self.blocks])

    def _made_of(self) -> Sequence[Op]:
        return self.blocks

    def _multiply(self, X: Tensor) -> Tensor:
        pairs = zip(self.blocks, self.split(X), strict=True)
        return self.join([block.apply(x) for block, x in pairs])

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        pairs = zip(self.blocks, self.split(X, axis=0), strict=True)
        return self.join([block.T.apply(x) for block, x in pairs])


class Kronecker(TorchLinearOperator):
    """The Kronecker product of operators, A ⊗ B ⊗ ….

    A product with it costs the products with the factors, along the axes of the
    vector: (A ⊗ B) vec(X) = vec(A X Bᵀ) with row-major vec.

    Args:
        factors: Operators, tensors or arrays, at least one.

    Example:
        >>> import torch, vivit_linop as vl
        >>> A = vl.Kronecker(torch.tensor([[1.0, 2.0]]), torch.eye(2))
        >>> A @ torch.tensor([1.0, 0.0, 0.0, 1.0])
        tensor([1., 2.])
    """

    def __init__(self, *factors: Op | Tensor | np.ndarray) -> None:
        self.factors = tuple(settled(as_operators(factors, "factors")))
        super().__init__(
            (
                math.prod(factor.shape[0] for factor in self.factors),
                math.prod(factor.shape[1] for factor in self.factors),
            ),
            *in_common(*self.factors),
        )

    @functools.cached_property
    def self_adjoint(self) -> bool:  # type: ignore[override]
        """Whether all factors are."""
        return all(factor.self_adjoint for factor in self.factors)

    @property
    def basis(self) -> Kronecker:
        """Whose eigenvectors it has: its own."""
        return self

    @functools.cached_property
    def factor_eigenpairs(self) -> list[tuple[Tensor, Tensor]]:
        """The eigenvalues and eigenvectors of each factor, computed once."""
        matrices = [verbs.to_dense(factor) for factor in self.factors]
        return self.ranks.led(_eigenpairs_of, matrices, self.torch_dtype)

    @property
    def eigenvalues(self) -> Tensor:
        """The products of the factors' eigenvalues, in the order of their vectors."""
        evals = self.factor_eigenpairs[0][0]
        for part, _ in self.factor_eigenpairs[1:]:
            evals = torch.outer(evals, part).reshape(-1)
        return evals

    @property
    def eigenvectors(self) -> Kronecker:
        """The Kronecker product of the factors' eigenvectors."""
        return Kronecker(*(vectors for _, vectors in self.factor_eigenpairs))

    def _mirrors(self, other: Op) -> bool:
        return isinstance(other, Kronecker) and _all_mirrored(
            self.factors, other.factors
        )

    def _settled(
        self, dtype: torch.dtype | None, device: torch.device | None
    ) -> Kronecker:
        return Kronecker(*(settle(part, dtype, device) for part in self.factors))

    def _made_of(self) -> Sequence[Op]:
        return self.factors

    def _multiply(self, X: Tensor) -> Tensor:
        # Each step multiplies the leading axis and puts it behind the others; after
        # all of them the column axis leads.
        result = X.T.reshape(-1)
        for factor in reversed(self.factors):
            rows = result.reshape(-1, factor.shape[1])
            result = factor.apply(rows.T).reshape(-1)
        return result.reshape(self.shape[0], -1)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return Kronecker(*(factor.T for factor in self.factors))._multiply(X)


def _eigenpairs_of(
    matrices: Sequence[Tensor], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    # In float64, so that what is known of small eigenvalues is not lost.
    pairs = [symmetric_eigenpairs(matrix.double()) for matrix in matrices]
    return [(evals.to(dtype), evecs.to(dtype)) for evals, evecs in pairs]


class CorrectedKronecker(TorchLinearOperator):
    """Q Λ Qᵀ in the eigenbasis Q of a Kronecker product, with eigenvalues of its own.

    Args:
        basis: A Kronecker product of self-adjoint operators.
        eigenvalues: ``[n]``, in the order of ``basis.eigenvectors``.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from vivit_linop.operators import CorrectedKronecker
        >>> A = vl.Kronecker(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2))
        >>> CorrectedKronecker(A, torch.arange(4.0)) @ torch.ones(4)
        tensor([0., 1., 2., 3.])
    """

    self_adjoint = True

    def __init__(self, basis: Kronecker, eigenvalues: Tensor) -> None:
        basis._check_self_adjoint("eigenvalue correction")
        if eigenvalues.shape != basis.shape[:1]:
            raise ValueError(
                f"eigenvalues: needs [{basis.shape[0]}], got {list(eigenvalues.shape)}."
            )
        self.basis, self.eigenvalues = basis, eigenvalues
        super().__init__(basis.shape, basis._own_dtype, basis._own_device)

    @property
    def factor_eigenpairs(self) -> list[tuple[Tensor, Tensor]]:
        """Those of the basis: their eigenvectors are the axes of Q."""
        return self.basis.factor_eigenpairs

    @property
    def eigenvectors(self) -> Kronecker:
        """Q."""
        return self.basis.eigenvectors

    def _made_of(self) -> Sequence[Op | Tensor]:
        return (self.basis, self.eigenvalues)

    def _multiply(self, X: Tensor) -> Tensor:
        # As matrices: a node would look whether they are symmetric.
        Q = [vectors for _, vectors in self.factor_eigenpairs]
        along = Kronecker(*(vectors.T for vectors in Q))._multiply(X)
        return Kronecker(*Q)._multiply(self.eigenvalues.unsqueeze(1) * along)


@verbs.same.register
def same_corrected_kronecker(left: CorrectedKronecker, right: Op) -> bool:
    """Those of one basis with the same eigenvalues, such as multiples made twice."""
    if left is right:
        return True
    if not isinstance(right, CorrectedKronecker) or left.basis is not right.basis:
        return False
    if left.requires_grad or right.requires_grad:
        return False
    return torch.equal(left.eigenvalues, right.eigenvalues)


class KhatriRao(TorchLinearOperator):
    """The column-wise Khatri–Rao product of two matrices: columns b_r ⊗ a_r.

    Args:
        left: ``[p, R]``, the columns b_r.
        right: ``[q, R]``, the columns a_r.

    The operator has shape ``[p q, R]`` and never forms that matrix; its Gram matrix
    is (BᵀB) ∘ (AᵀA).

    Example:
        >>> import torch, vivit_linop as vl
        >>> V = vl.KhatriRao(torch.ones(2, 1), torch.tensor([[1.0], [3.0]]))
        >>> V.to_dense().T
        tensor([[1., 3., 1., 3.]])
    """

    def __init__(self, left: Tensor | np.ndarray, right: Tensor | np.ndarray) -> None:
        self.left = _as_tensor(left, "left", ndim=2)
        self.right = _as_tensor(right, "right", ndim=2)
        if self.left.shape[1] != self.right.shape[1]:
            raise ValueError(
                "left, right: need as many columns each, got "
                f"{self.left.shape[1]} and {self.right.shape[1]}."
            )
        parts = Dense(self.left), Dense(self.right)
        dtype, device = in_common(*parts)
        super().__init__(
            (self.left.shape[0] * self.right.shape[0], self.left.shape[1]),
            dtype,
            device,
        )
        self.left, self.right = self.left.to(dtype), self.right.to(dtype)

    def _made_of(self) -> Sequence[Tensor]:
        return (self.left, self.right)

    def _multiply(self, X: Tensor) -> Tensor:
        product = torch.einsum("pr,qr,rk->pqk", self.left, self.right, X)
        return product.reshape(self.shape[0], -1)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        X = X.reshape(self.left.shape[0], self.right.shape[0], -1)
        return torch.einsum("pr,qr,pqk->rk", self.left, self.right, X)


def as_operators(given: Any, name: str) -> list[Op]:
    """Return a list of operators and matrices as operators.

    Raises:
        TypeError: If it is no list, or one of its entries is no matrix.
        ValueError: If it is empty.
    """
    what = "operators or matrices"
    if isinstance(given, (Op, Tensor, np.ndarray)):
        raise TypeError(f"{name}: a list of {what}, got one {type(given).__name__}.")
    operators: list[Op] = []
    for position, part in enumerate(as_list(given, name, what)):
        if not isinstance(part, Op):
            try:
                part = Dense(part)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: number {position}, as a {error}") from None
        operators.append(part)
    if not operators:
        raise ValueError(f"{name}: at least one, got none.")
    return operators


def _all_mirrored(left: Sequence[Op], right: Sequence[Op]) -> bool:
    return len(left) == len(right) and all(map(mirrored, left, right))


def _check_partition(blocks: Sequence[Op], indices: Sequence[Tensor]) -> None:
    if len(indices) != len(blocks):
        raise ValueError(
            f"indices: needs one index tensor a block, got {len(indices)} for "
            f"{len(blocks)} blocks."
        )
    for position, (block, index) in enumerate(zip(blocks, indices, strict=True)):
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"indices[{position}]: integers, got {index.dtype}.")
        if index.ndim != 1:
            raise ValueError(f"indices[{position}]: one axis, got {list(index.shape)}.")
        if block.shape != (len(index), len(index)):
            raise ValueError(
                f"indices[{position}]: numbers {len(index)} rows, the block has shape "
                f"{tuple(block.shape)}."
            )
    # The host waits once.
    device = indices[0].device
    together = torch.cat([index.to(device) for index in indices]).sort().values
    if not torch.equal(together, torch.arange(len(together), device=device)):
        raise ValueError(
            f"indices: together they must number range({len(together)}) once."
        )
