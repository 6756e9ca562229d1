"""Low-rank operators of any factor, and what they keep of it."""

import gc
import weakref

import pytest
import torch

import vivit_linop as vl
from tests.operator_market import Draw
from vivit_linop.linalg import decompositions
from vivit_linop.operators import Centered, Gram, LowRank, symmetric

# Gram operators of factors, and who keeps them ----------------------------------------


class Counted(vl.TorchLinearOperator):
    """A factor whose attribute of that name is no Gram operator of its own."""

    def __init__(self, matrix):
        self.matrix, self.gram = matrix, Gram(vl.Dense(matrix.T), vl.Dense(matrix.T))
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)

    def _multiply(self, X):
        return self.matrix @ X

    def _multiply_adjoint(self, X):
        return self.matrix.T @ X


def factors_with_a_gram_of_their_own():
    draw = Draw(torch.float64)
    V, W = draw(4, 6), draw(6, 3)
    tall, wide = LowRank(vl.Dense(W)), LowRank(vl.Dense(V.T))
    yield "of tall", tall, W @ W.T
    yield "of wide", wide, V.T @ V
    yield "of scaled", 3 * tall, 3 * W @ W.T
    yield "of low-rank of low-rank", LowRank(tall), W @ W.T @ W @ W.T
    yield "of Gram", Gram(vl.Dense(V), vl.Dense(V)), V.T @ V
    yield "of a user's", Counted(W), W
    yield "of centered", Centered(tall), W @ W.T @ (torch.eye(6).to(W) - 1 / 6)


@pytest.mark.parametrize(
    ("factor", "F"),
    [
        pytest.param(*case[1:], id=case[0])
        for case in factors_with_a_gram_of_their_own()
    ],
)
def test_low_rank_of_any_factor(factor, F):
    G, A = LowRank(factor, 0.5), 0.5 * F @ F.T
    unit, eye = vl.Identity(6), torch.eye(6).to(A)
    torch.testing.assert_close(G.gram.to_dense(), F.T @ F)
    vl.testing.check_operator(G, A)
    evals = torch.linalg.eigvalsh(A)
    torch.testing.assert_close(G.eigvalsh(), evals[-len(G.eigvalsh()) :])
    vl.testing.check_operator((G + unit).inv(), torch.linalg.inv(A + eye))
    torch.testing.assert_close((G + unit).logdet(), torch.logdet(A + eye))
    root = (G + unit).sqrt()
    torch.testing.assert_close((root @ root.T).to_dense(), A + eye)


def test_memory_comes_back_without_the_collector():
    data = torch.rand(8, 4).double(), torch.rand(8, 3).double()
    risk = vl.EmpiricalRisk(torch.nn.Linear(4, 3).double(), torch.nn.MSELoss(), data)
    draw = Draw(torch.float64)
    makers = {
        "KhatriRao": lambda: vl.KhatriRao(draw(4, 3), draw(5, 3)),
        "Dense": lambda: vl.Dense(draw(9, 3)),
        "GGN's factor": lambda: vl.GGNFactor(risk),
        "gradients": lambda: vl.PerSampleGradients(risk),
    }
    collects = gc.isenabled()
    gc.disable()
    try:
        for name, make in makers.items():
            V = make()
            G = V @ V.T
            damped = G + 0.1 * vl.Identity(V.shape[0])
            pairs = G.eigh(k=2)
            kept = [V, G, (V.T @ V), damped.inv(), damped.sqrt(), pairs]
            kept[3].logdet(), kept[2].matrix, pairs.eigenvectors, damped.eigh(k=1)
            alive = [weakref.ref(thing) for thing in kept]
            alive.append(weakref.ref(G.gram.matrix))
            del V, G, damped, pairs, kept
            assert [ref() for ref in alive] == [None] * len(alive), name
    finally:
        if collects:
            gc.enable()


# What LAPACK can do -------------------------------------------------------------------


@pytest.mark.host("LAPACK is the CPU's")
def test_matrices_too_large_for_one_of_lapacks_routines(monkeypatch):
    draw = Draw(torch.float64)
    A = draw.symmetric(9)
    expected = torch.linalg.eigh(A)

    def fails(matrix):
        raise AssertionError("the routine whose workspace overflows")

    monkeypatch.setattr(symmetric, "SYEVD_ROWS", 8)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    evals, evecs = vl.Dense(A).eigh()
    torch.testing.assert_close(evals, expected.eigenvalues)
    torch.testing.assert_close(A @ evecs, evals * evecs)
    V = vl.Dense(draw(20, 9))
    pairs = (V @ V.T).eigh(k=9)
    residual = (V @ V.T) @ pairs.eigenvectors - pairs.eigenvalues * pairs.eigenvectors
    assert residual.norm() <= 1e-12 * pairs.eigenvalues.max()
    root = (V @ V.T + vl.Identity(20)).sqrt()
    dense = V.matrix @ V.matrix.T + torch.eye(20).to(A)
    torch.testing.assert_close((root @ root.T).to_dense(), dense)


@pytest.mark.host("LAPACK is the CPU's")
def test_matrices_too_large_for_lapack(monkeypatch):
    A = vl.Dense(Draw(torch.float64).symmetric(9))
    monkeypatch.setattr(symmetric, "SYEVD_ROWS", 7)
    monkeypatch.setattr(symmetric, "LAPACK_ROWS", 8)
    for few in ("_VERY_FEW_ROWS", "_FEW_ROWS"):
        monkeypatch.setattr(symmetric, few, 0)
    for verb in (A.eigh, A.eigvalsh, vl.Kronecker(A).eigh, (A @ A.T).eigvalsh):
        with pytest.raises(MemoryError, match=r"eigh: a matrix of 9 rows.*k="):
            verb()
    with pytest.raises(MemoryError, match=r"eigsh\(op, k\)"):
        decompositions.largest_eigenpairs(A.matrix, 2)
