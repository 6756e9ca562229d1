"""The loss of a risk that is made of a model and inputs alone."""

from __future__ import annotations

from torch import Tensor, nn


class NoLoss(nn.Module):
    """A loss that is zero, and has no derivatives."""

    reduction = "sum"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Zero; an error where derivatives are wanted."""
        if output.requires_grad:
            raise ValueError(
                "loss: there is none, the operator was made of a model and inputs "
                "alone, vl.Jacobian(model, X). Give it a risk, "
                "vl.EmpiricalRisk(model, loss, (X, y))."
            )
        return output.new_zeros(())
