"""Damping by a diagonal: priors by layer or by entry, c V Vᵀ + P and its inverse."""

import itertools
import math

import pytest
import torch

import vivit_linop as vl
from tests.composition_cases import EPS, close, risks
from tests.operator_market import Draw
from tests.pairs import in_turn
from tests.refusals import refuse_products
from vivit_linop.curvature import column_sums
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.net.columns.base import DenseColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.stacked import StackedColumns
from vivit_linop.net.columns.tables import TableColumns
from vivit_linop.net.columns.weighted import WeightedKhatriRao, weighted
from vivit_linop.operators import (
    DenseInverse,
    DiagonallyDamped,
    DiagonalWoodbury,
    LowRank,
    Product,
    Sandwich,
    WeightedRows,
)

FLOAT64 = torch.float64


def by_layer(risk):
    numbers = 0.1 + torch.rand(len(risk.sizes), dtype=risk.dtype)
    return numbers.repeat_interleave(torch.tensor(risk.sizes))


def by_entry(risk):
    return 0.1 + torch.rand(risk.num_params, dtype=risk.dtype)


def by_output(risk):
    """One number for each row of a weight and each entry of a bias."""
    parts = [0.1 + torch.rand(len(p), dtype=p.dtype) for p in risk.params.values()]
    each = [p.numel() // len(p) for p in risk.params.values()]
    return torch.cat([p.repeat_interleave(n) for p, n in zip(parts, each, strict=True)])


PRIORS = {f.__name__: f for f in (by_layer, by_entry, by_output)}
CASES = [
    *(("tall", prior, dtype) for prior, dtype in in_turn(PRIORS, EPS)),
    *((kind, "by_entry", FLOAT64) for kind in ("wide", "convolution", "tied")),
    *((kind, "by_layer", FLOAT64) for kind in ("wide", "convolution", "tied")),
    ("convolution", "by_output", FLOAT64),
]


@pytest.mark.parametrize(("kind", "prior", "dtype"), CASES)
def test_verbs_against_dense_matrices(kind, prior, dtype):
    train, test = risks(kind, dtype)
    G, p = vl.GGN(train), PRIORS[prior](train)
    V = vl.GGNFactor(train).to_dense().double()
    dense = V @ V.T + p.double().diag()
    truth = torch.linalg.inv(dense)
    A = G + vl.Diagonal(p)
    assert type(A) is DiagonallyDamped
    S = A.inv()
    assert isinstance(S, DenseInverse if kind == "wide" else DiagonalWoodbury)
    vl.testing.check_operator(S, truth.to(dtype))
    close(S.to_dense(), truth, dtype)
    close(S.diagonal(), truth.diagonal(), dtype)
    close(S.trace(), truth.trace(), dtype)
    close(A.logdet(), torch.logdet(dense), dtype)
    close(S.logdet(), -torch.logdet(dense), dtype)
    close(S.inv().to_dense(), dense, dtype)
    for op, matrix in ((A, dense), (S, truth)):
        root = op.sqrt().to_dense().double()
        close((root @ root.T).to(dtype), matrix, dtype)
    evals = torch.linalg.eigvalsh(dense)
    close(A.eigh(k=2).eigenvalues, evals[-2:], dtype)
    if kind == "wide":
        close(A.eigvalsh(), evals, dtype)
    b = Draw(dtype)(len(dense))
    close(A.solve(b), truth @ b.double(), dtype)
    for of in (train, test):
        J, U = vl.Jacobian(of), vl.PerSampleGradients(of)
        M = vl.Dense(Draw(dtype)(len(dense), 2))
        for B in (J.T, U, U.centered(), M):
            matrix = B.to_dense().double()
            op, expected = B.T @ S @ B, matrix.T @ truth @ matrix
            assert type(op) is (Product if kind == "wide" else Sandwich)
            close(op.to_dense(), expected, dtype)
            close(op.diagonal(), expected.diagonal(), dtype)
    cross = J @ S @ G.factor
    close(cross.to_dense(), J.to_dense().double() @ truth @ V, dtype)


@pytest.mark.parametrize("prior", PRIORS)
def test_sandwiches_of_diagonals(prior):
    """Diagonal posteriors, also ones that are not definite."""
    train, test = risks("tall", FLOAT64)
    p = PRIORS[prior](train)
    for entries in (p, p - 0.5):
        D = vl.Diagonal(entries)
        for A in (vl.Jacobian(test).T, vl.GGNFactor(train)):
            matrix = A.to_dense()
            op, expected = A.T @ D @ A, matrix.T @ entries.diag() @ matrix
            assert type(op) is Sandwich
            close(op.to_dense(), expected, FLOAT64)
            close(op.diagonal(), expected.diagonal(), FLOAT64)
        U, J = vl.PerSampleGradients(train), vl.Jacobian(test)
        expected = J.to_dense() @ entries.diag() @ U.to_dense()
        close((J @ D @ U).to_dense(), expected, FLOAT64)


def test_columns_are_not_formed(monkeypatch):
    """Weights stand in the layers' columns."""
    train, _ = risks("tall", FLOAT64)
    G, p = vl.GGN(train), by_entry(train)
    refuse_products(monkeypatch, Pullback)
    monkeypatch.setattr(
        column_sums, "Rows", lambda *_: pytest.fail("columns are formed")
    )
    A = G + vl.Diagonal(p)
    A.inv()
    A.logdet()


def test_sums_that_are_damped_by_a_diagonal():
    train, _ = risks("tall", FLOAT64)
    G, p = vl.GGN(train), by_entry(train)
    unit, D = vl.Identity(len(p)), vl.Diagonal(p)
    sizes = train.sizes
    blocks = vl.BlockDiagonal([(i + 1.0) * vl.Identity(n) for i, n in enumerate(sizes)])
    layers = torch.cat([torch.full((n,), i + 1.0) for i, n in enumerate(sizes)])
    layers = layers.double()
    dense = G.to_dense()
    for op, entries, scale in (
        (D + G, p, 1.0),
        (G + D + 0.5 * unit, p + 0.5, 1.0),
        (G + 0.5 * unit + D, p + 0.5, 1.0),
        (G + D + D, 2 * p, 1.0),
        (D + (G + D), 2 * p, 1.0),
        (3.0 * (G + D), 3 * p, 3.0),
        (G + D + G, p, 2.0),
        (G + (G + D), p, 2.0),
        (G + blocks, layers, 1.0),
        (blocks + G, layers, 1.0),
    ):
        assert type(op) is DiagonallyDamped, op
        matrix = scale * dense + entries.diag()
        close(op.inv().to_dense(), torch.linalg.inv(matrix), FLOAT64)
        close(op.to_dense(), matrix, FLOAT64)
        close(op.diagonal(), matrix.diagonal(), FLOAT64)
    assert not isinstance(-(G + D), DiagonallyDamped)
    close((-(G + D)).to_dense(), -dense - p.diag(), FLOAT64)


@pytest.mark.parametrize("width", [3, 9])
def test_derivatives_in_the_entries(width):
    draw = Draw(FLOAT64)
    V, b = draw(6, width), draw(6)
    G = LowRank(vl.Dense(V), 2.0)
    verbs_of = {
        "logdet": (lambda A: A.logdet(), torch.logdet),
        "logdet of inverse": (lambda A: A.inv().logdet(), lambda A: -torch.logdet(A)),
        "solve": (lambda A: A.solve(b), lambda A: torch.linalg.solve(A, b)),
        "product": (lambda A: A @ b, lambda A: A @ b),
        "trace": (lambda A: A.trace(), torch.trace),
        "inverse": (lambda A: A.inv().to_dense(), torch.linalg.inv),
    }
    for name, (verb, dense) in verbs_of.items():
        found = []
        for of_operators in (True, False):
            p = torch.linspace(0.5, 1.5, 6, dtype=FLOAT64).requires_grad_()
            if of_operators:
                value = verb(G + vl.Diagonal(p))
            else:
                value = dense(2 * V @ V.T + p.diag())
            weights = torch.linspace(1, 2, value.numel()).double().view(value.shape)
            (weights * value).sum().backward()
            found.append((value.detach(), p.grad))
        torch.testing.assert_close(found[0], found[1], msg=name)
    p = torch.ones(6, dtype=FLOAT64, requires_grad=True)
    x = draw(6, 2).requires_grad_()
    torch.autograd.gradcheck(lambda p, x: (G + vl.Diagonal(p)).inv() @ x, (p, x))


def test_what_is_not_differentiated_is_refused():
    V = Draw(FLOAT64)(6, 3)
    G = LowRank(vl.Dense(V))
    p = torch.ones(6, dtype=FLOAT64, requires_grad=True)
    S = (G + vl.Diagonal(p)).inv()
    for verb in (S.diagonal, S.trace):
        with pytest.raises(TypeError, match="entries of the damping"):
            verb()
    for weight in (1.0, p.detach().sum(), p.sum()):  # of what it is a factor
        value = weight * (G + vl.Diagonal(p)).logdet() + p.pow(3).sum()
        (slope,) = torch.autograd.grad(value, p, create_graph=True)
        with pytest.raises(TypeError, match="logdet: second derivatives"):
            torch.autograd.grad(slope.sum(), p)
    M = V.clone().requires_grad_()
    with pytest.raises(TypeError, match="requires grad"):
        (LowRank(vl.Dense(M)) + vl.Diagonal(torch.ones(6).double())).inv()


def test_entries_that_do_not_damp_are_refused():
    G = LowRank(vl.Dense(Draw(FLOAT64)(6, 3)))
    for least in (0.0, -1.0):
        p = torch.ones(6, dtype=FLOAT64)
        p[4] = least
        for verb in ("inv", "logdet", "sqrt"):
            with pytest.raises(ValueError, match=f"{verb}.*entry 4"):
                getattr(G + vl.Diagonal(p), verb)()


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("groups, positions", [(1, 1), (2, 2), (1, 3)])
def test_inner_products_of_weighted_columns_of_a_sample(
    groups, positions, inputs_first
):
    """By pairs of positions, and by blocks where these are many, as if formed."""
    n, R, Q, b, a = 3, 4, 5, 3, 2

    def columns(width):
        inputs = torch.rand(n, groups, a, positions, dtype=FLOAT64)
        cotangents = torch.rand(n, width, groups, b, positions, dtype=FLOAT64)
        return KhatriRaoColumns(inputs, cotangents, inputs_first)

    def formed(part):
        return part.rows().view(n, part.width, -1)

    left, right = columns(R), columns(Q)
    weights = torch.rand(groups * a * b, dtype=FLOAT64)
    for both in (left, weighted(left, weights)), (right, weighted(right, weights)):
        assert type(both[1]) is WeightedKhatriRao
        torch.testing.assert_close(formed(both[1]), formed(both[0]) * weights)
    for one, other in (
        (weighted(left, weights), right),
        (weighted(left, weights), weighted(right, weights.sqrt())),
        (weighted(left, weights),) * 2,
    ):
        found = one.sample_grams(other, memory=10**6)
        torch.testing.assert_close(found, formed(one) @ formed(other).mT)


def test_inner_products_of_columns_of_a_sample_in_any_structure():
    n, rows, b, P = 3, 7, 4, 2

    def columns(width):
        index = torch.randint(rows, (n, P))
        table = TableColumns(index, torch.rand(n, width, 1, b, P).double(), rows)
        plain = KhatriRaoColumns(table.inputs, table.cotangents, True)
        part = KhatriRaoColumns(
            torch.rand(n, 1, 2, 3).double(), torch.rand(n, width, 1, 3, 3).double()
        )
        stacked = StackedColumns({(0, 6): part, (8, 36): table}, 40)
        moved = StackedColumns({(1, 7): part, (8, 36): table}, 40)
        formed = DenseColumns(torch.rand(n, width, rows * b).double())
        return {"layer": [table, plain, formed], "parts": [stacked, moved]}

    left, right = columns(5), columns(6)
    for kind, some in left.items():
        for one, other in itertools.product(some, right[kind]):
            pair = (part.rows().view(n, part.width, -1) for part in (one, other))
            first, second = pair
            for memory in (1, 10**6):
                found = one.sample_grams(other, memory)
                torch.testing.assert_close(found, first @ second.mT)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("at", [[2], [0, 7], list(range(8))])
def test_inverses_on_the_side_of_parameters_refuse_what_is_no_number(at, number):
    V = vl.Dense(Draw(FLOAT64)(8, 20))
    G = V @ V.T
    assert not G.by_gram
    p = torch.linspace(1, 2, 8, dtype=FLOAT64)
    inverse = torch.linalg.inv(G.to_dense() + p.diag())
    torch.testing.assert_close((G + vl.Diagonal(p)).inv().to_dense(), inverse)
    p[at] = number
    with pytest.raises(ValueError, match="NaN or Inf"):
        (G + vl.Diagonal(p)).inv()
    for damping in (0.0, 0.5):  # on the diagonal or beside it
        A = G.to_dense()
        A[at, 0] = number
        with pytest.raises(ValueError, match="NaN or Inf"):
            (vl.Dense(A) + damping * vl.Identity(8)).inv()


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@pytest.mark.parametrize("least", [1e-3, 1e-9, 1e-11])
def test_what_all_entries_have_counts_where_it_is_small(dtype, least):
    """Of integers, of which G has no rounding errors, and rank 4 of 6."""
    generator = torch.Generator().manual_seed(3)
    A, B = (
        torch.randint(-3, 4, (6, 13), generator=generator).to(FLOAT64).split([4, 9], 1)
    )
    V = vl.Dense((A @ B[:4]).to(dtype))
    G = V @ V.T
    assert not G.by_gram
    p = torch.full((6,), least, dtype=FLOAT64)
    op, matrix = G + vl.Diagonal(p.to(dtype)), G.to_dense().double() + p.diag()
    assert torch.linalg.matrix_rank(G.to_dense()) == 4
    expected = torch.linalg.slogdet(matrix).logabsdet
    assert float(op.logdet()) == pytest.approx(float(expected), rel=1e-5)
    R, size = op.sqrt().to_dense().double(), matrix.norm()
    assert (R @ R.T - matrix).norm() <= 10 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-22, 1e22])
def test_inverses_of_very_small_and_large_operators(
    size: float, dtype: torch.dtype
) -> None:
    """Squares of what the Gram matrix holds need not be numbers."""
    V = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    exact = V.double() @ V.double().T + torch.diag(torch.linspace(1, 2, 6).double())
    entries = (size * torch.linspace(1, 2, 6).double()).to(dtype)
    factor = vl.Dense(V)
    large = vl.Dense((size**0.5 * V.double()).to(dtype))
    for low_rank in (size * (factor @ factor.T), large @ large.T):
        found = (low_rank + vl.Diagonal(entries)).inv().to_dense().double() * size
        torch.testing.assert_close(
            found,
            torch.linalg.inv(exact),
            rtol=1e-4,
            atol=1e-4 if dtype == torch.float32 else 1e-9,
        )


def test_rows_of_a_factor_with_weights():
    """What has no rule of its own is computed by products."""
    w, V = torch.rand(6, dtype=FLOAT64) + 0.5, torch.rand(6, 4, dtype=FLOAT64)
    op, dense, x = (
        WeightedRows(w, vl.Dense(V)),
        w[:, None] * V,
        torch.rand(6, 2).double(),
    )
    torch.testing.assert_close(vl.linalg.row_norms_squared(op), (dense**2).sum(1))
    torch.testing.assert_close(vl.linalg.column_norms_squared(op), (dense**2).sum(0))
    torch.testing.assert_close((op @ op.T) @ x, dense @ (dense.T @ x))
    torch.testing.assert_close((op @ op.T).to_dense(), dense @ dense.T)
