"""Inner products of gradients and Jacobians, also through a curvature's inverse.

Gradient noise, the influence of samples on each other, covariances of predictions.
"""

from __future__ import annotations

from torch import Tensor

from vivit_linop.arguments import check_flag
from vivit_linop.curvature.jacobian import Jacobian
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.lowrank import Centered
from vivit_linop.operators.verbs import diagonal_blocks, gram_matrix


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


@ordinary_mode()
def predictive_covariance(
    J_test: Jacobian, S: TorchLinearOperator, diagonal: bool = False
) -> Tensor:
    """Return the covariances J_n S J_nᵀ of the outputs of each sample.

    With θ ~ N(θ*, S), the outputs f(x_n, θ) of the linearised net have this covariance
    (Immer, Korzepa & Bauer 2021, arXiv:2008.08217). It is that of the outputs, without
    the noise of observations.

    Computed as :func:`influence` is, with C columns a test sample; for S = (c V Vᵀ +
    damping)⁻¹ in one pass over the test data, and one over the training data for what
    V has not kept. Covariances between samples are not formed.

    Args:
        J_test: The Jacobian of N* samples, C outputs each, ``[N*·C, D]``; for inputs
            alone ``vl.Jacobian(model, X)``.
        S: The posterior covariance, self-adjoint ``[D, D]``, such as
            ``vl.posterior_precision(risk, curvature, prior_precision).inv()``.
        diagonal: Whether only variances are wanted.

    Returns:
        ``[N*, C, C]``, or the variances ``[N*, C]``.

    Raises:
        TypeError: If ``J_test`` is no Jacobian, or S is not self-adjoint.
        ValueError: If they have other numbers of parameters.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> net, data = nn.Linear(3, 2), (torch.rand(8, 3), torch.randint(2, (8,)))
        >>> risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
        >>> S = vl.posterior_precision(risk, vl.GGN(risk), 1.0).inv()
        >>> J = vl.Jacobian(net, torch.rand(5, 3))
        >>> vl.predictive_covariance(J, S).shape
        torch.Size([5, 2, 2])
    """
    if not isinstance(J_test, Jacobian):
        raise TypeError(f"J_test: a vl.Jacobian, got {type(J_test).__name__}.")
    check_square(S, J_test.shape[1], "S")
    check_flag(diagonal, "diagonal")
    layout = J_test.risk.layout
    if not layout.is_uniform:
        raise ValueError(
            "J_test: its samples have different numbers of outputs, "
            f"{sorted(set(layout.each))}; give those with as many each together."
        )
    N, C = J_test.risk.num_samples, layout.width
    covariance = J_test @ S @ J_test.T
    if diagonal:
        return covariance.diagonal().reshape(N, C)
    return diagonal_blocks(covariance, C)


def check_square(op: TorchLinearOperator, size: int, name: str) -> None:
    """Raise an error unless an operator is self-adjoint of a size."""
    if not isinstance(op, TorchLinearOperator) or op.shape != (size, size):
        raise ValueError(
            f"{name}: a self-adjoint operator of shape ({size}, {size}), got {op!r}."
        )
    if not op.self_adjoint:
        raise TypeError(f"{name}: must be self-adjoint, and {op!r} is not known to be.")
