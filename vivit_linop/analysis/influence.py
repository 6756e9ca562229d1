"""Influence of samples on each other, through a curvature's inverse."""

from __future__ import annotations

from torch import Tensor

from vivit_linop.analysis.predictive import check_square
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator


@ordinary_mode()
def influence(
    U_test: TorchLinearOperator, S: TorchLinearOperator, U_train: TorchLinearOperator
) -> Tensor:
    """Return the inner products u_mᵀ S u_n of gradients, ``[N*, N]``.

    With S the inverse of a (damped) curvature of the risk L = r Σ_n ℓ_n, training with
    sample n weighted by 1 + ε moves θ by −ε r S ∇ℓ_n to first order, and the loss of
    test sample m by −ε r times entry (m, n) (Cook & Weisberg 1982; Koh & Liang 2017,
    arXiv:1703.04730). So leaving out sample n, ε = −1, changes it by about r times
    the entry: positive entries are of samples that help. The function has neither r nor
    a sign.

    For S = (c V Vᵀ + damping)⁻¹ through Gram matrices between U, U* and V, of whole
    data sets; for S = (r U Uᵀ + δ I)⁻¹ with the same U through that of U alone. For
    diagonals and Kronecker factors from the columns of the layers, with weights and
    rotated into the eigenbases. For other operators by products of S with the columns
    of U_train, some at a time, and a tangent pass over the test data for each of these.
    Nothing of size D × N is formed.

    Args:
        U_test: Gradients of test samples, ``[D, N*]``: ``vl.PerSampleGradients``; or
            what else is pulled back, such as ``vl.Jacobian(model, X).T`` for outputs.
        S: Self-adjoint, ``[D, D]``, such as ``(G + delta * Identity(D)).inv()``, or
            that of KFAC or EKFAC; ``Identity(D)`` for the kernel of gradients.
        U_train: Gradients of training samples, ``[D, N]``.

    Raises:
        TypeError: If S is not self-adjoint.
        ValueError: If the numbers of parameters differ.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> net, loss = nn.Linear(3, 2), nn.CrossEntropyLoss()
        >>> train = vl.EmpiricalRisk(net, loss, (torch.rand(8, 3), torch.arange(8) % 2))
        >>> test = vl.EmpiricalRisk(net, loss, (torch.rand(5, 3), torch.arange(5) % 2))
        >>> S = (vl.GGN(train) + 0.1 * vl.Identity(8)).inv()
        >>> U, V = vl.PerSampleGradients(test), vl.PerSampleGradients(train)
        >>> vl.influence(U, S, V).shape
        torch.Size([5, 8])
    """
    check_square(S, _rows(U_train, "U_train"), "S")
    if _rows(U_test, "U_test") != U_train.shape[0]:
        raise ValueError(
            f"U_test: has {U_test.shape[0]} rows and U_train {U_train.shape[0]}; both "
            "need those of the same parameters."
        )
    return (U_test.T @ S @ U_train).to_dense()


@ordinary_mode()
def self_influence(S: TorchLinearOperator, U: TorchLinearOperator) -> Tensor:
    """Return u_nᵀ S u_n for each gradient, ``[N]``: the diagonal of :func:`influence`.

    r times the entry is about how much the loss of a sample rises when it is left out
    of training: the memorised, the mislabelled and the rare have large ones. Without
    the inner products between samples.

    Args:
        S: Self-adjoint, ``[D, D]``, as for :func:`influence`.
        U: Gradients, ``[D, N]``.

    Raises:
        TypeError: If S is not self-adjoint.
        ValueError: If the numbers of parameters differ.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(8, 3), torch.randint(2, (8,)))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
        >>> S = (vl.EmpiricalFisher(risk) + 0.1 * vl.Identity(8)).inv()
        >>> vl.self_influence(S, vl.PerSampleGradients(risk)).shape
        torch.Size([8])
    """
    check_square(S, _rows(U, "U"), "S")
    return (U.T @ S @ U).diagonal()


def _rows(U: TorchLinearOperator, name: str) -> int:
    if not isinstance(U, TorchLinearOperator):
        raise TypeError(
            f"{name}: an operator such as vl.PerSampleGradients(risk), got "
            f"{type(U).__name__}."
        )
    return int(U.shape[0])
