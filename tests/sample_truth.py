"""Dense matrices of a risk, sample by sample, by plain autograd without the package.

Each sample is a function of the net, and its loss a function of its outputs: whatever
form the data have, and however many outputs each sample has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vivit_linop as vl

# The outputs of a sample by the net, and its loss by its outputs.
Sample = tuple[Callable[[nn.Module], Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class SampleTruth:
    """J, H, U by sample, and what they add up to; ``scale`` Σ ℓ_n is the risk."""

    J: list[Tensor]  # [C_n, D] each
    H: list[Tensor]  # [C_n, C_n] each, with scale
    U: Tensor  # [D, N]
    r: float
    value: Tensor
    gradient: Tensor
    hessian: Callable[[], Tensor]  # not all nets have second derivatives

    @property
    def parts(self) -> list[Tensor]:
        return [J.T @ H @ J for J, H in zip(self.J, self.H, strict=True)]

    @property
    def G(self) -> Tensor:
        return torch.stack(self.parts).sum(0)


def truth_of(
    net: nn.Module, samples: Sequence[Sample], scale: float, r: float | None = None
) -> SampleTruth:
    """Differentiate each sample alone; r is 1/N unless it is given."""
    r = 1.0 / len(samples) if r is None else r
    params = [p for p in net.parameters() if p.requires_grad]

    def flat(gradients: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in gradients])

    def rows(values: Tensor) -> Tensor:
        each = [
            torch.autograd.grad(v, params, retain_graph=True, materialize_grads=True)
            for v in values.reshape(-1)
        ]
        return torch.stack([flat(gradients) for gradients in each])

    J, H, U = [], [], []
    total: Any = 0.0
    for outputs, loss in samples:
        f = outputs(net)
        leaf = f.detach().reshape(-1)

        def of_flat(values: Tensor, shape: Any = f.shape, loss: Any = loss) -> Tensor:
            return loss(values.reshape(shape))

        J.append(rows(f))
        H.append(scale * torch.autograd.functional.hessian(of_flat, leaf))
        slope = torch.func.grad(of_flat)(leaf)
        U.append(scale / r * J[-1].T @ slope)
        total = total + scale * loss(f)
    gradient = flat(torch.autograd.grad(total, params, retain_graph=True))

    def hessian() -> Tensor:
        slope = flat(torch.autograd.grad(total, params, create_graph=True))
        return rows(slope + 0.0 * sum(p.sum() for p in params))

    value = total.detach()
    return SampleTruth(J, H, torch.stack(U, 1), r, value, gradient, hessian)


def close(found: Tensor, expected: Tensor) -> bool:
    assert found.shape == expected.shape
    return bool((found - expected).norm() <= 1e-9 * expected.norm() + 1e-12)


def check_products(risk: vl.EmpiricalRisk, truth: SampleTruth) -> None:
    """Compare a few of them only."""
    D = len(truth.gradient)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(D, generator=generator, dtype=torch.float64)
    assert risk.num_samples == len(truth.J)
    assert close(risk.value(), truth.value)
    assert close(risk.gradient(), truth.gradient)
    assert close(vl.GGN(risk) @ x, truth.G @ x)
    V = vl.GGNFactor(risk).to_dense()
    assert close(V @ V.T, truth.G)
    assert close(vl.PerSampleGradients(risk).to_dense(), truth.U)


def check(risk: vl.EmpiricalRisk, truth: SampleTruth) -> None:
    """Compare what a risk gives with dense matrices."""
    N, D = len(truth.J), truth.G.shape[0]
    J, H = torch.cat(truth.J), torch.block_diag(*truth.H)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(D, 2, generator=generator, dtype=torch.float64)
    u = torch.randn(len(J), 2, generator=generator, dtype=torch.float64)
    assert risk.num_samples == N
    assert close(risk.value(), truth.value)
    assert close(risk.gradient(), truth.gradient)
    assert close(vl.Jacobian(risk) @ x, J @ x)
    assert close(vl.Jacobian(risk).T @ u, J.T @ u)
    assert close(vl.Jacobian(risk).to_dense(), J)
    assert close(vl.LossHessian(risk) @ u, H @ u)
    assert close(vl.LossHessian(risk).to_dense(), H)
    assert close(vl.LossHessian(risk).diagonal(), H.diagonal())
    S = vl.LossHessian(risk).sqrt()
    assert close(S @ (S.T @ u), H @ u)
    assert close(S.to_dense() @ S.to_dense().T, H)
    G, V = vl.GGN(risk), vl.GGNFactor(risk)
    assert close(G @ x, truth.G @ x)
    assert close(V @ (V.T @ x), truth.G @ x)
    assert close(V.to_dense() @ V.to_dense().T, truth.G)
    assert close(G.diagonal(), truth.G.diagonal())
    assert close(G.trace(), truth.G.trace())
    spectrum, K = torch.linalg.eigvalsh(truth.G), (V.T @ V).to_dense()
    nonzero = min(len(K), D)
    assert close(torch.linalg.eigvalsh(K)[-nonzero:], spectrum[-nonzero:])
    assert close(G.eigvalsh()[-nonzero:], spectrum[-nonzero:])
    damped = truth.G + 0.1 * torch.eye(D, dtype=torch.float64)
    assert close((G + 0.1 * vl.Identity(D)).inv() @ x, torch.linalg.solve(damped, x))
    U = vl.PerSampleGradients(risk)
    assert close(U.to_dense(), truth.U)
    assert close(vl.EmpiricalFisher(risk) @ x, truth.r * truth.U @ (truth.U.T @ x))
    pairs = G.eigh(k=2)
    E = pairs.eigenvectors
    gammas, lambdas = vl.directional_derivatives(risk, pairs)
    assert close(gammas, truth.U.T @ E)
    parts = torch.stack([(E * (part @ E)).sum(0) for part in truth.parts])
    assert close(lambdas, parts / truth.r)
    assert close(vl.Hessian(risk) @ x, truth.hessian() @ x)
    of_samples = torch.stack([part.diagonal() for part in truth.parts]) / truth.r
    assert close(G.sample_diagonals(), of_samples)
