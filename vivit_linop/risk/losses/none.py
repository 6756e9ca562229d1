"""The loss of a risk that is made of a model and inputs alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vivit_linop.risk.containers import leaves


class NoLoss(nn.Module):
    """A loss that is zero, and has no derivatives."""

    reduction = "sum"

    def forward(self, output: Any, target: Tensor) -> Tensor:
        """Zero, for outputs in any container; an error where derivatives are wanted."""
        tensors = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
        if any(tensor.requires_grad for tensor in tensors):
            raise ValueError(
                "loss: there is none, the operator was made of a model and inputs "
                "alone, vl.Jacobian(model, X). Give it a risk, "
                "vl.EmpiricalRisk(model, loss, (X, y))."
            )
        return tensors[0].new_zeros(())
