"""Kronecker-factored curvature and a diagonal with a number for each entry."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from vivit_linop.linalg import IterativeInverse, eigen
from vivit_linop.linalg.iterative import preconditioner
from vivit_linop.operators import rules

FLOAT64 = torch.float64


def risk_of(dtype: torch.dtype = FLOAT64) -> vl.EmpiricalRisk:
    torch.manual_seed(0)
    X, y = torch.rand(30, 5).to(dtype), torch.randint(3, (30,))
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))


def curvatures(of: vl.EmpiricalRisk) -> dict[str, Any]:
    K, E = vl.KFAC(of, variant="exact"), vl.EKFAC(of, variant="exact")
    return {"KFAC": K, "EKFAC": E, "multiple": 30 * K, "damped": E + vl.Identity(57)}


def prior(dtype: torch.dtype = FLOAT64) -> Tensor:
    return torch.linspace(0.1, 3.0, 57, dtype=dtype)


def matrix(name: str) -> Tensor:
    return curvatures(risk_of())[name].to_dense() + torch.diag(prior())


NAMES = ["KFAC", "EKFAC", "multiple", "damped"]


@pytest.fixture
def only_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, and all of them together, are too large to be matrices."""
    for module in (rules, eigen):
        monkeypatch.setattr(module, "DENSE_ROWS", 0)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("name", NAMES)
def test_small_blocks_are_matrices(name: str, dtype: torch.dtype) -> None:
    K, p, A = curvatures(risk_of(dtype))[name], prior(dtype), matrix(name)
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    for S in (K + vl.Diagonal(p), vl.Diagonal(p) + K):
        assert isinstance(S, vl.BlockDiagonal) or isinstance(
            S.operator, vl.BlockDiagonal
        )
        inverse, R = S.inv(), S.inv().sqrt()
        for got, expected in [
            (S.to_dense(), A),
            (inverse.to_dense(), torch.linalg.inv(A)),
            ((R @ R.T).to_dense(), torch.linalg.inv(A)),
            (S.logdet(), torch.logdet(A)),
            (S.eigvalsh(), torch.linalg.eigvalsh(A)),
        ]:
            assert (got.double() - expected).norm() <= rtol * expected.norm()


@pytest.mark.usefixtures("only_large")
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("name", NAMES)
def test_large_ones_are_solved_with_by_iteration(name: str, dtype: torch.dtype) -> None:
    S = curvatures(risk_of(dtype))[name] + vl.Diagonal(prior(dtype))
    b = torch.arange(114, dtype=dtype).cos().view(57, 2)
    A = matrix(name)
    for rtol in (None, 1e-5):
        x = S.solve(b, rtol=rtol).double()
        residual = (A @ x - b.double()).norm(dim=0)
        assert (residual <= 1e-3 * b.double().norm(dim=0)).all()
    exact = torch.linalg.solve(A, b.double())
    assert (x - exact).norm() <= 1e-3 * exact.norm()


class Counted(vl.TorchLinearOperator):
    """An operator that counts its products."""

    self_adjoint = True

    def __init__(self, operator: vl.TorchLinearOperator) -> None:
        self.operator, self.count = operator, 0
        super().__init__(operator.shape, operator.torch_dtype, operator.device)

    def _multiply(self, X: Tensor) -> Tensor:
        self.count += 1
        return self.operator.apply(X)


@pytest.mark.usefixtures("only_large")
def test_the_factors_are_the_preconditioner() -> None:
    """It makes few steps of many: the condition is that of the prior."""
    generator = torch.Generator().manual_seed(0)
    A, B = (
        vl.Dense(Q @ torch.diag(torch.logspace(0, -4, n, dtype=FLOAT64)) @ Q.T)
        for n in (9, 8)
        for Q in [torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q]
    )
    S = 1e4 * vl.Kronecker(A, B) + vl.Diagonal(torch.linspace(1, 3, 72, dtype=FLOAT64))
    M = preconditioner(S)
    assert M is not None
    b, steps = torch.ones(72, dtype=FLOAT64), []
    for given in (M, vl.Identity(72)):
        counted = Counted(S)
        x = IterativeInverse(counted, 1e-8, given) @ b
        assert (S @ x - b).norm() <= 1e-8 * b.norm()
        steps.append(counted.count)
    assert steps[0] <= 20 and 2 * steps[0] < steps[1]
    # Nothing to begin with: no diagonal, none that is positive, no closed form beside.
    negative = vl.Diagonal(torch.full((72,), -1.0, dtype=FLOAT64))
    assert preconditioner(vl.Kronecker(A, B)) is None
    assert preconditioner(vl.Kronecker(A, B) + negative) is None
    assert preconditioner(Counted(S) - negative) is None


@pytest.mark.usefixtures("only_large")
@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_what_needs_a_closed_form_says_what_to_do(name: str) -> None:
    of = risk_of()
    K = curvatures(of)[name]
    S = K + vl.Diagonal(prior())
    for verb in ("inv", "logdet", "sqrt", "eigvalsh"):
        with pytest.raises(TypeError, match=f"^(inv|sqrt|eigh|{verb}): no closed form"):
            getattr(S, verb)()
    message = r"prior_precision: no closed-form determinant .* take vl\.GGN\(risk\)"
    with pytest.raises(TypeError, match=message):
        vl.log_marginal_likelihood(of, K, prior())
    value = vl.log_marginal_likelihood(of, vl.GGN(of), prior())
    assert value.isfinite()


def test_derivatives_go_around_an_iteration() -> None:
    """Of (H + δ I)⁻¹ b, in δ and in b, for a Hessian without a closed form."""
    of = risk_of()
    H, b = vl.Hessian(of), of.gradient().clone().requires_grad_()
    delta = torch.tensor(0.7, dtype=FLOAT64, requires_grad=True)
    x = (H + delta * vl.Identity(57)).solve(b, rtol=1e-12)
    got = torch.autograd.grad(x.square().sum(), [delta, b])
    dense, unit = H.to_dense(), torch.eye(57, dtype=FLOAT64)
    exact = torch.linalg.solve(dense + delta * unit, b)
    expected = torch.autograd.grad(exact.square().sum(), [delta, b])
    torch.testing.assert_close(x, exact)
    torch.testing.assert_close(got, expected)
    with pytest.raises(TypeError, match=r"solve: a tensor of this .* requires grad"):
        (delta * H).solve(b, rtol=1e-6)
