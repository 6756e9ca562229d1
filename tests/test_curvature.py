"""Operators of a risk against dense matrices: products, roots, Gram matrices."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import CONVEX, NAMES, dense, problem
from tests.curvature_cases import build, check_products, close, fresh, risk
from tests.pairs import in_turn
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.operators.lowrank import Gram, LowRank
from vivit_linop.testing import check_operator

DTYPES = [torch.float64, torch.float32]


# These stand for all in tests of what is not about the model or the loss.
FEWEST = [
    "mlp_ce_mean",
    "ce_sequence",
    "coupled_function_loss",
    "uneven_batches",
    "more_columns_than_parameters",
    "callable_model",
]


# Products -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if problem(name).convex])
def test_products_from_stored_columns(name: str) -> None:
    for symbol in "VU":
        op, matrix = build(symbol, risk(name), name)
        stored = type(op).through(op.jacobian, op.output)
        stored.keep_columns()
        assert stored.columns() is not None
        check_products(stored, matrix, 1e-12)
        if symbol == "V":
            check_products(stored @ stored.T, matrix @ matrix.T, 1e-12)


@pytest.mark.parametrize(("outputs", "kept"), [(10, True), (2000, False)])
def test_columns_are_stored_where_reading_them_is_cheap(
    outputs: int, kept: bool
) -> None:
    net = nn.Sequential(nn.Linear(800, 800), nn.ReLU(), nn.Linear(800, outputs))
    data = torch.rand(64, 800), torch.randint(outputs, (64,))
    V = vl.GGNFactor(net, nn.CrossEntropyLoss(), data)
    assert V.columns() is None  # the first product is not worth the question
    assert (V.columns() is not None) == kept


def test_columns_of_two_draws_are_not_shared() -> None:
    net = nn.Sequential(nn.Linear(800, 800), nn.ReLU(), nn.Linear(800, 3))
    data = torch.rand(8, 800), torch.randint(3, (8,))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
    J, H = vl.Jacobian(risk), vl.LossHessian(risk)
    for seed in (0, 1):
        root = H.sqrt(2, torch.Generator().manual_seed(seed))
        outer = root @ root.T
        pulled = J.T @ outer
        z = torch.linspace(-1, 2, outer.shape[1]).pow(3)
        assert close(pulled @ z, J.T @ (outer @ z), 1e-5)
        assert pulled.columns() is not None  # else the test shows nothing


def symbols_of(name: str) -> list[str]:
    """The operators of a problem; where a loss is not convex, there is no root."""
    case = problem(name)
    return [
        *("J", "H", "G", "U", "F"),
        *(["Hess"] if case.has_hessian else []),
        *(["S", "V"] if case.convex else []),
    ]


@pytest.mark.parametrize(
    ("name", "symbol"), [(name, of) for name in NAMES for of in symbols_of(name)]
)
def test_operators(name: str, symbol: str) -> None:
    op, matrix = build(symbol, risk(name), name)
    if name in FEWEST:
        check_operator(op, matrix)
    else:
        # What else the battery checks is the same code for all.
        check_products(op, matrix, 1e-12)
        if problem(name).convex or symbol != "G":
            assert close(op.to_dense(), matrix)


@pytest.mark.parametrize(("turn", "name"), list(enumerate(NAMES)))
def test_operators_in_float32(turn: int, name: str) -> None:
    """All problems, and by turns all operators: the dtype reaches both alike."""
    case, of = problem(name, torch.float32), risk(name, torch.float32)
    for symbol in symbols_of(name)[turn % 3 :: 3]:
        op, matrix = build(symbol, of, name)
        assert op.torch_dtype == torch.float32
        check_products(op, matrix, case.rtol32)


@pytest.mark.parametrize("name", FEWEST)
def test_battery_in_float32(name: str) -> None:
    rtol = problem(name).rtol32
    for symbol in ("J", "G", "V", "Hess"):
        check_operator(*build(symbol, risk(name, torch.float32), name), rtol)


@pytest.mark.parametrize(("name", "dtype"), in_turn(CONVEX, DTYPES))
def test_square_root(name: str, dtype: torch.dtype) -> None:
    H, truth = vl.LossHessian(risk(name, dtype)), dense(name)
    S = H.sqrt()
    rtol = 1e-12 if dtype == torch.float64 else problem(name).rtol32
    assert close(S.to_dense() @ S.to_dense().T, truth.H, rtol)
    if isinstance(problem(name).loss, nn.CrossEntropyLoss | nn.NLLLoss):
        channels = truth.outputs.shape[1]
        width = max(channels - 1, 1) * (truth.C // channels)
        assert S.shape == (truth.N * truth.C, truth.N * width)
    else:
        assert S.shape == (truth.N * truth.C, truth.N * truth.C)


def test_saturated_square_root_keeps_its_digits() -> None:
    # Entry by entry, not only relative to the largest: p = 1 − ε and tiny p alike.
    f = torch.tensor([[0.0, -40.0, -60.0], [50.0, 50.0, 0.0], [0.0, 700.0, -700.0]])
    f = f.double()
    model = lambda params, x: params["f"] * x  # noqa: E731
    data = (torch.ones(3, 3, dtype=torch.float64), torch.tensor([0, 1, 2]))
    loss = nn.CrossEntropyLoss(reduction="sum")
    # Which sample is which decides about its outputs, so they are not checked alone.
    of = vl.EmpiricalRisk(model, loss, data, {"f": f}, check=False)
    S = vl.LossHessian(of).sqrt().to_dense().reshape(3, 3, 3, 2)
    H = vl.LossHessian(of).to_dense().reshape(3, 3, 3, 3)
    for n in range(3):
        # diag(p) − p pᵀ with 1 − p summed from the other entries.
        p = [math.exp(v - torch.logsumexp(f[n], 0).item()) for v in f[n].tolist()]
        exact = torch.tensor(
            [
                [
                    p[i] * math.fsum(p[k] for k in range(3) if k != i)
                    if i == j
                    else -p[i] * p[j]
                    for j in range(3)
                ]
                for i in range(3)
            ],
            dtype=torch.float64,
        )
        # exp(−700) is known to 700 · ε.
        torch.testing.assert_close(H[n, :, n], exact, rtol=1e-12, atol=0.0)
        # A product of factors knows entry (i, j) relative to √(H_ii H_jj).
        root, size = S[n, :, n], exact.diagonal().sqrt()
        error = (root @ root.T - exact).abs()
        assert (error <= 1e-12 * torch.outer(size, size)).all()


# Expressions --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEWEST)
def test_expressions(name: str) -> None:
    of, truth = risk(name), dense(name)
    J, H = vl.Jacobian(of), vl.LossHessian(of)
    S, V, U = H.sqrt(), vl.GGNFactor(of), vl.PerSampleGradients(of)
    root = S.to_dense()
    dense_V = truth.J.T @ root
    table: list[tuple[Any, type | None, Tensor]] = [
        (J.T @ H @ J, vl.GGN, truth.G),
        (J.T @ (H @ J), vl.GGN, truth.G),
        ((J.T @ H) @ J, vl.GGN, truth.G),
        (J.T @ S @ S.T @ J, vl.GGN, truth.G),
        ((J.T @ S) @ (J.T @ S).T, LowRank, truth.G),
        (V @ V.T, vl.GGN, truth.G),
        (J.T @ S, vl.GGNFactor, dense_V),
        (S.T @ J, None, dense_V.T),
        (S @ S.T, vl.LossHessian, truth.H),
        (J.T @ J, LowRank, truth.J.T @ truth.J),
        (V.T @ V, Gram, dense_V.T @ dense_V),
        (U.T @ V, Gram, truth.U.T @ dense_V),
        (V.T @ U, Gram, dense_V.T @ truth.U),
        (J @ J.T, Gram, truth.J @ truth.J.T),
        (J @ V, Gram, truth.J @ dense_V),
        (V.T @ J.T, Gram, dense_V.T @ truth.J.T),
        (U @ U.T, LowRank, truth.U @ truth.U.T),
        (2.0 * (V @ V.T), vl.GGN, 2.0 * truth.G),
        (vl.GGN(of).factor @ vl.GGN(of).factor.T, None, truth.G),
    ]
    for number, (op, kind, matrix) in enumerate(table):
        assert kind is None or isinstance(op, kind), (number, op)
        check_products(op, matrix, 1e-12)
        assert close(op.to_dense(), matrix), (number, op)
        # A Gram operator multiplies by its matrix once that is known.
        check_products(op, matrix, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gram_matrices(name: str) -> None:
    """The Gram matrices of all cases, which have a way of their own to be computed."""
    case, of, truth = problem(name), risk(name), dense(name)
    J, U = vl.Jacobian(of), vl.PerSampleGradients(of)
    table = [(J @ J.T, truth.J.T, truth.J.T), (U.T @ U, truth.U, truth.U)]
    table += [(U.T @ J.T, truth.U, truth.J.T)]
    if case.convex:
        V = vl.GGNFactor(of)
        dense_V = truth.J.T @ V.output.to_dense()
        table += [(V.T @ V, dense_V, dense_V), (U.T @ V, truth.U, dense_V)]
        assert close(V.to_dense(), dense_V)
    for op, left, right in table:
        assert close(op.to_dense(), left.T @ right, scale=left.norm() * right.norm())
    assert close(J.to_dense(), truth.J) and close(U.to_dense(), truth.U)


@pytest.mark.parametrize("name", CONVEX)
def test_gram_matrices_in_float32(name: str) -> None:
    of, truth = risk(name, torch.float32), dense(name)
    V, U = vl.GGNFactor(of), vl.PerSampleGradients(of)
    dense_V = truth.J.T @ V.output.to_dense().double()
    rtol = problem(name).rtol32
    for op, left in ((V.T @ V, dense_V), (U.T @ V, truth.U)):
        scale = left.norm() * dense_V.norm()
        assert close(op.to_dense(), left.T @ dense_V, rtol, scale)


@pytest.mark.parametrize(
    "name",
    [
        *("mlp_ce_mean", "mlp_bce_weighted", "ce_sequence", "ce_everything"),
        *("bce_saturated", "huber_kinked", "poisson_rates"),
    ],
)
def test_least_squares_as_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's only driver wants full rank; roots of weighted losses have zeros."""
    full_rank = functools.partial(torch.linalg.lstsq, driver="gels")
    monkeypatch.setattr(torch.linalg, "lstsq", full_rank)
    of, truth = fresh(name), dense(name)
    V, U = vl.GGNFactor(of), vl.PerSampleGradients(of)
    dense_V = truth.J.T @ V.output.to_dense()
    for op, left in ((V.T @ V, dense_V), (U.T @ V, truth.U)):
        scale = left.norm() * dense_V.norm()
        assert close(op.to_dense(), left.T @ dense_V, scale=scale)


def test_same_samples_in_two_risks() -> None:
    # Equal numbers are not the same Jacobian: no rewriting, but the same values.
    A, B = vl.Jacobian(fresh("mlp_ce_mean")), vl.Jacobian(fresh("mlp_ce_mean"))
    H, truth = vl.LossHessian(A.risk), dense("mlp_ce_mean")
    op = B.T @ H @ A
    assert not isinstance(op, vl.GGN)
    check_products(op, truth.G, 1e-12)
    cross = A @ B.T
    assert isinstance(cross, Gram) and not cross.self_adjoint
    check_operator(cross, truth.J @ truth.J.T)


@pytest.mark.parametrize("memory", [None, 0, 2000])
def test_cross_gram_of_different_data(memory: int | None) -> None:
    whole, truth = fresh("mlp_ce_mean", memory=memory), dense("mlp_ce_mean")
    part = whole.subset([4, 1])
    V = vl.GGNFactor(whole)
    op = vl.PerSampleGradients(part).T @ V
    expected = truth.U[:, [4, 1]].T @ truth.J.T @ V.output.to_dense()
    assert close(op.to_dense(), expected)
    check_products(op, expected, 1e-12)


# Forms of construction ----------------------------------------------------------------


def test_pullback_is_shared() -> None:
    # J.T is one object, so that expressions recognise it.
    J = vl.Jacobian(risk("mlp_ce_mean"))
    assert J.T is J.T and isinstance(J.T, Pullback) and J.T.T is J
    V = vl.GGNFactor(risk("mlp_ce_mean"))
    assert V.T.T is V and vl.GGN(risk("mlp_ce_mean")).T.shape == (43, 43)


@pytest.mark.parametrize("name", ["mlp_ce_mean", "uneven_batches"])
def test_cross_gram_matrices_in_parts(name: str) -> None:
    # Whatever fits into memory, each pair of samples counts once. Between these bytes
    # samples are cut in the same way.
    (model, loss, data, params), keywords = problem(name).arguments()
    truth = dense(name)
    for memory in (500, 1000, 1500, 2000, 2500, 3500, 4000, 5000, 9500):
        of = vl.EmpiricalRisk(model, loss, data, params, memory=memory, **keywords)
        J, U = vl.Jacobian(of), vl.PerSampleGradients(of)
        for op, expected in (
            (J @ U, truth.J @ truth.U),
            (U.T @ J.T, truth.U.T @ truth.J.T),
        ):
            assert (op.to_dense() - expected).norm() <= 1e-12 * expected.norm(), memory


def test_diagonal_of_a_saturated_cross_entropy() -> None:
    """Entries at certain classes keep their digits."""
    logits = torch.tensor([[0.0, 40.0, -3.0], [1.0, 0.5, -90.0]], dtype=torch.float64)
    data = (logits, torch.tensor([0, 1]))
    loss = nn.CrossEntropyLoss(reduction="sum")
    H = vl.LossHessian(nn.Linear(3, 3).double(), loss, data)
    H.risk.outputs = [logits]
    a, b, c, d = (math.exp(x) for x in (-40.0, -43.0, -0.5, -91.0))
    expected = [
        *(a / (1 + a + b), (a + b) / (1 + a + b) ** 2, b / (1 + a + b)),
        *((c + d) / (1 + c + d) ** 2, c * (1 + d) / (1 + c + d) ** 2, d / (1 + c)),
    ]
    got = H.diagonal()
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=got.dtype), rtol=1e-12, atol=0
    )
    dense = H.to_dense().diagonal()
    torch.testing.assert_close(got, dense, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_roots_of_loss_hessians_agree_however_asked_for(dtype: torch.dtype) -> None:
    net = nn.Linear(4, 3).to(dtype)
    data = torch.rand(6, 4, dtype=dtype), torch.randint(3, (6,))
    H = vl.LossHessian(net, nn.CrossEntropyLoss(), data)
    for factor, root in (
        (1.0, H.sqrt()),
        (1.0, vl.linalg.sqrt(H)),
        (2.0, (2 * H).sqrt()),
        (0.5, vl.linalg.sqrt(0.5 * H)),
    ):
        assert root.shape == (18, 12)
        assert close((root @ root.T).to_dense(), factor * H.to_dense(), rtol=1e-6)
    S = H.sqrt(mc_samples=1)
    assert (S @ S.T).sqrt() is S and vl.linalg.sqrt(S @ S.T) is S
    diagonals = vl.Hessian(net, nn.CrossEntropyLoss(), data)
    assert close((2 * diagonals).diagonal(), 2 * diagonals.diagonal(), rtol=1e-6)
