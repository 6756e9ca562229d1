"""What a covariance of parameters means for predictions: J S Jᵀ by samples."""

from __future__ import annotations

from torch import Tensor

from vivit_linop.arguments import check_flag
from vivit_linop.curvature.jacobian import Jacobian
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.verbs import diagonal_blocks


@ordinary_mode()
def predictive_covariance(
    J_test: Jacobian, S: TorchLinearOperator, diagonal: bool = False
) -> Tensor:
    """Return the covariances J_n S J_nᵀ of the outputs of each sample.

    With θ ~ N(θ*, S), the outputs f(x_n, θ) of the linearised net have this covariance
    (Immer, Korzepa & Bauer 2021, arXiv:2008.08217). It is that of the outputs, without
    the noise of observations.

    For S = (c V Vᵀ + damping)⁻¹ through Gram matrices between V and the Jacobian, R
    columns a training sample and C a test sample: one pass over the test data, and one
    over the training data for what V has not kept. For diagonals and Kronecker factors
    from the columns of the layers, with weights and rotated into the eigenbases. For
    other operators by products of S with the columns of J_testᵀ, some at a time.
    Nothing of size D × N is formed, nor are covariances between samples.

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
