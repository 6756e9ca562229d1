"""Inverses, roots and determinants exist where the matrix has them, and in float32."""

import functools
import math

import pytest
import torch
from torch import nn

import vivit_linop as vl
from tests.operator_market import Draw
from tests.verb_cases import FLOAT64, assert_near, every_dtype
from vivit_linop.operators import CorrectedKronecker, LowRank


def eps(dtype):
    return torch.finfo(dtype).eps


# Full rank without damping -----------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (6, 40)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.01, -2.0])
@every_dtype
def test_full_rank_operators_have_inverses(shape, scale, dtype, device):
    V = Draw(FLOAT64, seed=3)(*shape) + 2 * torch.eye(*shape)
    V = V.to(device, dtype)
    G, A = scale * LowRank(vl.Dense(V)), scale * V.double() @ V.double().T
    rtol = 50 * eps(dtype) * torch.linalg.cond(A).item()
    inverse = torch.linalg.inv(A)
    assert_near(G.inv().to_dense(), inverse, rtol)
    b = torch.ones(len(A), dtype=dtype, device=device)
    assert_near(G.solve(b), inverse @ b.double(), rtol)
    assert abs(G.logdet() - torch.linalg.slogdet(A)[1]) <= len(A) * rtol
    assert_near(G.inv().inv().to_dense(), A, rtol)


@every_dtype
def test_inverse_of_a_full_rank_ggn(dtype):
    data = torch.randn(20, 2, dtype=dtype), torch.randn(20, 3, dtype=dtype)
    G = vl.GGN(nn.Linear(2, 3).to(dtype), nn.MSELoss(), data)
    A = G.to_dense().double()
    assert_near(G.inv().to_dense(), torch.linalg.inv(A), 1e3 * eps(dtype))
    root = G.inv().sqrt()
    assert_near((root @ root.T).to_dense(), torch.linalg.inv(A), 1e3 * eps(dtype))


@pytest.mark.parametrize(
    ("values", "dtype", "says"),
    [
        (
            [1.0, 1e-5],
            torch.float32,
            r"condition number is (\d.*e\+|infinite).*float32",
        ),
        ([1.0, 1e-9], FLOAT64, r"condition number is (\d.*e\+|infinite).*float64"),
        ([1.0, 0.0], FLOAT64, "condition number is "),
    ],
)
def test_ill_conditioned_operators_say_so(values, dtype, says):
    V = vl.Dense(torch.diag(torch.tensor(values, dtype=dtype)))
    with pytest.raises(ValueError, match=f"^inv: .* close to it: its {says}"):
        LowRank(V).inv()


def test_low_rank_operators_say_how_singular_they_are():
    V = vl.Dense(torch.ones(7, 2))
    with pytest.raises(ValueError, match=r"^inv: .*is singular: 5 of its eigenvalues"):
        (V @ V.T).inv()


@pytest.mark.parametrize(
    "build",
    [
        lambda A, B: vl.Kronecker(A, B),
        lambda A, B: vl.BlockDiagonal([A, B]),
        lambda A, B: vl.Kronecker(A, torch.eye(2).double(), B),
    ],
    ids=["Kronecker", "blocks", "three"],
)
def test_square_operators_of_rectangular_parts_are_singular(build):
    draw = Draw(FLOAT64)
    op = build(draw(2, 3), draw(3, 2))
    assert torch.linalg.matrix_rank(op.to_dense()) < op.shape[0]
    assert op.logdet() == -math.inf
    with pytest.raises(ValueError, match=r"^inv: .*rectangular.* is singular"):
        op.inv()


# Roots of what is positive semi-definite as a whole ----------------------------------


def roots():
    draw = Draw(FLOAT64)
    S, P, Q = -torch.eye(2).double(), draw.definite(3), draw.definite(2)
    W, A = draw(1, 2), draw(3, 2)
    d = vl.Diagonal(torch.tensor([3.0, -1.0]).double())
    wide = torch.tensor([[2.0, 1.0]]).double()
    tall = torch.tensor([[2.0], [1.0], [0.5]]).double() @ wide
    yield "two negative factors", vl.Kronecker(-P, -Q)
    yield "three factors", vl.Kronecker(-P, Q, S)
    yield "minus a negative", -vl.Kronecker(-P, Q)
    yield "minus two of three", -vl.Kronecker(S, -P, -Q)
    yield "minus an inverse", -vl.Dense(-P).inv()
    yield "mirrored, wide", vl.Dense(wide) @ d @ vl.Dense(wide).T
    yield "mirrored, tall", vl.Dense(tall) @ d @ vl.Dense(tall).T
    yield "mirrored, of one node", (lambda V: V @ d @ V.T)(vl.Dense(tall))
    yield "minus mirrored", -(vl.Dense(A) @ -vl.Diagonal(W[0].abs()) @ vl.Dense(A).T)


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in roots()])
def test_roots(op):
    dense = op.to_dense()
    assert torch.linalg.eigvalsh(dense).min() >= -1e-12 * dense.norm()
    root = op.sqrt()
    assert_near((root @ root.T).to_dense(), dense, 1e-13)


def test_roots_of_what_is_indefinite_are_refused():
    draw = Draw(FLOAT64)
    P, V = draw.definite(3), vl.Dense(draw(4, 3))
    for op in (
        vl.Kronecker(-P, P),
        -vl.Kronecker(P, P),
        V @ vl.Diagonal(torch.tensor([1.0, 1.0, -1.0]).double()) @ V.T,
        -(V @ V.T),
        vl.Dense(-P).inv(),
    ):
        with pytest.raises(ValueError, match=r"^sqrt: .*(eigenvalue -|below 0)"):
            op.sqrt()


# Posteriors --------------------------------------------------------------------------


@functools.cache
def posteriors(dtype):
    return dict(_posteriors(dtype))


def _posteriors(dtype):
    torch.manual_seed(0)
    X, y = torch.rand(40, 5).to(dtype), torch.randint(4, (40,))
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).to(dtype)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    few = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X[:4], y[:4]))
    A = torch.rand(50, 50).to(dtype)
    yield "KFAC", vl.KFAC(risk, variant="exact")
    yield "EKFAC", vl.EKFAC(risk, variant="exact")
    yield "KFAC, empirical", vl.KFAC(risk, variant="empirical")
    yield "blocks, D-side", vl.GGN(risk).block_diagonal("parameter")
    yield "blocks, Gram side", vl.GGN(few).block_diagonal("module")
    yield "GGN, D-side", vl.GGN(risk)
    yield "GGN, Gram side", vl.GGN(few)
    yield "dense", vl.Dense(A @ A.T)
    yield (
        "blocks of dense",
        vl.BlockDiagonal([A @ A.T, vl.Kronecker(A[:3, :3] @ A[:3, :3].T)]),
    )


@pytest.mark.parametrize("name", list(posteriors(FLOAT64)))
@pytest.mark.parametrize("relative", [1.0, 1e-2, 1e-4])
@every_dtype
def test_roots_of_posteriors(name, relative, dtype):
    op, truth = posteriors(dtype)[name], posteriors(FLOAT64)[name]
    A = op.to_dense().double() if "dense" in name else truth.to_dense()
    largest = torch.linalg.eigvalsh(A)[-1].item()
    damping = relative * largest
    S = (op + damping * vl.Identity(len(A))).inv()
    expected = torch.linalg.inv(A + damping * torch.eye(len(A)).to(A))
    root = S.sqrt()
    assert root.torch_dtype == dtype
    assert_near((root @ root.T).to_dense(), expected, 500 * eps(dtype) / relative)


@pytest.mark.parametrize("relative", [1e-5, 1e-6, 1e-7, 1e-9])
@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "KFAC, empirical"])
def test_damped_inverses_in_float32_are_positive_definite_or_refused(name, relative):
    op = posteriors(torch.float32)[name]
    D = op.shape[0]
    damping = relative * op.eigvalsh()[-1].item()
    try:
        inverse = (op + damping * vl.Identity(D)).inv()
    except ValueError as error:
        assert relative < 1e-6 and "below the rounding error" in str(error)
        return
    evals = inverse.eigvalsh()
    assert evals.min() > 0
    X = Draw(torch.float32)(D, 20)
    assert ((X * (inverse @ X)).sum(0) > 0).all()
    inverse.sqrt()  # is one of a positive definite operator


def test_rounding_below_zero_is_no_eigenvalue_of_a_damped_inverse():
    # In float32 the factors of rank one have eigenvalues of about -1e-8.
    draw = Draw(torch.float32, seed=1)
    a, b = draw(6, 1), draw(5, 1)
    K = vl.Kronecker(a @ a.T, b @ b.T)
    C = CorrectedKronecker(K, K.eigenvalues - 1e-8)
    for op in (K, C):
        damped = op + 1e-9 * vl.Identity(30)
        assert damped.inv().eigvalsh().min() > 0
        largest = op.eigvalsh()[-1]
        expected = 29 * math.log(1e-9) + largest.log()
        assert abs(damped.logdet() - expected) <= 0.02 * abs(expected)
    noisy = vl.Dense(torch.diag(torch.tensor([1.0, 0.5, -1e-8])))
    with pytest.raises(ValueError, match=r"^damping: .*below the rounding error"):
        (noisy + 1e-9 * vl.Identity(3)).inv()
    # What is indefinite beyond rounding has an inverse of its own.
    indefinite = vl.Dense(torch.diag(torch.tensor([1.0, 0.5, -0.25])))
    inverse = (indefinite + 0.125 * vl.Identity(3)).inv()
    assert_near(
        inverse.to_dense().diagonal(), torch.tensor([8 / 9, 1.6, -8.0]).double(), 1e-6
    )


@pytest.mark.parametrize("relative", [1e-3, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("name", ["GGN, D-side", "GGN, Gram side", "KFAC", "EKFAC"])
def test_the_error_of_logdet_in_float32_is_bounded_as_said(name, relative):
    op, A = posteriors(torch.float32)[name], posteriors(FLOAT64)[name].to_dense()
    evals = torch.linalg.eigvalsh(A).clamp(min=0)
    damping = relative * evals.max().item()
    logdet = (op + damping * vl.Identity(len(A))).logdet().double()
    expected = (evals + damping).log().sum()
    noise = max(10.0, len(A) ** 0.5) * eps(torch.float32) * evals.max()
    rounding = 10 * eps(torch.float32) * (evals + damping).log().abs().sum()
    assert (logdet - expected).abs() <= noise * (1 / (evals + damping)).sum() + rounding


def test_determinants_by_eigenvalues_need_a_symmetric_operator() -> None:
    """A Kronecker product has no self-adjoint multiple unless it is self-adjoint."""
    A = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
    K = vl.Kronecker(A, A)
    for op in (vl.Identity(4) - K, vl.Identity(4) - 2 * K, 3 * vl.Identity(4) + (-K)):
        with pytest.raises(TypeError, match="logdet: needs a self-adjoint operator"):
            op.logdet()
    S = A @ A.T
    symmetric = vl.Identity(4) - vl.Kronecker(S, S)
    expected = torch.linalg.slogdet(torch.eye(4).double() - torch.kron(S, S)).logabsdet
    assert torch.isclose(symmetric.logdet(), expected, rtol=1e-12)


@pytest.mark.parametrize("sign", [-1.0, -0.5])
def test_negative_multiples_of_products_say_that_symmetry_is_unknown(
    sign: float,
) -> None:
    # −(A⁻¹) (−A) is the identity, which the nodes do not know.
    A = vl.Dense(torch.randn(4, 2).double())
    damped = A @ A.T + 0.5 * vl.Identity(4)
    product = sign * (damped.inv() @ vl.Dense(damped.to_dense()))
    with pytest.raises(TypeError, match=r"^sqrt: .*self-adjoint"):
        product.sqrt()
