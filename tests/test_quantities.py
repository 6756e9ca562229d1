"""Quantities of BackPACK's extensions: equal to it, or to dense truth beyond it.

Exact ones agree to 1e-10 in float64. BackPACK has its r in quantities of single
samples, this library has not: r is put on in the tests.
"""

import functools
from typing import Any

import pytest
import torch
from backpack import extensions as bp
from torch import Tensor, nn

import vivit_linop as vl
from tests import backpack_peer, cases
from tests.backpack_peer import REDUCTIONS, peer_risk
from tests.cases import dense, problem
from tests.comparing import close
from tests.curvature_cases import check_products, fresh, risk
from vivit_linop.curvature.hessian import diagonals_one_by_one
from vivit_linop.net.columns import base
from vivit_linop.net.columns.base import DenseColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns, squares_by_pairs
from vivit_linop.operators import Centered, Gram
from vivit_linop.testing import check_operator

RTOL = 1e-10
# Models that BackPACK cannot do, and uses of every structure.
BEYOND = [
    "residual",
    "attention",
    "reused_and_tied",
    "embedding",
    "normalisations",
    "convolutions_1d_and_3d",
    "recurrent_gru",
    "uneven_batches",
    "ce_image_soft",
    "low_rank_adapter",
    "unused_parameters",
    "tokens",
]


def gathered(parameters: list[nn.Parameter], field: str, leading: int = 0) -> Tensor:
    """What BackPACK left on the parameters, entries of all of them side by side."""
    parts = [getattr(p, field) for p in parameters]
    return torch.cat([part.flatten(leading) for part in parts], dim=leading)


# As BackPACK -----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", backpack_peer.ALL)
def test_first_order_as_backpack(name: str, reduction: str) -> None:
    parameters = backpack_peer.run(
        name,
        reduction,
        bp.BatchGrad(),
        bp.Variance(),
        bp.SumGradSquared(),
        bp.BatchL2Grad(),
    )
    of = peer_risk(name, reduction)
    U, r, N = vl.PerSampleGradients(of), of.reduction_factor, of.num_samples
    assert close(r * U.to_dense().T, gathered(parameters, "grad_batch", 1))
    moment = gathered(parameters, "sum_grad_squared")
    assert close(r**2 * N * U.second_moment(), moment)
    variance = gathered(parameters, "variance")
    assert close(r**2 * U.variance(), variance)
    norms = torch.stack([p.batch_l2 for p in parameters], dim=1)
    if name == "grouped_and_transposed":
        # BackPACK 1.7.1 adds the squares of its own grad_batch up to another value.
        own = parameters[0].grad_batch.flatten(1).square().sum(1)
        assert not close(norms[:, 0], own, rtol=0.1)
        norms[:, 0] = own
    assert close(r**2 * U.squared_norms("parameter"), norms)
    assert close(r**2 * U.squared_norms(), norms.sum(1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", backpack_peer.ALL)
def test_ggn_diagonals_as_backpack(name: str, reduction: str) -> None:
    parameters = backpack_peer.run(
        name, reduction, bp.DiagGGNExact(), bp.BatchDiagGGNExact()
    )
    of = peer_risk(name, reduction)
    G = vl.GGN(of)
    assert close(G.diagonal(), gathered(parameters, "diag_ggn_exact"))
    by_sample = gathered(parameters, "diag_ggn_exact_batch", 1)
    assert close(of.reduction_factor * G.sample_diagonals(), by_sample)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", backpack_peer.ROOTS)
def test_square_roots_as_backpack(name: str, reduction: str) -> None:
    """Its V has other columns, of which ours are an orthogonal mixing."""
    parameters = backpack_peer.run(name, reduction, bp.SqrtGGNExact())
    theirs = gathered(parameters, "sqrt_ggn_exact", 2).flatten(0, 1).T
    V = vl.GGNFactor(peer_risk(name, reduction)).to_dense()
    assert close(V @ V.T, theirs @ theirs.T)


@pytest.mark.parametrize("name", ["mlp_ce", "mlp_mse", "bce"])
def test_monte_carlo_diagonals_in_expectation(name: str) -> None:
    """The mean of 4000 draws is within 5 standard errors, entry by entry."""
    of = peer_risk(name, "mean")
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(40):
        G = vl.GGN(of, mc_samples=100, generator=generator)
        draws.append(G.diagonal())
    assert close(G.sample_diagonals().mean(0), draws[-1])
    stacked = torch.stack(draws)
    error = stacked.std(0) / len(draws) ** 0.5
    # The error of the error: 40 draws know it to 11 percent.
    exact = vl.GGN(of).diagonal()
    assert ((stacked.mean(0) - exact).abs() <= 5 * error + 1e-14).all()
    assert error.norm() <= 0.02 * exact.norm()


# Beyond BackPACK --------------------------------------------------------------------


@pytest.mark.parametrize("name", BEYOND)
def test_first_order_beyond_backpack(name: str) -> None:
    truth, of = dense(name), risk(name)
    U = vl.PerSampleGradients(of)
    squares = truth.U.square()
    assert close(U.second_moment(), squares.mean(1))
    assert close(
        U.variance(), truth.U.var(1, correction=0), size=squares.mean(1).norm()
    )
    assert close(U.squared_norms(), squares.sum(0))
    parts = squares.split(of.sizes)
    by_parameter = torch.stack([part.sum(0) for part in parts], dim=1)
    assert close(U.squared_norms("parameter"), by_parameter)


@pytest.mark.parametrize("name", BEYOND)
def test_ggn_diagonals_beyond_backpack(name: str) -> None:
    truth, of = dense(name), risk(name)
    G = vl.GGN(of)
    assert close(G.diagonal(), truth.G.diagonal())
    by_sample = truth.per_sample_ggn().diagonal(dim1=1, dim2=2)
    assert close(G.sample_diagonals(), by_sample)
    assert close((2 * G).sample_diagonals(), 2 * by_sample)
    block = G.block_diagonal("parameter").blocks[-1]
    assert close(block.diagonal(), truth.G.diagonal()[-block.shape[0] :])


@pytest.mark.parametrize("name", ["mlp_ce_mean", "residual", "uneven_batches"])
def test_covariance(name: str) -> None:
    truth, of = dense(name), risk(name)
    U = vl.PerSampleGradients(of)
    centred = truth.U - truth.U.mean(1, keepdim=True)
    Uc = U.centered()
    check_operator(Uc, centred)
    gram = Uc.T @ Uc
    assert isinstance(gram, Gram)
    assert close(gram.to_dense(), centred.T @ centred)
    assert close((Uc.T @ U).to_dense(), centred.T @ truth.U)
    C = U.covariance()
    expected = centred @ centred.T / truth.N
    check_operator(C, expected)
    assert close(C.diagonal(), U.variance())
    evals = torch.linalg.eigvalsh(expected)[-truth.N :]
    assert close(C.eigvalsh(), evals) if truth.N <= truth.D else True
    damped = C + 0.1 * vl.Identity(truth.D)
    unit = torch.eye(truth.D, dtype=torch.float64)
    assert close(damped.inv() @ unit, torch.linalg.inv(expected + 0.1 * unit))


def test_centered_of_any_factor() -> None:
    A = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    op = Centered(vl.Dense(A))
    centred = A - A.mean(1, keepdim=True)
    check_operator(op, centred)
    assert close(vl.linalg.row_norms_squared(op), centred.square().sum(1))
    assert close((op.T @ op).to_dense(), centred.T @ centred)


def test_gram_diagonal_without_the_matrix() -> None:
    V = vl.GGNFactor(risk("cnn"))
    gram = V.T @ V
    squared_norms = V.to_dense().square().sum(0)
    assert close(gram.diagonal(), squared_norms)
    assert "matrix" not in gram.__dict__
    gram.to_dense()
    assert close(gram.diagonal(), squared_norms)


# Each way to each sum ---------------------------------------------------------------


# In: inputs, cotangents and positions. Out: whether pairs of positions are cheaper than
# blocks of columns.
@pytest.mark.parametrize(
    ("sizes", "by_pairs"),
    [
        ((3, 6, 1), True),
        ((3, 6, 3), True),
        ((30, 40, 8), True),
        ((1, 1, 3), False),
        ((3, 6, 8), False),
    ],
)
@pytest.mark.parametrize("memory", [1, 2**30])
@pytest.mark.parametrize("inputs_first", [True, False])
def test_sums_from_factors(
    sizes: tuple[int, int, int], by_pairs: bool, memory: int, inputs_first: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs, outputs, positions = sizes
    assert squares_by_pairs(inputs, outputs, positions, width=4) == by_pairs
    a, b = draw(5, 2, inputs, positions), draw(5, 4, 2, outputs, positions)
    columns = KhatriRaoColumns(a, b, inputs_first)
    rows = columns.rows()
    assert close(columns.entry_squares(memory), rows.square().sum(0))
    by_sample = rows.view(5, 4, -1).square().sum(1)
    assert close(columns.sample_entry_squares(memory), by_sample)
    assert close(columns.squared_norms(memory), rows.square().sum(1))
    assert close(columns.entry_sums(), rows.sum(0))


def test_squares_of_formed_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    expected = values.square().sum((0, 1))
    for entries in (1, 9, 2**20):  # so many are squared at a time
        monkeypatch.setattr(base, "_SQUARED_AT_A_TIME", entries)
        assert close(DenseColumns(values).entry_squares(2**20), expected)


def test_squares_form_no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a linear layer no column is formed."""
    of = risk("mlp_ce_mean")
    vl.GGN(of).diagonal()  # the structure of the net is checked with formed columns

    def refuse(self: Any, *_: Any) -> Tensor:
        raise AssertionError("columns were formed")

    for name in ("rows", "sample_blocks"):
        monkeypatch.setattr(KhatriRaoColumns, name, refuse)
    U = vl.PerSampleGradients(of)
    assert close(vl.GGN(of).diagonal(), dense("mlp_ce_mean").G.diagonal())
    assert close(U.squared_norms(), dense("mlp_ce_mean").U.square().sum(0))
    vl.GGN(of).sample_diagonals()
    U.variance()


def test_little_memory() -> None:
    of = fresh("cnn", memory=1)
    assert close(vl.GGN(of).diagonal(), dense("cnn").G.diagonal())
    by_sample = dense("cnn").per_sample_ggn().diagonal(dim1=1, dim2=2)
    assert close(vl.GGN(of).sample_diagonals(), by_sample)
    U = vl.PerSampleGradients(of)
    assert close(U.squared_norms(), dense("cnn").U.square().sum(0))


def test_blocks_of_norms_are_checked() -> None:
    U = vl.PerSampleGradients(risk("mlp_ce_mean"))
    with pytest.raises(ValueError, match="blocks"):
        U.squared_norms("layer")


assert set(BEYOND) <= set(cases.NAMES)


# The Hessian ------------------------------------------------------------------------

# Models with forward mode and without, with and without batched backward passes.
CURVED = [
    "mlp_ce_mean",
    "residual",
    "attention",
    "recurrent_gru",
    "uneven_batches",
    "ce_everything",
    "ce_image_soft",
    "embedding",
    "linear_loss",
    "unused_parameters",
    "custom_function",
]


@functools.cache
def sample_hessians(name: str) -> Tensor:
    """The diagonals of ∇²ℓ_n one by one, by autograd on the samples alone."""
    p, of = problem(name), risk(name)
    chosen = {n: t.detach().double() for n, t in p.chosen().items()}
    model = p.reference(p.model)
    targets = torch.cat([y for _, y in p.batches()])
    outputs = dense(name).outputs
    rows, first = [], 0
    for X, y in p.batches():
        for n in range(len(y)):
            theta = {k: t.clone().requires_grad_() for k, t in chosen.items()}
            f = cases.call(model, theta, X)[n : n + 1]
            # The risk of all outputs as a function of this sample's.
            place = first + n
            full = torch.cat([outputs[:place], f, outputs[place + 1 :]])
            total = p.loss(full, targets) / of.reduction_factor
            slope = torch.autograd.grad(
                total, list(theta.values()), create_graph=True, materialize_grads=True
            )
            flat = torch.cat([g.flatten() for g in slope])
            row = []
            for i, entry in enumerate(flat):
                if not entry.requires_grad:
                    row.append(torch.zeros((), dtype=torch.float64))
                    continue
                second = torch.autograd.grad(
                    entry,
                    list(theta.values()),
                    retain_graph=True,
                    materialize_grads=True,
                )
                row.append(torch.cat([s.flatten() for s in second])[i])
            rows.append(torch.stack(row))
        first += len(y)
    return torch.stack(rows).detach()


@pytest.mark.parametrize("name", CURVED)
def test_hessian_diagonals_beyond_backpack(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, of = dense(name), risk(name)
    H = vl.Hessian(of)
    size = max(truth.hessian.diagonal().norm(), torch.tensor(1e-10))
    assert close(H.diagonal("products"), truth.hessian.diagonal(), size=size)
    expected = sample_hessians(name)
    total = of.reduction_factor * expected.sum(0)
    assert close(total, truth.hessian.diagonal(), size=size)
    size = max(expected.norm(), torch.tensor(1e-10))
    assert close(H.sample_diagonals("products"), expected, size=size)
    x = torch.ones(truth.D, 1, dtype=torch.float64)
    assert close(diagonals_one_by_one(H, x, H @ x), expected, size=size)
    H._chunks.possible = False
    assert close(H.diagonal("products"), truth.hessian.diagonal(), size=size)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", backpack_peer.HESSIAN)
def test_hessian_diagonals_as_backpack(name: str, reduction: str) -> None:
    parameters = backpack_peer.run(
        name, reduction, bp.DiagHessian(), bp.BatchDiagHessian()
    )
    of = peer_risk(name, reduction)
    H, r = vl.Hessian(of), of.reduction_factor
    diagonal = gathered(parameters, "diag_h")
    by_sample = gathered(parameters, "diag_h_batch", 1)
    for route in ("backpack", "products", None):
        assert close(H.diagonal(route), diagonal)
        assert close(r * H.sample_diagonals(route), by_sample)
    assert close(vl.linalg.diagonal(H), diagonal)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", backpack_peer.PRODUCTS)
def test_products_with_blocks_as_backpack(name: str, reduction: str) -> None:
    parameters = backpack_peer.run(
        name,
        reduction,
        bp.HMP(),
        bp.GGNMP(),
        bp.PCHMP(savefield="pchmp_clip", modify="clip"),
        bp.PCHMP(savefield="pchmp_abs", modify="abs"),
    )
    of = peer_risk(name, reduction)
    generator = torch.Generator().manual_seed(0)
    D = of.num_params
    X = torch.randn(D, 3, generator=generator, dtype=torch.float64)
    for field, op in {
        "hmp": vl.Hessian(of).block_diagonal("parameter"),
        "ggnmp": vl.GGN(of).block_diagonal("parameter"),
        "pchmp_clip": vl.PositiveCurvatureHessian(of),
        "pchmp_abs": vl.PositiveCurvatureHessian(of, modify="abs"),
    }.items():
        parts = zip(parameters, of.unflatten(X), strict=True)
        expected = of.flatten([getattr(p, field)(part) for p, part in parts])
        assert close(op @ X, expected)
        assert close(op @ X[:, 0], expected[:, 0])
        matrix = op.to_dense()
        assert close(matrix, matrix.T)
        if field.startswith("pchmp"):
            evals = torch.linalg.eigvalsh(matrix)
            assert evals.min() >= -1e-10 * evals.max()


@pytest.mark.parametrize("blocks", ["parameter", "module"])
@pytest.mark.parametrize("name", ["residual", "uneven_batches", "recurrent_gru"])
def test_products_with_blocks_beyond_backpack(name: str, blocks: str) -> None:
    truth, of = dense(name), risk(name)
    for whole, op in (
        (truth.hessian, vl.Hessian(of).block_diagonal(blocks)),
        (truth.G, vl.GGN(of).block_diagonal(blocks)),
    ):
        expected = torch.zeros_like(whole)
        for index in op.indices:
            expected[index[:, None], index] = whole[index[:, None], index]
        X = torch.randn(truth.D, 3, generator=torch.Generator().manual_seed(0))
        assert close(op @ X.double(), expected @ X.double())
        assert close(op @ X[:, 0].double(), expected @ X[:, 0].double())


def test_positive_curvature_hessian_of_piecewise_linear_nets() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    X, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    of = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    blocks = vl.GGN(of).block_diagonal("parameter").to_dense()
    for modify in ("clip", "abs"):
        P = vl.PositiveCurvatureHessian(of, modify=modify)
        assert close(P.to_dense(), blocks)


@pytest.mark.parametrize(
    ("name", "modify"),
    [("mlp_ce", "abs"), ("mlp_mse", "clip"), ("mlp_mse", "abs"), ("cnn_ce", "clip")],
)
def test_positive_curvature_hessian_by_module(name: str, modify: str) -> None:
    """With BackPACK's blocks inside."""
    of = peer_risk(name, "mean")
    expected = vl.PositiveCurvatureHessian(of, modify=modify).to_dense()
    each: list[Any] = [[n] for n in of.params]
    P = vl.PositiveCurvatureHessian(of, modify=modify, blocks=each)
    check_products(P, expected, 1e-12)
    modules = vl.PositiveCurvatureHessian(of, modify=modify, blocks="module")
    matrix = modules.to_dense()
    assert len(modules.blocks) < len(each)
    if name == "mlp_mse":
        check_operator(modules, matrix)
    check_products(modules, matrix, 1e-12)
    evals = torch.linalg.eigvalsh(matrix)
    assert evals.min() >= -1e-10 * evals.max()
    for place in torch.arange(of.num_params).split(of.sizes):
        index = place[:, None], place
        assert close(matrix[index], expected[index])


@pytest.mark.parametrize("modify", ["clip", "abs"])
def test_positive_curvature_hessian_of_a_module_densely(modify: str) -> None:
    """The Hessian's block, with the terms of the one function made positive."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    generator = torch.Generator().manual_seed(0)
    X, y = (torch.randn(6, k, generator=generator).double() for k in (3, 2))
    halves = [(X[:2], y[:2]), (X[2:], y[2:])]
    of = vl.EmpiricalRisk(net, nn.MSELoss(), halves)
    keywords: dict[str, Any] = {"modify": modify, "blocks": "module"}
    P = vl.PositiveCurvatureHessian(of, as_published=True, **keywords)
    z = net[0](X).detach()
    # Of the mean over 12 entries.
    slopes = 2 / 12 * (net(X) - y).detach() @ net[2].weight.detach()
    terms = -2 * z.tanh() * (1 - z.tanh().square()) * slopes
    inputs, unit = torch.cat([X, torch.ones(6, 1)], dim=1), torch.eye(4).double()
    J = torch.einsum("ij,na->nija", unit, inputs.double())  # [n, z, out, in + 1]
    J = torch.cat([J[..., :3].flatten(2), J[..., 3]], dim=2)
    expected = vl.Hessian(of).block_diagonal("module").to_dense()
    for op, slope in ((P, 1.0), (vl.PositiveCurvatureHessian(of, **keywords), slopes)):
        positive = terms * slope
        positive = positive.clamp(min=0) if modify == "clip" else positive.abs()
        added = torch.einsum("ni,nix,niy->xy", positive - terms, J, J)
        assert not close(added + expected[:16, :16], expected[:16, :16])
        whole = expected.clone()
        whole[:16, :16] += added
        assert close(op.to_dense(), whole)


def test_positive_curvature_hessian_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BackPACK cannot compute PCHMP.*BatchNorm1d"):
        vl.PositiveCurvatureHessian(peer_risk("batch_norm", "mean"))
    with pytest.raises(ValueError, match="modify: one of 'clip', 'abs'"):
        vl.PositiveCurvatureHessian(peer_risk("mlp_ce", "mean"), modify="square")


def test_routes_to_the_hessian_diagonal() -> None:
    with pytest.raises(ValueError, match=r"BackPACK cannot compute DiagHessian"):
        vl.Hessian(risk("residual")).diagonal("backpack")
    with pytest.raises(ValueError, match="route: one of"):
        vl.Hessian(risk("residual")).diagonal("exact")
    net, loss, data = backpack_peer.built("mlp_ce", "mean")
    little = vl.EmpiricalRisk(net, loss, data, memory=100)
    with pytest.raises(ValueError, match="bytes"):
        vl.Hessian(little).diagonal("backpack")
    with pytest.raises(ValueError, match="bytes"):
        vl.Hessian(little).sample_diagonals("backpack")
    expected = vl.Hessian(peer_risk("mlp_ce", "mean")).diagonal("products")
    assert close(vl.Hessian(little).diagonal(), expected)


def test_costs_are_said_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    cost = vl.Hessian(peer_risk("mlp_ce", "mean")).explain_diagonal()
    assert capsys.readouterr().out == f"{cost}\n"
    assert cost.products == 7 * 6 + 6 + 6 * 5 + 5 + 5 * 4 + 4 and cost.seconds > 0
    assert cost.refusal is None and cost.recursion_seconds > 0
    refused = vl.Hessian(risk("residual")).explain_diagonal()
    assert refused.refusal is not None and "BackPACK cannot" in str(refused)


def test_estimated_diagonal() -> None:
    """Within 5 standard errors entry by entry, and these are the right ones."""
    truth = dense("residual").hessian
    H = vl.Hessian(risk("residual"))
    state = torch.random.get_rng_state()
    mean, error = vl.estimate_diagonal(H, 200, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ((mean - truth.diagonal()).abs() <= 5 * error + 1e-14).all()
    variance = truth.square().sum(1) - truth.diagonal().square()
    assert close(error, (variance / 200).sqrt(), rtol=0.15)
    with pytest.raises(ValueError, match="num_products"):
        vl.estimate_diagonal(H, 1)
    with pytest.raises(ValueError, match="square"):
        vl.estimate_diagonal(vl.Jacobian(risk("residual")), 5)
