"""What users compose, as expressions and by hand from Gram matrices.

By hand means: the matrices K = VᵀV, VᵀA, and column norms of the library, and dense
algebra of their sizes. The expressions are to take at most twice the time. G and K are
known on both sides; train on the first part of the data, test inputs are the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

import vivit_linop as vl
from benchmarks.measure import Build, Ratio, Run, Suite, differences
from benchmarks.problems import Problem

# So many of the samples are test inputs.
TEST_SHARE = 0.5
TAUS = torch.logspace(-3, 1, 20).tolist()
TAU = 0.1


@dataclass(frozen=True)
class Setting:
    """Train and test data of a problem, and the prior precision τ of all parameters."""

    problem: Problem

    @cached_property
    def sizes(self) -> tuple[int, int]:
        n = self.problem.num_samples
        return n - int(TEST_SHARE * n), int(TEST_SHARE * n)

    def _risk(self, first: bool) -> vl.EmpiricalRisk:
        X, y = self.problem.data
        n = self.sizes[0]
        part = slice(0, n) if first else slice(n, None)
        return vl.EmpiricalRisk(
            self.problem.model, self.problem.loss, (X[part], y[part])
        )

    @cached_property
    def train(self) -> vl.EmpiricalRisk:
        return self._risk(True)

    @cached_property
    def test(self) -> vl.EmpiricalRisk:
        return self._risk(False)

    @cached_property
    def G(self) -> vl.GGN:
        G = vl.GGN(self.train)
        _ = G.gram.matrix
        return G

    @cached_property
    def K(self) -> Tensor:
        return self.G.gram.to_dense()

    @property
    def V(self) -> vl.GGNFactor:
        return self.G.factor

    @cached_property
    def eye(self) -> vl.Identity:
        return vl.Identity(self.G.shape[0])

    @cached_property
    def S(self) -> vl.TorchLinearOperator:
        return (self.G + TAU * self.eye).inv()

    @cached_property
    def cholesky(self) -> Tensor:
        K = self.K.double()
        K.diagonal().add_(TAU)
        return torch.linalg.cholesky(K)

    def solve(self, Y: Tensor) -> Tensor:
        """(K + τ I)⁻¹ Y."""
        return torch.cholesky_solve(Y.double(), self.cholesky).to(Y.dtype)


def case(of: Callable[[Setting], Run]) -> Build:
    return lambda problem: of(Setting(problem))


# Predictive variances: the diagonal of J S Jᵀ, and its C × C blocks ----------------


def variances(at: Setting) -> Run:
    J = vl.Jacobian(at.test)
    S = at.S
    return lambda: (J @ S @ J.T).diagonal()


def variances_by_hand(at: Setting) -> Run:
    J = vl.Jacobian(at.test)
    _ = at.cholesky

    def run() -> Tensor:
        cross = (at.V.T @ J.T).to_dense()
        squares = vl.linalg.row_norms_squared(J)
        return (squares - (cross * at.solve(cross)).sum(0)) / TAU

    return run


# Influence: U_testᵀ S U, and the diagonal for the training data --------------------


def influence(at: Setting) -> Run:
    U, Ut, S = vl.PerSampleGradients(at.train), vl.PerSampleGradients(at.test), at.S
    return lambda: (Ut.T @ S @ U).to_dense()


def influence_by_hand(at: Setting) -> Run:
    U, Ut = vl.PerSampleGradients(at.train), vl.PerSampleGradients(at.test)
    _ = at.cholesky

    def run() -> Tensor:
        left, right = (at.V.T @ Ut).to_dense(), (at.V.T @ U).to_dense()
        return ((Ut.T @ U).to_dense() - left.T @ at.solve(right)) / TAU

    return run


def self_influence(at: Setting) -> Run:
    U, S = vl.PerSampleGradients(at.train), at.S
    return lambda: (U.T @ S @ U).diagonal()


def self_influence_by_hand(at: Setting) -> Run:
    U = vl.PerSampleGradients(at.train)
    _ = at.cholesky

    def run() -> Tensor:
        cross = (at.V.T @ U).to_dense()
        return (U.squared_norms() - (cross * at.solve(cross)).sum(0)) / TAU

    return run


# The posterior: variances of parameters, evidence ----------------------------------


def marginal_variances(at: Setting) -> Run:
    S = at.S
    return lambda: S.diagonal()


def marginal_variances_by_hand(at: Setting) -> Run:
    _ = at.cholesky
    D = at.V.shape[0]

    def run() -> Tensor:
        # Rows of V L⁻ᵀ, some columns at a time.
        R = at.V.shape[1]
        weights = torch.linalg.solve_triangular(
            at.cholesky, torch.eye(R).to(at.cholesky), upper=False
        ).to(at.K.dtype)
        total = at.K.new_zeros(D)
        for part in weights.T.split(256, dim=1):
            total += (at.V @ part.contiguous()).square().sum(1)
        return (1.0 - total) / TAU

    return run


def evidence(at: Setting) -> Run:
    G, eye = at.G, at.eye
    return lambda: torch.stack([(G + tau * eye).logdet() for tau in TAUS])


def evidence_at_once(at: Setting) -> Run:
    G, taus = at.G, at.K.new_tensor(TAUS)
    return lambda: G.logdet(damping=taus)


def evidence_by_hand(at: Setting) -> Run:
    evals, D = at.G.eigvalsh().clamp(min=0.0), at.V.shape[0]

    def run() -> Tensor:
        return torch.stack(
            [D * math.log(tau) + torch.log1p(evals / tau).sum() for tau in TAUS]
        )

    return run


# A prior by layer: log det(G + P), from the net ------------------------------------


def precisions(at: Setting) -> Tensor:
    return torch.linspace(0.1, 1.0, len(at.train.sizes), device=at.problem.device)


def evidence_by_layer(at: Setting) -> Run:
    sizes = torch.tensor(at.train.sizes, device=at.problem.device)
    entries = precisions(at).repeat_interleave(sizes)
    return lambda: (vl.GGN(at.train) + vl.Diagonal(entries)).logdet()


def evidence_by_layer_by_hand(at: Setting) -> Run:
    sizes = torch.tensor(at.train.sizes, device=at.problem.device)
    entries = precisions(at).repeat_interleave(sizes)

    def run() -> Tensor:
        # No Gram matrix of the library has weights inside: V is formed.
        W = vl.GGNFactor(at.train).to_dense().mul_(entries.rsqrt()[:, None])
        evals = torch.linalg.eigvalsh(W.T @ W).clamp(min=0.0)
        return entries.log().sum() + torch.log1p(evals).sum()

    return run


# Two tasks: (G₁ + G₂ + τ I)⁻¹ x, with both Gram matrices known ----------------------


def tasks(at: Setting) -> Run:
    second = vl.GGN(at.test)
    _, _ = at.G, second.gram.matrix
    x = at.problem.columns(1).squeeze(1)
    return lambda: (at.G + second + TAU * at.eye).inv() @ x


def tasks_by_hand(at: Setting) -> Run:
    second = vl.GGN(at.test)
    first, last = at.K, second.gram.to_dense()
    V, W, x = at.V, second.factor, at.problem.columns(1).squeeze(1)

    def run() -> Tensor:
        cross = (V.T @ W).to_dense()
        K = torch.cat(
            [torch.cat([first, cross], 1), torch.cat([cross.T, last], 1)]
        ).double()
        K.diagonal().add_(TAU)
        inner = torch.cat([V.T @ x, W.T @ x]).double()
        y = torch.cholesky_solve(inner[:, None], torch.linalg.cholesky(K))
        left, right = y.squeeze(1).to(x.dtype).split([len(first), len(last)])
        return (x - V @ left - W @ right) / TAU

    return run


# Eigenpairs -------------------------------------------------------------------------


def pairs_wanted(at: Setting) -> int:
    return min(10, at.V.shape[1] - 1)


def pairs_after_inverse(at: Setting) -> Run:
    _ = at.S
    return lambda: at.G.eigh(k=pairs_wanted(at)).eigenvalues


def pairs_after_inverse_by_hand(at: Setting) -> Run:
    _, K = at.S, at.K.cpu().numpy()
    return lambda: at.K.new_tensor(eigsh(K, k=pairs_wanted(at), which="LA")[0])


PAIRS: dict[str, tuple[Callable[[Setting], Run], Callable[[Setting], Run]]] = {
    "predictive variances": (variances, variances_by_hand),
    "influence": (influence, influence_by_hand),
    "self-influence": (self_influence, self_influence_by_hand),
    "posterior variances": (marginal_variances, marginal_variances_by_hand),
    "evidence for 20 precisions": (evidence, evidence_by_hand),
    "evidence for 20 precisions, at once": (evidence_at_once, evidence_by_hand),
    "evidence, a prior by layer": (evidence_by_layer, evidence_by_layer_by_hand),
    "an inverse for two tasks": (tasks, tasks_by_hand),
    "eigh(k=10) after inv()": (pairs_after_inverse, pairs_after_inverse_by_hand),
}
BY_HAND = ", by hand"
# So many train and test inputs together; those of the largest have five columns each.
NETS = {"small": 200, "mlp-13k": 200, "mlp-51k": 400, "mlp-100k": 200, "mlp-1m": 200}

SUITE = Suite(
    "what users compose, and the same by hand from Gram matrices",
    {
        label: case(of)
        for name, pair in PAIRS.items()
        for label, of in zip((name, name + BY_HAND), pair, strict=True)
    },
    nets=dict(NETS),
    ratios=[
        Ratio(name, name, name + BY_HAND, dict.fromkeys(NETS, 2.0), at_most=True)
        for name in PAIRS
    ],
    agreement=differences(*((name, name + BY_HAND) for name in PAIRS)),
)
