"""Products with VᵀV on stored columns, between samples and through the parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import dense, problem
from vivit_linop.curvature import plan
from vivit_linop.linalg import tracking
from vivit_linop.net import inner
from vivit_linop.net.costs import layer_costs
from vivit_linop.net.inner import InnerProducts

# Linear layers, groups and positions, tables, shared and joined weights, norms, batches
# of several sizes, parameters without use.
NAMES = [
    "mlp_ce_mean",
    "convolutions",
    "embedding",
    "attention",
    "reused_and_tied",
    "normalisations",
    "uneven_batches",
    "unused_parameters",
    "low_rank_adapter",
    "sparse_embedding",
]


@pytest.mark.parametrize("between", [True, False, None])
@pytest.mark.parametrize("name", NAMES)
def test_products_of_nets(
    name: str, between: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways, and what is taken by itself, against J Jᵀ of torch.func."""
    if between is not None:
        monkeypatch.setattr(inner, "between_pays", lambda parts, vectors: between)
    arguments, keywords = problem(name).arguments()
    J = vl.Jacobian(*arguments, **keywords)
    J.pullback.keep_columns()
    assert J.pullback.stored is not None
    products, truth = InnerProducts(J.pullback.stored, 3), dense(name).J
    X = torch.linspace(-1, 2, 3 * len(truth), dtype=torch.float64).view(-1, 3).cos()
    torch.testing.assert_close(products.multiply(X), truth @ (truth.T @ X))
    torch.testing.assert_close(
        products.multiply(X[:, :1]), truth @ (truth.T @ X[:, :1])
    )


def test_vectors_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "between_pays", lambda parts, vectors: True)
    monkeypatch.setattr(inner, "CACHED_BYTES", 1)
    test_products_of_nets("convolutions", None, monkeypatch)


def test_few_samples_of_wide_layers_are_multiplied_with_each_other() -> None:
    _, risk = problem_of(6, width=64)
    pullback = vl.Jacobian(risk).pullback
    pullback.keep_columns()
    assert pullback.stored is not None
    (_, *others), (columns, *_) = (
        list(piece.columns.values()) for piece in pullback.stored.pieces[:2]
    )
    assert others and inner.between_pays([columns], 10)
    assert not inner.between_pays([columns] * 100, 10)


# Eigenpairs that are followed --------------------------------------------------------


def problem_of(
    samples: int, width: int = 20, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, vl.EmpiricalRisk]:
    torch.manual_seed(0)
    X, y = torch.randn(samples, 6).to(dtype), torch.arange(samples) % 4
    net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 4)).to(dtype)
    data = [(X[:4], y[:4]), (X[4:], y[4:])]
    return net, vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)


@pytest.fixture
def on_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems would take the linearisation."""
    monkeypatch.setattr(plan, "followed_on_columns", lambda *_: True)


def step(net: nn.Module, risk: vl.EmpiricalRisk, rate: float) -> vl.EmpiricalRisk:
    risk.add_to_(net, -rate * risk.gradient())
    return risk.at()


def check(pairs: Any, matrix: Tensor, tol: float) -> None:
    """Ritz values below the exact ones by no more, with their orthonormal vectors."""
    evals, evecs = (part.double() for part in pairs)
    matrix, k = matrix.double(), len(pairs)
    exact = torch.linalg.eigvalsh(matrix)[-k:]
    rounding = 1e-4 if pairs.eigenvalues.dtype == torch.float32 else 1e-9
    assert (evals <= exact + rounding * exact[-1]).all()
    assert (exact - evals).sum() <= tol * exact[-1]
    unit = torch.eye(k, dtype=torch.float64)
    assert (evecs.T @ evecs - unit).norm() <= 10 * rounding
    quotients = (evecs * (matrix @ evecs)).sum(0)
    assert (quotients - evals).norm() <= 10 * rounding * exact[-1]


@pytest.mark.usefixtures("on_columns")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rate", [0.05, 2.0])
def test_pairs_are_followed_by_products_with_the_gram_operator(
    rate: float, dtype: torch.dtype
) -> None:
    net, risk = problem_of(12, dtype=dtype)
    pairs: Any = vl.GGN(risk).eigh(k=4)
    for _ in range(5):
        risk = step(net, risk, rate)
        G = vl.GGN(risk)
        pairs = G.eigh(k=4, start=pairs)
        assert pairs.route == "tracked" and pairs.block.far
        assert not G.gram.known  # its matrix is not needed
        check(pairs, G.to_dense(), 0.02)
    for tol in (1e-4, 1e-7):
        check(G.eigh(k=3, start=pairs, tol=tol), G.to_dense(), 50 * tol)


@pytest.mark.usefixtures("on_columns")
@pytest.mark.parametrize("kind", ["scaled", "fisher", "damped", "vectors", "far"])
def test_other_operators_and_beginnings(kind: str) -> None:
    net, risk = problem_of(12)

    def make(risk: vl.EmpiricalRisk) -> Any:
        if kind == "fisher":
            return vl.EmpiricalFisher(risk)
        G = vl.GGN(risk)
        if kind == "damped":
            return G + 0.3 * vl.Identity(risk.num_params)
        return 3 * G if kind == "scaled" else G

    start = make(risk).eigh(k=5)
    if kind == "vectors":
        start = vl.linalg.Eigenpairs(*start)
    if kind == "far":
        generator = torch.Generator().manual_seed(0)
        shape = risk.num_params, 5
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        start = vl.linalg.Eigenpairs(torch.ones(5).double(), torch.linalg.qr(random).Q)
    A = make(step(net, risk, 0.2))
    pairs = A.eigh(k=5, start=start, tol=1e-4 if kind == "far" else 5e-3)
    assert pairs.route == "tracked"
    check(pairs, A.to_dense(), 0.02)


@pytest.mark.usefixtures("on_columns")
def test_vectors_are_those_of_the_operator_that_they_were_found_for() -> None:
    """Formed later, when the model has moved on, and values have been written to."""
    net, risk = problem_of(12)
    start = vl.GGN(risk).eigh(k=4)
    G = vl.GGN(step(net, risk, 0.2))
    matrix, pairs = G.to_dense(), G.eigh(k=4, start=start)
    values = pairs.eigenvalues.clone()
    pairs.eigenvalues.zero_()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    evecs = pairs.eigenvectors
    torch.testing.assert_close((evecs * (matrix @ evecs)).sum(0), values)


@pytest.mark.usefixtures("on_columns")
def test_fewer_pairs_than_vectors() -> None:
    """Of one sample, given four times, G has three pairs; four come from its matrix."""
    X = torch.rand(1, 3, dtype=torch.float64).expand(4, 3)
    G = vl.GGN(nn.Linear(3, 3).double(), nn.MSELoss(), (X, X))
    start = vl.linalg.Eigenpairs(
        torch.ones(4), torch.eye(12, dtype=torch.float64)[:4].T
    )
    for k in (2, 4):
        pairs, exact = G.eigh(k=k, start=start), torch.linalg.eigvalsh(G.to_dense())
        assert pairs.route == "dense Gram"
        torch.testing.assert_close(pairs.eigenvalues, exact[-k:])


def test_dependent_vectors_are_refused() -> None:
    inner_products = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(tracking.NotNear):
        tracking._ritz(inner_products, inner_products, 2)
    squares, _ = tracking._ritz(inner_products, 2 * inner_products, 1)
    torch.testing.assert_close(squares, torch.tensor([2.0], dtype=torch.float64))


def test_the_plan_takes_columns_where_they_are_the_cheaper_way() -> None:
    """A wide MLP on few samples; not on many, and not with many cotangents.

    By the costs of a CPU, wherever the tests run.
    """
    net = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10))

    def chosen(samples: int, vectors: int = 10, width: int = 9) -> bool:
        data = torch.rand(samples, 300), torch.randint(10, (samples,))
        risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
        return plan.followed_on_columns(
            layer_costs(risk, width), width, vectors, torch.device("cpu")
        )

    assert chosen(300)
    assert not chosen(5)  # overhead
    assert not chosen(300, width=200)


@pytest.mark.usefixtures("on_columns")
def test_training_that_goes_to_and_fro() -> None:
    """From the third step on, pairs begin where they were two steps before."""
    net, risk = problem_of(12)
    step = -8.0 * risk.gradient()
    pairs: Any = vl.GGN(risk).eigh(k=4)
    taken = []
    for count in range(6):
        risk.add_to_(net, step if count % 2 == 0 else -step)
        risk = risk.at()
        G = vl.GGN(risk)
        pairs = G.eigh(k=4, start=pairs)
        check(pairs, G.to_dense(), 0.02)
        taken.append(pairs.half_steps)
    assert min(taken[:2]) > 2 and taken[-2:] == [2, 2]
    assert pairs.following is pairs.before
    # What it is guessed to be decides nothing but how long it takes.
    check(G.eigh(k=4, start=pairs, tol=1e-7), G.to_dense(), 1e-5)


def krylov(size: int = 4) -> tuple[Tensor, Tensor, tracking.Krylov, list[int]]:
    """A factor and vectors, what is missing of its pairs, and columns multiplied."""
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    V = V * torch.linspace(-3, 0, 30, dtype=torch.float64).exp()
    K, columns = V.T @ V, []

    class Counted(vl.Dense):
        def _multiply(self, X: Tensor) -> Tensor:
            columns.append(X.shape[1])
            return super()._multiply(X)

    near = torch.linalg.eigh(K).eigenvectors[:, -size:]
    near = near + 0.1 * torch.randn(30, size, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(near).Q
    return K, Q, tracking.Krylov(Counted(V), Q), columns


def test_what_is_missing_is_bounded_or_told_by_a_vector() -> None:
    K, Q, found, columns = krylov()
    W = K @ Q
    L = torch.linalg.cholesky(Q.T @ W)
    A = torch.linalg.solve_triangular(L, W.T, upper=False)  # Ritz: A Aᵀ
    values, Y = torch.linalg.eigh(A @ A.T)
    torch.testing.assert_close(found.squares, values)
    Z = torch.linalg.solve_triangular(L.mT, Y, upper=True)
    D = W @ Z / values.sqrt() - values.sqrt() * (Q @ Z)
    rise = float((D * (K @ D)).sum() / values[-1])
    columns.clear()
    bound, told_by = found.rise(1e3)
    assert told_by is None and not columns and rise <= bound <= 1e3
    told, told_by = found.rise(1e-9)
    assert told_by is not None and columns == [1] and 0.1 * rise < told < 10 * rise


def test_few_directions_are_enough_for_the_second_product() -> None:
    K, _, found, columns = krylov()
    exact = torch.linalg.eigvalsh(K)[-4:]
    before = float((exact - found.squares).sum() / exact[-1])
    rise, told_by = found.rise(1e-12)
    columns.clear()
    found.widen(1.0, told_by)
    after = float((exact - found.squares).sum() / exact[-1])
    assert sum(columns) < 3 and 0 <= after < before - 0.3 * rise
    for _ in range(3):
        found.widen(1e-9, found.rise(1e-12)[1])
    torch.testing.assert_close(found.squares, exact)
