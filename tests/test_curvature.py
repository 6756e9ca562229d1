"""Curvature operators are the matrices that ``cases.dense`` computes without them."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import cases
import numpy as np
import pytest
import torch
from cases import CONVEX, NAMES, dense, problem
from torch import Tensor, nn

import vivit_linop as vl
from vivit_linop.curvature.jacobian import Pullback
from vivit_linop.net import linearization
from vivit_linop.net.linearization import Linearization, NoTangentError
from vivit_linop.operators.lowrank import Damped, Gram, LowRank, Woodbury
from vivit_linop.risk.empirical import _evaluated
from vivit_linop.testing import check_operator

DTYPES = [torch.float64, torch.float32]
EPS = torch.finfo(torch.float64).eps

# These stand for all in tests of what is not about the model or the loss.
FEWEST = [
    "mlp_ce_mean",
    "ce_sequence",
    "coupled_function_loss",
    "uneven_batches",
    "more_columns_than_parameters",
    "callable_model",
]
FEW = [
    "mlp_ce_mean",
    "mlp_mse_sum",
    "bce_saturated",
    "ce_everything",
    "ce_sequence",
    "coupled_function_loss",
    "uneven_batches",
    "more_columns_than_parameters",
    "repeated_samples",
    "callable_model",
    "cnn",
    "tokens",
    "control_flow",
]


@pytest.fixture(autouse=True)
def _quiet_vmap():
    # torch says which of its operations vmap runs in a loop; that is not our concern.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


@functools.cache
def risk(name: str, dtype: torch.dtype = torch.float64) -> vl.EmpiricalRisk:
    arguments, keywords = problem(name, dtype).arguments()
    return vl.EmpiricalRisk(*arguments, **keywords)


def fresh(name: str, **keywords: Any) -> vl.EmpiricalRisk:
    arguments, own = problem(name).arguments()
    return vl.EmpiricalRisk(*arguments, **own, **keywords)


def close(
    got: Tensor, expected: Tensor, rtol: float = 1e-12, scale: Any = None
) -> bool:
    """Relative to the norm of what is expected, or to a given size."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    scale = expected.double().norm() if scale is None else scale
    return bool((got.double() - expected.double()).norm() <= rtol * scale)


def build(symbol: str, of: vl.EmpiricalRisk, name: str) -> tuple[Any, Tensor]:
    """An operator and its matrix."""
    truth = dense(name)
    if symbol in "SV":
        # S is unique up to rotation only, so S Sᵀ is checked and S itself is taken
        # as dense blocks, which its products do not form.
        S = vl.LossHessian(of).sqrt()
        root = S.to_dense().double()
        if symbol == "S":
            return S, root
        V = vl.GGNFactor(of)
        assert torch.equal(V.blocks.to_dense().double(), root)
        return V, truth.J.T @ root
    constructors: dict[str, tuple[Callable[..., Any], Tensor]] = {
        "J": (vl.Jacobian, truth.J),
        "H": (vl.LossHessian, truth.H),
        "G": (vl.GGN, truth.G),
        "U": (vl.PerSampleGradients, truth.U),
        "F": (vl.EmpiricalFisher, truth.F),
        "Hess": (vl.Hessian, truth.hessian),
    }
    constructor, matrix = constructors[symbol]
    return constructor(of), matrix


def check_products(op: Any, matrix: Tensor, rtol: float) -> None:
    """One and several columns, from both sides; what check_operator begins with."""
    generator = torch.Generator().manual_seed(1)
    for A, M in ((op, matrix), (op.T, matrix.T)):
        for columns in (1, 3):
            x = torch.randn(
                M.shape[1], columns, generator=generator, dtype=op.torch_dtype
            )
            x = x.squeeze(1) if columns == 1 else x
            scale = M.norm() * x.norm()
            assert close(A @ x, M @ x.double(), rtol, scale), (A, columns)


# Products ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if problem(name).convex])
def test_products_from_stored_columns(name: str) -> None:
    for symbol in "VU":
        op, matrix = build(symbol, risk(name), name)
        stored = type(op).through(op.jacobian, op.blocks)
        stored.keep_columns()
        assert stored.columns() is not None
        check_products(stored, matrix, 1e-12)
        if symbol == "V":
            check_products(stored @ stored.T, matrix @ matrix.T, 1e-12)


@pytest.mark.parametrize(("outputs", "kept"), [(10, True), (2000, False)])
def test_columns_are_stored_where_reading_them_is_cheap(
    outputs: int, kept: bool
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(800, 800), nn.ReLU(), nn.Linear(800, outputs))
    data = torch.rand(64, 800), torch.randint(outputs, (64,))
    V = vl.GGNFactor(net, nn.CrossEntropyLoss(), data)
    assert (V.columns() is not None) == kept


def test_columns_of_two_draws_are_not_shared() -> None:
    torch.manual_seed(0)
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


@pytest.mark.parametrize("symbol", ["J", "H", "G", "S", "V", "U", "F", "Hess"])
@pytest.mark.parametrize("name", NAMES)
def test_operators(name: str, symbol: str) -> None:
    case = problem(name)
    if symbol == "Hess" and not case.has_hessian:
        pytest.skip("there is no right one (see cases.py)")
    if not case.convex and symbol in "SV":
        pytest.skip("a loss that is not convex has no square root (test_bad_input)")
    op, matrix = build(symbol, risk(name), name)
    if (symbol == "G" and case.convex) or name in FEWEST:
        check_operator(op, matrix)
    else:
        # What else the battery checks is the same code for all.
        check_products(op, matrix, 1e-12)
        if case.convex or symbol != "G":
            assert close(op.to_dense(), matrix)


@pytest.mark.parametrize("name", NAMES)
def test_operators_in_float32(name: str) -> None:
    case, of = problem(name, torch.float32), risk(name, torch.float32)
    symbols = ["J", "H", "G", "U", "F"]
    symbols += ["Hess"] * case.has_hessian + ["S", "V"] * case.convex
    for symbol in symbols:
        op, matrix = build(symbol, of, name)
        assert op.torch_dtype == torch.float32
        check_products(op, matrix, case.rtol32)


@pytest.mark.parametrize("name", FEWEST)
def test_battery_in_float32(name: str) -> None:
    rtol = problem(name).rtol32
    for symbol in ("J", "G", "V", "Hess"):
        check_operator(*build(symbol, risk(name, torch.float32), name), rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVEX)
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


# Expressions ------------------------------------------------------------------------


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
        dense_V = truth.J.T @ V.blocks.to_dense()
        table += [(V.T @ V, dense_V, dense_V), (U.T @ V, truth.U, dense_V)]
        assert close(V.to_dense(), dense_V)
    for op, left, right in table:
        assert close(op.to_dense(), left.T @ right, scale=left.norm() * right.norm())
    assert close(J.to_dense(), truth.J) and close(U.to_dense(), truth.U)


@pytest.mark.parametrize("name", CONVEX)
def test_gram_matrices_in_float32(name: str) -> None:
    of, truth = risk(name, torch.float32), dense(name)
    V, U = vl.GGNFactor(of), vl.PerSampleGradients(of)
    dense_V = truth.J.T @ V.blocks.to_dense().double()
    rtol = problem(name).rtol32
    for op, left in ((V.T @ V, dense_V), (U.T @ V, truth.U)):
        scale = left.norm() * dense_V.norm()
        assert close(op.to_dense(), left.T @ dense_V, rtol, scale)


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
    expected = truth.U[:, [4, 1]].T @ truth.J.T @ V.blocks.to_dense()
    assert close(op.to_dense(), expected)
    check_products(op, expected, 1e-12)


# The spectrum -----------------------------------------------------------------------


def check_pairs(pairs: Any, G: Tensor, tolerance: float = 1e-10) -> None:
    evals, evecs = pairs
    lambda_max = torch.linalg.matrix_norm(G, 2)
    unit = torch.eye(len(evals), dtype=torch.float64)
    assert evals.isfinite().all() and evecs.isfinite().all()
    assert ((evecs.T @ evecs - unit).abs() <= tolerance).all()
    residuals = (G @ evecs - evals * evecs).norm(dim=0)
    assert (residuals <= tolerance * lambda_max).all(), residuals / lambda_max


@pytest.mark.parametrize("name", CONVEX)
def test_eigenvalues_and_vectors(name: str) -> None:
    of, truth = risk(name), dense(name)
    G = vl.GGN(of)
    count = min(G.factor.shape)
    expected = torch.linalg.eigvalsh(truth.G)
    largest = expected[-1].clamp(min=0.0)
    evals = G.eigvalsh()
    assert evals.shape == (count,)
    assert (evals.diff() >= 0).all()
    top = expected[-count:]
    assert (evals - top).abs().max() <= 1e-10 * largest

    pairs = G.eigh()
    check_pairs(pairs, truth.G)
    # What is left out is zero to rounding, what is kept is not.
    assert (pairs.eigenvalues > 0).all()
    left_out = top[: count - len(pairs)]
    assert (left_out.abs() <= 1e-12 * largest).all()
    kept = top[count - len(pairs) :]
    assert ((pairs.eigenvalues - kept).abs() <= 1e-10 * largest).all()

    everything = G.eigh(select=lambda evals: list(range(len(evals))))
    assert len(everything) == count
    check_pairs(everything, truth.G)
    few = G.eigh(k=min(2, count))
    check_pairs(few, truth.G)
    assert (few.eigenvalues - top[-min(2, count) :]).abs().max() <= 1e-10 * largest
    # In the order of the criterion, with indices from the end.
    order = [-1, 0] if count > 1 else [0]
    chosen = G.eigh(select=lambda evals: order)
    check_pairs(chosen, truth.G)
    assert torch.equal(chosen.eigenvalues, evals[order]) or close(
        chosen.eigenvalues, evals[order], EPS * 100, largest
    )


@pytest.mark.parametrize(
    "kind",
    [
        lambda indices: indices,
        tuple,
        torch.tensor,
        np.array,
        lambda indices: (i for i in indices),
        lambda indices: torch.tensor(indices, dtype=torch.int32),
    ],
)
def test_criteria_may_return_indices_of_all_kinds(kind: Any) -> None:
    G = vl.GGN(risk("mlp_ce_mean"))
    evals = G.eigvalsh()
    try:
        pairs = G.eigh(select=lambda _: kind([3, 11, -2]))
    except (ValueError, TypeError) as error:
        assert "select" in str(error)
    else:
        assert close(pairs.eigenvalues, evals[[3, 11, 10]], 1e-11)
        check_pairs(pairs, dense("mlp_ce_mean").G)
    above = G.eigh(select=lambda e: e > e.mean())
    assert close(above.eigenvalues, evals[evals > evals.mean()], 1e-11)
    assert len(G.eigh(select=lambda e: e > 2 * e.max())) == 0


@pytest.mark.parametrize("name", FEW)
def test_spectrum_in_float32(name: str) -> None:
    of, truth = risk(name, torch.float32), dense(name)
    expected = torch.linalg.eigvalsh(truth.G)
    evals = vl.GGN(of).eigvalsh().double()
    rtol = problem(name).rtol32
    assert (evals - expected[-len(evals) :]).abs().max() <= rtol * expected[-1]
    for pairs in (
        vl.GGN(of).eigh(),
        vl.GGN(of).eigh(select=lambda evals: range(len(evals))),
    ):
        values, vectors = pairs
        unit = torch.eye(len(values))
        assert (vectors.T @ vectors - unit).abs().max() <= 1e-5
        residual = truth.G @ vectors.double() - values.double() * vectors.double()
        assert residual.norm(dim=0).max() <= 10 * rtol * expected[-1]


@pytest.mark.parametrize("name", ["linear_loss_of_linear_net", "ce_one_class"])
def test_zero_curvature(name: str) -> None:
    G = vl.GGN(risk(name))
    assert G.eigvalsh().abs().max() == 0.0
    assert len(G.eigh()) == 0  # no pair is numerically nonzero
    evals, evecs = G.eigh(k=1)
    assert evals.item() == 0.0 and abs(evecs.norm().item() - 1.0) < 1e-12
    x = torch.ones(G.shape[0], dtype=torch.float64)
    assert close((G + 0.5 * vl.Identity(len(x))).solve(x), 2.0 * x)


def test_wide_range_of_eigenvalues() -> None:
    # Those above the rounding of λ_max in the Gram matrix have correct digits.
    name = "wide_range_of_scales"
    expected = torch.linalg.eigvalsh(dense(name).G)
    evals = vl.GGN(risk(name)).eigvalsh()
    errors = (evals - expected[-len(evals) :]).abs()
    assert errors.max() <= 100 * EPS * expected[-1]
    # Half of the columns are kept by default: those with digits.
    kept = vl.GGN(risk(name)).eigh()
    check_pairs(kept, dense(name).G, 1e-12)


def test_eigenpairs_of_scaled_damped_and_fisher() -> None:
    name = "mlp_ce_mean"
    of, truth = risk(name), dense(name)
    G, D = vl.GGN(of), truth.D
    unit = torch.eye(D, dtype=torch.float64)
    check_pairs((3.0 * G).eigh(), 3.0 * truth.G)
    check_pairs((3.0 * G).eigh(k=4), 3.0 * truth.G)
    check_pairs((G + 0.5 * vl.Identity(D)).eigh(), truth.G + 0.5 * unit)
    check_pairs(vl.EmpiricalFisher(of).eigh(), truth.F)
    lowest = (-2.0 * G).eigh(select=lambda evals: [0, 1])
    check_pairs(lowest, -2.0 * truth.G)
    expected = torch.linalg.eigvalsh(-2.0 * truth.G)[:2]
    assert close(lowest.eigenvalues, expected, 1e-11)
    evals = (G + 0.5 * vl.Identity(D)).eigvalsh()
    expected = torch.linalg.eigvalsh(truth.G + 0.5 * unit)
    assert close(evals, expected[-len(evals) :], 1e-11)
    assert len(evals) == D


# Inverses, diagonals, blocks --------------------------------------------------------


@pytest.mark.parametrize("name", CONVEX)
def test_damped_inverse(name: str) -> None:
    of, truth = risk(name), dense(name)
    largest = torch.linalg.matrix_norm(truth.G, 2).item() or 1.0
    unit = torch.eye(truth.D, dtype=torch.float64)
    b = torch.randn(truth.D, 2, generator=torch.Generator().manual_seed(2)).double()
    G = vl.GGN(of)
    for delta in [largest * 10.0**e for e in (-6, -3, 0, 3)]:
        damped = G + delta * vl.Identity(truth.D)
        assert isinstance(damped, Damped)
        inverse = damped.inv()
        assert isinstance(inverse, Woodbury) and isinstance(inverse.inv(), Damped)
        expected = torch.linalg.solve(truth.G + delta * unit, b)
        assert close(inverse @ b, expected, 1e-9), delta
        assert close(damped.solve(b[:, 0]), expected[:, 0], 1e-9)
        logdet = torch.linalg.slogdet(truth.G + delta * unit).logabsdet
        assert abs(damped.logdet() - logdet) <= 1e-9 * truth.D
        assert abs(inverse.logdet() + logdet) <= 1e-9 * truth.D
    check_products(inverse, torch.linalg.inv(truth.G + delta * unit), 1e-9)


@pytest.mark.parametrize("name", FEW)
def test_damped_inverse_in_float32(name: str) -> None:
    of, truth = risk(name, torch.float32), dense(name)
    delta = 1e-2 * torch.linalg.matrix_norm(truth.G, 2).item()
    inverse = (vl.GGN(of) + delta * vl.Identity(truth.D)).inv()
    unit = torch.eye(truth.D, dtype=torch.float64)
    expected = torch.linalg.inv(truth.G + delta * unit)
    # λ_max/δ = 100 multiplies what float32 rounds.
    check_products(inverse, expected, 100 * problem(name).rtol32)


@pytest.mark.parametrize("name", CONVEX)
def test_diagonal_and_trace(name: str) -> None:
    of, truth = risk(name), dense(name)
    for op, matrix in (
        (vl.GGN(of), truth.G),
        (vl.EmpiricalFisher(of), truth.F),
        (vl.GGN(of).factor.gram, None),
        (vl.LossHessian(of), truth.H),
    ):
        matrix = op.to_dense() if matrix is None else matrix
        assert close(op.diagonal(), matrix.diagonal(), scale=matrix.norm())
        scale = matrix.diagonal().abs().sum()
        assert abs(op.trace() - matrix.trace()) <= 1e-12 * scale


def blocks_of(G: Tensor, sizes: list[int], groups: list[list[int]]) -> list[Tensor]:
    places = torch.arange(len(G)).split(sizes)
    result = []
    for group in groups:
        index = torch.cat([places[i] for i in group])
        result.append(G[index][:, index])
    return result


def check_blocks(
    op: vl.BlockDiagonal, G: Tensor, sizes: list[int], groups: list[list[int]]
) -> None:
    expected = blocks_of(G, sizes, groups)
    places = torch.arange(len(G)).split(sizes)
    whole = torch.zeros_like(G)
    for group, block in zip(groups, expected, strict=True):
        index = torch.cat([places[i] for i in group])
        whole[index[:, None], index] = block
    assert isinstance(op, vl.BlockDiagonal) and len(op.blocks) == len(groups)
    # Relative to all of G: a block may be small because signals cancel in the net.
    size = whole.norm()
    x = torch.randn(len(G), 2, generator=torch.Generator().manual_seed(5)).double()
    for block, matrix in zip(op.blocks, expected, strict=True):
        part = x[: len(matrix)]
        assert close(block @ part, matrix @ part, scale=size * part.norm())
        assert close(block.to_dense(), matrix, scale=size)
        evals = block.eigvalsh()
        top = torch.linalg.eigvalsh(matrix)[-len(evals) :]
        assert (evals - top).abs().max() <= 1e-12 * size
        values, vectors = block.eigh()
        unit = torch.eye(len(values), dtype=torch.float64)
        assert ((vectors.T @ vectors - unit).abs() <= 1e-10).all()
        residuals = matrix @ vectors - values * vectors
        assert (residuals.norm(dim=0) <= 1e-10 * size).all()
        assert close(block.diagonal(), matrix.diagonal(), scale=size)
    check_products(op, whole, 1e-12)
    assert close(op.to_dense(), whole)
    delta = 0.1 * torch.linalg.matrix_norm(whole, 2).item() or 1.0
    inverse = (op + delta * vl.Identity(len(G))).inv()
    unit = torch.eye(len(G), dtype=torch.float64)
    check_products(inverse, torch.linalg.inv(whole + delta * unit), 1e-10)
    logdet = torch.linalg.slogdet(whole + delta * unit).logabsdet
    assert abs((op + delta * vl.Identity(len(G))).logdet() - logdet) <= 1e-9 * len(G)
    check_pairs(op.eigh(), whole)


@pytest.mark.parametrize("name", [n for n in CONVEX if n != "zero_size_parameter"])
def test_block_diagonal(name: str) -> None:
    of, truth = risk(name), dense(name)
    names = list(of.params)
    op = vl.GGN(of).block_diagonal("parameter")
    check_blocks(op, truth.G, of.sizes, [[i] for i in range(len(names))])
    modules: dict[str, list[int]] = {}
    for i, key in enumerate(names):
        modules.setdefault(key.rpartition(".")[0], []).append(i)
    by_module = vl.GGN(of).block_diagonal("module")
    assert [b.shape[0] for b in by_module.blocks] == [
        sum(of.sizes[i] for i in group) for group in modules.values()
    ]
    expected = blocks_of(truth.G, of.sizes, list(modules.values()))
    for block, matrix in zip(by_module.blocks, expected, strict=True):
        # Blocks may be all cancellation: relative to the whole.
        assert close(block.to_dense(), matrix, scale=truth.G.norm())


def test_block_diagonal_of_groups() -> None:
    name = "residual"  # first, inner, last: weight and bias each
    net, of, truth = problem(name).model, risk(name), dense(name)
    groups = [[3, 0], [5, 1, 2, 4]]  # not contiguous, not in order
    parameters = list(net.parameters())
    lists = [[parameters[i] for i in group] for group in groups]
    dicts = [{"params": members, "lr": 0.1} for members in lists]
    optimizer = torch.optim.SGD(
        [{"params": members, "lr": 0.1 * i} for i, members in enumerate(lists, 1)]
    )
    for blocks in (lists, dicts, optimizer.param_groups):
        op = vl.GGN(of).block_diagonal(blocks)
        check_blocks(op, truth.G, of.sizes, groups)
        # Blocks have the order in which their parameters were given.
        expected = blocks_of(truth.G, of.sizes, groups)
        assert close(op.blocks[0].to_dense(), expected[0])


def test_block_diagonal_of_scaled_and_sampled() -> None:
    name = "mlp_ce_mean"
    of, truth = risk(name), dense(name)
    groups = [[i] for i in range(4)]
    check_blocks(
        (3.0 * vl.GGN(of)).block_diagonal("parameter"), 3.0 * truth.G, of.sizes, groups
    )
    sampled = vl.GGN(of, mc_samples=2, generator=torch.Generator().manual_seed(0))
    op = sampled.block_diagonal("parameter")
    check_blocks(op, sampled.to_dense(), of.sizes, groups)


def test_block_of_a_parameter_without_entries() -> None:
    of, truth = risk("zero_size_parameter"), dense("zero_size_parameter")
    op = vl.GGN(of).block_diagonal("module")
    matrix = torch.zeros_like(truth.G)
    for block in blocks_of(truth.G, of.sizes, [[0], [1, 2]]):
        matrix[-len(block) :, -len(block) :] = block if len(block) else matrix
    check_products(op, matrix, 1e-12)


# What an operator must not depend on ------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["mlp_ce_mean", "mlp_bce_weighted", "poisson", "tokens", "attention", "cnn"],
)
def test_batches_do_not_matter(name: str) -> None:
    whole = problem(name)
    N = dense(name).N
    truth = dense(name)
    for sizes in ([1] * N, [N - 1, 1]):
        arguments, keywords = whole.rebatched(*sizes).arguments()
        of = vl.EmpiricalRisk(*arguments, **keywords)
        assert of.batch_sizes == sizes
        assert close(of.value(), truth.value) and close(of.gradient(), truth.gradient)
        for symbol in ("J", "H", "G", "U", "F", "Hess"):
            check_products(*build(symbol, of, name), 1e-12)
        V = vl.GGNFactor(of)
        gram, expected = V.T @ V, truth.J.T @ V.blocks.to_dense()
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
    dense_V = truth.J.T @ V.blocks.to_dense()
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
        "linalg.reductions._CHUNK",
        "net.linearization._CPU_COLUMN_BYTES",
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
def test_two_ways_to_split(name: str) -> None:
    """The same numbers however the data are cut, the divisor of a mean too."""
    case, truth = problem(name).joined(), dense(name)
    x = torch.randn(truth.D, generator=torch.Generator().manual_seed(6)).double()
    # The mask of attention is as long as three samples would be.
    first = 2 if name == "attention" else 1
    for sizes in ([first, truth.N - first], [truth.N - first, first]):
        arguments, keywords = case.rebatched(*(n for n in sizes if n)).arguments()
        of = vl.EmpiricalRisk(*arguments, **keywords, memory=0)
        assert close(of.value(), truth.value, 1e-10, 1.0 + truth.value.abs())
        assert close(of.gradient(), truth.gradient, 1e-10, 1.0)
        J, H = vl.Jacobian(of), vl.LossHessian(of)
        product = J.T @ (H @ (J @ x))
        assert close(product, truth.G @ x, 1e-10, truth.G.norm() * x.norm())


# Linearisations ---------------------------------------------------------------------


def _untraceable(*_: Any) -> None:
    raise NotImplementedError


# That a risk's own linearisations are right, products with J have shown already.
@pytest.mark.parametrize(
    ("name", "method"),
    [(n, "trace") for n in FEW] + [(n, "reverse") for n in NAMES],
)
def test_linearization(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of, truth = risk(name), dense(name)
    module = "vivit_linop.net.linearization"
    if method == "reverse":
        monkeypatch.setattr(f"{module}.tangent_map", _untraceable)
    monkeypatch.setattr(f"{module}.tracing_pays", lambda _: method == "trace")
    rows = truth.J.split([n * truth.C for n in of.batch_sizes])
    for (X, _), J in zip(of.batches(), rows, strict=True):
        # Some models write into their input.
        function = functools.partial(_evaluated, of.model, cases._map(torch.clone, X))
        linear = Linearization(function, of.params)
        assert linear.method in (method, "reverse")
        generator = torch.Generator().manual_seed(3)
        for columns in (1, 4, 1):
            x = torch.randn(J.shape[1], columns, generator=generator).double()
            u = torch.randn(J.shape[0], columns, generator=generator).double()
            assert close(linear.jvp(x), J @ x, scale=J.norm() * x.norm())
            assert close(linear.vjp(u), J.T @ u, scale=J.norm() * u.norm())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("cnn", "trace"),
        ("residual", "reverse"),
        ("mlp_ce_mean", "reverse"),
        ("tokens", "reverse"),
        ("transformer", "reverse"),
    ],
)
def test_ordinary_nets_are_traced_where_it_pays(name: str, method: str) -> None:
    # Convolutions have a slow second derivative; a trace of other nets takes time only.
    assert {linear.method for linear in fresh(name).linearizations()} == {method}


@pytest.mark.parametrize("wrong", ["result", "error"])
def test_a_trace_stands_in_for_a_wrong_second_derivative(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "vivit_linop.net.linearization"
    if wrong == "error":

        def impossible(graph: Any) -> None:
            raise NotImplementedError("derivative for f_backward")

        monkeypatch.setattr(f"{module}.ReverseTangents", impossible)
    else:
        monkeypatch.setattr(Linearization, "_reverse", lambda linear: False)
    of, truth = fresh("mlp_ce_mean"), dense("mlp_ce_mean")
    x = torch.linspace(-1.0, 1.0, truth.D).double()
    assert close(vl.Jacobian(of) @ x, truth.J @ x)
    assert {linear.method for linear in of.linearizations()} == {"trace"}
    monkeypatch.setattr(f"{module}.tangent_map", _untraceable)
    of = fresh("mlp_ce_mean")  # and columns for both
    assert close(vl.Jacobian(of) @ x, truth.J @ x)
    assert not of.has_tangents
    with pytest.raises(NoTangentError, match="second derivative"):
        next(iter(of.linearizations())).jvp(x.unsqueeze(1))


def test_hessian_of_a_wrong_double_backward() -> None:
    # The double backward of torch 2.13's fused weight_norm is wrong, and so is a
    # product made of it: it must be right or refused, not silently asymmetric.
    name = "parametrised_weight"
    truth = dense(name)
    x = torch.ones(truth.D, dtype=torch.float64)
    try:
        product = vl.Hessian(risk(name)) @ x
    except (ValueError, RuntimeError):
        return
    assert close(product, truth.hessian @ x)


# Monte-Carlo ------------------------------------------------------------------------

LIKELIHOODS = [name for name in NAMES if problem(name).likelihood]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_factor_is_one_draw(name: str) -> None:
    of, truth = risk(name), dense(name)

    def sampled(seed: int) -> vl.GGN:
        return vl.GGN(of, mc_samples=2, generator=torch.Generator().manual_seed(seed))

    G = sampled(0)
    V = G.factor
    assert V.shape == (truth.D, 2 * truth.N) and V.mc_samples == 2
    S = V.blocks.to_dense()
    dense_V = truth.J.T @ S
    check_products(V, dense_V, 1e-12)
    check_products(G, dense_V @ dense_V.T, 1e-12)
    assert close((V.T @ V).to_dense(), dense_V.T @ dense_V)
    evals = torch.linalg.eigvalsh(dense_V @ dense_V.T)
    got = G.eigvalsh()
    assert (got - evals[-len(got) :]).abs().max() <= 1e-10 * evals[-1]
    check_pairs(G.eigh(), dense_V @ dense_V.T)
    # The same from the same seed through every way there is; another from another.
    x = torch.ones(truth.D, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for other in (
        sampled(0),
        (lambda W: W @ W.T)(
            vl.GGNFactor(of, mc_samples=2, generator=torch.Generator().manual_seed(0))
        ),
        (lambda J, R: J.T @ R @ R.T @ J)(
            vl.Jacobian(of), vl.LossHessian(of).sqrt(2, generator)
        ),
    ):
        assert close(other @ x, G @ x, 1e-13, scale=dense_V.norm() ** 2 * x.norm())
    if name != "ce_saturated":  # hardly anything is left to chance there
        # A few labels may be drawn alike by chance, but not again and again.
        assert not all(close(sampled(seed) @ x, G @ x, 1e-3) for seed in range(1, 6))


def test_sampled_factor_takes_the_global_generator_by_default() -> None:
    of = risk("mlp_ce_mean")
    x = torch.ones(of.num_params, dtype=torch.float64)
    torch.manual_seed(7)
    first, second = vl.GGN(of, mc_samples=1), vl.GGN(of, mc_samples=1)
    torch.manual_seed(7)
    again = vl.GGN(of, mc_samples=1)
    assert torch.equal(first @ x, again @ x)
    assert not close(first @ x, second @ x, 1e-3)
    assert torch.equal(first @ x, first @ x)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_root_is_unbiased(name: str) -> None:
    """E[S Sᵀ] = H to five standard errors, which are estimated from the samples."""
    of, truth = risk(name), dense(name)
    M = 4000
    S = vl.LossHessian(of).sqrt(M, torch.Generator().manual_seed(0))
    blocks = S.blocks
    N, C = truth.N, truth.C
    roots = torch.cat(
        [blocks(b).reshape(n, C, M) for b, n in enumerate(of.batch_sizes)]
    )
    products = M * torch.einsum("ncm,ndm->ncdm", roots, roots)
    mean, spread = products.mean(-1), products.std(-1) / M**0.5
    H = truth.H.reshape(N, C, N, C).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    scale = H.abs().max()
    # A class of probability p is not drawn at all with probability (1 − p)^M, so that
    # its spread is not seen: an entry may be off by what p < 10/M contributes.
    assert ((mean - H).abs() <= 5 * spread + 10 / M * scale * (spread == 0)).all()
    # Without bias in sum: the trace, which averages over all entries.
    traces = products.diagonal(dim1=1, dim2=2).sum((0, 2))
    error = 5 * traces.std() / M**0.5 + 1e-9 * H.diagonal(dim1=1, dim2=2).sum()
    if name not in ("ce_saturated", "bce_saturated"):
        assert abs(traces.mean() - H.diagonal(dim1=1, dim2=2).sum()) <= error


def test_sampled_mse_is_unbiased_through_the_net() -> None:
    name = "linear_mse"
    of, truth = risk(name), dense(name)
    draws = torch.stack(
        [
            vl.GGN(of, mc_samples=1, generator=torch.Generator().manual_seed(seed))
            .to_dense()
            .flatten()
            for seed in range(300)
        ]
    )
    error = (draws.mean(0) - truth.G.flatten()).norm()
    # The mean of independent draws is off by the root of the sum of their variances.
    assert error <= 3 * draws.var(0).sum().sqrt() / 300**0.5


# Forms of construction --------------------------------------------------------------


def test_pullback_is_shared() -> None:
    # J.T is one object, so that expressions recognise it.
    J = vl.Jacobian(risk("mlp_ce_mean"))
    assert J.T is J.T and isinstance(J.T, Pullback) and J.T.T is J
    V = vl.GGNFactor(risk("mlp_ce_mean"))
    assert V.T.T is V and vl.GGN(risk("mlp_ce_mean")).T.shape == (43, 43)


@pytest.mark.parametrize("name", ["mlp_ce_mean", "uneven_batches"])
def test_cross_gram_matrices_in_parts(name: str) -> None:
    # Whatever fits into memory, each pair of samples counts once.
    (model, loss, data, params), keywords = problem(name).arguments()
    truth = dense(name)
    for memory in range(500, 12_000, 250):
        of = vl.EmpiricalRisk(model, loss, data, params, memory=memory, **keywords)
        J, U = vl.Jacobian(of), vl.PerSampleGradients(of)
        for op, expected in (
            (J @ U, truth.J @ truth.U),
            (U.T @ J.T, truth.U.T @ truth.J.T),
        ):
            assert (op.to_dense() - expected).norm() <= 1e-12 * expected.norm(), memory


class _WrongTwice(torch.autograd.Function):
    """x², with a backward pass whose derivative is wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _Wrong.apply(x, gradient)


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, gradient)
        return 2.0 * x * gradient

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, gradient = ctx.saved_tensors
        return 7.0 * gradient * cotangent * x, 3.0 * x * cotangent


def test_wrong_second_derivatives_are_refused_each_time_or_not_needed() -> None:
    net = cases.Lambda(
        lambda m, x: m.second(_WrongTwice.apply(m.first(x))),
        first=nn.Linear(3, 4),
        second=nn.Linear(4, 2),
    ).double()
    X, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    of = vl.EmpiricalRisk(net, nn.MSELoss(), (X, y))
    H, J = vl.Hessian(of), vl.Jacobian(of)
    x = torch.ones(of.num_params).double()
    for _ in range(2):
        with pytest.raises(ValueError, match="derivative"):
            H @ x
        assert close(J @ x, J.T.to_dense().T @ x)


def test_a_trace_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, keywords = problem("convolutions").arguments()
    of, truth = vl.EmpiricalRisk(*arguments, **keywords), dense("convolutions")
    J, unit = vl.Jacobian(of), torch.eye(truth.J.shape[0], dtype=torch.float64)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(linearization, "tangent_map", lambda *_: interrupted)
        with pytest.raises(KeyboardInterrupt):
            J @ torch.ones(of.num_params)
    assert (J.T @ unit - truth.J.T).norm() <= 1e-12 * truth.J.norm()
    assert (J @ J.T @ unit - truth.J @ truth.J.T).norm() <= 1e-12 * truth.J.norm() ** 2


def test_trace_of_batch_norms() -> None:
    # torch's formula of their tangents works in place.
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten()
    )
    net = net.double().eval()
    net[1].running_mean.uniform_(), net[1].running_var.uniform_(0.5, 2.0)
    data = torch.randn(4, 2, 5, 5).double(), torch.randn(4, 27).double()
    J = vl.Jacobian(net, nn.MSELoss(), data)
    (linearization,) = J.risk.linearizations()
    expected = J.T.to_dense().T
    for _ in range(2):
        assert close(J.to_dense(), expected, 1e-12)
        x = torch.linspace(-1, 1, J.shape[1], dtype=torch.float64)
        assert close(J @ x, expected @ x, 1e-12)
    assert linearization.method == "trace"


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


def test_diagonal_of_sampled_loss_hessian() -> None:
    of = fresh("ce_sequence")
    S = vl.LossHessian(of).sqrt(2, torch.Generator().manual_seed(0))
    H = S @ S.T
    torch.testing.assert_close(H.diagonal(), H.to_dense().diagonal())
