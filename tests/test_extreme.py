"""Eigenpairs at the ends of the spectrum, for operators without a closed form."""

import numpy as np
import pytest
import torch
from scipy.sparse import linalg as sparse
from torch import nn

import vivit_linop as vl
from tests import placing
from tests.composition_cases import risks
from tests.operator_market import Draw
from tests.pairs import in_turn
from vivit_linop.linalg import eigen, krylov

FLOAT64 = torch.float64
TOLERANCE = {torch.float32: 2e-4, FLOAT64: 1e-9}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def hessian_of(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
    data = torch.rand(20, 4).to(dtype), torch.randint(3, (20,))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
    return vl.Hessian(risk), vl.GGN(risk), vl.KFAC(risk, variant="exact")


def expressions(dtype):
    H, G, F = hessian_of(dtype)
    D = vl.Diagonal(torch.linspace(-1, 1, H.shape[0], dtype=dtype))
    unit = vl.Identity(H.shape[0])
    return {
        "Hessian": H,
        "damped": H + 0.5 * unit,
        "scaled": 2 * H,
        "negative": -H,
        "difference": H - G,
        "sum": G + F,
        "sum with a diagonal": G + D,
        "product": D @ H @ D,
        "damped by a diagonal": G + vl.Diagonal(1.5 + D.entries),
        "inverse": (G + vl.Diagonal(1.5 + D.entries)).inv(),
    }


def chosen(evals, k, which):
    if which == "LA":
        return evals[-k:]
    if which == "SA":
        return evals[:k]
    return evals[evals.abs().argsort()[-k:]].sort().values


@pytest.mark.parametrize(
    ("name", "dtype"), in_turn(expressions(FLOAT64), TOLERANCE), ids=str
)
def test_ends_of_spectra(name, dtype):
    op, exact = expressions(dtype)[name], expressions(FLOAT64)[name]
    dense = exact.to_dense()
    dense = (dense + dense.T) / 2
    evals = torch.linalg.eigvalsh(dense)
    scale = evals.abs().max()
    for which in eigen.WHICH:
        pairs = op.eigh(k=3, which=which)
        assert pairs.eigenvalues.dtype == pairs.eigenvectors.dtype == dtype
        found = pairs.eigenvalues.double()
        tolerance = TOLERANCE[dtype] * scale
        assert (found - chosen(evals, 3, which)).abs().max() <= tolerance
        E = pairs.eigenvectors.double()
        assert (E.T @ E - torch.eye(3).double()).norm() <= TOLERANCE[dtype]
        assert (dense @ E - E * found).norm() <= 10 * tolerance
    assert torch.equal(op.eigh(k=3).eigenvalues, op.eigh(k=3).eigenvalues)


@pytest.mark.parametrize(
    ("name", "dtype"), in_turn(expressions(FLOAT64), TOLERANCE), ids=str
)
def test_all_pairs_of_few_rows(name, dtype):
    """Also between the ends, and what is computed from all eigenvalues."""
    op, dense = expressions(dtype)[name], expressions(FLOAT64)[name].to_dense()
    expected = torch.linalg.eigvalsh((dense + dense.T) / 2)
    tolerance = TOLERANCE[dtype] * expected.abs().max()
    for pairs in (op.eigh(), op.eigh(select=lambda evals: range(len(evals)))):
        evals, E = (part.double() for part in pairs)
        assert (evals - expected).abs().max() <= tolerance
        assert (dense @ E - E * evals).norm() <= 10 * tolerance
    assert (op.eigvalsh().double() - expected).abs().max() <= tolerance
    if expected.abs().min() > 1e-3 * expected.abs().max() and "diagonal" not in name:
        logdet = expected.abs().log().sum()
        torch.testing.assert_close(op.logdet().double(), logdet, rtol=1e-3, atol=1e-3)


def test_the_route_is_said():
    H, G, F = hessian_of(FLOAT64)
    assert H.eigh(k=2).route == placing.krylov("Hessian")
    assert (G + F).eigh(k=2).route == placing.krylov("Sum")
    assert (H + vl.Identity(H.shape[0])).eigh(k=2).route == placing.krylov("Hessian")
    # Where there is something better, that is taken, unless an iteration is asked for.
    assert F.eigh(k=2, which="SA").route == "dense"
    assert G.eigh(k=2, which="LM").route == "dense"
    assert G.eigh(k=2, tol=1e-6).route == placing.krylov("GGN")


def test_few_rows_are_dense():
    draw = Draw(FLOAT64)
    A, B = draw.symmetric(12), draw.symmetric(12)
    op = vl.Kronecker(A[:3, :3], A[4:8, 4:8]) + vl.Dense(B)
    matrix = torch.kron(A[:3, :3].contiguous(), A[4:8, 4:8].contiguous()) + B
    evals = torch.linalg.eigvalsh(matrix)
    for which in eigen.WHICH:
        for k in (1, 11, 12):
            pairs = op.eigh(k=k, which=which)
            assert pairs.route == "dense"
            torch.testing.assert_close(pairs.eigenvalues, chosen(evals, k, which))


def test_the_start_and_the_accuracy_reach_arpack(monkeypatch):
    H, _, _ = hessian_of(FLOAT64)
    seen = []

    def eigsh(A, k, **options):
        seen.append(options)
        return sparse.eigsh(A, k, **options)

    monkeypatch.setattr(krylov, "eigsh", eigsh)
    v0 = torch.arange(1.0, 1 + H.shape[0])
    for start in (v0, v0.numpy(), v0.tolist()):
        H.eigh(k=2, v0=start, tol=1e-3, which="SA", route="ARPACK")
        options = seen.pop()
        assert options["tol"] == 1e-3 and options["which"] == "SA"
        np.testing.assert_array_equal(options["v0"], v0.double().numpy())


def test_ends_without_vectors_are_refused():
    _, test = risks("tall", FLOAT64)
    G = vl.GGN(test)
    assert G.factor.shape[1] < G.shape[0] - 2
    for op in (G, 2 * G + 0.1 * vl.Identity(G.shape[0])):
        with pytest.raises(ValueError, match=r"k: the 2 eigenvalues .*tol="):
            op.eigh(k=2, which="SA")
        least = op.eigh(k=2, which="SA", tol=0.0).eigenvalues
        expected = torch.linalg.eigvalsh(op.to_dense())[:2]
        torch.testing.assert_close(least, expected, atol=1e-10, rtol=1e-8)
    negative = -1.0 * G
    evals = torch.linalg.eigvalsh(negative.to_dense())
    for which in ("SA", "LM"):
        found = negative.eigh(k=2, which=which).eigenvalues
        torch.testing.assert_close(found, evals[:2])


def test_bad_input_is_named():
    H, G, _ = hessian_of(FLOAT64)
    for call, error, message in (
        (lambda: H.eigh(k=2, which="BE"), ValueError, "which: one of 'LA', 'SA'"),
        (lambda: H.eigh(which="SA"), ValueError, "which, tol, v0: .*Give k="),
        (lambda: G.eigh(k=2, tol=1e-3, route="dense Gram"), ValueError, "route= out"),
        (lambda: H.eigh(k=0), ValueError, "k: .* between 1 and 75"),
        (lambda: H.eigh(k=1.5), TypeError, "k: an integer"),
        (lambda: H.eigh(k=2, tol=-1.0), ValueError, "tol: a number"),
        (lambda: H.eigh(k=2, v0=torch.ones(3)), ValueError, r"v0: a vector of 75"),
        (lambda: H.eigh(k=2, v0=torch.zeros(75)), ValueError, "v0:.*not all 0"),
    ):
        with pytest.raises(error, match=message):
            call()
    p = torch.ones(75, dtype=FLOAT64, requires_grad=True)
    with pytest.raises(TypeError, match="requires grad"):
        (G + vl.Diagonal(p)).eigh(k=2)


def small_end(dtype):
    """A sum whose least eigenvalues are zeros but for rounding."""
    draw = Draw(FLOAT64)
    Q = torch.linalg.qr(draw(80, 80)).Q
    evals = torch.cat([torch.zeros(3), torch.linspace(0.2, 1, 77)]).double()
    matrix = Q * evals @ Q.T
    half = vl.Dense((matrix / 2 + Q[:, :1] @ Q[:, :1].T).to(dtype))
    low_rank = vl.Dense(Q[:, :1].to(dtype))
    return half + vl.Kronecker(vl.Dense(torch.eye(1).to(dtype)), half) - 2 * (
        low_rank @ low_rank.T
    ), evals


@every_dtype
@pytest.mark.parametrize("rows", [0, 2000])
def test_zeros_at_the_end_of_a_spectrum(dtype, rows, monkeypatch):
    """ARPACK asks for more than rounding has; shifted, or from the matrix."""
    monkeypatch.setattr(eigen, "DENSE_ROWS", rows)
    op, evals = small_end(dtype)
    for sign, which in ((1, "SA"), (-1, "LA")):
        pairs = (sign * op).eigh(k=3, which=which)
        assert pairs.eigenvalues.abs().max() <= TOLERANCE[dtype]
        residual = op @ pairs.eigenvectors
        assert residual.norm() <= TOLERANCE[dtype]
    assert (op.eigh(k=2).eigenvalues - evals[-2:]).abs().max() <= TOLERANCE[dtype]


@every_dtype
@pytest.mark.parametrize("route", ["ARPACK", "Lanczos"])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("copies, gap", [(3, 0.2), (5, 1.0), (10, 0.05)])
def test_copies_of_an_eigenvalue(copies, gap, which, route, dtype):
    """One vector's Krylov space has one of them, and others by rounding only."""
    draw = Draw(FLOAT64)
    Q = torch.linalg.qr(draw(160, 160)).Q
    evals = torch.linspace(0.0, 1.0, 160).double()
    if which == "SA":
        evals[:copies] = -gap
    else:
        evals[-copies:] = 1.0 + gap
    A = Multiplier((Q * evals @ Q.T).to(dtype))
    pairs = A.eigh(k=copies, which=which, route=route)
    expected = chosen(evals, copies, which)
    E, tolerance = pairs.eigenvectors, 10 * TOLERANCE[dtype]
    assert pairs.route in (f"{route} on Multiplier", "dense")  # if it takes too long
    assert (pairs.eigenvalues - expected).abs().max() <= tolerance
    assert (A @ E - E * pairs.eigenvalues).norm() <= tolerance
    assert (E.T @ E - torch.eye(copies)).abs().max() <= tolerance


@every_dtype
@pytest.mark.parametrize("route", ["ARPACK", "Lanczos"])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e20])
def test_very_small_and_very_large_matrices(size, which, route, dtype):
    """ARPACK takes small eigenvalues for larger ones, and squares may be no numbers."""
    Q = torch.linalg.qr(Draw(FLOAT64)(160, 160)).Q
    evals = torch.linspace(-1.0, 1.2, 160).double()
    A = Multiplier((size * (Q * evals @ Q.T)).to(dtype))
    pairs = A.eigh(k=3, which=which, route=route)
    expected, tolerance = chosen(evals, 3, which), 10 * TOLERANCE[dtype]
    E = pairs.eigenvectors.double()
    assert pairs.route == f"{route} on Multiplier"
    assert (pairs.eigenvalues.double() / size - expected).abs().max() <= tolerance
    residual = A.matrix.double() @ E / size - E * expected
    assert residual.norm() <= tolerance


@every_dtype
@pytest.mark.parametrize("size", [1e-30, 1e-12])
def test_very_small_known_matrices(size, dtype):
    V = vl.Dense((size**0.5 * Draw(FLOAT64)(170, 160)).to(dtype))
    G = V @ V.T
    expected = torch.linalg.svdvals(V.matrix.double() / size**0.5)[:4].flip(0) ** 2
    assert G.gram.matrix.shape == (160, 160)
    pairs = G.eigh(k=4, route="ARPACK on K")
    error = (pairs.eigenvalues.double() / size - expected).abs().max()
    assert error <= 10 * TOLERANCE[dtype] * expected.max()


SPECTRA = {
    "copies": torch.cat([torch.linspace(0.0, 1.0, 150), torch.full((10,), 1.05)]),
    "zeros beside": torch.cat([torch.zeros(150), torch.linspace(0.5, 1.0, 10)]),
    "one": torch.full((160,), 2.0),
}


@every_dtype
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("turned", [True, False])
def test_copies_of_an_eigenvalue_of_a_known_matrix(turned, spectrum, dtype):
    """Also where nothing is left of products, and where that is exact."""
    Q = torch.linalg.qr(Draw(FLOAT64)(160, 160)).Q if turned else torch.eye(160)
    evals = SPECTRA[spectrum].double()
    V = vl.Dense((torch.eye(170, 160) * evals.sqrt() @ Q.double().T).to(dtype))
    G = V @ V.T
    assert G.gram.matrix.shape == (160, 160)
    for k in (3, 5):
        pairs = G.eigh(k=k, route="ARPACK on K")
        E, tolerance = pairs.eigenvectors, 10 * TOLERANCE[dtype]
        # If ARPACK finds them.
        assert pairs.route in ("ARPACK on K", "dense Gram")
        assert (pairs.eigenvalues - evals[-k:]).abs().max() <= tolerance
        assert (G @ E - E * pairs.eigenvalues).norm() <= tolerance
        assert (E.T @ E - torch.eye(k)).abs().max() <= tolerance


@pytest.mark.parametrize(
    "error",
    [
        sparse.ArpackError(3),
        sparse.ArpackNoConvergence("", np.zeros(1), np.zeros((160, 1))),
    ],
)
@pytest.mark.parametrize("side", ["K", "G"])
def test_matrices_that_are_known_where_arpack_fails(side, error, monkeypatch):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(krylov, "eigsh", failing)
    matrix = Draw(FLOAT64)(*((170, 160) if side == "K" else (160, 170)))
    V, expected = vl.Dense(matrix), torch.linalg.svdvals(matrix)[:4].flip(0) ** 2
    with pytest.raises(RuntimeError, match="ARPACK has f"):
        (V @ V.T).eigh(k=4, route=f"ARPACK on {side}")
    G = V @ V.T
    _ = G.eigvalsh()  # from the smaller side, which is known from then on
    pairs = G.eigh(k=4, route=f"ARPACK on {side}")
    assert pairs.route == {"K": "dense Gram", "G": "dense G"}[side]
    assert (pairs.eigenvalues - expected).abs().max() <= 1e-10 * expected.max()


class Multiplier(vl.TorchLinearOperator):
    """A matrix that only multiplies."""

    self_adjoint = True

    def __init__(self, matrix):
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)
        self.matrix = matrix

    def _multiply(self, X):
        return self.matrix @ X


@pytest.mark.host("ARPACK is the CPU's")
@pytest.mark.parametrize("which", ["LA", "LM"])
def test_no_convergence_says_what_to_do(which, monkeypatch):
    H, _, _ = hessian_of(FLOAT64)

    def eigsh(A, k, maxiter, **_):
        if k == 1:
            return np.ones(1), np.ones((75, 1))
        raise sparse.ArpackNoConvergence("no", np.ones(1), np.ones((75, 1)))

    monkeypatch.setattr(krylov, "eigsh", eigsh)
    expected = H.eigh(k=2, which=which)  # from the matrix
    assert expected.route == "dense"
    monkeypatch.setattr(eigen, "DENSE_ROWS", 0)
    with pytest.raises(RuntimeError, match=r"found 1 of 2 pairs of this Hessian.*tol="):
        H.eigh(k=2, which=which)
