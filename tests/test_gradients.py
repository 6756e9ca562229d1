"""Derivatives in a scale, a damping or a matrix that requires grad."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import vivit_linop as vl
from tests import placing
from tests.operator_market import Draw
from vivit_linop.operators import CorrectedKronecker, LowRank, Woodbury, symmetric
from vivit_linop.operators.symmetric import largest_eigenpairs as largest

FLOAT64 = torch.float64


def operators():
    """Operators that are constant, symmetric and positive semi-definite."""
    draw = Draw(FLOAT64)
    V, W = draw(6, 3), draw(6, 9)
    K = vl.Kronecker(draw.definite(2), draw.definite(3))
    torch.manual_seed(0)
    data = torch.rand(5, 2).double(), torch.randint(2, (5,))
    net = nn.Linear(2, 2).double()
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
    yield "low rank, tall", LowRank(vl.Dense(V), 2.0)
    yield "low rank, wide", LowRank(vl.Dense(W))
    yield "dense", vl.Dense(draw.definite(6))
    yield "diagonal", vl.Diagonal(draw(6).abs())
    yield "Kronecker", K
    yield "corrected", CorrectedKronecker(K, draw(6).abs())
    yield "blocks", vl.BlockDiagonal([LowRank(vl.Dense(V)), draw.definite(2)])
    yield "GGN", vl.GGN(risk)
    yield "KFAC", vl.KFAC(risk, variant="exact")
    yield "identity", vl.Identity(6, FLOAT64, placing.device())


OPERATORS = dict(operators())
every_operator = pytest.mark.parametrize("name", OPERATORS)

EXPRESSIONS = {
    "A + δI": lambda A, eye, s, d: A + d * eye,
    "sA + δI": lambda A, eye, s, d: s * A + d * eye,
    "s(A + δI)": lambda A, eye, s, d: s * (A + d * eye),
    "A/s + 2A + δI + I": lambda A, eye, s, d: A / s + d * eye + eye,
}
every_expression = pytest.mark.parametrize("form", EXPRESSIONS)

VERBS = {
    "logdet": lambda op: op.logdet(),
    "trace": lambda op: op.trace(),
    "diagonal": lambda op: op.diagonal(),
    "eigvalsh": lambda op: op.eigvalsh(),
    "eigh": lambda op: op.eigh(k=2).eigenvalues,
    "to_dense": lambda op: op.to_dense(),
    "product": lambda op: op @ torch.arange(1.0, 1 + op.shape[0]).double(),
    "left": lambda op: torch.arange(1.0, 1 + op.shape[0]).double() @ op.T,
    "solve": lambda op: op.solve(torch.arange(1.0, 1 + op.shape[0]).double()),
    "inverse": lambda op: op.inv().to_dense(),
    "trace of inverse": lambda op: op.inv().trace(),
    "diagonal of inverse": lambda op: op.inv().diagonal(),
    "logdet of inverse": lambda op: op.inv().logdet(),
    "inverse of inverse": lambda op: op.inv().inv().to_dense(),
    "root": lambda op: squared(op.sqrt()),
    "root of inverse": lambda op: squared(op.inv().sqrt()),
}
DENSE = {
    "logdet": torch.logdet,
    "trace": torch.trace,
    "diagonal": torch.diagonal,
    "eigvalsh": torch.linalg.eigvalsh,
    "eigh": lambda A: torch.linalg.eigvalsh(A)[-2:],
    "to_dense": lambda A: A,
    "product": lambda A: A @ torch.arange(1.0, 1 + len(A)).double(),
    "left": lambda A: torch.arange(1.0, 1 + len(A)).double() @ A,
    "solve": lambda A: torch.linalg.solve(A, torch.arange(1.0, 1 + len(A)).double()),
    "inverse": torch.linalg.inv,
    "trace of inverse": lambda A: torch.linalg.inv(A).trace(),
    "diagonal of inverse": lambda A: torch.linalg.inv(A).diagonal(),
    "logdet of inverse": lambda A: -torch.logdet(A),
    "inverse of inverse": lambda A: A,
    "root": lambda A: A,
    "root of inverse": torch.linalg.inv,
}


def squared(root):
    """R Rᵀ, to which derivatives pass."""
    matrix = root.to_dense()
    return matrix @ matrix.T


def leaves():
    return [torch.tensor(x, dtype=FLOAT64, requires_grad=True) for x in (1.5, 0.7)]


def derivatives(value, inputs):
    weights = torch.linspace(1, 2, value.numel(), dtype=FLOAT64).reshape(value.shape)
    given = torch.autograd.grad(
        (weights * value).sum(), inputs, allow_unused=True, retain_graph=True
    )
    return [
        torch.zeros_like(x) if g is None else g
        for g, x in zip(given, inputs, strict=True)
    ]


@every_operator
@every_expression
def test_derivatives_in_scale_and_damping(name, form):
    A = OPERATORS[name]
    dense, n = A.to_dense(), A.shape[0]
    for verb in VERBS:
        s, d = leaves()
        op = EXPRESSIONS[form](A, vl.Identity(n), s, d)
        got = VERBS[verb](op)
        t, e = leaves()
        expected = DENSE[verb](EXPRESSIONS[form](dense, torch.eye(n).double(), t, e))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            derivatives(got, (s, d)),
            derivatives(expected, (t, e)),
            rtol=1e-7,
            atol=1e-9,
            msg=lambda text, verb=verb: f"{verb}: {text}",
        )


@pytest.mark.parametrize("name", ["low rank, tall", "low rank, wide", "GGN"])
def test_products_with_roots_and_samples(name):
    """The root is symmetric; samples are an inverse times samples of its inverse."""
    A = OPERATORS[name]
    n, x = A.shape[0], torch.linspace(1, 2, A.shape[0]).double()
    d = torch.tensor(0.7, dtype=FLOAT64, requires_grad=True)
    evals, Q = torch.linalg.eigh(A.to_dense())
    evals = evals + d  # as torch has it, derivatives of equal eigenvalues are NaN
    op = A + d * vl.Identity(n)
    B = vl.Dense(torch.linspace(-1, 1, 2 * n).double().reshape(n, 2))
    for got, power in ((op.sqrt(), 0.5), (op.inv().sqrt(), -0.5)):
        expected = Q @ (evals**power).diag() @ Q.T
        for value, truth in (
            (got @ x, expected @ x),
            (got.diagonal(), expected.diagonal()),
            (got.trace(), expected.trace()),
            (got.logdet(), power * evals.log().sum()),
            ((B.T @ got @ B).to_dense(), B.matrix.T @ expected @ B.matrix),
        ):
            torch.testing.assert_close(value, truth)
            for _ in range(2):  # no graph is kept in between
                (slope,) = derivatives(value, (d,))
            (wanted,) = derivatives(truth, (d,))
            torch.testing.assert_close(slope, wanted, rtol=1e-6, atol=1e-9)

    def samples(d):
        S = (A + d * vl.Identity(n)).inv()
        return S.sample(2, torch.Generator().manual_seed(0))

    torch.autograd.gradcheck(samples, (d,))
    if name == "low rank, wide":
        return
    p = torch.linspace(0.5, 1, n, dtype=FLOAT64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda p: (
            (A + vl.Diagonal(p)).inv().sample(2, torch.Generator().manual_seed(0))
        ),
        (p,),
    )


@every_operator
def test_second_derivatives(name):
    A = OPERATORS[name]
    n = A.shape[0]
    b = torch.linspace(1, 2, n, dtype=FLOAT64, requires_grad=True)

    def functions(s, d, b):
        op = s * A + d * vl.Identity(n)
        return op.logdet(), op @ b, op.inv() @ b, op.trace()

    torch.autograd.gradcheck(functions, (*leaves(), b))
    # Of the second ones along random directions: each entry would take ten times that.
    torch.autograd.gradgradcheck(functions, (*leaves(), b), fast_mode=True)


def test_gradient_of_a_marginal_likelihood():
    G = OPERATORS["GGN"]
    D, found = G.shape[0], []
    for logdet in (
        lambda tau: (G + tau * vl.Identity(D)).logdet(),
        lambda tau: torch.logdet(G.to_dense() + tau * torch.eye(D).double()),
    ):
        tau = torch.tensor(2.0, dtype=FLOAT64, requires_grad=True)
        (0.5 * tau * 3.0 + 0.5 * logdet(tau) - 0.5 * D * tau.log()).backward()
        found.append(tau.grad)
    torch.testing.assert_close(*found)


def test_parameters_and_training_loops():
    G = OPERATORS["GGN"]
    log_tau = nn.Parameter(torch.zeros(()))  # float32
    optimizer = torch.optim.SGD([log_tau], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        op = G + log_tau.exp() * vl.Identity(G.shape[0])
        assert op.logdet().dtype == FLOAT64
        (op.logdet() + op.inv().trace()).backward()
        evals = torch.linalg.eigvalsh(G.to_dense())
        tau = log_tau.detach().double().exp()
        expected = (tau / (evals + tau) - tau / (evals + tau) ** 2).sum()
        torch.testing.assert_close(
            log_tau.grad.double(), expected, rtol=1e-5, atol=1e-6
        )
        optimizer.step()


def test_matrices_that_require_grad():
    draw = Draw(FLOAT64)
    p = draw(6).abs().requires_grad_()
    M = draw.definite(6).requires_grad_()
    A = OPERATORS["low rank, tall"]
    x = draw(6)
    for op, dense in (
        (A + vl.Diagonal(p), A.to_dense() + p.diag()),
        (vl.Dense(M) + 0.5 * vl.Identity(6), M + 0.5 * torch.eye(6).to(M)),
        (vl.Diagonal(p) @ vl.Dense(M), p.diag() @ M),
        (
            LowRank(vl.Dense(M)) + 0.5 * vl.Identity(6),
            M @ M.T + 0.5 * torch.eye(6).to(M),
        ),
        (vl.Kronecker(M[:2, :2], M[3:, 3:]), torch.kron(M[:2, :2], M[3:, 3:])),
        (
            vl.BlockDiagonal([M[:2, :2], vl.Diagonal(p[:4])]),
            torch.block_diag(M[:2, :2], p[:4].diag()),
        ),
    ):
        for got, expected in (
            (op @ x, dense @ x),
            (op.trace(), dense.trace()),
            (op.diagonal(), dense.diagonal()),
            (op.to_dense(), dense),
            (x @ op, x @ dense),
        ):
            torch.testing.assert_close(
                derivatives(got, (p, M)), derivatives(expected, (p, M))
            )
    for op, dense in ((vl.Diagonal(p), p.diag()), (vl.Dense(M), M)):
        for got, expected in (
            (op.logdet(), torch.logdet(dense)),
            (op.inv() @ x, torch.linalg.solve(dense, x)),
            (op.solve(x), torch.linalg.solve(dense, x)),
        ):
            torch.testing.assert_close(
                derivatives(got, (p, M)), derivatives(expected, (p, M))
            )


def test_what_gradients_would_not_reach_is_refused():
    d = torch.tensor(0.5, requires_grad=True)
    M = torch.ones(4, 2, requires_grad=True)
    G, unit = LowRank(vl.Dense(M.detach())), vl.Identity(4)
    for make in (
        lambda: LowRank(vl.Dense(M.detach()), d),
        lambda: Woodbury(G, d),
        lambda: (G + vl.Diagonal(d.expand(4))).sqrt(),
        lambda: (G + vl.Diagonal(d.expand(4))).inv().sqrt(),
        lambda: (LowRank(vl.Dense(M)) + unit).inv(),
        lambda: (LowRank(vl.Dense(M)) + unit).sqrt(),
        lambda: LowRank(vl.Dense(M)).eigh(),
    ):
        with pytest.raises(
            TypeError, match=r"requires grad|no closed form|derivatives in"
        ):
            make()


def test_constants_stay_constants():
    G, unit = OPERATORS["low rank, tall"], vl.Identity(6)
    d = torch.tensor(0.5, dtype=FLOAT64, requires_grad=True)
    for scalar in (torch.tensor(0.5), d.detach(), 0.5, d.detach().numpy()):
        op = G + scalar * unit
        assert not op.requires_grad
        assert isinstance(op.inv(), Woodbury)
        assert not op.logdet().requires_grad
    with torch.no_grad():
        assert not (G + d * unit).requires_grad
        live = d * G
    assert not live.requires_grad
    op = G + d * unit
    with torch.no_grad():
        assert not (op @ torch.ones(6).double()).requires_grad
        assert not op.logdet().requires_grad
    assert isinstance(op @ torch.ones(6).double().numpy(), type(d.detach().numpy()))
    # Zero and one are numbers like others.
    for value in (0.0, 1.0):
        e = torch.tensor(value, dtype=FLOAT64, requires_grad=True)
        assert derivatives((G + e * unit).trace(), (e,))[0] == 6
        assert derivatives((e * G).trace(), (e,))[0] == G.trace()


def test_forward_mode_is_right_or_refused():
    G, unit = OPERATORS["low rank, tall"], vl.Identity(6)
    one, x = torch.ones((), dtype=FLOAT64), torch.ones(6).double()
    delta = torch.tensor(0.5, dtype=FLOAT64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(delta, one)
        logdet = (G + dual * unit).logdet()
        tangent = forward_ad.unpack_dual(logdet).tangent
    inverse = torch.linalg.inv(G.to_dense() + 0.5 * torch.eye(6).double())
    torch.testing.assert_close(tangent, inverse.trace())
    _, tangent = torch.func.jvp(lambda d: (d * G) @ x, (delta,), (one,))
    torch.testing.assert_close(tangent, G @ x)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda d: (G + d * unit).solve(x), (delta,), (one,))


@pytest.mark.parametrize("verb", ["inverse", "solve", "logdet", "trace of inverse"])
@pytest.mark.parametrize("name", ["low rank, tall", "GGN"])
def test_noise_on_a_posterior(name, verb):
    """((A + δ I)⁻¹ + τ I)⁻¹, with derivatives in both."""
    A = OPERATORS[name]
    dense, n = A.to_dense(), A.shape[0]
    eye, unit = vl.Identity(n), torch.eye(n).to(dense)
    given = [torch.tensor(0.3).double(), torch.tensor(0.7).double()]
    found, expected = (
        [number.clone().requires_grad_() for number in given] for _ in range(2)
    )
    delta, tau = found
    value = VERBS[verb]((A + delta * eye).inv() + tau * eye)
    delta, tau = expected
    matrix = torch.linalg.inv(dense + delta * unit) + tau * unit
    reference = {
        "inverse": torch.linalg.inv,
        "solve": lambda M: torch.linalg.solve(M, torch.arange(1.0, 1 + n).to(M)),
        "logdet": torch.logdet,
        "trace of inverse": lambda M: torch.linalg.inv(M).trace(),
    }[verb](matrix)
    torch.testing.assert_close(value, reference)
    weights = torch.linspace(0.5, 1, value.numel()).to(value).reshape(value.shape)
    for number, wanted in zip(
        torch.autograd.grad((value * weights).sum(), found),
        torch.autograd.grad((reference * weights).sum(), expected),
        strict=True,
    ):
        torch.testing.assert_close(number, wanted)


SPECTRAL = {
    "eigenvalues": lambda A, V: vl.Dense(A).eigvalsh(),
    "eigenpairs": lambda A, V: vl.Dense(A).eigh().eigenvalues,
    "low rank": lambda A, V: LowRank(vl.Dense(V)).eigvalsh(),
    "largest": lambda A, V: LowRank(vl.Dense(V)).eigh(k=2).eigenvalues,
    "chosen": lambda A, V: LowRank(vl.Dense(V)).eigh(select=lambda _: [0]).eigenvalues,
    "logdet": lambda A, V: (LowRank(vl.Dense(V)) + vl.Identity(len(V))).logdet(),
}


@pytest.mark.parametrize("rows", [5, 140])
@pytest.mark.parametrize("name", SPECTRAL)
def test_forward_mode_through_decompositions(name, rows):
    """Of few rows, and of so many that LAPACK is called without torch."""
    draw = Draw(torch.float64)
    A, B = draw.symmetric(rows), draw.symmetric(rows)
    V, W = draw(rows + 3, rows), draw(rows + 3, rows)

    def at(step):
        return SPECTRAL[name](A + step * B, V + step * W)

    step = 1e-6
    expected = (at(step) - at(-step)) / (2 * step)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(A, B), forward_ad.make_dual(V, W)
        _, tangent = forward_ad.unpack_dual(SPECTRAL[name](*dual))
    assert tangent is not None
    error = (tangent - expected).norm()
    assert error <= 1e-4 * expected.norm()


@pytest.mark.host("LAPACK is the CPU's")
def test_derivatives_of_more_rows_than_torch_decomposes(monkeypatch):
    monkeypatch.setattr(symmetric, "SYEVD_ROWS", 8)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    A = Draw(torch.float64).symmetric(9)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(A, A)
        for ask in (symmetric.symmetric_eigenpairs, lambda M: largest(M, 2)):
            with pytest.raises(ValueError, match="of eigenvectors of 9 rows"):
                ask(dual)


def of_entries():
    """Expressions without derivatives in forward mode, and what they are."""
    draw = Draw(FLOAT64)
    M, V, b = draw.definite(9), draw(9, 2), draw(9)
    skew, A = draw(9, 9), V @ V.T
    low_rank = LowRank(vl.Dense(V))
    plus, inv, solve = vl.operators.Sum, torch.linalg.inv, torch.linalg.solve
    yield "solve", lambda P: plus(vl.Dense(M), P).solve(b), lambda P: solve(M + P, b)
    yield (
        "solve, unsymmetric",
        lambda P: plus(vl.Dense(9 * M + skew), P).solve(b, rtol=1e-12),
        lambda P: solve(9 * M + skew + P, b),
    )
    yield (
        "solve, adjoint",
        lambda P: plus(vl.Dense(9 * M + skew), P).T.solve(b, rtol=1e-12),
        lambda P: solve((9 * M + skew + P).T, b),
    )
    yield "inv", lambda P: (low_rank + P).inv() @ b, lambda P: solve(A + P, b)
    yield (
        "diagonal",
        lambda P: (low_rank + P).inv().diagonal(),
        lambda P: inv(A + P).diagonal(),
    )
    yield "logdet", lambda P: (low_rank + P).logdet(), lambda P: torch.logdet(A + P)


@pytest.mark.parametrize("name, of, truth", of_entries())
def test_tangents_that_would_be_lost_are_refused(name, of, truth):
    """They were: derivatives were zero, or those of a part."""
    entries = torch.linspace(1, 2, 9, dtype=FLOAT64)
    found = of(vl.Diagonal(entries))
    torch.testing.assert_close(found, truth(torch.diag(entries)), rtol=1e-6, atol=0.0)
    refusals = TypeError, NotImplementedError
    with pytest.raises(refusals, match=r"tangent|forward mode"):
        torch.func.jvp(lambda p: of(vl.Diagonal(p)), (entries,), (entries.cos(),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(entries, entries.cos())
        with pytest.raises(refusals, match=r"tangent|forward mode"):
            of(vl.Diagonal(dual))


INSIDE = {
    "S B": lambda S, B, F: S @ B,
    "B S": lambda S, B, F: B @ S,
    "S F": lambda S, B, F: S @ F,
    "B S B": lambda S, B, F: B.T @ S @ B,
    "S B S": lambda S, B, F: S @ B @ S,
    "S S": lambda S, B, F: S @ S,
}
READ = {
    "trace": lambda A: A.trace(),
    "diagonal": lambda A: A.diagonal() @ torch.linspace(1, 2, 6, dtype=torch.float64),
    "norm": lambda A: (A.T @ A).trace(),
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("name", INSIDE)
def test_priors_inside_of_products(name: str, read: str) -> None:
    """Derivatives in the entries of P, of (c V Vᵀ + P)⁻¹ among other factors."""
    generator = torch.Generator().manual_seed(0)
    V, W, B = (
        torch.randn(6, k, generator=generator, dtype=torch.float64) for k in (2, 3, 6)
    )
    p = torch.linspace(0.5, 2, 6, dtype=torch.float64).requires_grad_()
    low_rank, other = vl.Dense(V), vl.Dense(W)
    S = (low_rank @ low_rank.T + vl.Diagonal(p)).inv()
    exact = torch.linalg.inv(V @ V.T + p.diag())
    found = READ[read](INSIDE[name](S, vl.Dense(B), other @ other.T))
    expected = READ[read](INSIDE[name](exact, B, W @ W.T))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, p)[0] for x in (found, expected))
    )


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_pseudoinverses_of_products(shape: tuple[int, int]) -> None:
    """Of a condition of 1e4 they have derivatives, as those of the matrix."""
    draw = Draw(FLOAT64)
    rank = min(shape)
    left, right = (torch.linalg.qr(draw(n, rank)).Q for n in shape)
    A = ((left * torch.logspace(0, -4, rank, dtype=FLOAT64)) @ right.T).requires_grad_()
    B, weights = vl.from_scipy(draw.definite(shape[1]).numpy()), draw(*shape[::-1])
    expected = torch.linalg.pinv(A @ B.to_dense())
    found = (vl.Dense(A) @ B).pinv().to_dense()
    assert (found - expected).norm() <= 1e-8 * expected.norm()
    both = [torch.autograd.grad((x * weights).sum(), A)[0] for x in (found, expected)]
    assert (both[0] - both[1]).norm() <= 1e-5 * both[1].norm()


def of_one_eigenvalue(t):
    """V with VᵀV = t² I, and tQ."""
    return vl.Dense(t * torch.linalg.qr(Draw(FLOAT64)(6, 3)).Q)


@pytest.mark.parametrize(
    "form",
    [
        lambda V: V.T @ V + 0.7 * vl.Identity(3),
        lambda V: V @ V.T + 0.7 * vl.Identity(6),
        lambda V: 2.0 * (V @ V.T) + 0.7 * vl.Identity(6),
    ],
)
def test_what_is_smooth_is_so_at_eigenvalues_that_are_the_same(form):
    """Second derivatives of determinants; those of an eigenvalue are refused."""
    t = torch.tensor(1.5, dtype=FLOAT64, requires_grad=True)
    op = form(of_one_eigenvalue(t))
    found, expected = op.logdet(), torch.logdet(op.to_dense())
    for _ in range(2):
        (found,) = torch.autograd.grad(found, t, create_graph=True)
        (expected,) = torch.autograd.grad(expected, t, create_graph=True)
        assert abs(found - expected) <= 1e-10 * abs(expected)
    (slope,) = torch.autograd.grad(op.eigvalsh().sum(), t, create_graph=True)
    (expected,) = torch.autograd.grad(op.trace(), t, retain_graph=True)
    assert abs(slope - expected) <= 1e-10 * expected
    with pytest.raises(ValueError, match="eigenvalues that are the same"):
        torch.autograd.grad(slope, t)


def test_eigenvectors_have_derivatives_where_their_eigenvalues_are_apart():
    draw = Draw(FLOAT64)
    Q, W = torch.linalg.qr(draw(5, 5)).Q, draw(5, 5)
    values = torch.tensor([1e-12, 2e-12, 3e-12, 1.0, 2.0]).double()

    def largest_of(A):
        V = vl.Dense(A)
        evals, evecs = (V.T @ V).eigh(k=1)
        return (W @ (evecs * evals)).square().sum()

    A = (Q * values.sqrt()).requires_grad_()
    (slope,) = torch.autograd.grad(largest_of(A), A)
    step = 1e-5 * draw(5, 5)
    with torch.no_grad():
        change = (largest_of(A + step) - largest_of(A - step)) / 2
    assert abs((slope * step).sum() - change) <= 1e-6 * change.abs()
    V = vl.Dense(A)
    evecs = (V.T @ V).eigh().eigenvectors
    with pytest.raises(ValueError, match="eigenvalues that are the same, or nearly"):
        torch.autograd.grad((W[: len(evecs)] @ evecs[:, :2]).square().sum(), A)


def _quadratic(risk):
    """Per-sample gradients, and the GGN."""
    U, G = vl.PerSampleGradients(risk).to_dense(), vl.GGN(risk).to_dense()
    return U, G


ALONG = {
    "slopes": (
        lambda risk, E: vl.directional_derivatives(risk, E)[0],
        lambda U, G, E: U.T @ E,
    ),
    "curvatures": (
        lambda risk, E: vl.directional_derivatives(risk, E)[1].mean(0),
        lambda U, G, E: (E.T @ G @ E).diagonal(),
    ),
    "Newton step": (
        lambda risk, E: vl.damped_newton_step(risk, E, 0.1),
        lambda U, G, E: -E @ (E.T @ U.mean(1) / ((E.T @ G @ E).diagonal() + 0.1)),
    ),
    "projector": (
        lambda risk, E: vl.projector(E).to_dense(),
        lambda U, G, E: E @ torch.linalg.inv(E.T @ E) @ E.T,
    ),
    "complement": (
        lambda risk, E: vl.projector(E, complement=True) @ torch.ones(len(E)).double(),
        lambda U, G, E: (
            torch.ones(len(E)).double() - E @ (torch.linalg.inv(E.T @ E) @ E.sum(0))
        ),
    ),
}


@pytest.mark.parametrize("name", ALONG)
def test_derivatives_in_directions(name):
    """They were cut off without a word: what is added to them had all the slope."""
    found, expected = ALONG[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = torch.randn(6, 2).double(), torch.randint(2, (6,))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
    U, G = _quadratic(risk)
    E = torch.linalg.qr(torch.randn(len(G), 2).double()).Q.requires_grad_()
    value, truth = found(risk, E), expected(U, G, E)
    weights = torch.rand_like(truth)
    torch.testing.assert_close(value, truth)
    slopes = [torch.autograd.grad((weights * v).sum(), E)[0] for v in (value, truth)]
    torch.testing.assert_close(*slopes)
    with torch.no_grad():
        assert not torch.as_tensor(found(risk, E)).requires_grad


def test_densities_of_what_requires_grad_are_refused():
    delta = torch.tensor(0.5, dtype=FLOAT64, requires_grad=True)
    A = vl.Diagonal(torch.arange(1.0, 7.0).double())
    for op in (A + delta * vl.Identity(6), delta * A, vl.Diagonal(delta.expand(6))):
        with pytest.raises(TypeError, match="passes no derivatives"):
            vl.LanczosSpectrum(op, 3)
    assert (
        len(vl.LanczosSpectrum(A + delta.detach() * vl.Identity(6), 3).density()) == 2
    )
