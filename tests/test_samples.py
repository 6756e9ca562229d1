"""Samples of N(0, A): mean zero, covariance A, reproducible."""

from collections.abc import Callable

import pytest
import torch

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import risk

float64, MANY = torch.float64, 1_000

POSTERIORS: dict[str, Callable[[vl.EmpiricalRisk], vl.TorchLinearOperator]] = {
    "ggn": lambda of: (vl.GGN(of) + 0.1 * vl.Identity(of.num_params)).inv(),
    "kfac": lambda of: vl.posterior_precision(of, vl.KFAC(of), 2.0).inv(),
    "ekfac": lambda of: vl.posterior_precision(of, vl.EKFAC(of), 2.0).inv(),
    "diagonal": lambda of: vl.Diagonal(vl.GGN(of).diagonal() + 0.5).inv(),
    "blocks": lambda of: (
        vl.GGN(of).block_diagonal("module") + 0.3 * vl.Identity(of.num_params)
    ).inv(),
    "prior by parameter": lambda of: vl.posterior_precision(
        of, vl.KFAC(of), torch.linspace(1.0, 3.0, len(of.sizes))
    ).inv(),
    "prior": lambda of: 0.5 * vl.Identity(of.num_params, of.dtype, of.device),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", POSTERIORS)
def test_mean_and_covariance(name: str, dtype: torch.dtype) -> None:
    S = POSTERIORS[name](risk("mlp_ce_mean", dtype))
    samples = S.sample(MANY, generator())
    assert samples.dtype == dtype
    R, truth = S.sqrt().to_dense().double(), S.to_dense().double()
    assert (R @ R.T - truth).norm() < (
        1e-10 if dtype == float64 else 1e-4
    ) * truth.norm()
    # What is left after whitening has unit covariance, to errors of about 1/√MANY.
    root = torch.linalg.cholesky(S.to_dense().double())
    white = torch.linalg.solve_triangular(root, samples.double(), upper=False)
    found = white @ white.T / MANY
    error = 6 / MANY**0.5
    assert (found - torch.eye(len(found))).abs().max() < error * 2**0.5
    assert white.mean(1).abs().max() < error


@pytest.mark.parametrize("name", ["ggn", "kfac"])
def test_more_columns_than_parameters(name: str) -> None:
    of = risk("more_columns_than_parameters")
    truth = dense("more_columns_than_parameters")
    assert truth.N * truth.C > truth.D
    S = POSTERIORS[name](of)
    samples = S.sample(MANY, generator())
    white = torch.linalg.solve(torch.linalg.cholesky(S.to_dense()), samples)
    found = white @ white.T / MANY
    assert (found - torch.eye(len(found))).abs().max() < 6 * (2 / MANY) ** 0.5


def test_generators() -> None:
    S = POSTERIORS["ggn"](risk("mlp_ce_mean"))
    first = S.sample(3, generator(1))
    assert torch.equal(S.sample(3, generator(1)), first)
    assert not torch.equal(S.sample(3, generator(2)), first)
    torch.manual_seed(5)
    default = S.sample(3)
    state = torch.get_rng_state()
    S.sample(3, generator())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(S.sample(3), default)


def test_roots_of_inverses_in_float32() -> None:
    X = torch.randn(40, 12, generator=generator())
    A = X.T @ X / 40 + 0.1 * torch.eye(12)
    R = vl.Dense(A).inv().sqrt().to_dense().double()
    expected = torch.linalg.inv(A.double())
    assert (R @ R.T - expected).norm() < 1e-5 * expected.norm()


def test_what_is_refused() -> None:
    of = risk("mlp_ce_mean")
    S = POSTERIORS["ggn"](of)
    for bad in (0, -1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match=r"^num: "):
            S.sample(bad)
    with pytest.raises(ValueError, match="sample: needs a square"):
        vl.Dense(torch.rand(2, 3)).sample(1)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        vl.Diagonal(torch.tensor([1.0, -1.0])).sample(1)
    with pytest.raises(TypeError, match="sqrt: no closed form"):
        vl.Hessian(of).sample(1)
    # An eigenvalue that rounding has made negative is no reason for a wrong root.
    A = torch.diag(torch.tensor([1.0, -1e-8]))
    with pytest.raises(ValueError, match="0 but for rounding"):
        vl.Dense(A).inv().sqrt()
    with pytest.raises(ValueError, match="is not positive semi-definite"):
        vl.Dense(torch.diag(torch.tensor([1.0, -1.0]))).inv().sqrt()
