"""The Hessian of the empirical risk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.risk.empirical import EmpiricalRisk, as_risk
from vivit_linop.risk.model import as_guest


class Hessian(TorchLinearOperator):
    """The Hessian ∇²L(θ), ``[D, D]``; symmetric, in general indefinite.

    A product is the derivative of the gradient along a vector (Pearlmutter 1994): one
    backward pass through the graph of the gradient, which is kept for the first batch
    and made anew for the others.

    Args:
        risk: An :class:`EmpiricalRisk`, or a model, followed by ``loss``, ``data`` and
            ``params`` as for :class:`EmpiricalRisk`.

    Example:
        >>> import torch, vivit_linop as vl
        >>> from torch import nn
        >>> data = (torch.rand(4, 3), torch.rand(4, 1))
        >>> risk = vl.EmpiricalRisk(nn.Linear(3, 1), nn.MSELoss(), data)
        >>> x = torch.ones(4)  # for a linear model the GGN is the Hessian
        >>> torch.allclose(vl.Hessian(risk) @ x, vl.GGN(risk) @ x, atol=1e-5)
        True
    """

    self_adjoint = True

    def __init__(
        self,
        risk: EmpiricalRisk | Any,
        loss: Any = None,
        data: Any = None,
        params: Any | None = None,
    ) -> None:
        self.risk = as_risk(risk, loss, data, params)
        D = self.risk.num_params
        super().__init__((D, D), self.risk.dtype, self.risk.device)
        self._kept: list[Tensor] | None = None
        self._checked = False

    def _gradient(self, index: int, X: Any) -> list[Tensor]:
        """The gradient on a batch, with its graph."""
        risk = self.risk
        output = risk.model(risk.params, X)
        risk.check_outputs(index, output)
        total = risk.loss.total(output, risk.targets()[index]) * risk.scale
        parameters = list(risk.params.values())
        gradients = torch.autograd.grad(
            total, parameters, create_graph=True, allow_unused=True
        )
        return [
            torch.zeros_like(p) if gradient is None else gradient
            for gradient, p in zip(gradients, parameters, strict=True)
        ]

    def _multiply(self, X: Tensor) -> Tensor:
        if not self._checked:
            self._check_symmetry()
        result = torch.zeros_like(X)
        single = len(self.risk.batch_sizes) == 1
        with as_guest(self.risk.device):
            if single and self._kept is not None:
                return self._differentiate(self._kept, X)
            for index, (inputs, _) in enumerate(self.risk.batches("product")):
                gradient = self._gradient(index, inputs)
                if single:
                    self._kept = gradient
                result += self._differentiate(gradient, X)
        return result

    def _check_symmetry(self) -> None:
        """Raise an error if ⟨x, H y⟩ and ⟨y, H x⟩ differ, once."""
        self._checked = True
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.shape[0], 2, generator=generator, dtype=torch.float64)
        X = noise.to(self.device, self.torch_dtype)
        image = self._multiply(X)
        products = X.T @ image
        tolerance = 100 * torch.finfo(self.torch_dtype).eps ** 0.75
        size = X.norm() * image.norm()
        if not (products[0, 1] - products[1, 0]).abs() <= tolerance * size:
            raise ValueError(
                "model: its second derivatives by torch are not symmetric, so an "
                "operation of the model has a wrong one; replace it by an equivalent "
                "one. The GGN does not need second derivatives."
            )

    def _differentiate(self, gradient: list[Tensor], X: Tensor) -> Tensor:
        """Differentiate the gradient along each column."""
        risk = self.risk
        # The loss may be linear in some parameters.
        curved = [index for index, g in enumerate(gradient) if g.requires_grad]
        if not curved:
            return torch.zeros_like(X)
        columns = []
        for x in X.unbind(1):
            parts = risk.unflatten(x)
            product = torch.autograd.grad(
                [gradient[index] for index in curved],
                list(risk.params.values()),
                [parts[index] for index in curved],
                retain_graph=True,
                allow_unused=True,
            )
            columns.append(risk.flatten(product))
        return torch.stack(columns, dim=1)
