"""Operators side by side: what becomes of them, and factors of several risks."""

import pytest
import torch
from torch import Tensor

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk
from vivit_linop.operators import Gram, HStack, LowRank, Woodbury, verbs

float64 = torch.float64


def two_factors(dtype: torch.dtype) -> tuple[vl.GGNFactor, vl.Jacobian, Tensor]:
    """V of one risk and Jᵀ of another one, and [V Jᵀ]."""
    of, truth = risk("mlp_ce_mean", dtype), dense("mlp_ce_mean")
    V, J = vl.GGNFactor(of), vl.Jacobian(of)
    return V, J, torch.cat([V.to_dense().double(), truth.J.T], dim=1)


def test_one_part_is_itself() -> None:
    A = vl.Dense(torch.eye(3))
    assert vl.hstack([A]) is A
    assert vl.vstack([A]) is A


def test_types() -> None:
    A, B = torch.rand(4, 2), torch.rand(4, 3)
    W = vl.hstack([A, B])
    assert type(W) is HStack
    assert type(W @ W.T) is LowRank
    assert type(W.T @ W) is Gram
    assert type((W @ W.T + vl.Identity(4)).inv()) is Woodbury
    R = vl.vstack([A.T, B.T])
    assert type(R.T) is HStack
    assert type(R.T @ R) is LowRank


@pytest.mark.parametrize("dtype, rtol", [(float64, 1e-12), (torch.float32, 1e-5)])
def test_factors_of_risks(dtype: torch.dtype, rtol: float) -> None:
    V, J, truth = two_factors(dtype)
    W = vl.hstack([V, J.T])
    G = W @ W.T
    expected = truth @ truth.T
    assert close(G.to_dense(), expected, rtol)
    assert close(G.diagonal(), expected.diagonal(), rtol)
    assert close(G.gram.to_dense(), truth.T @ truth, rtol)
    count = min(W.shape)
    evals = torch.linalg.eigvalsh(expected)[-count:]
    assert close(G.eigvalsh(), evals, 10 * rtol)
    x = torch.linspace(-1.0, 1.0, len(expected), dtype=dtype)
    assert close(G @ x, expected @ x.double(), rtol)
    damped = expected + torch.eye(len(expected), dtype=float64)
    solved = (G + vl.Identity(len(expected))).solve(x)
    assert close(solved, torch.linalg.solve(damped, x.double()), 100 * rtol)


def test_cross_gram_of_stacks() -> None:
    V, J, truth = two_factors(float64)
    of = risk("mlp_ce_mean")
    U = vl.PerSampleGradients(of)
    left, right = vl.hstack([V, J.T]), vl.hstack([J.T, U])
    expected = truth.T @ torch.cat([truth[:, V.shape[1] :], U.to_dense()], dim=1)
    assert close(verbs.gram_matrix(left, right), expected)
    assert close((left.T @ right).to_dense(), expected)
    assert close((left.T @ U).to_dense(), truth.T @ U.to_dense())


def test_gram_matrix_takes_those_that_factors_keep() -> None:
    V, J, _ = two_factors(float64)
    K = V.gram.matrix
    assert V.gram.known
    W = vl.hstack([V, J.T])
    assert torch.equal((W.T @ W).to_dense()[: len(K), : len(K)], K)


@pytest.mark.parametrize("name", ["mlp_ce_mean", "uneven_batches", "cnn"])
def test_pieces_of_columns(name: str) -> None:
    """They are all columns, in order, whole samples of pullbacks."""
    of = risk(name)
    U, J = vl.PerSampleGradients(of), vl.Jacobian(of)
    A = torch.rand(3, of.num_params, dtype=float64)
    for op in (U, J.T, J, 2 * J.T, vl.Dense(A) @ J.T, vl.hstack([U, J.T])):
        end, parts = 0, []
        for place, columns in verbs.column_pieces(op):
            assert place.start == end
            assert columns.shape == (op.shape[0], place.stop - place.start)
            end = place.stop
            parts.append(columns)
        assert end == op.shape[1]
        assert close(torch.cat(parts, dim=1), op @ torch.eye(end, dtype=float64))
    for place, _ in verbs.column_pieces(J.T):
        assert place.start % of.num_outputs == place.stop % of.num_outputs == 0


@pytest.mark.parametrize("stack", [vl.hstack, vl.vstack])
def test_what_does_not_fit(stack) -> None:
    with pytest.raises(ValueError, match="parts: at least one"):
        stack([])
    with pytest.raises(ValueError, match=r"parts: .*\(2, 3\)"):
        stack([torch.rand(2, 3), torch.rand(4, 5)])
    with pytest.raises(TypeError, match="parts: a list"):
        stack(torch.rand(2, 3))
