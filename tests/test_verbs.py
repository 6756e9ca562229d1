"""Diagonals, inverses, determinants of the market's operators, against dense ones."""

import math

import numpy as np
import pytest
import torch

import vivit_linop as vl
from tests.operator_market import MARKET, Draw, build
from tests.verb_cases import (
    FLOAT64,
    SQUARE,
    assert_near,
    every_dtype,
    graded,
    on_market,
)
from vivit_linop.operators import LowRank, Woodbury

RECTANGULAR = [name for name in MARKET if name not in SQUARE]
REGULAR = on_market(
    lambda op, dense: op.shape[0] == op.shape[1] and torch.linalg.cond(dense) < 1e6
)

# Nodes for which there is no closed form, though their matrix has what is asked for.
NO_INVERSE = {
    "sum_of_three",
    "sum_symmetric",
    "expression_damped_by_undecided_identity",
    "expression_power",
    "expression_nested",
    "expression_sandwich",
    "product_symmetric",
    "block_diagonal_rectangular_blocks_in_square",
}


NO_LOGDET = {
    # neither self-adjoint nor made of square ones that have one
    "sum_of_three",
    "product_rectangular_factors_in_square",
    "expression_nested",
    "expression_power",
    "expression_damped_by_undecided_identity",
}


def tolerance(dtype, dense=None):
    """Relative to the result; a solution loses as much as the matrix is ill-posed."""
    condition = 1.0 if dense is None else torch.linalg.cond(dense).item()
    return max(100.0, 10.0 * condition) * torch.finfo(dtype).eps


# Diagonals and traces -----------------------------------------------------------------


@pytest.mark.parametrize("name", SQUARE)
@every_dtype
def test_diagonal_and_trace(name, dtype, device):
    op, dense = build(name, dtype, device)
    diagonal, trace = op.diagonal(), op.trace()
    assert diagonal.dtype == trace.dtype == dtype
    assert diagonal.device == trace.device == op.device
    assert trace.ndim == 0
    rtol = 20 * torch.finfo(dtype).eps
    assert (diagonal - dense.diagonal()).norm() <= rtol * dense.norm()
    assert (trace - dense.trace()).abs() <= rtol * len(dense) * dense.norm()
    assert torch.equal(diagonal, vl.linalg.diagonal(op))
    assert torch.equal(trace, vl.linalg.trace(op))


@pytest.mark.parametrize("name", RECTANGULAR)
@pytest.mark.parametrize(
    "verb", ["diagonal", "trace", "inv", "logdet", "eigh", "eigvalsh"]
)
def test_rectangular_operators_have_no(verb, name):
    op, _ = build(name, FLOAT64)
    with pytest.raises(ValueError, match=rf"^{verb}: needs a square operator.*\("):
        getattr(op, verb)()


@pytest.mark.parametrize("name", RECTANGULAR)
def test_rectangular_operators_have_no_solution(name):
    op, _ = build(name, FLOAT64)
    with pytest.raises(ValueError, match=r"^solve: needs a square operator"):
        op.solve(torch.ones(op.shape[0]))


@pytest.mark.parametrize("name", MARKET)
def test_row_norms(name, device):
    op, dense = build(name, FLOAT64, device)
    rows = vl.linalg.row_norms_squared(op)
    torch.testing.assert_close(rows, dense.square().sum(1), rtol=1e-12, atol=1e-12)


# Inverses -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in REGULAR if name not in NO_INVERSE])
@every_dtype
def test_inverse(name, dtype, device):
    op, dense = build(name, dtype, device)
    inverse = op.inv()
    assert inverse.torch_dtype == dtype
    assert inverse.device == op.device
    rtol = tolerance(dtype, dense)
    expected = torch.linalg.inv(dense)
    assert_near(inverse.to_dense(), expected, rtol)
    if dtype == FLOAT64:
        vl.testing.check_operator(inverse, expected, rtol=rtol)

    b = torch.ones(len(dense), dtype=dtype, device=device)
    assert_near(op.solve(b), expected @ b.double(), rtol)
    B = Draw(dtype, device, seed=1)(len(dense), 3)
    assert_near(op.solve(B), expected @ B.double(), rtol)
    numpy_solution = op.solve(B.cpu().numpy())
    assert isinstance(numpy_solution, np.ndarray)
    assert torch.equal(torch.as_tensor(numpy_solution), op.solve(B))


@pytest.mark.parametrize("name", [name for name in REGULAR if name not in NO_INVERSE])
def test_inverse_of_inverse(name):
    op, dense = build(name, FLOAT64)
    again = op.inv().inv()
    assert_near(again.to_dense(), dense, 10 * tolerance(FLOAT64, dense))


@pytest.mark.parametrize("name", [name for name in REGULAR if name in NO_INVERSE])
def test_no_closed_form_of_the_inverse(name):
    op, _ = build(name, FLOAT64)
    with pytest.raises((TypeError, ValueError), match=r"^inv\b.*: "):
        op.inv()


@pytest.mark.parametrize("name", [name for name in SQUARE if name not in REGULAR])
def test_singular_operators_have_no_inverse(name):
    op, _ = build(name, FLOAT64)
    with pytest.raises((TypeError, ValueError), match=r"^inv\b.*: "):
        op.inv()


def test_singular_operators_say_what_to_do():
    singular = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    V = vl.Dense(torch.ones(3, 1))
    for op in (
        vl.Dense(singular),
        vl.Diagonal(torch.tensor([1.0, 0.0])),
        V @ V.T,
        vl.BlockDiagonal([torch.eye(2), singular]),
        vl.Kronecker(torch.eye(2), singular),
    ):
        with pytest.raises(ValueError, match=r"inv: .* singular.*Add damping"):
            op.inv()
    with pytest.raises(ValueError, match="entry 1 is 0"):
        vl.Diagonal(torch.tensor([1.0, 0.0])).inv()
    with pytest.raises(ValueError, match="scaled by 0"):
        (0 * vl.Kronecker(torch.eye(2))).inv()


def test_blocks_of_damped_operators_are_inverted_under_more_damping(device):
    draw = Draw(FLOAT64, device)
    V, A = vl.Dense(draw(4, 2)), draw.regular(2)
    blocks = [V @ V.T + vl.Identity(4), vl.Dense(A), vl.Identity(2)]
    op = vl.BlockDiagonal(blocks) + 0.5 * vl.Identity(8)
    V = V.matrix
    dense = torch.block_diag(V @ V.T + draw.eye(4), A, draw.eye(2)) + 0.5 * draw.eye(8)
    vl.testing.check_operator(op.inv(), torch.linalg.inv(dense))
    assert_near(op.logdet(), torch.linalg.slogdet(dense)[1], 1e-13)


def test_gradients_flow_through_solutions(device):
    op, dense = build("damped_low_rank", FLOAT64, device)
    b = torch.ones(6, dtype=FLOAT64, device=device, requires_grad=True)
    (op.solve(b).square().sum() / 2).backward()
    inverse = torch.linalg.inv(dense)
    assert_near(b.grad, inverse @ inverse @ b.detach(), 1e-12)


# Woodbury -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 8), (12, 12), (9, 30)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("relative", [1e-6, 1e-4, 1e-2, 1.0, 1e3])
def test_woodbury_against_a_dense_solve(shape, scale, relative, device):
    V, dense = graded(*shape, FLOAT64, device)
    G = scale * (V @ V.T)
    A = scale * dense @ dense.T
    damping = relative * torch.linalg.eigvalsh(A)[-1].item()
    A = A + damping * torch.eye(len(A)).to(A)
    inverse = (G + damping * vl.Identity(len(A))).inv()
    assert isinstance(inverse, Woodbury)
    b = Draw(FLOAT64, device, seed=3)(len(A), 2)
    # Within the range of V, the solution is the difference of much larger vectors.
    b[:, 1] = dense[:, 0]
    for column in b.T:
        assert_near(inverse @ column, torch.linalg.solve(A, column), 1e-9)
    assert_near(inverse.logdet(), -torch.linalg.slogdet(A)[1], 1e-9)
    assert_near(inverse.trace(), torch.linalg.inv(A).trace(), 1e-9)
    assert_near(inverse.eigvalsh(), 1 / torch.linalg.eigvalsh(A).flip(0), 1e-9)


@pytest.mark.parametrize("shape", [(40, 8), (12, 12), (9, 30)], ids=str)
@pytest.mark.parametrize("relative", [1e-4, 1e-2, 1.0, 1e3])
def test_woodbury_in_float32_is_as_accurate_as_it_says(shape, relative, device):
    V, dense = graded(*shape, torch.float32, device)
    A = dense @ dense.T
    damping = relative * torch.linalg.eigvalsh(A)[-1].item()
    A = A + damping * torch.eye(len(A)).to(A)
    b = Draw(torch.float32, device, seed=3)(len(A))
    x = (V @ V.T + damping * vl.Identity(len(A))).inv() @ b
    assert x.dtype == torch.float32
    rtol = 10 * torch.finfo(torch.float32).eps * max(1.0, 1 / relative)
    assert_near(x, torch.linalg.solve(A, b.double()), rtol)


@pytest.mark.parametrize("shape", [(5, 2), (2, 5)], ids=str)
@pytest.mark.parametrize("damping", [0.0, -1e-3, -1.0])
def test_damping_must_be_positive(shape, damping):
    V = vl.Dense(torch.ones(shape, dtype=FLOAT64))
    G, unit = V @ V.T, vl.Identity(shape[0])
    with pytest.raises(
        (TypeError, ValueError), match=r"negatively damped|inv: a low-rank"
    ):
        (G + damping * unit).inv()


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan])
def test_woodbury_needs_positive_damping(damping):
    with pytest.raises(ValueError, match=r"^damping: .*damping > 0"):
        Woodbury(LowRank(vl.Dense(torch.ones(3, 1))), damping)


@pytest.mark.host("as LAPACK rounds")
def test_damping_below_the_rounding_error():
    columns = Draw(torch.float32)(6, 1).repeat(1, 3)
    G = vl.Dense(columns) @ vl.Dense(columns).T
    V = vl.Dense(1e10 * columns)
    G = V @ V.T
    with pytest.raises(ValueError, match=r"^damping: .*larger damping"):
        (G + 1e-20 * vl.Identity(6)).inv()


# Log-determinants ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SQUARE if name not in NO_LOGDET])
@every_dtype
def test_logdet(name, dtype, device):
    op, dense = build(name, dtype, device)
    got = op.logdet()
    assert got.ndim == 0
    assert (got.dtype, got.device) == (dtype, op.device)
    if name not in REGULAR:
        # Rounding may leave a singular matrix a determinant.
        assert got < math.log(1e-10)
        return
    expected = torch.linalg.slogdet(dense).logabsdet
    # A relative error of each eigenvalue is an absolute one of its logarithm.
    bound = len(dense) * tolerance(dtype, dense)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("name", sorted(NO_LOGDET))
def test_no_closed_form_of_the_log_determinant(name):
    op, _ = build(name, FLOAT64)
    with pytest.raises((TypeError, ValueError), match=r"^(logdet|eigvalsh|eigh): "):
        op.logdet()


def test_logdet_of_singular_operators_is_minus_infinity():
    V = vl.Dense(torch.ones(3, 1))
    singular = vl.Diagonal(torch.tensor([1.0, 0.0]))
    for op in (
        V @ V.T,
        2 * (V @ V.T),
        singular,
        0 * vl.Kronecker(torch.eye(2)),
        vl.BlockDiagonal([torch.eye(2), singular]),
        vl.Kronecker(torch.eye(2), singular),
    ):
        assert op.logdet() == -math.inf


def test_logdet_of_a_damped_low_rank_operator_does_not_cancel(device):
    # log(1 + 1e-12) is lost in 1 + 1e-12, and D log δ overflows nothing.
    V = vl.Dense(torch.tensor([[1e-6], [0.0]], dtype=FLOAT64, device=device))
    logdet = (V @ V.T + vl.Identity(2)).logdet()
    torch.testing.assert_close(logdet.item(), 1e-12, rtol=1e-10, atol=0)


# Eigenpairs ---------------------------------------------------------------------------


def test_verbs_are_functions_too():
    op, dense = build("damped_low_rank", FLOAT64)
    assert isinstance(vl.linalg.inv(op), Woodbury)
    assert_near(vl.linalg.logdet(op), torch.linalg.slogdet(dense)[1], 1e-13)
    assert_near(vl.linalg.eigvalsh(op), torch.linalg.eigvalsh(dense), 1e-13)
    assert_near(vl.linalg.trace(op), dense.trace(), 1e-13)
    assert_near(vl.linalg.eigh(op, k=1).eigenvalues, op.eigvalsh()[-1:], 1e-13)
    assert_near(vl.linalg.to_dense(op), dense, 1e-13)


@pytest.mark.parametrize(
    "verb",
    ["inv", "logdet", "eigh", "eigvalsh", "trace", "diagonal", "to_dense"],
)
def test_verbs_on_what_is_no_operator(verb):
    with pytest.raises(TypeError, match=rf"^{verb}: .*Tensor"):
        getattr(vl.linalg, verb)(torch.eye(2))
