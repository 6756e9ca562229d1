"""Estimated traces: unbiased, with honest error bars. (Diagonals: test_quantities.)"""

import pytest
import torch

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import risk


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_traces_are_within_their_error_bars(dtype: torch.dtype) -> None:
    H, expected = vl.Hessian(risk("mlp_ce_mean", dtype)), dense("mlp_ce_mean").hessian
    off_diagonal = expected - torch.diag(expected.diagonal())
    variance = 2 * off_diagonal.square().sum()
    covered = 0
    for seed in range(20):
        trace, error = vl.estimate_trace(H, 60, seed=seed)
        assert trace.dtype == error.dtype == dtype
        assert 0.5 < error / (variance / 60) ** 0.5 < 2
        covered += int((trace - expected.trace()).abs() < 2 * error)
    assert covered >= 17
    assert (trace - expected.trace()).abs() < 4 * error


def test_a_diagonal_operator_has_no_error() -> None:
    trace, error = vl.estimate_trace(vl.Diagonal(torch.arange(10.0)), 300)
    assert trace == 45.0
    assert error == 0.0


def test_seeds() -> None:
    A = vl.Dense(torch.randn(6, 6))
    state = torch.get_rng_state()
    first = vl.estimate_trace(A, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == vl.estimate_trace(A, 5, seed=1)
    assert first != vl.estimate_trace(A, 5, seed=2)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="num_products: at least 2"):
        vl.estimate_trace(vl.Identity(3), 1)
    with pytest.raises(ValueError, match="op: must be square"):
        vl.estimate_trace(vl.Dense(torch.rand(2, 3)), 5)
