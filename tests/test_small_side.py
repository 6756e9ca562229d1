"""One matrix and one decomposition serve all that is exact about c V Vᵀ + δ I."""

import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vivit_linop as vl
from tests.composition_cases import close, risks
from tests.operator_market import Draw
from tests.pairs import pairwise
from vivit_linop.operators import Gram, LowRank, Woodbury, damped_solver, symmetric

FLOAT64 = torch.float64


@pytest.fixture
def decompositions(monkeypatch):
    """The sizes of the matrices that are decomposed."""
    calls = []
    for name in ("symmetric_eigenpairs", "symmetric_eigenvalues"):
        function = getattr(symmetric, name)

        def counted(matrix, function=function):
            calls.append(len(matrix))
            return function(matrix)

        monkeypatch.setattr(symmetric, name, counted)
    return calls


@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_eigenpairs_serve_every_verb_scale_and_damping(kind, decompositions):
    train, _ = risks(kind, FLOAT64)
    V = vl.GGNFactor(train).to_dense()
    G, D, A = vl.GGN(train), len(V), V @ V.T
    G.eigh()
    for scale, delta in ((1.0, 0.1), (1.0, 1e-3), (3.0, 0.5)):
        op = scale * G + delta * vl.Identity(D)
        matrix = scale * A + delta * torch.eye(D).double()
        inverse = torch.linalg.inv(matrix)
        S = op.inv()
        close(S.to_dense(), inverse, FLOAT64)
        close(S.diagonal(), inverse.diagonal(), FLOAT64)
        close(S.trace(), inverse.trace(), FLOAT64)
        close(op.logdet(), torch.logdet(matrix), FLOAT64)
        close(op.eigvalsh(), torch.linalg.eigvalsh(matrix), FLOAT64)
        for root, square in ((op.sqrt(), matrix), (S.sqrt(), inverse)):
            close((root @ root.T).to_dense(), square, FLOAT64)
        largest = torch.linalg.eigvalsh(scale * A)[-2:]
        close((scale * G).eigh(k=2).eigenvalues, largest, FLOAT64)
    assert decompositions == [min(V.shape)]


@pytest.mark.parametrize("kind", ["tall", "wide"])
def test_determinants_cost_one_decomposition(kind, decompositions):
    train, _ = risks(kind, FLOAT64)
    G = vl.GGN(train)
    V = vl.GGNFactor(train).to_dense()
    D, A = len(V), V @ V.T
    G.eigvalsh().zero_()  # the caller's own
    taus = torch.logspace(-3, 1, 20).double()
    matrices = [A + tau * torch.eye(D).double() for tau in taus]
    exact = torch.stack([torch.logdet(matrix) for matrix in matrices])
    close(G.logdet(damping=taus), exact, FLOAT64)
    for tau, matrix, expected in zip(taus.tolist(), matrices, exact, strict=True):
        damped = G + tau * vl.Identity(D)
        close(damped.logdet(), expected, FLOAT64)
        close(damped.inv().trace(), torch.linalg.inv(matrix).trace(), FLOAT64)
    close((3 * damped).eigvalsh(), 3 * torch.linalg.eigvalsh(matrix), FLOAT64)
    assert decompositions == [min(V.shape)]


def test_what_is_kept_is_within_the_budget(decompositions):
    V = vl.Dense(Draw(FLOAT64)(9, 4))
    K = Gram(V, V, symmetric.KeptMatrix(lambda: 8 * 16 - 1))
    for _ in range(2):
        evals, _ = K.eigenpairs
        assert not K.kept.decomposed
    assert decompositions == [4, 4]
    torch.testing.assert_close(evals, K.eigenvalues)
    train, _ = risks("tall", FLOAT64)
    G = vl.GGN(train)
    G.eigh()
    assert G.kept.decomposed


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)], ids=str)
def test_traces_come_from_a_matrix_that_is_known(shape):
    V = vl.Dense(Draw(FLOAT64)(*shape))
    G, trace = 0.5 * (V @ V.T), 0.5 * V.matrix.square().sum()
    torch.testing.assert_close(G.trace(), trace)
    G.eigvalsh()
    V.matrix.fill_(torch.nan)  # nothing is computed of it
    torch.testing.assert_close(G.trace(), trace)


def test_a_factor_squares_itself_where_it_is_the_wide_one(monkeypatch):
    """Jᵀ has a rule for J Jᵀ of columns; its adjoint J would take products."""
    torch.manual_seed(0)
    data = torch.rand(16, 3, dtype=FLOAT64), torch.rand(16, 2, dtype=FLOAT64)
    risk = vl.EmpiricalRisk(nn.Linear(3, 2).double(), nn.MSELoss(), data)
    J = vl.Jacobian(risk)
    G, dense = J.T @ J, J.to_dense()
    assert not G.by_gram

    def refuse(self, X):
        raise AssertionError("J multiplies")

    monkeypatch.setattr(vl.Jacobian, "_multiply", refuse)
    close(G.eigvalsh(), torch.linalg.eigvalsh(dense.T @ dense), FLOAT64)
    close(
        (G + vl.Identity(8)).logdet(),
        (dense.T @ dense).add(torch.eye(8)).logdet(),
        FLOAT64,
    )


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile have taken together."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = tree_leaves((args, kwargs))
        known = {
            x.untyped_storage()._cdata for x in given if isinstance(x, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage(), known)
        return result

    def _count(self, storage, known):
        key = storage._cdata
        if key in known or key in self.seen:
            return
        self.seen.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key, nbytes):
        self.seen.discard(key)
        self.now -= nbytes


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_memory_of_an_inverse(dtype):
    """K and a factor of its size: the factorisation is in place."""
    V = vl.Dense(Draw(dtype)(400, 300))
    G = V @ V.T
    K = G.gram.matrix
    with Peak() as peak:
        S = (2 * G + 10.0 * vl.Identity(400)).inv()
    assert K.nbytes + peak.most <= 2.5 * K.nbytes
    x = Draw(dtype)(400)
    with Peak() as peak:
        product = S @ x
    assert peak.most <= 0.2 * K.nbytes
    matrix = (
        2 * V.matrix.double() @ V.matrix.double().T + 10.0 * torch.eye(400).double()
    )
    close(product, torch.linalg.solve(matrix, x.double()), dtype)
    L = S._solver._cholesky
    assert L.dtype == dtype and L.untyped_storage().nbytes() == K.nbytes


@pytest.mark.parametrize(
    ("shape", "dtype", "known"),
    pairwise(
        [(800, 600), (1000, 600), (600, 800)],
        [torch.float32, FLOAT64],
        [False, True],
    ),
    ids=str,
)
def test_memory_of_the_diagonal_of_an_inverse(shape, dtype, known):
    """Beside K and its factor, by either: some columns of V L⁻ᵀ at a time."""
    V = vl.Dense(Draw(dtype)(*shape))
    G = V @ V.T
    if known:
        G.eigh()
    S = (2 * G + 10.0 * vl.Identity(shape[0])).inv()
    small = dtype.itemsize * min(shape) ** 2
    with Peak() as peak:
        entries = S.diagonal()
    assert peak.most <= 0.5 * small
    damped = 2 * V.matrix.double() @ V.matrix.double().T
    damped.diagonal().add_(10.0)
    close(entries, damped.inverse().diagonal(), dtype)


@pytest.mark.parametrize("kind", ["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_inverses_of_damped_inverses(kind, dtype):
    """Of a posterior and noise: no product with the operator, none with columns."""
    train, test = risks(kind, dtype)
    G, D = vl.GGN(train) + vl.GGN(test), train.num_params
    A = G.to_dense().double() + 0.1 * torch.eye(D).double()
    for delta in (0.3, 20.0):
        S = (G + 0.1 * vl.Identity(D)).inv() + delta * vl.Identity(D)
        truth = torch.linalg.inv(torch.linalg.inv(A) + delta * torch.eye(D).double())
        found, x = S.inv(), torch.linspace(-1, 1, D).to(dtype)
        close(found @ x, truth @ x.double(), dtype)
        close(found.diagonal(), truth.diagonal(), dtype)
        close(S.solve(x), truth @ x.double(), dtype)
    least = torch.finfo(dtype).eps ** 0.5
    with pytest.raises(TypeError, match="no closed form for a damped Woodbury"):
        ((G + 0.1 * vl.Identity(D)).inv() + least * vl.Identity(D)).inv()
    small = vl.Dense(A[:4, :4]).inv() + 0.3 * vl.Identity(4)
    truth = torch.linalg.inv(torch.linalg.inv(A[:4, :4]) + 0.3 * torch.eye(4).double())
    close(small.inv().to_dense(), truth, FLOAT64)


def nets():
    """Wide and narrow nets, and one with convolutions; how many samples they get."""
    yield nn.Sequential(nn.Linear(100, 30), nn.ReLU(), nn.Linear(30, 10)), (160, 100)
    yield nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 10)), (80, 30)
    conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten())
    yield nn.Sequential(conv, nn.Linear(128, 10)), (80, 1, 6, 6)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@pytest.mark.parametrize("number", range(3))
def test_memory_of_what_an_inverse_does(number, dtype):
    """Of nets, beside K and its factor; K is what a user has already."""
    net, shape = list(nets())[number]
    X, y = torch.randn(shape).to(dtype), torch.randint(10, shape[:1])
    risk = vl.EmpiricalRisk(net.to(dtype), nn.CrossEntropyLoss(), (X, y))
    G, D = vl.GGN(risk), risk.num_params
    S = (G + 0.1 * vl.Identity(D)).inv()
    _ = S @ torch.ones(D).to(dtype), S @ torch.ones(D).to(dtype)  # columns, if stored
    small = dtype.itemsize * min(G.factor.shape) ** 2
    evals = torch.linalg.eigvalsh(G.gram.to_dense().double()).clamp(min=0.0)
    zeros = D - len(evals)
    verbs = {
        "product": lambda: S @ torch.ones(D).to(dtype),
        "logdet": S.logdet,
        "trace": S.trace,
        "diagonal": S.diagonal,
        "sample": lambda: S.sample(2),
    }
    found = {}
    for name, verb in verbs.items():
        with Peak() as peak:
            found[name] = verb()
        assert peak.most <= 0.5 * small, (name, peak.most / small)
    logdet = -(evals + 0.1).log().sum() - zeros * math.log(0.1)
    close(found["logdet"], logdet, dtype)
    close(found["trace"], (1 / (evals + 0.1)).sum() + zeros / 0.1, dtype)
    some = torch.arange(0, D, D // 20)
    units = torch.zeros(D, len(some), dtype=dtype)
    units[some, torch.arange(len(some))] = 1.0
    close(found["diagonal"][some], (S @ units)[some].diagonal(), dtype)
    assert not G.kept.has_eigenvalues


def test_factors_where_rounding_is_large():
    """In float32 as long as that can be, then in float64, then not at all."""
    draw = Draw(FLOAT64)
    Q, W = torch.linalg.qr(draw(300, 60)).Q, torch.linalg.qr(draw(60, 60)).Q
    V = (Q * torch.logspace(0, -6, 60, dtype=FLOAT64) @ W.T).float()
    factor, A = vl.Dense(V), V.double() @ V.double().T
    G, b, found = factor @ factor.T, draw(300).float(), []
    for delta in (1e-3, 1e-5, 3e-7):
        S = (G + delta * vl.Identity(300)).inv()
        x = torch.linalg.solve(A + delta * torch.eye(300).double(), b.double())
        error = ((S @ b).double() - x).norm() / x.norm()
        assert error <= 1e-7 / delta, error
        found.append(S._solver._cholesky.dtype)
    assert found[0] == torch.float32
    with pytest.raises(ValueError, match="damping: 1e-12 is below the rounding error"):
        (G + 1e-12 * vl.Identity(300)).inv()


def test_room_is_asked_for_before_it_is_taken(monkeypatch):
    V = vl.Dense(Draw(FLOAT64)(40, 20))
    G = V @ V.T
    nbytes = G.gram.matrix.nbytes
    monkeypatch.setattr(damped_solver, "free_memory", lambda device: nbytes - 1)
    with pytest.raises(MemoryError, match=r"inv: the Cholesky factor.*20 rows.*cg"):
        (G + vl.Identity(40)).inv()
    monkeypatch.setattr(damped_solver, "free_memory", lambda device: nbytes)
    assert isinstance((G + vl.Identity(40)).inv(), Woodbury)


def test_decompositions_travel():
    V = vl.Dense(Draw(FLOAT64)(9, 4))
    G = LowRank(V)
    G.eigh()
    copied = pickle.loads(pickle.dumps(G))
    torch.testing.assert_close(copied.eigvalsh(), G.eigvalsh())
    S = pickle.loads(pickle.dumps((G + vl.Identity(9)).inv()))
    torch.testing.assert_close(S.to_dense(), (G + vl.Identity(9)).inv().to_dense())
