"""Mirrored products A B Aᵀ: spectra, roots and inverses of their smaller side."""

import pytest
import torch
from torch import nn

import vivit_linop as vl
from tests.operator_market import Draw
from vivit_linop.operators import Diagonal, Product
from vivit_linop.operators.elementary import mirrored

EPS = {torch.float32: 1e-5, torch.float64: 1e-12}


def risk_of(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    data = torch.rand(6, 4, dtype=dtype), torch.randint(3, (6,))
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)


def weighted(draw):
    """V W with weights on the columns, and its product with the transpose."""
    V, w = draw(30, 4), draw(4)
    W = vl.Dense(V) @ Diagonal(w)
    return W @ W.T, (V * w) @ (V * w).T


def small_side(draw):
    """Wᵀ W of the same."""
    V, w = draw(30, 4), draw(4)
    W = vl.Dense(V) @ Diagonal(w)
    return W.T @ W, (V * w).T @ (V * w)


def khatri_rao(draw):
    V, w = vl.KhatriRao(draw(5, 3), draw(6, 3)), draw(3).abs()
    return V @ Diagonal(w) @ V.T, V.to_dense() * w @ V.to_dense().T


def projected(draw):
    """P G P with a symmetric P of full size."""
    risk = risk_of(draw(1).dtype)
    D = risk.num_params
    E = torch.linalg.qr(draw(D, 7)).Q
    P, G = vl.Dense(E) @ vl.Dense(E).T, vl.GGN(risk)
    return P @ G @ P, E @ E.T @ G.to_dense() @ E @ E.T


def complement(draw):
    """(I − E Eᵀ) G (I − E Eᵀ)."""
    risk = risk_of(draw(1).dtype)
    D, G = risk.num_params, vl.GGN(risk)
    E = torch.linalg.qr(draw(D, 7)).Q
    P = vl.Identity(D) - vl.Dense(E) @ vl.Dense(E).T
    Q = torch.eye(D, dtype=E.dtype) - E @ E.T
    return P @ G @ P, Q @ G.to_dense() @ Q


def conjugated(draw):
    """A G Aᵀ with a matrix A of no symmetry."""
    risk = risk_of(draw(1).dtype)
    G, A = vl.GGN(risk), draw(risk.num_params, risk.num_params)
    op = vl.Dense(A) @ G @ vl.Dense(A).T
    return op, A @ G.to_dense() @ A.T


def wide(draw):
    """A G Aᵀ with fewer rows than G."""
    risk = risk_of(draw(1).dtype)
    G, A = vl.GGN(risk), draw(8, risk.num_params)
    return vl.Dense(A) @ G @ vl.Dense(A).T, A @ G.to_dense() @ A.T


def scaled_factor(draw):
    """The GGN of weighted samples: columns of V times weights."""
    risk = risk_of(draw(1).dtype)
    V = vl.GGNFactor(risk)
    w = draw(V.shape[1])
    W = V @ Diagonal(w)
    return W @ W.T, (V.to_dense() * w) @ (V.to_dense() * w).T


def dense_inside(draw):
    A, B = draw(20, 4), draw(4, 4)
    K = vl.KhatriRao(A[:5], A[5:10])
    op = K @ vl.Dense(B @ B.T) @ K.T
    return op, K.to_dense() @ B @ B.T @ K.to_dense().T


def longer(draw):
    """A B D Bᵀ Aᵀ, whose factors do not merge."""
    A, B, d = draw.regular(24), draw(24, 3), draw(3).abs()
    K = vl.Kronecker(A[:4, :4], A[:6, :6])
    op = K @ vl.Dense(B) @ Diagonal(d) @ vl.Dense(B).T @ K.T
    return op, K.to_dense() @ (B * d) @ B.T @ K.to_dense().T


def blocks(draw):
    """Blocks at scattered places on both sides."""
    indices = [torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])]
    parts, V, d = [draw.regular(3), draw.regular(3)], draw(6, 2), draw(2).abs()
    B = vl.BlockDiagonal(parts, indices)
    op = B @ vl.Dense(V) @ Diagonal(d) @ vl.Dense(V).T @ B.T
    return op, B.to_dense() @ (V * d) @ V.T @ B.to_dense().T


CASES = [
    blocks,
    weighted, small_side, khatri_rao, projected, complement, conjugated, wide,
    scaled_factor, dense_inside, longer,
]  # fmt: skip


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_verbs_of_mirrored_products(case, dtype):
    op, matrix = case(Draw(dtype))
    assert isinstance(op, Product) and op.self_adjoint
    truth, size = matrix.double(), matrix.double().norm()
    tolerance = EPS[dtype] * size

    def near(got, expected, scale=1.0):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= scale * tolerance

    vl.testing.check_operator(op, matrix)
    expected = torch.linalg.eigvalsh(truth)
    evals = op.eigvalsh()
    near(evals, expected[-len(evals) :])
    assert expected[: -len(evals)].abs().sum() <= tolerance  # the others are zero
    near(op.eigh(k=2).eigenvalues, expected[-2:])
    pairs = op.eigh()
    near(pairs.eigenvectors * pairs.eigenvalues @ pairs.eigenvectors.T, truth)
    near(op.diagonal(), truth.diagonal())
    near(op.trace(), truth.trace())
    root = op.sqrt()
    near((root @ root.T).to_dense(), truth)

    delta = 0.1 * expected[-1].item()
    n = len(matrix)
    damped = op + delta * vl.Identity(n)
    inverse = torch.linalg.inv(truth + delta * torch.eye(n).double())
    near(damped.inv().to_dense(), inverse, inverse.norm() / size)
    logdet = torch.logdet(truth + delta * torch.eye(n).double())
    assert abs(damped.logdet() - logdet) <= EPS[dtype] * n * 10
    root = damped.sqrt().to_dense()
    near(root @ root.T, truth + delta * torch.eye(n).double())
    near((3 * op).eigh(k=1).eigenvalues, 3 * expected[-1:])
    near(
        (0.5 * op + delta * vl.Identity(n)).eigvalsh()[-1:], 0.5 * expected[-1:] + delta
    )


def test_log_determinants_of_singular_and_regular_ones():
    draw = Draw(torch.float64)
    op, _ = weighted(draw)
    assert op.logdet() == -torch.inf
    small, matrix = small_side(draw)
    torch.testing.assert_close(small.logdet(), torch.logdet(matrix))
    vl.testing.check_operator(small.inv(), torch.linalg.inv(matrix))
    with pytest.raises(ValueError, match=r"singular.*damping"):
        op.inv()


def test_the_gram_matrix_is_computed_once():
    class Counted(vl.Dense):
        adjoints = 0

        def _multiply_adjoint(self, X):
            self.adjoints += 1
            return super()._multiply_adjoint(X)

    draw = Draw(torch.float64)
    V = Counted(draw(30, 4))
    op = V @ vl.Kronecker(draw.regular(2), draw.regular(2))
    op = op @ op.T
    evals = op.eigvalsh()
    known = V.adjoints
    for delta in (0.1, 1.0):
        damped = (op + delta * vl.Identity(30)).logdet()
        expected = 26 * torch.tensor(delta).double().log() + (evals + delta).log().sum()
        torch.testing.assert_close(damped, expected)
    assert V.adjoints == known


def test_what_has_no_root_says_so():
    draw = Draw(torch.float64)
    V = vl.Dense(draw(30, 4))
    indefinite = V @ Diagonal(torch.tensor([1.0, -1.0, 2.0, 3.0]).double()) @ V.T
    evals = torch.linalg.eigvalsh(indefinite.to_dense())
    torch.testing.assert_close(indefinite.eigvalsh(), evals)
    with pytest.raises(TypeError, match="inv: no closed form for a damped Product"):
        (indefinite + vl.Identity(30)).inv()
    with pytest.raises(ValueError, match="not positive semi-definite"):
        indefinite.sqrt()
    matrix = indefinite.to_dense()
    torch.testing.assert_close(indefinite.diagonal(), matrix.diagonal())


def test_different_places_or_factors_are_not_mirrored():
    draw = Draw(torch.float64)
    parts, D = [draw.regular(3), draw.regular(3)], Diagonal(draw(6))
    A = vl.BlockDiagonal(parts)
    B = vl.BlockDiagonal(parts, [torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])])
    K = vl.Kronecker(draw.regular(2), draw.regular(3))
    L = vl.Kronecker(K.factors[0], draw.regular(3))
    for left, right in ((A, B.T), (B, A.T), (A, A), (K, L.T), (K, K), (K, A.T)):
        assert not (left @ D @ right).self_adjoint
    assert (A @ D @ A.T).self_adjoint and (K @ D @ K.T).self_adjoint


def test_diagonals_of_one_tensor_are_mirrored():
    """P G P with a P written twice has the inverse of a low-rank node."""
    draw = Draw(torch.float64)
    G, p = vl.Dense(draw(30, 4)), draw(30).abs()
    A = Diagonal(p) @ (G @ G.T) @ Diagonal(p) + 0.1 * vl.Identity(30)
    W = p[:, None] * G.matrix
    matrix = W @ W.T + 0.1 * torch.eye(30).double()
    torch.testing.assert_close(A.inv().to_dense(), torch.linalg.inv(matrix))
    torch.testing.assert_close(A.logdet(), torch.logdet(matrix))
    assert not (Diagonal(p) @ (G @ G.T) @ Diagonal(p.clone())).self_adjoint
    # Of one memory, but with other derivatives.
    leaf = p.clone().requires_grad_()
    assert not (Diagonal(leaf) @ (G @ G.T) @ Diagonal(leaf.detach())).self_adjoint
    product = Diagonal(leaf) @ (G @ G.T) @ Diagonal(leaf) @ p
    expected = leaf * (G.matrix @ (G.matrix.T @ (leaf * p)))
    (found,) = torch.autograd.grad(product.sum(), leaf)
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(found, wanted)
    slope = torch.func.grad(
        lambda q: (Diagonal(q) @ (G @ G.T) @ Diagonal(q) @ p).sum()
    )(p)
    torch.testing.assert_close(
        slope,
        torch.func.grad(lambda q: (q * (G.matrix @ (G.matrix.T @ (q * p)))).sum())(p),
    )


# Nodes that are written twice of one risk.
TWICE = {
    "U Uᵀ": lambda r: vl.PerSampleGradients(r) @ vl.PerSampleGradients(r).T,
    "V Vᵀ": lambda r: vl.GGNFactor(r) @ vl.GGN(r).factor.T,
    "UᵀU": lambda r: vl.PerSampleGradients(r).T @ vl.PerSampleGradients(r),
    "J S Jᵀ": lambda r: vl.Jacobian(r) @ inverse(r) @ vl.Jacobian(r).T,
    "Uᵀ S U": lambda r: (
        vl.PerSampleGradients(r).T @ inverse(r) @ vl.PerSampleGradients(r)
    ),
    "J G Jᵀ": lambda r: vl.Jacobian(r) @ vl.GGN(r) @ vl.Jacobian(r).T,
    "G G": lambda r: vl.GGN(r) @ vl.GGN(r),
}


def inverse(risk):
    return (vl.GGN(risk) + 0.1 * vl.Identity(risk.num_params)).inv()


@pytest.mark.parametrize("name", TWICE)
def test_what_is_written_twice_is_one(name):
    risk = risk_of(torch.float64)
    op = TWICE[name](risk)
    dense = op.to_dense()
    assert op.self_adjoint
    assert torch.allclose(op @ torch.eye(len(dense)).to(dense), dense, atol=1e-12)
    damped = op + vl.Identity(len(dense))
    reference = dense + torch.eye(len(dense)).to(dense)
    assert torch.allclose(damped.logdet(), torch.logdet(reference))
    largest = op.eigh(k=2).eigenvalues
    assert torch.allclose(largest, torch.linalg.eigvalsh(dense)[-2:])


def test_sums_of_what_is_written_twice():
    risk = risk_of(torch.float64)
    both = vl.GGN(risk) + 2 * vl.GGN(risk)
    assert both.factor.shape[1] == vl.GGN(risk).factor.shape[1]
    assert torch.allclose(both.to_dense(), 3 * vl.GGN(risk).to_dense())


def test_draws_are_two():
    """Two Monte-Carlo factors of one risk are two matrices; so are two risks."""
    risk = risk_of(torch.float64)
    draws = [
        vl.GGN(risk, mc_samples=1, generator=torch.Generator().manual_seed(seed)).factor
        for seed in (0, 1)
    ]
    product = draws[0].T @ draws[1]
    assert not product.self_adjoint
    expected = draws[0].to_dense().T @ draws[1].to_dense()
    assert torch.allclose(product.to_dense(), expected)
    assert not torch.allclose(expected, draws[1].gram.to_dense())
    other = risk.at({name: 2 * p for name, p in risk.params.items()})
    J, moved = vl.Jacobian(risk), vl.Jacobian(other)
    assert not (J @ moved.T).self_adjoint
    assert torch.allclose((J @ moved.T).to_dense(), J.to_dense() @ moved.to_dense().T)


@pytest.mark.parametrize("dtype", EPS)
def test_anticommutators_are_self_adjoint(dtype):
    """A B + B A for self-adjoint A, B, whose products are not."""
    risk = risk_of(dtype)
    D, G = risk.num_params, vl.GGN(risk)
    K, p = vl.KFAC(risk, variant="exact"), Diagonal(torch.linspace(1, 2, D).to(dtype))
    S = (G + 0.5 * vl.Identity(D)).inv()
    for A, B in [(K, G), (S, p), (S, K), (G, p)]:
        assert not (A @ B).self_adjoint
        op = (A @ B + B @ A) / 2
        a, b = A.to_dense().double(), B.to_dense().double()
        truth, size = (a @ b + b @ a) / 2, a.norm() * b.norm()
        assert op.self_adjoint and op.T is op
        assert (op.to_dense() - truth).norm() <= EPS[dtype] * size
        evals = op.eigh(k=3).eigenvalues.double()
        assert (evals - torch.linalg.eigvalsh(truth)[-3:]).norm() <= EPS[dtype] * size
        x = torch.linspace(-1, 1, D).to(dtype)
        solution = (op + 5.0 * size.item() * vl.Identity(D)).solve(x, rtol=EPS[dtype])
        shifted = truth + 5.0 * size * torch.eye(D).double()
        exact = torch.linalg.solve(shifted, x.double())
        assert (solution - exact).norm() <= 10 * EPS[dtype] * exact.norm()
    for op in (K @ G + K @ S, K @ G + G @ K + K @ G, K @ G + G, K @ G - G @ K):
        assert not op.self_adjoint
        with pytest.raises((TypeError, ValueError)):
            op.eigh(k=2)
    both = vl.operators.Sum(K @ G, S @ p)
    assert vl.operators.elementary.mirrored(both, vl.operators.Sum(p @ S, G @ K))


def test_a_matrix_and_its_negative_in_the_same_memory_are_two():
    """As torch has it for imaginary parts of conjugates."""
    z = torch.rand(3, 3, dtype=torch.complex128)
    A, B = vl.Dense(z.imag), vl.Dense(z.conj().imag)
    assert torch.equal(A.to_dense(), -B.to_dense())
    total = vl.Kronecker(A, vl.Identity(2)) + vl.Kronecker(vl.Identity(2), A)
    other = vl.Kronecker(B.T, vl.Identity(2)) + vl.Kronecker(vl.Identity(2), B.T)
    assert not mirrored(total, other)
    for left in (A, vl.Diagonal(z.imag[0])):
        right = A.T if left is A else vl.Diagonal(z.imag[0])
        assert mirrored(left, right)
    assert not mirrored(vl.Diagonal(z.imag[0]), vl.Diagonal(z.conj().imag[0]))
