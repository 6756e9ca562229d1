"""Sandwiches with Kronecker factors: in the structure of the layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.curvature_cases import close, risk
from tests.refusals import refuse_products
from vivit_linop.curvature.block_sandwich import BlockSandwich
from vivit_linop.operators import CorrectedKronecker, Kronecker, Product

float64 = torch.float64

Inverse = Callable[[vl.EmpiricalRisk], vl.TorchLinearOperator]


def damped(of: vl.EmpiricalRisk, K: vl.TorchLinearOperator) -> vl.TorchLinearOperator:
    return (K + 0.1 * vl.Identity(of.num_params)).inv()


INVERSES: dict[str, Inverse] = {
    "kfac": lambda of: damped(of, vl.KFAC(of, variant="exact")),
    "ekfac": lambda of: damped(of, vl.EKFAC(of, variant="exact")),
    "pi-damped": lambda of: vl.KFAC(of, variant="exact").pi_damped(0.1).inv(),
    "scaled": lambda of: 3 * vl.KFAC(of, variant="exact").pi_damped(0.1).inv(),
    "a number a parameter": lambda of: vl.posterior_precision(
        of, vl.KFAC(of, variant="exact"), torch.linspace(1, 2, len(of.sizes))
    ).inv(),
    "diagonals": lambda of: vl.BlockDiagonal(
        [vl.Diagonal(torch.linspace(1, 2, n, dtype=float64)) for n in of.sizes]
    ),
    "reduce": lambda of: damped(
        of, vl.KFAC(of, variant="exact", weight_sharing="reduce")
    ),
}


@pytest.mark.parametrize("name", ["mlp_ce_mean", "cnn"])
@pytest.mark.parametrize("kind", INVERSES)
def test_columns_are_rotated_not_multiplied(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = risk(name)
    S = INVERSES[kind](of)
    J, U = vl.Jacobian(of), vl.PerSampleGradients(of)
    rows, columns, matrix = J.to_dense(), U.to_dense(), S.to_dense()
    refuse_products(monkeypatch, CorrectedKronecker)
    if name == "mlp_ce_mean":
        refuse_products(monkeypatch, Kronecker)
    for op, expected in (
        (J @ S @ J.T, rows @ matrix @ rows.T),
        (U.T @ S @ U, columns.T @ matrix @ columns),
        (J @ S @ U, rows @ matrix @ columns),
    ):
        assert type(op) is BlockSandwich
        assert close(op.to_dense(), expected, 1e-10)
        if op.shape[0] == op.shape[1] and op.self_adjoint:
            assert close(op.diagonal(), expected.diagonal(), 1e-10)
            assert torch.equal(op.T.to_dense(), op.to_dense())
        else:
            assert close(op.T.to_dense(), expected.T, 1e-10)
    blocks = vl.linalg.diagonal_blocks(J @ S @ J.T, of.num_outputs)
    whole = (rows @ matrix @ rows.T).unflatten(0, (-1, of.num_outputs))
    whole = whole.unflatten(2, (-1, of.num_outputs)).diagonal(dim1=0, dim2=2)
    assert close(blocks, whole.permute(2, 0, 1), 1e-10)


def test_products_with_vectors() -> None:
    of = risk("mlp_ce_mean")
    S, J = INVERSES["kfac"](of), vl.Jacobian(of)
    x = torch.linspace(-1, 1, J.shape[0], dtype=float64)
    assert close((J @ S @ J.T) @ x, J @ (S @ (J.T @ x)), 1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda of: damped(of, vl.KFAC(of, variant="exact", joint_bias=True)),
        lambda of: damped(of, vl.GGN(of).block_diagonal("module")),
        lambda of: damped(of, vl.GGN(of).block_diagonal("parameter")),
        lambda of: -1.0 * damped(of, vl.KFAC(of, variant="exact")),
    ],
    ids=["joint bias", "modules", "low-rank blocks", "negative"],
)
def test_what_has_no_such_roots_is_multiplied(make: Inverse) -> None:
    of = risk("mlp_ce_mean")
    S, U = make(of), vl.PerSampleGradients(of)
    op, columns = U.T @ S @ U, U.to_dense()
    assert isinstance(op, Product)
    expected = columns.T @ S.to_dense() @ columns
    assert close(op.to_dense(), expected, 1e-10)
    assert close(op.diagonal(), expected.diagonal(), 1e-10)


def test_layers_of_other_kinds() -> None:
    """Embeddings, tied weights, transposed convolutions, several positions."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4, dtype=float64)
            self.mix = nn.Linear(4, 4, dtype=float64)
            self.up = nn.ConvTranspose1d(4, 3, 2, dtype=float64)

        def forward(self, x: Tensor) -> Tensor:
            z = self.mix(self.mix(self.embedding(x)).tanh())
            return self.up(z.mT).flatten(1)

    X, y = torch.randint(7, (5, 3)), torch.randn(5, 12, dtype=float64)
    of = vl.EmpiricalRisk(Net(), nn.MSELoss(), [(X[:2], y[:2]), (X[2:], y[2:])])
    for kind in ("kfac", "ekfac"):
        S, J = INVERSES[kind](of), vl.Jacobian(of)
        rows = J.to_dense()
        expected = rows @ S.to_dense() @ rows.T
        assert close((J @ S @ J.T).to_dense(), expected, 1e-10)
        variances = vl.predictive_covariance(J, S, diagonal=True)
        assert close(variances.flatten(), expected.diagonal(), 1e-10)
