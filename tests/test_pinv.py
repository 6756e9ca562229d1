"""Moore–Penrose inverses against ``torch.linalg.pinv``."""

import pytest
import torch
from torch import Tensor

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk
from tests.operator_market import MARKET, build
from tests.verb_cases import FLOAT64
from vivit_linop.operators import LowRank

NO_CLOSED_FORM = {
    "sum_symmetric",  # by eigenpairs, which sums have none of
    "product_symmetric",  # its middle is indefinite
    "expression_sandwich",
    "expression_damped_by_undecided_identity",
}


@pytest.mark.parametrize(
    "name", [name for name in MARKET if name not in NO_CLOSED_FORM]
)
def test_on_the_market(name: str) -> None:
    op, matrix = build(name, FLOAT64)
    expected = torch.linalg.pinv(matrix, rtol=1e-12)
    found = op.pinv()
    assert found.shape == op.shape[::-1]
    error = (found.to_dense() - expected).norm()
    assert error <= 1e-8 * expected.norm() * (1 + matrix.norm() * expected.norm())


@pytest.mark.parametrize("dtype, rtol", [(FLOAT64, 1e-8), (torch.float32, 1e-2)])
@pytest.mark.parametrize(
    "name", ["mlp_ce_mean", "more_columns_than_parameters", "repeated_samples"]
)
def test_of_risks(name: str, dtype: torch.dtype, rtol: float) -> None:
    """Of G, of its factor and of J: what is zero but for rounding stays zero."""
    of, truth = risk(name, dtype), dense(name)
    rcond = 1e-5
    for op, matrix, cut in (
        (vl.GGN(of), truth.G, rcond),
        (vl.EmpiricalFisher(of), truth.F, rcond),
        (vl.Jacobian(of), truth.J, rcond**0.5),
        (vl.PerSampleGradients(of), truth.U, rcond**0.5),
    ):
        found = op.pinv(rcond=cut).to_dense()
        expected = torch.linalg.pinv(matrix, rtol=cut)
        assert close(found, expected, rtol), type(op)
    assert isinstance(vl.GGN(of).pinv(), LowRank)


def test_least_norm_solution() -> None:
    truth = dense("mlp_ce_mean")
    J = vl.Jacobian(risk("mlp_ce_mean"))
    assert truth.J.shape[0] < truth.J.shape[1]
    b = torch.linspace(-1, 1, len(truth.J), dtype=FLOAT64)
    expected = torch.linalg.pinv(truth.J) @ b
    assert close(J.pinv() @ b, expected, 1e-8)


@pytest.mark.parametrize(
    "op",
    [
        0.0 * vl.Dense(torch.eye(3)),
        vl.Diagonal(torch.zeros(3)),
        LowRank(vl.Dense(torch.zeros(3, 2))),
        vl.Dense(torch.zeros(3, 3)),
    ],
    ids=["scaled", "diagonal", "low rank", "dense"],
)
def test_of_zero(op: vl.TorchLinearOperator) -> None:
    assert torch.equal(op.pinv().to_dense(), torch.zeros(3, 3))


def test_rcond() -> None:
    entries = torch.tensor([1.0, 1e-3, -1e-5])

    def kept(op: vl.TorchLinearOperator, rcond: float | None) -> int:
        matrix: Tensor = op.pinv(rcond=rcond).to_dense()
        return int(torch.linalg.matrix_rank(matrix, hermitian=True, rtol=1e-12))

    for op in (vl.Diagonal(entries), vl.Dense(torch.diag(entries))):
        assert [kept(op, rcond) for rcond in (None, 1e-4, 1e-2)] == [3, 2, 1]
    for bad in (-1.0, 1.0):
        with pytest.raises(ValueError, match="rcond: a number in"):
            vl.Identity(3).pinv(rcond=bad)
    with pytest.raises(TypeError, match=r"pinv|eigh"):
        build("product_symmetric", FLOAT64)[0].pinv()
