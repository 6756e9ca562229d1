"""Gram matrices of columns less their mean: of gradients, the noise of their mean."""

from __future__ import annotations

from torch import Tensor

from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.lowrank import Centered
from vivit_linop.operators.verbs import gram_matrix


@ordinary_mode()
def centered_gram(columns: TorchLinearOperator) -> Tensor:
    """Return the Gram matrix of the columns minus their mean, ``[N, N]``.

    For per-sample gradients U these are the inner products of the gradient noise,
    ⟨∇ℓ_n − g, ∇ℓ_m − g⟩ with g = U 1 / N: the non-centred Gram matrix K = UᵀU with its
    row and column means taken out (Schölkopf, Smola & Müller 1998, appendix B), so
    that U is not formed and g is not computed. ``(U.T @ U).to_dense()`` is K.

    Args:
        columns: U, ``[D, N]``, or one of its blocks: for ``F =
            vl.EmpiricalFisher(risk)``, ``block.factor`` for each block of
            ``F.block_diagonal("module")``.

    Raises:
        TypeError: If it is no operator.

    Example:
        >>> import torch, vivit_linop as vl
        >>> vl.centered_gram(vl.Dense(torch.tensor([[1.0, 3.0], [2.0, 2.0]])))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    if not isinstance(columns, TorchLinearOperator):
        raise TypeError(
            f"columns: a TorchLinearOperator, got {type(columns).__name__}."
        )
    centered = Centered(columns)
    return gram_matrix(centered, centered)
