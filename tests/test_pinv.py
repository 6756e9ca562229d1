"""Moore–Penrose inverses against ``torch.linalg.pinv``."""

import pytest
import torch
from torch import Tensor

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import close, risk
from tests.operator_market import MARKET, Draw, build
from tests.verb_cases import FLOAT64
from vivit_linop.operators import LowRank

NO_CLOSED_FORM = {
    "sum_symmetric",  # by eigenpairs, which sums have none of
    "product_symmetric",  # its middle is indefinite
    "expression_sandwich",
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


def test_eigenvalues_of_all_other_vectors_count() -> None:
    """I − P and its kin: singular, and not zero where V knows nothing."""
    draw, unit = Draw(FLOAT64), vl.Identity(6)
    Q = vl.Dense(torch.linalg.qr(draw(6, 2)).Q)
    P, skew = Q @ Q.T, vl.Dense(draw(6, 6)) @ vl.Dense(draw(6, 2)) @ Q.T
    two = vl.BlockDiagonal([unit - P, 3.0 * unit - P])
    for op in (
        unit - P,
        0.5 * P - 0.5 * unit,
        vl.BlockDiagonal([unit - P, torch.eye(2).double()]),
        two + 1.0 * vl.Identity(12),
        two - 1.0 * vl.Identity(12),
        skew - 0.0 * unit,
        vl.Kronecker(unit - P, draw.definite(2)),
    ):
        expected = torch.linalg.pinv(op.to_dense(), rtol=1e-8)
        for rcond in (None, 1e-6):
            assert close(op.pinv(rcond).to_dense(), expected, 1e-10)


def test_a_damping_that_makes_singular_has_derivatives() -> None:
    Q = torch.linalg.qr(Draw(FLOAT64)(6, 2)).Q
    delta = torch.tensor(1.0, dtype=FLOAT64, requires_grad=True)
    P = vl.Dense(Q) @ vl.Dense(Q).T
    found = (delta * vl.Identity(6) - P).pinv(rcond=1e-6)
    (slope,) = torch.autograd.grad(found.trace(), delta)
    assert close(slope, torch.tensor(-4.0, dtype=FLOAT64), 1e-10)


def test_rounding_is_that_of_the_least_precise_part() -> None:
    draw = Draw(FLOAT64)
    A, B, C = draw(5, 2), draw(2, 2).float(), draw(2, 5)
    V = vl.KhatriRao(A[:1], A) @ vl.Dense(B) @ vl.Dense(C.float())
    matrix = (A[:1] * A) @ B.double() @ C.float().double()
    for op, dense_op in (
        (V, matrix),
        (V.T, matrix.T),
        (LowRank(V), matrix @ matrix.T),
        (LowRank(V.T), matrix.T @ matrix),
    ):
        assert op.torch_dtype == FLOAT64
        found = op.pinv().to_dense()
        assert close(found, torch.linalg.pinv(dense_op, rtol=1e-4), 1e-3)


def test_what_is_cut_may_be_less_than_squares_know() -> None:
    """In float32 singular values of 1e-3 and zeros have the same squares."""
    draw = Draw(torch.float32)
    values = torch.tensor([1.0, 1e-3, 0.0])
    left, right = (torch.linalg.qr(draw(n, 3)).Q for n in (6, 4))
    for op in (
        vl.Dense(left) @ vl.Diagonal(values) @ vl.Dense(right.T),
        vl.hstack([left * values, 0.0 * left[:, :1]]),
    ):
        expected = torch.linalg.pinv(op.to_dense().double(), rtol=1e-5)
        assert close(op.pinv(rcond=1e-5).to_dense().double(), expected, 1e-2)
