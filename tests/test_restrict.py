"""Principal submatrices: their nodes, their values, and those of inverses."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk
from tests.operator_market import build
from tests.verb_cases import FLOAT64, SQUARE, assert_near
from vivit_linop.operators import (
    Damped,
    LowRank,
    Restricted,
    Rows,
    Sandwich,
    Woodbury,
    verbs,
)

NAMES = ["mlp_ce_mean", "more_columns_than_parameters", "repeated_samples"]


def some_of(n: int) -> Tensor:
    return torch.tensor(sorted({n - 1, 0, n // 2}, reverse=True))


def shuffled(n: int, k: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k]


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SQUARE)
def test_on_the_market(name: str, dtype: torch.dtype) -> None:
    op, matrix = build(name, dtype)
    index = some_of(len(matrix))
    part, expected = op.restrict(index), matrix[index][:, index]
    rtol = 1e-10 if dtype == FLOAT64 else 1e-3
    assert part.torch_dtype == op.torch_dtype
    assert_near(part.to_dense(), expected, rtol)
    x = torch.linspace(1, 2, len(index), dtype=dtype)
    size = matrix.norm() * x.norm()
    assert (part @ x - expected @ x.double()).norm() <= rtol * size
    assert (part.T @ x - expected.T @ x.double()).norm() <= rtol * size
    assert (part.diagonal() - expected.diagonal()).norm() <= rtol * matrix.norm()


def test_types() -> None:
    of = risk("mlp_ce_mean")
    G, D = vl.GGN(of), of.num_params
    index, I = shuffled(D, 7), vl.Identity(D)
    assert type(G.restrict(index)) is LowRank
    assert type((G + 0.1 * I).restrict(index)) is Damped
    assert type((G + 0.1 * I).restrict(index).inv()) is Woodbury
    marginal = (G + 0.1 * I).inv().restrict(index)
    assert type(marginal) is Restricted
    assert type(marginal.inv()) is Damped
    assert type(marginal.inv().inv()) is Woodbury
    K = vl.KFAC(of).restrict(index)
    assert isinstance(K, vl.BlockDiagonal)
    assert marginal.restrict([1, 0]).operator is marginal.operator


@pytest.mark.parametrize("dtype, rtol", [(FLOAT64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 10, "most"])
def test_subnetworks(name: str, k: int | str, dtype: torch.dtype, rtol: float) -> None:
    """Others fixed: the part of G. Others integrated out: the part of its inverse."""
    of, G = risk(name, dtype), dense(name).G
    D = len(G)
    index, I = shuffled(D, D - 2 if k == "most" else k), vl.Identity(D)
    damped = G + 0.1 * torch.eye(D, dtype=FLOAT64)
    part = vl.GGN(of).restrict(index)
    expected = G[index][:, index]
    assert close(part.to_dense(), expected, rtol)
    assert close(part.trace(), expected.trace(), rtol)
    count = min(part.factor.shape)
    evals = torch.linalg.eigvalsh(expected)[-count:]
    assert close(part.eigvalsh(), evals, rtol)
    A = vl.GGN(of) + 0.1 * I
    fixed = torch.linalg.inv(damped[index][:, index])
    assert close(A.restrict(index).inv().to_dense(), fixed, rtol)
    marginal, expected = A.inv().restrict(index), torch.linalg.inv(damped)
    expected = expected[index][:, index]
    assert close(marginal.to_dense(), expected, rtol)
    assert close(marginal.inv().to_dense(), torch.linalg.inv(expected), rtol)
    assert close(marginal.inv().inv().to_dense(), expected, rtol)
    logdet = torch.logdet(expected)
    assert (marginal.logdet() - logdet).abs() <= rtol * max(1.0, logdet.abs().item())
    R = marginal.sqrt().to_dense().double()
    assert close(R @ R.T, expected, rtol)


@pytest.mark.parametrize("variant", [vl.KFAC, vl.EKFAC])
def test_of_kronecker_factors(variant: Callable[..., vl.BlockDiagonal]) -> None:
    of = risk("mlp_ce_mean")
    D = of.num_params
    K = variant(of, variant="exact")
    index, matrix = shuffled(D, 12), K.to_dense() + torch.eye(D, dtype=FLOAT64)
    S = (K + vl.Identity(D)).inv().restrict(index)
    expected = torch.linalg.inv(matrix)[index][:, index]
    assert close(S.to_dense(), expected, 1e-10)
    assert close(S.inv().to_dense(), torch.linalg.inv(expected), 1e-9)
    assert close(K.restrict(index).to_dense(), K.to_dense()[index][:, index], 1e-10)


def test_rounds_of_pruning() -> None:
    """Restricting step by step is restricting at once."""
    of, D = risk("mlp_ce_mean"), risk("mlp_ce_mean").num_params
    A = vl.GGN(of) + 0.1 * vl.Identity(D)
    kept, S = torch.arange(D), A.inv()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(kept), generator=generator)[: len(kept) - 4]
        kept = kept[index]
        # What is left out is pruned: the others' curvature, and its inverse.
        S = S.inv().restrict(index).inv()
    expected = dense("mlp_ce_mean").G + 0.1 * torch.eye(D, dtype=FLOAT64)
    expected = torch.linalg.inv(expected[kept][:, kept])
    assert close(S.to_dense(), expected, 1e-10)


@pytest.mark.parametrize("dtype, rtol", [(FLOAT64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize("name", ["mlp_ce_mean", "cnn"])
def test_influence_in_a_subnetwork(
    name: str, dtype: torch.dtype, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the small side: the rows of V and U are not formed, if some are left out."""
    of, truth = risk(name, dtype), dense(name)
    index = shuffled(truth.D, truth.D // 2)
    U = Rows(vl.PerSampleGradients(of), index)
    J = Rows(vl.Jacobian(of).T, index)
    S = (vl.GGN(of).restrict(index) + 0.1 * vl.Identity(len(index))).inv()
    assert isinstance(S, Woodbury)
    matrix = truth.G[index][:, index] + 0.1 * torch.eye(len(index), dtype=FLOAT64)
    inverse, rows = torch.linalg.inv(matrix), truth.U[index]
    if truth.N * S.operator.factor.operator.width < len(index):
        assert type(U.T @ S @ U) is Sandwich
        monkeypatch.setattr(Rows, "to_dense", None)
    assert close(vl.influence(U, S, U), rows.T @ inverse @ rows, rtol)
    assert close(vl.self_influence(S, U), (rows * (inverse @ rows)).sum(0), rtol)
    outputs = truth.J[:, index]
    covariance = (J.T @ S @ J).diagonal()
    assert close(covariance, (outputs @ inverse * outputs).sum(1), rtol)
    squares = verbs.column_norms_squared(U)
    assert close(squares, rows.square().sum(0), rtol)


def test_rows_of_different_kinds() -> None:
    of, truth = risk("mlp_ce_mean"), dense("mlp_ce_mean")
    index, other = shuffled(truth.D, 9), torch.arange(9)
    U, J = vl.PerSampleGradients(of), vl.Jacobian(of).T
    left, right = Rows(U, index), Rows(J, other)
    expected = truth.U[index].T @ truth.J.T[other]
    assert close(verbs.gram_matrix(left, right), expected)
    weights = torch.linspace(0.5, 1.0, 9, dtype=FLOAT64)
    expected = truth.U[index].T @ (weights[:, None] * truth.U[index])
    assert close(verbs.weighted_gram_matrix(left, left, weights), expected)
    blocks = verbs.gram_blocks(left, left, 1, weights).flatten()
    assert close(blocks, expected.diagonal())
    dense_factor = vl.Dense(torch.rand(9, 2, dtype=FLOAT64))
    expected = truth.U[index].T @ dense_factor.matrix
    assert close(verbs.gram_matrix(left, dense_factor), expected)
    assert close(verbs.gram_matrix(dense_factor, left), expected.T)


def test_kinds_of_indices() -> None:
    A = torch.rand(5, 5)
    op, expected = vl.Dense(A), A[[1, 3]][:, [1, 3]]
    mask = torch.tensor([False, True, False, True, False])
    for index in ([1, 3], torch.tensor([1, 3]), np.array([1, 3]), mask, mask.numpy()):
        assert torch.equal(op.restrict(index).to_dense(), expected)
    assert torch.equal(op.restrict(range(1, 4, 2)).to_dense(), expected)
    for bad, match in (
        ([], "at least one"),
        ([[0]], "one axis"),
        ([0, 5], r"must lie in 0\.\.4"),
        ([-1], r"must lie in 0\.\.4"),
        ([1, 1], "listed twice"),
        (mask[:4], "a mask has 5 entries"),
        (~mask & mask, "False everywhere"),
    ):
        with pytest.raises(ValueError, match=f"index: .*{match}"):
            op.restrict(torch.tensor(bad) if isinstance(bad, list) else bad)
    with pytest.raises(TypeError, match="index: integers or a boolean"):
        op.restrict([0.0, 1.0])
    with pytest.raises(ValueError, match="restrict: needs a square"):
        vl.Dense(torch.rand(2, 3)).restrict([0])
