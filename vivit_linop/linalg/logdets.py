"""Log-determinants, of an operator and with one damping or many: the rules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vivit_linop.arguments import Scalar, as_scalar, log_abs
from vivit_linop.operators import verbs
from vivit_linop.operators.base import Op, settled
from vivit_linop.operators.damped import Damped, DampedInverse
from vivit_linop.operators.dispatch import NoClosedForm, no_eigenpairs
from vivit_linop.operators.elementary import (
    Dense,
    DenseInverse,
    Diagonal,
    Identity,
    Product,
    Scaled,
    as_dense,
    dense_over,
)
from vivit_linop.operators.kronecker import BlockDiagonal, CorrectedKronecker, Kronecker
from vivit_linop.operators.lowrank import DampedRoot, Gram, LowRank, Woodbury
from vivit_linop.operators.parts import Restricted
from vivit_linop.operators.symmetric import without_noise

# Eigenvalues are multiplied by no more in float32, in float64: they may be infinite.
_LARGE, _VERY_LARGE = 1e6, 1e250


@verbs.logdet.register
def logdet_of_operator(op: Op) -> Tensor:
    """The sum of the logarithms of the eigenvalues, for self-adjoint operators."""
    op._check_self_adjoint("logdet")
    return verbs.eigvalsh(op).abs().log().sum()


@verbs.logdet.register
def logdet_of_identity(op: Identity) -> Tensor:
    return torch.zeros((), dtype=op.torch_dtype, device=op.device)


@verbs.logdet.register
def logdet_of_dense(op: Dense) -> Tensor:
    return torch.linalg.slogdet(op.matrix).logabsdet


@verbs.logdet.register
def logdet_of_dense_inverse(op: DenseInverse) -> Tensor:
    return op.log_abs_det()


@verbs.logdet.register
def logdet_of_diagonal(op: Diagonal) -> Tensor:
    return op.entries.abs().log().sum()


@verbs.logdet.register
def logdet_of_scaled(op: Scaled) -> Tensor:
    if op.factor == 0.0:
        return torch.full((), -math.inf, dtype=op.torch_dtype, device=op.device)
    return plus(verbs.logdet(op.operator), op.shape[0] * log_abs(op.factor))


@verbs.logdet.register
def logdet_of_block_diagonal(op: BlockDiagonal) -> Tensor:
    """−∞ with rectangular blocks, which leave it less than full rank."""
    if not op.has_square_blocks:
        return torch.full((), -math.inf, dtype=op.torch_dtype, device=op.device)
    return torch.stack([block.logdet() for block in op.blocks]).sum()


@verbs.logdet.register
def logdet_of_kronecker(op: Kronecker) -> Tensor:
    """Each factor counts as often as the others have rows; −∞ with rectangular ones."""
    n = op.shape[0]
    if any(factor.shape[0] != factor.shape[1] for factor in op.factors):
        return torch.full((), -math.inf, dtype=op.torch_dtype, device=op.device)
    return torch.stack([f.logdet() * (n // f.shape[0]) for f in op.factors]).sum()


@verbs.logdet.register
def logdet_of_low_rank(op: LowRank) -> Tensor:
    if op.factor.shape[1] < op.shape[0]:
        return torch.full((), -math.inf, dtype=op.torch_dtype, device=op.device)
    return verbs.eigvalsh(op).clamp(min=0.0).log().sum()


@verbs.logdet.register
def logdet_of_product(op: Product) -> Tensor:
    """By the factors where all are square."""
    if all(factor.shape[0] == factor.shape[1] for factor in op.factors):
        return torch.stack(
            [verbs.logdet(factor) for factor in settled(op.factors)]
        ).sum()
    op._check_self_adjoint("logdet")
    try:
        return verbs.logdet(op.reduced_or(no_eigenpairs(op)))
    except NoClosedForm:
        return logdet_of_operator(op)


@verbs.logdet.register
def logdet_of_damped_inverse(op: DampedInverse) -> Tensor:
    return -verbs.damped_logdet(op.operator, op.damping)


@verbs.logdet.register
def logdet_of_damped(op: Damped) -> Tensor:
    return verbs.damped_logdet(op.operator, op.damping)


@verbs.logdet.register
def logdet_of_woodbury(op: Woodbury) -> Tensor:
    """From the factor that it has, unless the eigenvalues are known."""
    low_rank = op.operator
    if low_rank.kept.has_eigenvalues:
        return -verbs.damped_logdet(low_rank, op.damping)
    zeros = op.shape[0] - low_rank.small_rows
    return -op.small_logdet - zeros * math.log(op.damping)


@verbs.logdet.register
def logdet_of_damped_root(op: DampedRoot) -> Tensor:
    """Half of that of the damped operator."""
    half = verbs.damped_logdet(op.operator, op.damping) / 2
    return -half if op.inverse else half


@verbs.damped_logdet.register
def damped_logdet_of_operator(op: Op, damping: Scalar) -> Tensor:
    op._check_self_adjoint("logdet")
    return verbs.eigvalsh(Damped(op, damping)).abs().log().sum()


@verbs.damped_logdet.register
def damped_logdet_of_low_rank(op: LowRank, damping: Scalar) -> Tensor:
    """D log δ + logdet(I + K/δ) (Sylvester's determinant identity)."""
    if not damping > 0.0:
        return damped_logdet_of_operator(op, damping)
    if op.requires_grad:  # eigenvalues that are the same have no second derivatives
        inner = verbs.damped_logdet(dense_over(op.ranks, op.small_side), damping)
        return plus(inner, (op.shape[0] - op.small_rows) * log_abs(damping))
    evals, ratio = op.nonnegative_eigenvalues, op.scale / damping
    if ratio > _LARGE:
        delta = damping.double() if isinstance(damping, Tensor) else damping
        logs = (op.scale * evals.double() + delta).log()
        return plus(logs.sum(), (op.shape[0] - len(evals)) * log_abs(delta)).to(evals)
    return plus(times(evals, ratio).log1p_().sum(), op.shape[0] * log_abs(damping))


@verbs.damped_logdets.register
def damped_logdets_of_operator(op: Op, dampings: Tensor) -> Tensor:
    if not len(dampings):
        return dampings.new_zeros(0)
    return torch.stack([verbs.logdet(verbs.damp(op, as_scalar(d))) for d in dampings])


@verbs.damped_logdets.register
def damped_logdets_of_low_rank(op: LowRank, dampings: Tensor) -> Tensor:
    """As of one damping, in one go; in float64, which holds λ/δ of nearly every δ."""
    ratios = op.scale / dampings
    if not ((dampings > 0.0) & (ratios < _VERY_LARGE)).all():
        return damped_logdets_of_operator(op, dampings)
    ratios = op.nonnegative_eigenvalues.double() * ratios.unsqueeze(1)
    return torch.log1p(ratios).sum(1) + op.shape[0] * dampings.log()


@verbs.damped_logdet.register
def damped_logdet_of_product(op: Product, damping: Scalar) -> Tensor:
    op._check_self_adjoint("logdet")
    try:
        return verbs.damped_logdet(op.reduced_or(no_eigenpairs(op)), damping)
    except NoClosedForm:
        return damped_logdet_of_operator(op, damping)


@verbs.damped_logdet.register
def damped_logdet_of_scaled(op: Scaled, damping: Scalar) -> Tensor:
    """N log c + logdet(A + δ/c I), where c is positive."""
    if op.factor > 0.0:
        inner = verbs.logdet(verbs.damp(op.operator, damping / op.factor))
        return plus(inner, op.shape[0] * log_abs(op.factor))
    return damped_logdet_of_operator(op, damping)


@verbs.damped_logdet.register
def damped_logdet_of_matrix(
    op: DenseInverse | Gram | Restricted, damping: Scalar
) -> Tensor:
    """By eigenvalues where these are kept, which is where no derivatives are wanted."""
    if isinstance(op, Gram) and op.self_adjoint and not op.requires_grad:
        return damped_logdet_of_operator(op, damping)
    return verbs.damped_logdet(as_dense(op), damping)


@verbs.damped_logdet.register
def damped_logdet_of_dense(op: Dense, damping: Scalar) -> Tensor:
    """In float64, so that a small δ counts."""
    unit = torch.eye(op.shape[0], dtype=torch.float64, device=op.device)
    return torch.linalg.slogdet(op.matrix.double() + damping * unit).logabsdet


@verbs.damped_logdet.register
def damped_logdet_of_kronecker(
    op: Kronecker | CorrectedKronecker, damping: Scalar
) -> Tensor:
    op._check_self_adjoint("logdet")
    evals = op.eigenvalues
    evals = without_noise(evals) if damping > 0.0 else evals
    return (evals.double() + damping).abs().log().sum()


@verbs.damped_logdet.register
def damped_logdet_of_block_diagonal(op: BlockDiagonal, damping: Scalar) -> Tensor:
    if not op.has_square_blocks:
        return verbs.damped_logdet(as_dense(op), damping)
    return torch.stack(
        [verbs.logdet(verbs.damp(block, damping)) for block in op.blocks]
    ).sum()


# Arithmetic with numbers ------------------------------------------------------------

# Without axes and on the CPU, they go with tensors of any device and precision.
with torch.inference_mode(False):  # in which the package may be imported
    _ZERO = torch.zeros((), dtype=torch.float32, device="cpu")
    _ONE = torch.ones((), dtype=torch.float32, device="cpu")


def times(X: Tensor, c: Scalar) -> Tensor:
    """Return c X, for few entries sooner than ``c * X``.

    That makes a tensor of a number, which takes as long as the product; 0 + c X does
    not, and rounds once as well.
    """
    return c * X if isinstance(c, Tensor) else torch.add(_ZERO, X, alpha=c)


def plus(X: Tensor, c: Scalar) -> Tensor:
    """Return X + c, for few entries sooner than ``X + c``, likewise."""
    return X + c if isinstance(c, Tensor) else torch.add(X, _ONE, alpha=c)
