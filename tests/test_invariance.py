"""Batches, memory and ways of computing do not change what an operator is."""

import pytest
import torch

import vivit_linop as vl
from tests.cases import NAMES, dense, problem
from tests.curvature_cases import (
    blocks_of,
    build,
    check_products,
    close,
    fresh,
    risk_of,
)

# What an operator must not depend on --------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["mlp_ce_mean", "mlp_bce_weighted", "poisson", "tokens", "attention", "cnn"],
)
def test_batches_do_not_matter(name: str) -> None:
    whole = problem(name)
    N = dense(name).N
    truth = dense(name)
    for sizes in ([1] * N, [N - 1, 1]):
        of = risk_of(whole.rebatched(*sizes))
        assert of.batch_sizes == sizes
        assert close(of.value(), truth.value) and close(of.gradient(), truth.gradient)
        for symbol in ("J", "H", "G", "U", "F", "Hess"):
            check_products(*build(symbol, of, name), 1e-12)
        V = vl.GGNFactor(of)
        gram, expected = V.T @ V, truth.J.T @ V.output.to_dense()
        assert close(gram.to_dense(), expected.T @ expected)


@pytest.mark.parametrize(
    "name",
    ["uneven_batches", "mapping_input", "tuple_input_in_batches", "cnn", "tokens"],
)
@pytest.mark.parametrize("memory", [0, 3000])
def test_memory_does_not_matter(name: str, memory: int) -> None:
    # 0 keeps nothing; with a little, some is kept and Gram matrices come in pieces.
    of, truth = fresh(name, memory=memory), dense(name)
    for symbol in ("J", "G", "U", "Hess"):
        op, matrix = build(symbol, of, name)
        x = torch.randn(matrix.shape[1], 2, generator=torch.Generator().manual_seed(4))
        x = x.double()
        assert close(op @ x, matrix @ x, scale=matrix.norm() * x.norm())
        assert close(op @ x, matrix @ x, scale=matrix.norm() * x.norm())
    V, U = vl.GGNFactor(of), vl.PerSampleGradients(of)
    dense_V = truth.J.T @ V.output.to_dense()
    assert close((V.T @ V).to_dense(), dense_V.T @ dense_V)
    cross = truth.U.T @ dense_V
    assert close((U.T @ V).to_dense(), cross, scale=truth.U.norm() * dense_V.norm())
    assert close(V.to_dense(), dense_V)
    assert close(vl.GGN(of).diagonal(), truth.G.diagonal(), scale=truth.G.norm())
    assert close(vl.GGN(of).to_dense(), truth.G)
    groups = [[i] for i in range(len(of.params))]
    blocks = blocks_of(truth.G, of.sizes, groups)
    for block, matrix in zip(
        vl.GGN(of).block_diagonal("parameter").blocks, blocks, strict=True
    ):
        evals = block.eigvalsh()
        expected = torch.linalg.eigvalsh(matrix)[-len(evals) :]
        assert (evals - expected).abs().max() <= 1e-12 * truth.G.norm()


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    # Larger problems are multiplied some columns at a time.
    for place in (
        "linalg.reductions.CHUNK",
        "devices._CPU_COLUMN_BYTES",
    ):
        monkeypatch.setattr(f"vivit_linop.{place}", 7)
    for name in ("mlp_ce_mean", "control_flow", "uneven_batches"):
        of, truth = fresh(name), dense(name)
        for symbol in ("J", "G", "V", "U", "Hess", "H"):
            op, matrix = build(symbol, of, name)
            check_products(op, matrix, 1e-12)
            assert close(op.to_dense(), matrix)
        diagonal = vl.Hessian(of).diagonal()
        assert close(diagonal, truth.hessian.diagonal(), scale=truth.hessian.norm())


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_different_sizes(name: str) -> None:
    """The same numbers however the data are cut, the divisor of a mean too."""
    case, truth = problem(name).joined(), dense(name)
    x = torch.randn(truth.D, generator=torch.Generator().manual_seed(6)).double()
    # The mask of attention is as long as three samples would be.
    first = 2 if name == "attention" else 1
    # By turns the smaller part comes first and last.
    parts = [first, truth.N - first][:: 1 if NAMES.index(name) % 2 else -1]
    of = risk_of(case.rebatched(*(n for n in parts if n)), memory=0)
    assert close(of.value(), truth.value, 1e-10, 1.0 + truth.value.abs())
    assert close(of.gradient(), truth.gradient, 1e-10, 1.0)
    J, H = vl.Jacobian(of), vl.LossHessian(of)
    product = J.T @ (H @ (J @ x))
    assert close(product, truth.G @ x, 1e-10, truth.G.norm() * x.norm())
