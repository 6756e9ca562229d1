"""Losses that are not convex: JᵀHJ without a factor; the positive part of H."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests import placing
from tests.cases import (
    Dense,
    Lambda,
    Problem,
    classes,
    converted,
    dense_of,
    features,
    mlp,
)
from tests.comparing import assert_near
from tests.curvature_cases import risk_of


def gaussian(f: Tensor, y: Tensor) -> Tensor:
    """Mean and log-variance of a label."""
    return (0.5 * (f[:, 1] + (f[:, 0] - y[:, 0]) ** 2 * (-f[:, 1]).exp())).mean()


def dice(f: Tensor, y: Tensor) -> Tensor:
    p, t = f.softmax(1), F.one_hot(y, 3).movedim(-1, 1).to(f)
    overlap, size = (p * t).sum((2, 3)), (p + t).sum((2, 3))
    return (1 - (2 * overlap + 1) / (size + 1)).mean()


def focal(f: Tensor, y: Tensor) -> Tensor:
    log_p = f.log_softmax(1).gather(1, y[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).sum()


class Welsch(nn.Module):
    """Robust regression: 1 − exp(−(f − y)²/2), entry by entry."""

    reduction = "sum"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return (1 - (-((f - y) ** 2) / 2).exp()).sum()


@vl.losses.register(Welsch)
def welsch(loss: Welsch) -> vl.losses.OutputLoss:
    return OutputWelsch()


class OutputWelsch(vl.losses.ElementwiseLoss):
    def total(self, output: Tensor, target: Tensor) -> Tensor:
        return (1 - (-((output - target) ** 2) / 2).exp()).sum()

    def slope(self, output: Tensor, target: Tensor) -> Tensor:
        r = output - target
        return r * (-(r**2) / 2).exp()

    def curvature(self, output: Tensor, target: Tensor) -> Tensor:
        r = output - target
        return (1 - r**2) * (-(r**2) / 2).exp()


def _conv() -> nn.Module:
    return Lambda(lambda m, x: m.layer(x), layer=nn.Conv2d(1, 3, 3, padding=1))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mean and log-variance": lambda: Problem(
        mlp(3, 4, 2), gaussian, (features(6, 3), features(6, 1)), reduction="mean"
    ).rebatched(4, 2),
    "soft Dice": lambda: Problem(
        _conv(), dice, (features(4, 1, 4, 4), classes(4, 3, 4, 4)), reduction="mean"
    ),
    "focal": lambda: Problem(
        mlp(3, 4), focal, (4 * features(5, 3), classes(5, 4)), reduction="sum"
    ).rebatched(2, 3),
    "Welsch": lambda: Problem(
        mlp(3, 2), Welsch(), (features(5, 3), 3 * features(5, 2)), reduction="sum"
    ),
}


@functools.cache
def solved(name: str) -> tuple[vl.EmpiricalRisk, Dense]:
    torch.manual_seed(0)
    case = converted(PROBLEMS[name](), torch.float64)
    return risk_of(case), dense_of(case)


def positive(matrix: Tensor) -> Tensor:
    evals, evecs = torch.linalg.eigh(matrix)
    return (evecs * evals.clamp(min=0)) @ evecs.T


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_needs_products_only(name: str) -> None:
    risk, truth = solved(name)
    G, D = vl.GGN(risk), truth.D
    evals = torch.linalg.eigvalsh(truth.G)
    assert evals[0] < -1e-3 * evals[-1]  # there is something to be found
    if name in ("focal", "Welsch"):
        vl.testing.check_operator(G, truth.G)
    x = torch.linspace(-1, 1, D).double()
    assert_near(G @ x, truth.G @ x)
    assert_near(G.to_dense(), truth.G)
    assert_near(G.diagonal(), truth.G.diagonal())
    assert_near(G.trace(), truth.G.trace())
    assert_near((3 * G).to_dense(), 3 * truth.G)
    assert_near(G.sample_diagonals(), truth.per_sample_ggn().diagonal(dim1=1, dim2=2))
    damped = G + 0.3 * vl.Identity(D)
    matrix = truth.G + 0.3 * torch.eye(D).double()
    assert_near(damped.logdet(), torch.linalg.slogdet(matrix).logabsdet)
    assert_near(damped.eigvalsh(), evals + 0.3)
    H = vl.LossHessian(risk)
    assert_near(H.diagonal(), truth.H.diagonal())


@pytest.mark.parametrize("name", PROBLEMS)
def test_eigenpairs(name: str) -> None:
    risk, truth = solved(name)
    G = vl.GGN(risk)
    evals = torch.linalg.eigvalsh(truth.G)
    assert_near(G.eigvalsh(), evals)
    everything = G.eigh()
    assert_near(everything.eigenvalues, evals)
    assert everything.route == "dense G"
    few = G.eigh(k=2)
    assert few.route == placing.krylov("G")
    assert_near(few.eigenvalues, evals[-2:])
    assert_near(truth.G @ few.eigenvectors, evals[-2:] * few.eigenvectors)
    assert G.explain(k=2).chosen.name == placing.krylov("G")
    assert_near(G.eigh(k=2, route="dense G").eigenvalues, evals[-2:])
    assert_near((2 * G).eigh(k=1).eigenvalues, 2 * evals[-1:])
    lowest = G.eigh(select=lambda values: [0])
    assert_near(lowest.eigenvalues, evals[:1])
    with pytest.raises(ValueError, match="k is between 1 and"):
        G.eigh(k=truth.D + 1)


@pytest.mark.parametrize("name", PROBLEMS)
def test_positive_part(name: str) -> None:
    risk, truth = solved(name)
    H = vl.LossHessian(risk, positive_part=True)
    expected = positive(truth.H)  # of a block-diagonal matrix, block by block
    assert_near(H.to_dense(), expected)
    assert_near(H.diagonal(), expected.diagonal())
    x = torch.linspace(-1, 1, len(expected)).double()
    assert_near(H @ x, expected @ x)
    S = H.sqrt().to_dense()
    assert_near(S @ S.T, expected)
    G = vl.GGN(risk, positive_part=True)
    matrix = truth.J.T @ expected @ truth.J
    vl.testing.check_operator(G, matrix)
    assert_near((vl.Jacobian(risk).T @ H @ vl.Jacobian(risk)).to_dense(), matrix)
    assert_near(G.eigh(k=2).eigenvalues, torch.linalg.eigvalsh(matrix)[-2:])
    unit = torch.eye(truth.D).double()
    inverse = (G + 0.1 * vl.Identity(truth.D)).inv()
    assert_near(inverse.to_dense(), torch.linalg.inv(matrix + 0.1 * unit))
    V = vl.GGNFactor(risk, positive_part=True).to_dense()
    assert_near(V @ V.T, matrix)
    blocks = G.block_diagonal("parameter").blocks
    assert_near(
        blocks[0].to_dense(), matrix[: blocks[0].shape[0], : blocks[0].shape[0]]
    )


def test_kfac_of_the_positive_part() -> None:
    """It is exact for one sample with one position."""
    risk, truth = solved("mean and log-variance")
    one = risk.subset([3])
    rows = slice(3 * truth.C, 4 * truth.C)
    J, H = truth.J[rows], positive(truth.H[rows, rows] / truth.r)
    G = J.T @ H @ J
    for kind in (vl.KFAC, vl.EKFAC):
        K = kind(one, variant="exact", positive_part=True).to_dense()
        size = one.sizes[0]
        assert_near(K[:size, :size], G[:size, :size])


def test_a_convex_loss_is_its_positive_part() -> None:
    case = Problem(mlp(3, 4), nn.CrossEntropyLoss(), (features(5, 3), classes(5, 4)))
    risk = vl.EmpiricalRisk(*converted(case, torch.float64).arguments()[0])
    plain, other = vl.GGN(risk), vl.GGN(risk, positive_part=True)
    assert other.factor.width == plain.factor.width == 3  # the closed form
    assert_near(other.to_dense(), plain.to_dense())


def test_directional_derivatives() -> None:
    risk, truth = solved("mean and log-variance")
    E = torch.linalg.qr(torch.randn(truth.D, 3).double()).Q
    gammas, lambdas = vl.directional_derivatives(risk, E)
    assert_near(gammas, truth.U.T @ E)
    expected = torch.einsum("dk,nde,ek->nk", E, truth.per_sample_ggn(), E)
    assert expected.min() < 0
    assert_near(lambdas, expected)
    # The pairs of the positive part are directions of G as any others.
    pairs = vl.GGN(risk, positive_part=True).eigh(k=2)
    E = pairs.eigenvectors
    _, lambdas = vl.directional_derivatives(risk, pairs)
    assert_near(lambdas, torch.einsum("dk,nde,ek->nk", E, truth.per_sample_ggn(), E))


def test_spectral_densities_know_of_negative_eigenvalues() -> None:
    risk, truth = solved("mean and log-variance")
    G = vl.GGN(risk.subset([0, 1, 2]))  # fewer columns than rows
    lowest = G.eigvalsh()[0]
    assert lowest < 0 and G.factor.shape[1] < truth.D
    grid, _ = vl.LanczosSpectrum(G, ncv=5).density()
    assert grid[0] < lowest


def test_of_one_risk_the_parts_do_not_share_columns() -> None:
    """A convex and an indefinite H have one type, and what is kept goes by type."""
    risk, truth = solved("focal")
    x = torch.linspace(-1, 1, truth.D).double()
    expected = truth.J.T @ positive(truth.H) @ truth.J @ x
    for _ in range(3):
        assert_near(vl.GGN(risk, positive_part=True) @ x, expected)
        assert_near(vl.GGN(risk) @ x, truth.G @ x)


def test_saved_and_loaded(tmp_path: Any) -> None:
    risk, truth = solved("focal")
    G = vl.GGN(risk, positive_part=True)
    vl.save(G, tmp_path / "G.pt", risk)
    loaded = vl.load(tmp_path / "G.pt", risk)
    assert_near(loaded.to_dense(), truth.J.T @ positive(truth.H) @ truth.J)


def test_blocks_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are all that is left; nobody can tell whether there is a root."""
    risk, truth = solved("focal")
    monkeypatch.setattr(
        "vivit_linop.curvature.output_space.free_memory", lambda device: 100
    )
    G = vl.GGN(risk)
    few = G.eigh(k=2)
    assert few.route == placing.krylov("G")
    assert_near(few.eigenvalues, torch.linalg.eigvalsh(truth.G)[-2:])
    for use in (G.diagonal, lambda: vl.LossHessian(risk, positive_part=True)):
        with pytest.raises(MemoryError, match="has a block"):
            use()
    assert math.isfinite(float((G @ torch.ones(truth.D).double()).norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_roots_that_are_found_can_be_formed(dtype: torch.dtype) -> None:
    """Cholesky factors and eigenvalues draw the line of rounding alike."""
    Q = torch.linalg.qr(torch.randn(4, 4).double()).Q
    X, y = torch.randn(3, 2).to(dtype), torch.zeros(3, 4, dtype=dtype)
    net = nn.Linear(2, 4).to(dtype)
    found = []
    for lowest in [0.0, *(-(10.0**-k) for k in range(17, 0, -2))]:
        evals = torch.tensor([lowest, 0.0, 1e-3, 1.0], dtype=torch.float64)
        A = ((Q * evals) @ Q.T).to(dtype)

        def quadratic(f: Tensor, y: Tensor, A: Tensor = A) -> Tensor:
            return 0.5 * ((f @ A) * f).sum()

        risk = vl.EmpiricalRisk(net, quadratic, (X, y), reduction="sum")
        G = vl.GGN(risk)
        found.append(G.semidefinite)
        if G.semidefinite:
            S = vl.LossHessian(risk).sqrt().to_dense()
            assert (S @ S.T - vl.LossHessian(risk).to_dense()).abs().max() < 1e-3
        else:
            assert lowest < -10 * torch.finfo(dtype).eps
            with pytest.raises(ValueError, match="is not convex"):
                (G + vl.Identity(G.shape[0])).inv()
    assert found[0] and not found[-1]


SAVED: dict[str, tuple[Callable[[vl.GGN], Any], Callable[[Any], Tensor]]] = {
    "operator": (lambda part: part, lambda loaded: loaded.trace()),
    "Gram operator": (lambda part: part.gram, lambda loaded: loaded.trace()),
    "pairs": (lambda part: part.eigh(), lambda loaded: loaded.eigenvalues.sum()),
}


@pytest.mark.parametrize("name", SAVED)
def test_the_part_that_is_subtracted_is_not_saved(name: str, tmp_path: Any) -> None:
    """It was loaded as all of G; the positive part is loaded as what it is."""
    risk, truth = solved("mean and log-variance")
    of, trace = SAVED[name]
    added, subtracted = vl.GGN(risk).parts
    for part in (subtracted, 2 * subtracted):
        with pytest.raises(TypeError, match="cannot be saved"):
            vl.save(of(part), tmp_path / "part.pt", risk)
    vl.save(of(added), tmp_path / "part.pt", risk)
    expected = (truth.J.T @ positive(truth.H) @ truth.J).trace()
    assert_near(trace(vl.load(tmp_path / "part.pt", risk)), expected)
