"""SciPy's matrix-free functions on our operators give the dense answer.

Some of their defaults are traps, and the tests say how they are avoided: `lobpcg` stops
at a tolerance that grows with the dimension, `minres` at one that depends on the scale
of the right-hand side.
"""

import inspect

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg as sla
import torch

import vivit_linop as vl
from tests.operator_market import Draw, khatri_rao_of
from vivit_linop.operators import LowRank

FLOAT64 = torch.float64
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)

# SciPy renamed the relative tolerance of its solvers in 1.12.
RTOL = "rtol" if "rtol" in inspect.signature(sla.cg).parameters else "tol"
TIGHT = {RTOL: 1e-12, "atol": 0.0}


def spectrum(n, dtype, device, condition=1e2):
    """A symmetric matrix with eigenvalues spaced evenly in the logarithm."""
    draw = Draw(FLOAT64, seed=4)
    Q = torch.linalg.qr(draw(n, n)).Q
    A = (Q * torch.logspace(0, np.log10(condition), n, dtype=FLOAT64)) @ Q.T
    return ((A + A.T) / 2).to(device, dtype)


def factor(rows, columns, dtype, device=None):
    """A factor with singular values from 1 down to 0.1, well separated."""
    draw = Draw(FLOAT64, seed=5)
    rank = min(rows, columns)
    left = torch.linalg.qr(draw(rows, rank)).Q
    right = torch.linalg.qr(draw(columns, rank)).Q
    V = (left * torch.logspace(0, -1, rank, dtype=FLOAT64)) @ right.T
    return V.to(device, dtype)


def layer(dtype, device):
    """The factor of one linear layer's GGN: Khatri–Rao, with decaying columns."""
    draw = Draw(FLOAT64, seed=6)
    decay = torch.logspace(0, -1, 14, dtype=FLOAT64)
    B, A = draw(6, 14) * decay, draw(7, 14)
    return vl.KhatriRao(B.to(device, dtype), A.to(device, dtype))


def regression(dtype, device):
    """The GGN of a linear model under squared error, which is a Kronecker product."""
    draw = Draw(FLOAT64, seed=7)
    X = (draw(12, 5) * torch.logspace(0, -1, 5, dtype=FLOAT64)).to(device, dtype)
    model = torch.nn.Linear(5, 3, bias=False, device=device, dtype=dtype)
    y = torch.zeros(12, 3, device=device, dtype=dtype)
    G = vl.GGN(model, torch.nn.MSELoss(), [(X, y)])
    X = X.double()
    return G, torch.kron(torch.eye(3, dtype=FLOAT64), X.T @ X) * 2 / (12 * 3)


def dense(dtype, device):
    A = spectrum(40, dtype, device)
    return vl.Dense(A), A


def low_rank_tall(dtype, device=None):
    V = factor(40, 10, dtype, device)
    op = vl.Dense(V)
    return op @ op.T, V.double() @ V.double().T


def low_rank_wide(dtype, device):
    V = factor(30, 50, dtype, device)
    op = vl.Dense(V)
    return op @ op.T, V.double() @ V.double().T


def low_rank_of_a_layer(dtype, device):
    V = layer(dtype, device)
    matrix = khatri_rao_of(V.left, V.right)
    return V @ V.T, matrix @ matrix.T


def damped(dtype, device=None):
    G, A = low_rank_tall(dtype, device)
    return G + 0.1 * vl.Identity(len(A)), A + 0.1 * torch.eye(len(A)).to(A)


def woodbury(dtype, device):
    op, A = damped(dtype, device)
    return op.inv(), torch.linalg.inv(A)


def blocks(dtype, device):
    G, A = damped(dtype, device)
    B = spectrum(8, dtype, device, condition=7.0)
    return vl.BlockDiagonal([G, B]), torch.block_diag(A, B.double())


def kronecker(dtype, device):
    A, B = spectrum(5, dtype, device, 3.0), spectrum(8, dtype, device, 5.0)
    return vl.Kronecker(A, B), torch.kron(A.double(), B.double())


def damped_regression(dtype, device):
    G, A = regression(dtype, device)
    return G + 1e-2 * vl.Identity(15), A + 1e-2 * torch.eye(15, dtype=FLOAT64)


PSD = [
    dense,
    low_rank_tall,
    low_rank_wide,
    low_rank_of_a_layer,
    damped,
    woodbury,
    blocks,
    kronecker,
    regression,
]
DEFINITE = [dense, damped, woodbury, blocks, kronecker, damped_regression]


def name_of(build):
    return build.__name__


every_psd = pytest.mark.parametrize("build", PSD, ids=name_of)
every_definite = pytest.mark.parametrize("build", DEFINITE, ids=name_of)


def built(build, dtype, device):
    """An operator, and its matrix as a float64 array."""
    op, matrix = build(dtype, device)
    return op, matrix.double().cpu().numpy()


def eps(dtype):
    return torch.finfo(dtype).eps


def start(n, dtype, columns=None, seed=0):
    """What iterations start from: the same each time, in the operator's precision."""
    shape = n if columns is None else (n, columns)
    noise = np.random.default_rng(seed).standard_normal(shape)
    return noise.astype(np.float64 if dtype == FLOAT64 else np.float32)


def assert_near(got, expected, rtol):
    error = np.linalg.norm(np.asarray(got, dtype=np.float64) - expected)
    assert error <= rtol * np.linalg.norm(expected), f"off by {error:.1e}"


# Eigenvalues -------------------------------------------------------------------------


@every_psd
@every_dtype
def test_eigsh(build, dtype, device):
    op, A = built(build, dtype, device)
    evals, evecs = sla.eigsh(op, k=4, which="LA", v0=start(len(A), dtype))
    assert evals.dtype == evecs.dtype == op.dtype  # ARPACK ran in this precision
    expected = np.linalg.eigvalsh(A)
    assert np.abs(evals - expected[-4:]).max() <= 30 * eps(dtype) * expected[-1]
    residual = A @ evecs.astype(float) - evecs.astype(float) * evals.astype(float)
    # ARPACK's own criterion is eps^(2/3) relative to small eigenvalues only.
    assert np.linalg.norm(residual) <= 300 * eps(dtype) * expected[-1]


def test_eigsh_agrees_with_eigh(device):
    op, A = built(low_rank_of_a_layer, FLOAT64, device)
    evals = sla.eigsh(op, k=4, v0=start(len(A), FLOAT64), return_eigenvectors=False)
    assert_near(np.sort(evals), op.eigh(k=4).eigenvalues.cpu().numpy(), 1e-13)


def test_eigsh_of_the_gram_operator(device):
    V = layer(FLOAT64, device)
    gram = vl.Dense(V.to_dense()).T @ vl.Dense(V.to_dense())
    matrix = khatri_rao_of(V.left, V.right).cpu().numpy()
    evals, _ = sla.eigsh(gram, k=3, v0=start(14, FLOAT64))
    assert_near(evals, np.linalg.eigvalsh(matrix.T @ matrix)[-3:], 1e-13)


def test_shift_and_invert_with_woodbury(device):
    op, A = built(low_rank_wide, FLOAT64, device)
    inverse = (op + 1e-3 * vl.Identity(len(A))).inv()
    evals, _ = sla.eigsh(
        op, k=3, sigma=-1e-3, OPinv=inverse, which="LM", v0=start(len(A), FLOAT64)
    )
    assert_near(np.sort(evals), np.linalg.eigvalsh(A)[:3], 1e-11)


def test_eigs_of_an_operator_that_is_not_symmetric(device):
    B = Draw(FLOAT64, device)(20, 20)
    op = vl.Dense(B) @ vl.Diagonal(torch.arange(1.0, 21.0, dtype=FLOAT64).to(device))
    A = (B * torch.arange(1.0, 21.0).to(B)).cpu().numpy()
    evals = sla.eigs(op, k=3, v0=start(20, FLOAT64), return_eigenvectors=False)
    every = np.linalg.eigvals(A)
    for value in evals:
        assert np.abs(every - value).min() <= 1e-11 * np.abs(every).max()
    assert np.abs(evals).max() >= 0.999 * np.abs(every).max()


@every_psd
@every_dtype
@pytest.mark.filterwarnings("ignore:Exited")  # residuals are checked below
def test_lobpcg(build, dtype, device):
    op, A = built(build, dtype, device)
    expected = np.linalg.eigvalsh(A)[-3:][::-1]
    # The tolerance is absolute and, unless it is given, sqrt(eps) n: no tolerance.
    tol = (1e-6 if dtype == FLOAT64 else 2e-5) * expected[0]
    residuals = []
    # In float32 it stagnates from some starts where the largest eigenvalue is multiple,
    # for the dense matrix too (8 of 30).
    for seed in range(1 if dtype == FLOAT64 else 5):
        first = start(len(A), dtype, 3, seed)
        evals, evecs = sla.lobpcg(op, first, tol=tol, maxiter=100)
        # The error of an eigenvalue is quadratic in the residual.
        assert_near(evals, expected, 1e-10 if dtype == FLOAT64 else 1e-6)
        residual = A @ evecs - evecs * evals
        residuals.append(np.linalg.norm(residual, axis=0).max())
    assert min(residuals) <= 2 * tol


@every_dtype
@pytest.mark.filterwarnings("ignore:The problem size")
def test_lobpcg_on_small_problems(dtype, device):
    # With fewer than 5 k rows SciPy multiplies by an identity matrix of integers.
    V = factor(9, 4, dtype, device)
    op, A = LowRank(vl.Dense(V)), V.double().cpu().numpy()
    evals, _ = sla.lobpcg(op, start(9, dtype, 2))
    assert_near(evals, np.linalg.eigvalsh(A @ A.T)[-2:][::-1], 30 * eps(dtype))


# Singular values ---------------------------------------------------------------------

RECTANGULAR = {
    "dense, tall": lambda dtype, device: vl.Dense(factor(30, 20, dtype, device)),
    "dense, wide": lambda dtype, device: vl.Dense(factor(20, 30, dtype, device)),
    "adjoint": lambda dtype, device: vl.Dense(factor(30, 20, dtype, device)).T,
    "Khatri-Rao": layer,
    "Kronecker": lambda dtype, device: vl.Kronecker(
        factor(4, 3, dtype, device), factor(8, 5, dtype, device)
    ),
    "product": lambda dtype, device: (
        vl.Kronecker(factor(4, 3, dtype, device), factor(8, 5, dtype, device))
        @ vl.Diagonal(torch.linspace(1, 2, 15, dtype=dtype, device=device))
    ),
}


def rectangular_matrix(name, device):
    """Its matrix, without the operator."""
    if name == "Khatri-Rao":
        V = layer(FLOAT64, device)
        return khatri_rao_of(V.left, V.right).cpu().numpy()
    if name in ("Kronecker", "product"):
        parts = factor(4, 3, FLOAT64), factor(8, 5, FLOAT64)
        matrix = torch.kron(*parts).numpy()
        return matrix * np.linspace(1, 2, 15) if name == "product" else matrix
    shape = (20, 30) if name == "dense, wide" else (30, 20)
    matrix = factor(*shape, FLOAT64).numpy()
    return matrix.T if name == "adjoint" else matrix


@pytest.mark.parametrize("name", RECTANGULAR)
@pytest.mark.parametrize("solver", ["arpack", "lobpcg"])
@every_dtype
@pytest.mark.filterwarnings("error:Exited")
def test_svds(name, solver, dtype, device):
    op = RECTANGULAR[name](dtype, device)
    A = rectangular_matrix(name, device)
    left, expected, right = np.linalg.svd(A)
    if solver == "arpack":
        options = {"v0": start(min(A.shape), dtype)}
    else:
        # Squared, this is the absolute residual allowed in the Gram matrix.
        residual = (1e-8 if dtype == FLOAT64 else 2e-5) * expected[0] ** 2
        options = {"tol": residual**0.5, "maxiter": 100}
    u, values, vh = sla.svds(op, k=2, solver=solver, **options)
    rtol = 1e-12 if dtype == FLOAT64 else 1e-6
    assert_near(np.sort(values)[::-1], expected[:2], rtol)
    best = (left[:, :2] * expected[:2]) @ right[:2]
    assert_near((u * values) @ vh, best, 1e-6 if dtype == FLOAT64 else 1e-3)


@pytest.mark.filterwarnings("ignore:The problem size")
def test_svds_by_lobpcg_on_small_problems(device):
    V = factor(9, 4, FLOAT64, device)
    _, values, _ = sla.svds(vl.Dense(V), k=2, solver="lobpcg")
    expected = np.linalg.svd(V.cpu().numpy(), compute_uv=False)
    assert_near(np.sort(values)[::-1], expected[:2], 1e-13)


# Linear systems ----------------------------------------------------------------------


@every_definite
@every_dtype
@pytest.mark.parametrize("solver", ["cg", "bicgstab", "gmres", "minres"])
def test_square_systems(solver, build, dtype, device):
    op, A = built(build, dtype, device)
    rtol = 1e-12 if dtype == FLOAT64 else 1e-5
    b = start(len(A), dtype)
    b /= np.linalg.norm(b)  # for minres, whose stopping rule depends on the scale
    options = {} if solver == "minres" else {"atol": 0.0}
    if solver == "gmres":
        options["restart"] = len(A)
    x, info = getattr(sla, solver)(op, b, **{RTOL: rtol}, **options)
    assert info == 0
    # MINRES returns float64 whatever it is given.
    assert solver == "minres" or x.dtype == op.dtype
    residual = np.linalg.norm(A @ x.astype(float) - b)
    # MINRES stops at a residual relative to ‖A‖ ‖x‖.
    scale = 1.0
    if solver == "minres":
        scale = np.linalg.norm(A, 2) * np.linalg.norm(x)
    assert residual <= 10 * rtol * scale
    condition = np.linalg.cond(A)
    assert_near(x, np.linalg.solve(A, b.astype(float)), 20 * rtol * condition)


def test_cg_with_a_closed_form_inverse_as_preconditioner(device):
    G, A = built(damped, FLOAT64, device)
    op = G + vl.Diagonal(torch.linspace(0, 0.01, len(A), dtype=FLOAT64, device=device))
    A = A + np.diag(np.linspace(0, 0.01, len(A)))
    b = start(len(A), FLOAT64)
    iterates = []
    x, info = sla.cg(op, b, M=G.inv(), callback=iterates.append, **TIGHT)
    assert info == 0
    assert len(iterates) <= 12
    assert_near(x, np.linalg.solve(A, b), 1e-10)


@pytest.mark.parametrize("name", RECTANGULAR)
@pytest.mark.parametrize("solver", ["lsqr", "lsmr"])
@every_dtype
def test_least_squares(name, solver, dtype, device):
    op = RECTANGULAR[name](dtype, device)
    A = rectangular_matrix(name, device)
    b = start(A.shape[0], dtype)
    tol = 1e-13 if dtype == FLOAT64 else 1e-6
    with np.errstate(over="ignore"):  # LSMR's condition estimate in float32
        options = {"maxiter" if solver == "lsmr" else "iter_lim": 500}
        x = getattr(sla, solver)(op, b, atol=tol, btol=tol, conlim=0, **options)[0]
    # Of wide systems the solution of least norm.
    expected = np.linalg.lstsq(A, b.astype(float), rcond=None)[0]
    condition = np.divide(*np.linalg.svd(A, compute_uv=False)[[0, -1]])
    assert_near(x, expected, 20 * tol * condition**2)


# Functions of matrices and norms -----------------------------------------------------


@every_psd
@every_dtype
def test_expm_multiply(build, dtype, device):
    op, A = built(build, dtype, device)
    scale = 1.0 / np.linalg.norm(A, 2)
    op, A = scale * op, scale * A
    b = start(len(A), dtype, 2)
    got = sla.expm_multiply(-1.0 * op, b, traceA=-op.trace().item())
    assert_near(got, scipy.linalg.expm(-A) @ b.astype(float), 100 * eps(dtype))


def test_expm_multiply_over_time(device):
    op, A = built(damped, FLOAT64, device)
    b = start(len(A), FLOAT64)
    trace = op.trace().item()
    got = sla.expm_multiply(op, b, start=0.0, stop=0.5, num=3, traceA=trace)
    expected = np.stack([scipy.linalg.expm(t * A) @ b for t in (0.0, 0.25, 0.5)])
    assert_near(got, expected, 1e-13)


@every_psd
@every_dtype
def test_onenormest(build, dtype, device):
    op, A = built(build, dtype, device)
    norm = np.abs(A).sum(0).max()
    estimate, v, w = sla.onenormest(op, compute_v=True, compute_w=True)
    assert norm / 3 <= estimate <= norm * (1 + 10 * eps(dtype))
    # The estimate is attained: w = A v.
    assert_near(w, A @ v, 30 * eps(dtype))
    assert_near(np.abs(w).sum(), estimate * np.abs(v).sum(), 30 * eps(dtype))


def test_onenormest_is_exact_without_signs(device):
    B, C = (Draw(FLOAT64, device, seed)(n, n).abs() for seed, n in ((0, 5), (1, 6)))
    op = vl.Kronecker(B, C)
    norm = torch.kron(B, C).sum(0).max().item()
    assert abs(sla.onenormest(op) - norm) <= 1e-14 * norm
    nonsymmetric = vl.Dense(B) @ vl.Diagonal(B[0])
    norm = (B * B[0]).sum(0).max().item()
    assert abs(sla.onenormest(nonsymmetric) - norm) <= 1e-14 * norm


@pytest.mark.skipif(
    not hasattr(sla, "funm_multiply_krylov"), reason="SciPy has this since 1.17"
)
def test_functions_of_matrices(device):
    op, A = built(damped, FLOAT64, device)
    b = start(len(A), FLOAT64)
    got = sla.funm_multiply_krylov(scipy.linalg.sqrtm, op, b, assume_a="her")
    assert_near(got, scipy.linalg.sqrtm(A) @ b, 1e-7)


# SciPy's own operators ---------------------------------------------------------------


def test_aslinearoperator_leaves_ours_as_they_are():
    op, _ = damped(FLOAT64)
    assert sla.aslinearoperator(op) is op
    assert isinstance(op, sla.LinearOperator)


def test_expressions_with_scipy_operators(device):
    op, A = built(low_rank_tall, FLOAT64, device)
    B = start(len(A), FLOAT64, len(A))
    sparse = scipy.sparse.random(len(A), len(A), 0.1, format="csr", random_state=0)
    x = start(len(A), FLOAT64)
    for other, matrix in (
        (sla.aslinearoperator(B), B),
        (sla.aslinearoperator(sparse), sparse.toarray()),
    ):
        for expression in (
            lambda a, b: a + b,
            lambda a, b: b + a,
            lambda a, b: a - b,
            lambda a, b: b - a,
            lambda a, b: a @ b,
            lambda a, b: b @ a,
            lambda a, b: 2.0 * (a @ b @ a) + b,
        ):
            expected = expression(A, matrix) @ x
            assert_near(expression(op, other) @ x, expected, 1e-13)
            assert_near(expression(op, other).T @ x, expression(A, matrix).T @ x, 1e-13)


def test_sums_with_scipy_operators_go_into_solvers(device):
    op, A = built(damped, FLOAT64, device)
    ridge = scipy.sparse.diags(np.linspace(1, 2, len(A)))
    total = op + sla.aslinearoperator(ridge)
    b = start(len(A), FLOAT64)
    x, info = sla.cg(total, b, **TIGHT)
    assert info == 0
    assert_near(x, np.linalg.solve(A + ridge.toarray(), b), 1e-10)


@pytest.mark.parametrize("kind", ["csr_matrix", "coo_matrix", "csc_array"])
@every_dtype
def test_products_with_sparse_matrices_are_dense(kind, dtype, device):
    op, A = built(low_rank_tall, dtype, device)
    random = scipy.sparse.random(len(A), 7, 0.3, random_state=0)
    sparse, B = getattr(scipy.sparse, kind)(random), random.toarray()
    for got, expected in (
        (op @ sparse, A @ B),
        (op.matmat(sparse), A @ B),
        (op.dot(sparse), A @ B),
        (sparse.T @ op, B.T @ A),
        ((sparse != 0).astype(np.int8).T @ op, (B != 0).T @ A),
    ):
        assert isinstance(got, np.ndarray) and got.dtype == op.dtype
        assert_near(got, expected, 20 * eps(dtype))
    with pytest.raises(ValueError):
        op @ sparse.T


# What SciPy's own operators take -----------------------------------------------------

NUMBERS = {
    "int8": lambda n: np.arange(n, dtype=np.int8),
    "uint8": lambda n: np.arange(n, dtype=np.uint8),
    "int64": lambda n: np.arange(n).reshape(-1, 1) - np.arange(3),
    "bool": lambda n: np.arange(n) > 2,
    "complex64": lambda n: np.arange(n).astype(np.complex64) * (1 - 2j),
    "complex128": lambda n: np.arange(n)[:, None] * np.array([1.0, 2j, 3 - 1j]),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("build", [dense, low_rank_tall, woodbury, kronecker])
@every_dtype
def test_numbers_of_any_kind(kind, build, dtype, device):
    op, A = built(build, dtype, device)
    x = NUMBERS[kind](len(A))
    rtol, left = 200 * eps(dtype), x.T
    for got, expected in (
        (op @ x, A @ x),
        (op * x, A @ x),
        (op(x), A @ x),
        (left @ op, left @ A),
        (op.T @ x, A.T @ x),
        (op.matvec(x) if x.ndim == 1 else op.matmat(x), A @ x),
        (op.rmatvec(x) if x.ndim == 1 else op.rmatmat(x), A.T @ x),
    ):
        scale = np.linalg.norm(A) * np.linalg.norm(x)
        assert np.linalg.norm(got - expected) <= rtol * scale
        complex_type = np.result_type(op.dtype, np.complex64)
        assert got.dtype == (complex_type if "complex" in kind else op.dtype)


def test_gradients_flow_through_complex_vectors():
    op, A = low_rank_tall(FLOAT64)
    x = torch.randn(len(A), dtype=torch.complex128, requires_grad=True)
    (op @ x).abs().square().sum().backward()
    expected = 2 * (A @ A).to(x.dtype) @ x.detach()
    torch.testing.assert_close(x.grad, expected)
    conjugate = op @ x.detach().conj()
    torch.testing.assert_close(conjugate, A.to(x.dtype) @ x.detach().conj())


def test_scipy_wraps_a_product(device):
    # It finds the dtype by a product with an int8 vector.
    op, A = built(damped, FLOAT64, device)
    b = start(len(A), FLOAT64)
    wrapped = sla.LinearOperator(op.shape, matvec=lambda v: op @ v + 0.1 * v)
    assert wrapped.dtype == np.float64
    x, info = sla.cg(wrapped, b, **TIGHT)
    assert info == 0
    assert_near(x, np.linalg.solve(A + 0.1 * np.eye(len(A)), b), 1e-10)


@pytest.mark.parametrize("method", ["trust-constr", "Newton-CG"])
def test_operators_are_hessians_for_minimize(method, device):
    op, A = built(damped, FLOAT64, device)
    b = start(len(A), FLOAT64)
    found = scipy.optimize.minimize(
        lambda t: 0.5 * t @ (A @ t) - b @ t,
        np.zeros(len(A)),
        jac=lambda t: A @ t - b,
        hess=lambda t: op,
        method=method,
        options={"maxiter": 200},
    )
    assert_near(found.x, np.linalg.solve(A, b), 1e-5)


@pytest.mark.parametrize("power", [0, 1, np.int64(0), np.int8(2), np.int64(3), True])
@pytest.mark.parametrize("build", [dense, low_rank_tall, kronecker])
def test_powers(power, build, device):
    op, A = built(build, FLOAT64, device)
    result = op**power
    assert result.torch_dtype == FLOAT64 and result.device == op.device
    expected = torch.from_numpy(np.linalg.matrix_power(A, int(power))).to(device)
    vl.testing.check_operator(result, expected)


def test_solvers_do_not_need_their_vectors_to_be_writeable(device):
    op, A = built(damped, FLOAT64, device)
    b = start(len(A), FLOAT64)
    b.flags.writeable = False
    x, info = sla.cg(op, b, **TIGHT)
    assert info == 0
    assert_near(x, np.linalg.solve(A, b), 1e-10)
