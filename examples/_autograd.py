"""The GGN and gradients by torch.autograd alone, for the checks of the examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


def gradient(model: nn.Module, loss: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the loss, ``[D]``."""
    params = list(model.parameters())
    return parameters_to_vector(torch.autograd.grad(loss(model(X), y), params))


def ggn(model: nn.Module, loss: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """Return the GGN Jᵀ H J of the loss, ``[D, D]``."""
    params = list(model.parameters())
    output = model(X)
    rows = [
        parameters_to_vector(torch.autograd.grad(entry, params, retain_graph=True))
        for entry in output.reshape(-1)
    ]
    J = torch.stack(rows)
    f = output.detach().reshape(-1)
    H = torch.autograd.functional.hessian(lambda f: loss(f.view_as(output), y), f)
    return J.T @ H @ J


def jacobians(model: nn.Module, X: Tensor) -> Tensor:
    """Return the Jacobians of all samples in float64, ``[N, C, D]``."""
    params = {name: p.detach().double() for name, p in model.named_parameters()}

    def outputs(params: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, params, (X.double(),))
        return result

    parts = torch.func.jacrev(outputs)(params).values()
    return torch.cat([part.flatten(2) for part in parts], dim=2)


def cross_entropy_ggn(model: nn.Module, X: Tensor) -> Tensor:
    """Return Σ Jₙᵀ (diag(p) − p pᵀ) Jₙ over the samples in float64, ``[D, D]``."""
    J, p = jacobians(model, X), model(X).detach().double().softmax(1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return (H @ J).flatten(0, 1).T @ J.flatten(0, 1)


def check(what: str, value: Tensor, reference: Tensor, rtol: float = 1e-4) -> None:
    """Print whether two results agree; raise an error if they do not."""
    if not torch.allclose(value, reference, rtol=rtol, atol=1e-6):
        raise ValueError(f"{what} do not match: {value} and {reference}.")
    print(f"{what} match.")
