"""(G + δ I)⁻¹ g for ten values of δ, from net and data.

Ours is Woodbury's identity on the Gram matrix, which is computed once for all δ and
inside of the timing. The peer is SciPy's ``cg`` to a relative residual of 1e-6 over
curvlinops' GGN in float64 vectors and float32 products, a new run for each δ.

Both are held against a solution in float64, and their residuals are computed with
curvlinops' GGN in float64. In float32 no method has errors below about eps·λ_max/δ.
"""

from __future__ import annotations

import torch
from scipy.sparse.linalg import cg
from torch import Tensor

import vivit_linop as vl
from benchmarks import peers
from benchmarks.measure import Ratio, Results, Run, Suite
from benchmarks.problems import Problem

TOLERANCE = 1e-6
# Multiples of λ_max.
DAMPINGS = torch.logspace(-3, 0, 10, dtype=torch.float64)


def dampings(problem: Problem) -> list[float]:
    """The values of δ: known before anything is timed."""
    return (largest_eigenvalue(problem) * DAMPINGS).tolist()


def largest_eigenvalue(problem: Problem) -> float:
    """Return λ_max: a power iteration tells it well enough, and takes no memory."""
    G, x = peers.curvlinops_ggn(problem), problem.columns(1).squeeze(1)
    for _ in range(20):
        x = G @ (x / x.norm())
    return x.norm().item()


def gradient(problem: Problem) -> Tensor:
    X, y = problem.data
    loss = problem.loss(problem.model(X), y)
    parts = torch.autograd.grad(loss, problem.params)
    return torch.cat([part.reshape(-1) for part in parts])


def woodbury(problem: Problem) -> Run:
    deltas = dampings(problem)

    def run() -> Tensor:
        g = gradient(problem)
        G, eye = vl.GGN(problem.model, problem.loss, problem.data), vl.Identity(len(g))
        return torch.stack([(G + delta * eye).inv() @ g for delta in deltas], dim=1)

    return run


def conjugate_gradients(problem: Problem) -> Run:
    deltas = dampings(problem)

    def run() -> Tensor:
        g = gradient(problem).double().cpu().numpy()
        G = peers.curvlinops_ggn(problem).to_scipy()
        columns = []
        for delta in deltas:
            x, info = cg(peers.damped(G, delta), g, rtol=TOLERANCE, maxiter=2000)
            if info != 0:
                raise RuntimeError(f"cg: no convergence for δ = {delta:.3g}.")
            columns.append(torch.from_numpy(x))
        return torch.stack(columns, dim=1).to(problem.device)

    return run


OURS, PEER = "ten inverses", "ten inverses, cg"


def agreement(problem: Problem, results: Results) -> dict[str, float]:
    """The largest relative error and residual of the ten columns."""
    exact, deltas = problem.to(torch.float64), dampings(problem)
    g = gradient(exact)
    G, eye = vl.GGN(exact.model, exact.loss, exact.data), vl.Identity(len(g))
    solutions = torch.stack([(G + delta * eye).inv() @ g for delta in deltas], dim=1)
    solved = {name: X.double() for name, X in results.items()}
    peer, delta = peers.curvlinops_ggn(exact), g.new_tensor(deltas)
    found = {}
    for name, X in {**solved, "float64": solutions}.items():
        errors = (X - solutions).norm(dim=0) / solutions.norm(dim=0)
        residuals = peer @ X + delta * X - g[:, None]
        if name in results:
            found[f"error, {name}"] = errors.max().item()
        found[f"residual, {name}"] = (residuals.norm(dim=0) / g.norm()).max().item()
    return found


SUITE = Suite(
    "(G + δ I)⁻¹ g for ten δ, from net and data",
    {OURS: woodbury, PEER: conjugate_gradients},
    nets=dict.fromkeys(["mlp", "3c3d", "2c2d", "digits"]),
    ratios=[Ratio("cg / ours", PEER, OURS, {"mlp": 30, "3c3d": 10})],
    memory_ratios=[Ratio("ours / cg", OURS, PEER)],
    agreement=agreement,
    from_scratch=True,
)
