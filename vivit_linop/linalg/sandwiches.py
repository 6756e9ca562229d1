"""Matrices, diagonals and blocks of sandwiches Aᵀ S B, on the small side."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vivit_linop.arguments import as_float
from vivit_linop.linalg.reductions import (
    CHUNK,
    columns_at,
    diagonal_of_operator,
    entries_on_diagonal,
)
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op
from vivit_linop.operators.damped import DampedInverse
from vivit_linop.operators.elementary import Product, Scaled
from vivit_linop.operators.lowrank import DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.parts import HStack
from vivit_linop.operators.sandwich import LowRankForm, Sandwich

# So few where memory is to be small; products with fewer take longer each. On shared
# cores threads wait for each other in each of them.
_FEW, _MANY = 4, 64
# What columns may take beside a matrix of the small side, as a share of it, or in bytes
# if that is more. Layers of a net hold something too while they make them.
_BESIDE, _LITTLE = 0.25, 2**24
# Of how many random vectors an error is measured.
_VECTORS = 4
# Half of the digits are there for sure where rounding is this far below.
_SAFE = 0.1


@verbs.to_dense.register
def matrix_of_sandwich(op: Sandwich) -> Tensor:
    """The sum a AᵀB + (VᵀA)ᵀ M (VᵀB); symmetric where A is B."""
    A, B, form = op.factor, op.other, op.form
    V, dtype = form.factor, op.factors[1].torch_dtype
    if A is V:
        result = _in_parts(form.on_range, _gram(A, B, form).to(dtype))
    elif B is V:
        result = _in_parts(form.on_range, _gram(B, A, form).to(dtype)).T
    elif V is None:
        result = form.shift * _gram(A, B, form)
    else:
        X, Y = _sides(op, V, form)
        result = X.T @ _in_parts(form.multiply, Y)
        if form.shift != 0.0:
            result += form.shift * _gram(A, B, form)
        doubted = _lose_digits(op, form, X, Y, result.norm().reshape(1)).any()
        if doubted and not _stands_for(op, result):
            result = _by_products(op)
    return (result + result.T) / 2 if A is B else result


@verbs.diagonal.register
def diagonal_of_sandwich(op: Sandwich) -> Tensor:
    return verbs.diagonal_blocks(op, 1).flatten()


@verbs.diagonal_blocks.register
def diagonal_blocks_of_sandwich(op: Sandwich, size: int) -> Tensor:
    """As the matrix, without what is beside the blocks."""
    A, B, form = op.factor, op.other, op.form
    V = form.factor
    if V is not None and (A is V or B is V):
        return _blocks_on_diagonal(verbs.to_dense(op), size)
    if V is None:
        return form.shift * verbs.gram_blocks(A, B, size, form.weights)
    X, Y = _sides(op, V, form)
    few = max(1, CHUNK // size) * size
    result = torch.cat(
        [
            _products_of_blocks(left, form.multiply(right).to(left), size)
            for left, right in zip(X.split(few, 1), Y.split(few, 1), strict=True)
        ]
    )
    if form.shift != 0.0:
        result += form.shift * verbs.gram_blocks(A, B, size, form.weights)
    lost = _lose_digits(op, form, X, Y, result.flatten(1).norm(dim=1))
    for index in lost.nonzero().split(max(1, CHUNK // size)):
        columns = size * index + torch.arange(size, device=index.device)
        part = _part_of_product(op, columns.flatten(), size)
        result[index.squeeze(1)] = part.to(result)
    return (result + result.mT) / 2 if A is B else result


@verbs.diagonal.register
def diagonal_of_woodbury(op: Woodbury) -> Tensor:
    """(1 − c |row of V L⁻ᵀ|²)/δ with δ I + c K = L Lᵀ, some columns of V L⁻ᵀ at a time.

    Of the dense side, the squares of the rows of L⁻ᵀ. Entries that lose more than half
    of the digits come from products. Beside K and its factor, columns take little.
    """
    low_rank, D = op.operator, op.shape[0]
    few = _few_beside(low_rank.small_rows, D, op.torch_dtype)
    total = torch.zeros(D, dtype=op.torch_dtype, device=op.device)
    for columns in op.root_columns():
        if not low_rank.by_gram:
            total += columns.square_().sum(1)
            continue
        for part in columns.split(few, dim=1):
            total += low_rank.factor.apply(part).square_().sum(1)
    if not low_rank.by_gram:
        return total
    kept = total.mul_(-low_rank.scale).add_(1.0)
    eps = torch.finfo(op.torch_dtype).eps
    lost = kept < eps**0.5
    result = kept.div_(op.damping)
    if eps * op.norm / op.damping > _SAFE * eps**0.5:
        for part in lost.nonzero().squeeze(1).split(few):
            result[part] = entries_on_diagonal(op, part)
    return result


@verbs.diagonal.register
def diagonal_of_damped_inverse(op: DampedInverse) -> Tensor:
    """1/δ − Σ_k c (V Q)²_k / (δ (δ + c κ_k)), which derivatives in δ pass through.

    Entries that lose more than half of the digits come from products.
    """
    low_rank, D = op.operator, op.shape[0]
    if not (isinstance(low_rank, LowRank) and low_rank.by_gram):
        return diagonal_of_operator(op)
    evals, vectors = low_rank.small.eigenpairs
    evals, delta = low_rank.scale * evals.double().clamp(min=0.0), op.damping.double()
    shares = (low_rank.scale / (delta + evals)).to(vectors)
    kept = 1.0 - _squares_with_weights(low_rank, vectors, shares)
    lost = kept.detach() < torch.finfo(kept.dtype).eps ** 0.5
    result = kept / op.damping.to(kept)
    few = _few_beside(low_rank.small_rows, D, op.torch_dtype)
    for part in lost.nonzero().squeeze(1).split(few):
        result = result.index_copy(0, part, entries_on_diagonal(op, part))
    return result


@verbs.diagonal.register
def diagonal_of_damped_root(op: DampedRoot) -> Tensor:
    """f(δ) + Σ_k q_k (V Q_k)², with the diagonal q beside the eigenvectors Q of K."""
    total = _squares_with_weights(op.operator, *op.small_form)
    return total + op.shift if op.operator.by_gram else total


def _squares_with_weights(op: LowRank, vectors: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k (V Q_k)², some columns at a time; on the D × D side Σ_k w_k Q_k²."""
    few = _few_beside(op.small_rows, op.shape[0], op.torch_dtype)
    total = torch.zeros(op.shape[0], dtype=op.torch_dtype, device=op.device)
    for columns, w in zip(vectors.split(few, 1), weights.split(few), strict=True):
        columns = op.factor.apply(columns) if op.by_gram else columns
        total = total + columns.square() @ w
    return total


def _few_beside(small: int, rows: int, dtype: torch.dtype) -> int:
    """How many columns of all rows are made at a time.

    With three vectors they take less than a share of the matrix of the small side, or
    little, where vectors do not take that by themselves. No fewer than are worth a
    product.
    """
    fitting = max(int(_BESIDE * small**2), _LITTLE // dtype.itemsize) // rows - 3
    return min(max(fitting, _FEW), _MANY)


@verbs.diagonal_blocks.register
def diagonal_blocks_of_operator(op: Op, size: int) -> Tensor:
    parts = []
    for columns in _places(op.shape[1], size, op.device):
        parts.append(_blocks_on_diagonal(columns_at(op, columns)[columns], size))
    return torch.cat(parts)


@verbs.diagonal_blocks.register
def diagonal_blocks_of_gram(op: Gram, size: int) -> Tensor:
    """Without what is beside the blocks, unless the matrix is known."""
    if op.known:
        return _blocks_on_diagonal(op.matrix, size)
    return verbs.gram_blocks(op.left, op.right, size)


@verbs.diagonal_blocks.register
def diagonal_blocks_of_product(op: Product, size: int) -> Tensor:
    """(A B)_ii = Σ_k A_ik B_ki, some blocks at a time."""
    if op.self_adjoint and len(op.factors) == 3:
        _, middle, A = op.factors
        pieces = _whole_blocks(A, size)
        return torch.cat(
            [_products_of_blocks(a, middle.apply(a), size) for a in pieces]
        )
    places = _places(op.shape[0], size, op.device)
    return torch.cat([_part_of_product(op, columns, size) for columns in places])


@verbs.gram_blocks.register
def gram_blocks_of_operator(
    left: Op, right: Op, size: int, weights: Tensor | None = None
) -> Tensor:
    w = 1.0 if weights is None else weights[:, None]
    pairs = zip(_whole_blocks(left, size), _whole_blocks(right, size), strict=True)
    return torch.cat([_products_of_blocks(A, w * B, size) for A, B in pairs])


@verbs.gram_blocks.register
def gram_blocks_of_scaled(
    left: Scaled, right: Op, size: int, weights: Tensor | None = None
) -> Tensor:
    if right is left:
        blocks = verbs.gram_blocks(left.operator, left.operator, size, weights)
        return left.factor * (left.factor * blocks)
    return left.factor * verbs.gram_blocks(left.operator, right, size, weights)


@verbs.gram_blocks.register
def gram_blocks_of_stack(
    left: HStack, right: Op, size: int, weights: Tensor | None = None
) -> Tensor:
    """One part after the other, where a block is of one part."""
    if right is left and all(part.shape[1] % size == 0 for part in left.parts):
        return torch.cat(
            [verbs.gram_blocks(part, part, size, weights) for part in left.parts]
        )
    return gram_blocks_of_operator(left, right, size, weights)


def _gram(A: Op, B: Op, form: LowRankForm) -> Tensor:
    """AᵀB, or AᵀD B."""
    if form.weights is None:
        return verbs.gram_matrix(A, B)
    return verbs.weighted_gram_matrix(A, B, form.weights)


def _sides(op: Sandwich, V: Op, form: LowRankForm) -> tuple[Tensor, Tensor]:
    """VᵀA and VᵀB, or VᵀD A and VᵀD B."""
    dtype = op.factors[1].torch_dtype
    X = _gram(V, op.factor, form).to(dtype)
    return X, X if op.other is op.factor else _gram(V, op.other, form).to(dtype)


def may_lose_digits(op: Sandwich, form: LowRankForm) -> bool:
    """Whether terms may cancel up to half of the digits, which are those of S."""
    eps = torch.finfo(op.factors[1].torch_dtype).eps
    return eps * form.condition > _SAFE * eps**0.5


def _lose_digits(
    op: Sandwich, form: LowRankForm, X: Tensor, Y: Tensor, sizes: Tensor
) -> Tensor:
    """Which parts of a result, of these norms, may have lost over half of their digits.

    Rounding in AᵀB, and in X = VᵀA and Y = VᵀB, is enlarged by a, rounding in K by the
    two solutions. A part has as many columns of A and of B as any other.
    """
    eps = torch.finfo(op.factors[1].torch_dtype).eps
    if not may_lose_digits(op, form):
        return torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)

    def norms(columns: Tensor) -> Tensor:
        return columns.reshape(len(sizes), -1).sum(1).to(sizes).sqrt()

    def lengths(factor: Op) -> Tensor:
        return norms(verbs.gram_blocks(factor, factor, 1, form.weights))

    A, B = op.factor, op.other
    left = lengths(A)
    inner = norms(_in_parts(form.multiply, X).square().sum(0))
    right, outer = left, inner
    if B is not A:
        right = lengths(B)
        outer = norms(_in_parts(form.multiply, Y).square().sum(0))
    shift = abs(as_float(form.shift))
    error = eps * (shift * left * right + form.norm / shift * inner * outer)
    return ~(error <= eps**0.5 * sizes)


def _stands_for(op: Product, matrix: Tensor) -> bool:
    """Whether a matrix and the product agree to half of their digits.

    Rounding is mostly less than it can be. It is measured on vectors of random signs,
    which a difference enlarges by its Frobenius norm in the mean.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    draws = torch.rand(op.shape[1], _VECTORS, generator=generator, device="cpu")
    signs = (draws - 0.5).sign().to(matrix)
    difference = matrix @ signs - Product(*op.factors).apply(signs)
    eps = torch.finfo(op.torch_dtype).eps
    return bool(difference.norm() / _VECTORS**0.5 <= 0.5 * eps**0.5 * matrix.norm())


def _by_products(op: Product) -> Tensor:
    """By products with S, some columns at a time."""
    product, places = Product(*op.factors), _places(op.shape[1], 1, op.device)
    return torch.cat([columns_at(product, columns) for columns in places], dim=1)


def _part_of_product(op: Product, columns: Tensor, size: int) -> Tensor:
    """Some of the blocks on the diagonal, by products with their rows and columns."""
    A, B = op.factors[0].T, Product(*op.factors[1:])
    return _products_of_blocks(columns_at(A, columns), columns_at(B, columns), size)


def _products_of_blocks(left: Tensor, right: Tensor, size: int) -> Tensor:
    """``[R, n·s]`` twice ``-> [n, s, s]``: left blockᵀ right block."""
    if size == 1:
        return (left * right).sum(0).reshape(-1, 1, 1)
    blocks = left.unflatten(1, (-1, size)).permute(1, 2, 0)
    dtype = torch.promote_types(left.dtype, right.dtype)
    blocks, right = blocks.to(dtype), right.to(dtype)
    return blocks @ right.unflatten(1, (-1, size)).transpose(0, 1)


def _whole_blocks(op: Op, size: int) -> Iterator[Tensor]:
    """The columns of an operator, whole blocks of some at a time."""
    few = max(1, CHUNK // size) * size
    held = torch.empty(op.shape[0], 0, dtype=op.torch_dtype, device=op.device)
    for _, columns in verbs.column_pieces(op):
        held = torch.cat([held, columns], dim=1)
        while held.shape[1] >= few:
            yield held[:, :few]
            held = held[:, few:]
    if held.shape[1]:
        yield held


def _blocks_on_diagonal(matrix: Tensor, size: int) -> Tensor:
    blocks = matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _in_parts(function: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor:
    parts = [function(part).to(columns) for part in columns.split(CHUNK, dim=1)]
    return torch.cat(parts, dim=1)


def _places(n: int, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """The numbers of n columns, whole blocks of some at a time."""
    few = max(1, CHUNK // size) * size
    return torch.arange(n, device=device).split(few)
