"""``A.solve`` by iteration: right to the residual that is asked for, or an error."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import dense
from tests.curvature_cases import risk
from tests.operator_market import build
from tests.verb_cases import FLOAT64, SQUARE
from vivit_linop.linalg import IterativeInverse
from vivit_linop.operators import Sum, verbs

# Unsymmetric and without structure: GMRES takes as many steps as there are rows.
REGULAR = [
    name
    for name in SQUARE
    if name != "more_columns_than_a_chunk"
    and torch.linalg.cond(build(name, FLOAT64)[1]) < 1e6
]


@pytest.mark.parametrize("dtype, rtol", [(FLOAT64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", REGULAR)
def test_on_the_market(name: str, dtype: torch.dtype, rtol: float) -> None:
    op, matrix = build(name, dtype)
    B = torch.linspace(-1, 1, 2 * len(matrix), dtype=dtype).view(-1, 2).cos()
    X = op.solve(B, rtol=rtol)
    assert X.dtype == dtype
    residual = (matrix @ X.double() - B.double()).norm(dim=0)
    assert (residual <= 5 * rtol * B.double().norm(dim=0)).all()


def indefinite(of: vl.EmpiricalRisk, shift: float) -> vl.TorchLinearOperator:
    return vl.Hessian(of) + shift * vl.Identity(of.num_params)


@pytest.mark.parametrize("dtype, rtol", [(FLOAT64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", ["definite", "indefinite", "sum of two risks"])
def test_hessians_and_sums(kind: str, dtype: torch.dtype, rtol: float) -> None:
    of, truth = risk("mlp_ce_mean", dtype), dense("mlp_ce_mean")
    evals = torch.linalg.eigvalsh(truth.hessian)
    unit = torch.eye(truth.D, dtype=FLOAT64)
    if kind == "sum of two risks":
        half = of.subset(range(of.num_samples // 2))
        op = Sum(vl.Hessian(of), vl.GGN(half)) + 0.5 * vl.Identity(truth.D)
        part = truth.per_sample_ggn()[: of.num_samples // 2].mean(0)
        matrix = truth.hessian + part + 0.5 * unit
    else:
        # The shift lies in a gap between negative and positive eigenvalues.
        shift = 0.1 - evals[0].item() if kind == "definite" else 0.05
        op, matrix = indefinite(of, shift), truth.hessian + shift * unit
        assert (torch.linalg.eigvalsh(matrix)[0] > 0) == (kind == "definite")
    b = torch.linspace(-1, 1, truth.D, dtype=dtype)
    x = op.solve(b, rtol=rtol)
    residual = (matrix @ x.double() - b.double()).norm()
    assert residual <= 5 * rtol * b.norm()
    # Without a closed form it iterates by itself, and says so.
    by_default = verbs.solver(op)
    assert isinstance(by_default, IterativeInverse)
    assert by_default.self_adjoint
    x = op.solve(b)
    assert (matrix @ x.double() - b.double()).norm() <= 1e-3 * b.norm()


def test_closed_forms_come_first() -> None:
    of = risk("mlp_ce_mean")
    A = vl.GGN(of) + 0.1 * vl.Identity(of.num_params)
    b = torch.ones(of.num_params, dtype=FLOAT64)
    assert torch.equal(A.solve(b), A.inv() @ b)
    assert not isinstance(verbs.solver(A), IterativeInverse)
    assert isinstance(verbs.solver(A, rtol=1e-3), IterativeInverse)


DIFFERENCES = {
    "G - tau I": lambda G, eye: G - 0.03 * eye,
    "I - tau G": lambda G, eye: eye - 2.0 * G,
    "tau I - G": lambda G, eye: 0.03 * eye - G,
    "G / 2 - tau I": lambda G, eye: G / 2 - 0.03 * eye,
}


@pytest.mark.parametrize("dtype, rtol", [(FLOAT64, 1e-7), (torch.float32, 1e-3)])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_less_than_a_multiple_of_the_identity(
    name: str, dtype: torch.dtype, rtol: float
) -> None:
    """Indefinite, and regular: no closed form, but a solution."""
    of, truth = risk("mlp_ce_mean", dtype), dense("mlp_ce_mean")
    op = DIFFERENCES[name](vl.GGN(of), vl.Identity(truth.D))
    A = DIFFERENCES[name](truth.G, torch.eye(truth.D, dtype=FLOAT64))
    assert torch.linalg.cond(A) < 1e4
    b = torch.linspace(-1, 1, truth.D, dtype=dtype).cos()
    found = op.solve(b).double()
    assert (A @ found - b.double()).norm() <= rtol * b.double().norm()
    with pytest.raises(TypeError, match=r"^inv: no closed form for a negatively"):
        op.inv()


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32])
@pytest.mark.parametrize("size", [1e-25, 1e-8, 1.0, 1e25])
@pytest.mark.parametrize("length", [1e-25, 1.0, 1e10])
@pytest.mark.parametrize("kind", ["indefinite", "definite", "unsymmetric"])
def test_iterations_know_no_units(
    kind: str, length: float, size: float, dtype: torch.dtype
) -> None:
    if not 1e-30 < length / size < 1e30 and dtype == torch.float32:
        pytest.skip("the solution is no number of that precision")
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=FLOAT64)
    unit = torch.eye(6, dtype=FLOAT64)
    A = {
        "indefinite": A + A.T,
        "definite": A @ A.T + unit,
        "unsymmetric": A + 3 * unit,
    }[kind]

    class Product(vl.TorchLinearOperator):
        self_adjoint = kind != "unsymmetric"

        def _multiply(self, X: Tensor) -> Tensor:
            return (size * A).to(dtype) @ X

    b = torch.linspace(1, 2, 6, dtype=FLOAT64)
    found = Product((6, 6), dtype).solve((length * b).to(dtype)).double()
    exact = torch.linalg.solve(A, b)
    error = found / length * size - exact
    assert error.norm() <= 1e2 * torch.finfo(dtype).eps ** 0.5 * exact.norm()


def test_operators_that_take_the_dtype_of_a_vector() -> None:
    """The residual is one that its precision reaches."""
    op = vl.RandomProjection(3, 3, seed=3) + vl.Identity(3)
    for dtype, rtol in ((FLOAT64, 1e-7), (torch.float32, 1e-6)):
        b = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
        found = op.solve(b)
        assert found.dtype == dtype
        residual = op.to_dense() @ found.double() - b.double()
        assert residual.norm() <= rtol * b.norm()


def test_preconditioners() -> None:
    """The exact inverse as M needs next to no products."""
    D = 60
    evals = torch.logspace(0, 4, D, dtype=FLOAT64)
    products: list[int] = []

    class Counting(vl.TorchLinearOperator):
        self_adjoint = True

        def _multiply(self, X: torch.Tensor) -> torch.Tensor:
            products.append(X.shape[1])
            return evals[:, None] * X

    op, b = Counting((D, D), FLOAT64, evals.device), torch.ones(D, dtype=FLOAT64)
    assert torch.allclose(op.solve(b, rtol=1e-8), b / evals, rtol=1e-3)
    without = len(products)
    products.clear()
    M = vl.Diagonal(1 / evals)
    assert torch.allclose(op.solve(b, rtol=1e-8, M=M), b / evals, rtol=1e-3)
    assert len(products) < 5 < without


def test_right_hand_sides() -> None:
    op, matrix = build("sum_of_three", FLOAT64)
    b = torch.linspace(1, 2, len(matrix), dtype=FLOAT64)
    x = torch.linalg.solve(matrix, b)
    for given in (b.numpy(), b.view(-1, 1).repeat(1, 2).numpy()):
        found = op.solve(given, rtol=1e-10)
        assert isinstance(found, np.ndarray)
        expected = x.view(-1, *[1] * (given.ndim - 1)).expand(given.shape)
        assert np.allclose(found, expected)
    assert torch.equal(op.solve(0 * b), 0 * b)
    leaf = b.clone().requires_grad_()
    (slope,) = torch.autograd.grad(op.solve(leaf, rtol=1e-11).sum(), leaf)
    assert torch.allclose(slope, torch.linalg.solve(matrix.T, torch.ones_like(b)))


def test_what_is_refused() -> None:
    op, matrix = build("sum_of_three", FLOAT64)
    b = torch.ones(len(matrix), dtype=FLOAT64)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="rtol: a positive"):
            op.solve(b, rtol=bad)
    with pytest.raises(ValueError, match="M: an approximation"):
        op.solve(b, M=vl.Identity(2))
    with pytest.raises(ValueError, match="solve: needs a square"):
        vl.Dense(torch.rand(2, 3)).solve(torch.ones(2))
    # There is no solution.
    singular = Sum(vl.Diagonal(torch.tensor([1.0, 0.0])), vl.Dense(torch.zeros(2, 2)))
    with pytest.raises(ArithmeticError, match="solve: a relative residual"):
        singular.solve(torch.ones(2))
    # Gradients would not reach a scale.
    factor = torch.tensor(1.0, dtype=FLOAT64, requires_grad=True)
    D = risk("mlp_ce_mean").num_params
    damped = factor * vl.Hessian(risk("mlp_ce_mean")) + vl.Identity(D)
    for rtol in (None, 1e-3):
        with pytest.raises(TypeError, match=r"solve: .* requires grad"):
            damped.solve(torch.ones(D, dtype=FLOAT64), rtol=rtol)


# Singular but for rounding -----------------------------------------------------------


def of_rank(n: int, rank: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, rank, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32])
@pytest.mark.parametrize("n, rank", [(2, 1), (3, 2), (24, 7), (24, 23), (100, 99)])
def test_rounding_does_not_make_a_matrix_regular(
    n: int, rank: int, dtype: torch.dtype
) -> None:
    for seed in range(5):
        a, b = of_rank(n, rank, dtype, seed), of_rank(n, rank, dtype, seed + 9)
        regular = vl.Dense(torch.eye(2, dtype=dtype))
        for op in (
            vl.Dense(a @ a.T),
            vl.Dense(a @ b.T),
            vl.Kronecker(regular, vl.Dense(a @ a.T)),
            vl.BlockDiagonal([regular, vl.Dense(a @ b.T)]),
        ):
            with pytest.raises(ValueError, match=r"^inv: the matrix is singular"):
                op.inv()
            with pytest.raises(ValueError, match=r"^inv: the matrix is singular"):
                op.solve(torch.ones(op.shape[0], dtype=dtype))


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32])
def test_units_of_rows_and_columns_are_no_rounding(dtype: torch.dtype) -> None:
    n = 12
    units = torch.logspace(-9, 9, n, dtype=dtype)
    core = torch.eye(n, dtype=dtype) + 0.05 * of_rank(n, n, dtype)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    for left, right in ((units, units), (units, units[order]), (units, 1 / units)):
        matrix = left[:, None] * core * right
        inverse = torch.linalg.inv(core.double()) / left.double()
        found = vl.Dense(matrix).inv().to_dense() * right[:, None]
        scaled = found.double() * left.double()
        expected = inverse * left.double()
        assert (scaled - expected).norm() <= 1e3 * torch.finfo(dtype).eps * n


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32])
@pytest.mark.parametrize("variant", ["exact", "empirical"])
@pytest.mark.parametrize("kind", [vl.KFAC, vl.EKFAC])
def test_kronecker_factors_of_a_softmax_are_singular(
    kind: type[vl.KFAC], variant: str, dtype: torch.dtype
) -> None:
    """Logits may all be shifted: nothing is known of the last layer along that."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).to(dtype)
    data = torch.randn(8, 3, dtype=dtype), torch.randint(3, (8,))
    approximation = kind(net, nn.CrossEntropyLoss(), data, variant=variant)
    with pytest.raises(ValueError, match=r"^inv: the .* is singular.*Add damping"):
        approximation.inv()
    D = approximation.shape[0]
    damped = approximation + 0.1 * vl.Identity(D)
    shift = 0.1 * torch.eye(D, dtype=FLOAT64)
    exact = torch.linalg.inv(approximation.to_dense().double() + shift)
    error = damped.inv().to_dense().double() - exact
    assert error.norm() <= 1e4 * torch.finfo(dtype).eps * exact.norm()
