"""Checks of what is composed of a case's operators: posteriors, influence, evidence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import vivit_linop as vl
from tests.cases import Dense

from .checks import Library, Row, check, damping_of, findings

__all__ = ["findings"]  # of all checks


def _inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.inv((matrix + matrix.T) / 2)


@check
def posterior(lib: Library, t: Dense) -> Iterator[Row]:
    """Nodes are written anew, as users do."""
    delta, J, U = damping_of(t), vl.Jacobian, vl.PerSampleGradients
    inverse = _inverse(t.G + delta * torch.eye(t.D, dtype=torch.float64))
    S = (vl.GGN(lib.risk) + delta * vl.Identity(t.D)).inv()
    outputs, size = t.J @ inverse @ t.J.T, t.J.norm() ** 2 / delta
    sandwich = J(lib.risk) @ S @ J(lib.risk).T
    yield "J S Jᵀ", sandwich.to_dense(), outputs, size
    yield "its diagonal", (lib.J @ S @ lib.J.T).diagonal(), outputs.diagonal(), size
    blocks = outputs.reshape(t.N, t.C, t.N, t.C)[range(t.N), :, range(t.N), :]
    yield "covariance", vl.predictive_covariance(lib.J, S), blocks, size
    noisy = (sandwich + vl.Identity(t.N * t.C)).logdet()
    unit = torch.eye(t.N * t.C, dtype=torch.float64)
    yield "with noise", noisy, torch.logdet(outputs + unit), size + t.N * t.C
    scores, size = t.U.T @ inverse @ t.U, t.U.norm() ** 2 / delta
    yield "influence", vl.influence(U(lib.risk), S, U(lib.risk)), scores, size
    yield "of itself", vl.self_influence(S, U(lib.risk)), scores.diagonal(), size
    chosen = sorted(lib.random.sample(range(t.D), lib.random.randint(1, t.D)))
    part, known = S.restrict(chosen), inverse[chosen][:, chosen]
    yield "restricted", part.to_dense(), known, inverse.norm()
    yield (
        "its inverse",
        part.inv().to_dense(),
        _inverse(known),
        t.D * (t.G.norm() + delta),
    )


@check
def priors(lib: Library, t: Dense) -> Iterator[Row]:
    """A number for each parameter tensor, and derivatives in these."""
    delta, sizes = damping_of(t), torch.tensor(lib.risk.sizes)
    numbers = delta * (0.5 + lib.noise(len(sizes)).abs())
    given = numbers.clone().requires_grad_()
    P = numbers.repeat_interleave(sizes)
    inverse = _inverse(t.G + P.diag())
    value = (lib.G + vl.Diagonal(given.repeat_interleave(sizes))).logdet()
    size = t.D * P.log().abs().max() + t.D
    yield "logdet", value.detach(), torch.logdet(t.G + P.diag()), size
    (slopes,) = torch.autograd.grad(value, given)
    traces = [part.sum() for part in inverse.diagonal().split(lib.risk.sizes)]
    yield "derivatives", slopes, torch.stack(traces), t.D / P.min()
    S, x = (lib.G + vl.Diagonal(P)).inv(), lib.noise(t.D)
    yield "inverse", S @ x, inverse @ x, inverse.norm() * x.norm()
    outputs, most = (t.J @ inverse @ t.J.T).diagonal(), t.J.norm() ** 2 / P.min()
    yield "J S Jᵀ", (lib.J @ S @ lib.J.T).diagonal(), outputs, most
    theta = torch.cat([p.reshape(-1) for p in lib.risk.params.values()])
    # Per sample, as the evidence counts; r of a sum is 1.
    posterior = torch.logdet(t.G / t.r + P.diag())
    expected = -t.value / t.r - 0.5 * (P * theta * theta).sum()
    expected = expected - 0.5 * (posterior - P.log().sum())
    if lib.risk.scale == t.r:  # else weights of classes or ignored targets count
        named = dict(zip(lib.risk.params, numbers, strict=True))
        found = vl.log_marginal_likelihood(lib.risk, lib.G, named)
        yield "evidence", found, expected, expected.abs() + size
