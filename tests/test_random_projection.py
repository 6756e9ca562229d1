"""Random projections: one matrix for a seed, and inner products in expectation."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

import vivit_linop as vl
from tests import placing
from tests.cases import dense
from tests.curvature_cases import close, risk

float64 = torch.float64


def by_definition(D: int, k: int, seed: int) -> Tensor:
    """SplitMix64 in Python's integers, a bit an entry."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mixed(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    start, words = mixed((seed + gamma) & mask), -(-k // 64)
    P = torch.empty(k, D, dtype=float64)
    for j in range(D):
        for i in range(k):
            word = mixed((start + (j * words + i // 64) * gamma) & mask)
            P[i, j] = 2 * ((word >> (i % 64)) & 1) - 1
    return P / k**0.5


@pytest.mark.parametrize("D, k, seed", [(5, 3, 0), (4, 64, 1), (3, 130, 2**63 - 1)])
def test_entries(D: int, k: int, seed: int) -> None:
    P = vl.RandomProjection(D, k, seed, device=placing.device())
    assert close(P.to_dense(), by_definition(D, k, seed), 1e-15)


def test_one_seed_is_one_matrix() -> None:
    on = placing.device()
    P = vl.RandomProjection(50, 9, seed=4, device=on)
    matrix, X = P.to_dense(), torch.rand(50, 3, dtype=float64)
    assert close(P @ X, matrix @ X)
    assert close(P.T @ (P @ X), matrix.T @ matrix @ X)
    assert close((P @ X.float()).double(), matrix @ X, 1e-6)
    for twin in (copy.deepcopy(P), pickle.loads(pickle.dumps(P))):
        assert torch.equal(twin.to_dense(), matrix)
    assert not torch.equal(vl.RandomProjection(50, 9, 5, device=on).to_dense(), matrix)
    state = torch.get_rng_state()
    assert P.to_dense().shape == (9, 50)
    assert torch.equal(torch.get_rng_state(), state)


def test_large_ones_are_multiplied_block_by_block() -> None:
    D, k = 300_000, 8
    on = placing.device()
    P, X = vl.RandomProjection(D, k, 4, device=on), torch.rand(D, 2, dtype=float64)
    places = [place for place, _ in P.blocks(float64, P.device)]
    assert len(places) > 1 and places[-1].stop == D
    matrix = P.to_dense()
    # The first columns are those of a small one.
    small = vl.RandomProjection(50, k, 4, device=on)
    assert torch.equal(matrix[:, :50], small.to_dense())
    assert close(P @ X, matrix @ X)
    assert close(P.T @ X[:k], matrix.T @ X[:k])


def test_signs_are_balanced_and_not_correlated() -> None:
    P = vl.RandomProjection(400, 1000, 0, device=placing.device()).to_dense().sign()
    assert (P != 0).all()
    # Means of n signs have a standard error of 1/√n.
    assert P.mean().abs() < 4 / (400_000) ** 0.5
    rows, columns = P @ P.T / 400, P.T @ P / 1000
    for overlaps, n in ((rows, 400), (columns, 1000)):
        off = overlaps - torch.eye(len(overlaps), dtype=float64)
        assert off.abs().max() < 6 / n**0.5
        assert (off.square().mean().sqrt() * n**0.5 - 1).abs() < 0.05
    # Neighbouring seeds have nothing to do with each other.
    other = vl.RandomProjection(400, 1000, seed=1).to_dense().sign()
    assert (P * other).mean().abs() < 4 / (400_000) ** 0.5


@pytest.mark.parametrize("dtype, rtol", [(float64, 1e-12), (torch.float32, 1e-5)])
def test_features_of_gradients(dtype: torch.dtype, rtol: float) -> None:
    of, truth = risk("mlp_ce_mean", dtype), dense("mlp_ce_mean")
    U = vl.PerSampleGradients(of)
    P = vl.RandomProjection(of.num_params, 5, seed=0, device=of.device)
    features = (P @ U).to_dense()
    assert features.dtype == dtype
    assert close(features, P.to_dense() @ truth.U, rtol)


def test_kernels_in_expectation() -> None:
    truth, k = dense("mlp_ce_mean"), 4000
    of = risk("mlp_ce_mean")
    P = vl.RandomProjection(of.num_params, k, seed=0)
    features = (P @ vl.PerSampleGradients(of)).to_dense()
    K = truth.U.T @ truth.U
    norms = K.diagonal().sqrt()
    error = (features.T @ features - K) / torch.outer(norms, norms)
    assert error.abs().max() < 6 * (2 / k) ** 0.5


def test_what_is_refused() -> None:
    for arguments, name in (
        ((0, 1, 0), "D"),
        ((1, 0, 0), "k"),
        ((1, 1, -1), "seed"),
        ((1.5, 1, 0), "D"),
        ((1, True, 0), "k"),
        ((1, 1, 2**63), "seed"),
    ):
        with pytest.raises(ValueError, match=f"{name}: an integer"):
            vl.RandomProjection(*arguments)
