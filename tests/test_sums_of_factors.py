"""Sums of low-rank nodes: V Vᵀ + W Wᵀ = [V W][V W]ᵀ, over the data of several risks."""

import pytest
import torch

import vivit_linop as vl
from tests.composition_cases import EPS, close, risks
from tests.operator_market import Draw
from vivit_linop.curvature import column_sums
from vivit_linop.operators import HStack, LowRank, Sandwich, Woodbury

FLOAT64 = torch.float64


def check(op, matrix, dtype):
    """Spectrum, inverse, roots and determinant of a sum."""
    D, unit = len(matrix), vl.Identity(len(matrix))
    assert isinstance(op, LowRank) and isinstance(op.factor, HStack)
    vl.testing.check_operator(op, matrix.to(dtype))
    evals = torch.linalg.eigvalsh(matrix)
    found = op.eigvalsh()
    close(found, evals[-len(found) :], dtype)
    for k in (1, 3):
        pairs = op.eigh(k=k)
        close(pairs.eigenvalues, evals[-k:], dtype)
        close(op @ pairs.eigenvectors, pairs.eigenvectors.double() * evals[-k:], dtype)
    close(op.diagonal(), matrix.diagonal(), dtype)
    close(op.trace(), matrix.trace(), dtype)
    damped = matrix + 0.1 * torch.eye(D).double()
    close((op + 0.1 * unit).inv().to_dense(), torch.linalg.inv(damped), dtype)
    close((op + 0.1 * unit).logdet(), torch.logdet(damped), dtype)
    close(
        (op + 0.1 * unit).inv().diagonal(), torch.linalg.inv(damped).diagonal(), dtype
    )
    root = (op + 0.1 * unit).sqrt().to_dense().double()
    close((root @ root.T).to(dtype), damped, dtype)
    p = 0.1 + torch.rand(D, dtype=dtype)
    damped = matrix + p.double().diag()
    close((op + vl.Diagonal(p)).inv().to_dense(), torch.linalg.inv(damped), dtype)


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("kind", ["tall", "wide", "tied"])
def test_sums_over_risks(kind, dtype):
    train, test = risks(kind, dtype)
    G, H = vl.GGN(train), vl.GGN(test)
    V, W = (vl.GGNFactor(risk).to_dense().double() for risk in (train, test))
    check(G + H, V @ V.T + W @ W.T, dtype)
    check(2 * G + 0.5 * H, 2 * V @ V.T + 0.5 * W @ W.T, dtype)
    U = vl.PerSampleGradients(train).to_dense().double()
    check(vl.EmpiricalFisher(train) + 3 * G, U @ U.T / 7 + 3 * V @ V.T, dtype)


def test_sums_of_three_and_of_other_nodes():
    draw = Draw(FLOAT64)
    A, B, C = draw(20, 3), draw(20, 4), draw(20, 2)
    nodes = [V @ V.T for V in map(vl.Dense, (A, B, C))]
    for op in (sum(nodes), 0 + nodes[0] + (nodes[1] + nodes[2])):
        assert [part.shape[1] for part in op.factor.parts] == [3, 4, 2]
        check(op, A @ A.T + B @ B.T + C @ C.T, FLOAT64)
    twice = nodes[0] + nodes[1] + nodes[0]
    check(twice, 2 * A @ A.T + B @ B.T, FLOAT64)
    # What has no factor is summed as it is.
    difference = nodes[0] - nodes[1]
    assert not isinstance(difference, LowRank)
    close(difference.to_dense(), A @ A.T - B @ B.T, FLOAT64)


def test_gram_matrices_that_are_known_are_used_again(monkeypatch):
    train, test = risks("tall", FLOAT64)
    G, H = vl.GGN(train), vl.GGN(test)
    known = G.gram.to_dense(), H.gram.to_dense()
    made = []
    monkeypatch.setattr(column_sums, "GramTotal", lambda *_: made.append(_))
    K = (G + 2 * H).gram.to_dense()
    assert not made
    n = len(known[0])
    torch.testing.assert_close(K[:n, :n], known[0])
    torch.testing.assert_close(K[n:, n:], 2 * known[1])
    cross = (G.factor.T @ H.factor).to_dense()
    torch.testing.assert_close(K[:n, n:], 2**0.5 * cross)


def test_sandwiches_of_sums():
    train, test = risks("tall", FLOAT64)
    G, H, J = vl.GGN(train), vl.GGN(test), vl.Jacobian(test)
    dense = (G + H).to_dense() + 0.1 * torch.eye(G.shape[0]).double()
    S = (G + 2 * H + 0.1 * vl.Identity(G.shape[0])).inv()
    truth = torch.linalg.inv(dense + H.to_dense())
    assert isinstance(S, Woodbury)
    rows = J.to_dense()
    op, expected = J @ S @ J.T, rows @ truth @ rows.T
    assert isinstance(op, Sandwich)
    close(op.to_dense(), expected, FLOAT64)
    close(op.diagonal(), expected.diagonal(), FLOAT64)
    both = vl.hstack([vl.PerSampleGradients(test), 2 * vl.PerSampleGradients(train)])
    columns = both.to_dense()
    op, expected = both.T @ S @ both, columns.T @ truth @ columns
    assert isinstance(op, Sandwich)
    close(op.to_dense(), expected, FLOAT64)
    close(op.diagonal(), expected.diagonal(), FLOAT64)


def test_ways_to_eigenpairs_of_sums():
    """The plan adds up what the parts cost."""
    train, test = risks("tall", FLOAT64)
    G = vl.GGN(train) + vl.GGN(test)
    expected = torch.linalg.eigvalsh(G.to_dense())[-2:]
    for route in ("dense Gram", "ARPACK on K", "ARPACK on G"):
        pairs = G.eigh(k=2, route=route)
        assert pairs.route == route
        close(pairs.eigenvalues, expected, FLOAT64)
    choice = G.explain(k=2)
    assert choice.chosen.name in {route.name for route in choice.routes}


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_sums_of_full_rank_have_inverses_without_damping(dtype):
    draw = Draw(FLOAT64)
    A, B = torch.linalg.qr(draw(8, 8)).Q[:, :5], torch.linalg.qr(draw(8, 8)).Q[:, :6]
    V, W = vl.Dense(A.to(dtype)), vl.Dense(B.to(dtype))
    matrix = A @ A.T + 2 * B @ B.T
    assert torch.linalg.cond(matrix) < 1e3
    op = V @ V.T + 2 * (W @ W.T)
    close(op.inv().to_dense(), torch.linalg.inv(matrix), dtype)
    close(op.logdet(), torch.logdet(matrix), dtype)
    with pytest.raises(ValueError, match="singular"):
        (V @ V.T + 2 * (V @ V.T)).inv()
