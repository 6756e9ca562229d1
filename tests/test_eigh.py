"""Eigenvalues and eigenpairs: choices, numerical zeros, factors."""

import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

import vivit_linop as vl
from tests.operator_market import Draw, build, khatri_rao_of
from tests.verb_cases import (
    FLOAT64,
    SQUARE,
    assert_near,
    every_dtype,
    graded,
    on_market,
)
from vivit_linop.linalg import eigen
from vivit_linop.operators import Damped, Gram, LowRank

NO_CLOSED_FORM = ["expression_sandwich", "product_symmetric", "sum_symmetric"]
SELF_ADJOINT = on_market(lambda op, dense: op.self_adjoint)
NOT_SELF_ADJOINT = [name for name in SQUARE if name not in SELF_ADJOINT]


# Threads ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [100, 129])
def test_threads_of_blas_are_as_before(n: int) -> None:
    """Also where decompositions meet in several threads."""
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(n)).double()
    A = A + A.T

    def of_blas() -> list[int]:
        return [lib["num_threads"] for lib in threadpool_info()]

    def decomposed(_: int) -> tuple[Tensor, Tensor, Tensor]:
        op = vl.Dense(A)
        evals, evecs = op.eigh()
        return op.eigvalsh(), evals, evecs

    with threadpool_limits(2, user_api="blas"):
        before = of_blas()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(decomposed, range(4)))
        assert of_blas() == before
    expected = np.linalg.eigvalsh(A.numpy())
    for alone, evals, evecs in found:
        np.testing.assert_allclose(alone, expected, atol=1e-11)
        np.testing.assert_allclose(evals, expected, atol=1e-11)
        torch.testing.assert_close(evecs @ (evals[:, None] * evecs.T), A)


# Eigenvalues --------------------------------------------------------------------------


def all_eigenvalues(evals, n):
    """Low-rank nodes give their min(D, R) eigenvalues; the others are zero."""
    return torch.cat([evals, evals.new_zeros(n - len(evals))]).sort().values


@pytest.mark.parametrize("name", SELF_ADJOINT)
@every_dtype
def test_eigenvalues(name, dtype, device):
    op, dense = build(name, dtype, device)
    evals = op.eigvalsh()
    assert (evals.dtype, evals.device) == (dtype, op.device)
    assert torch.equal(evals, evals.sort().values)
    expected = torch.linalg.eigvalsh(dense)
    scale = 20 * torch.finfo(dtype).eps * expected.abs().max()
    error = all_eigenvalues(evals.double(), len(dense)) - expected
    assert error.abs().max() <= scale


@pytest.mark.parametrize("name", NO_CLOSED_FORM)
def test_all_eigenvalues_of_large_ones_need_a_closed_form(name, monkeypatch):
    monkeypatch.setattr(eigen, "DENSE_ROWS", 0)
    op, _ = build(name, FLOAT64)
    for verb in (op.eigvalsh, op.eigh, op.logdet):
        with pytest.raises(TypeError, match=r"^eigh: no closed form.*iterates"):
            verb()


def test_what_is_symmetric_but_for_rounding_says_what_to_take():
    B = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)).double()
    M = torch.linalg.inv(B @ B.T)  # whose rounding is that of a condition number
    assert (M != M.T).any() and not vl.Dense(M).self_adjoint
    with pytest.raises(TypeError, match=r"^eigh: .* Dense\(\(M \+ M.T\) / 2\)"):
        vl.Dense(M).eigh()
    found = vl.Dense((M + M.T) / 2).eigvalsh()
    expected = torch.linalg.eigvalsh(B @ B.T).reciprocal().flip(0)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("name", NOT_SELF_ADJOINT)
def test_operators_that_are_not_self_adjoint_have_no_eigh(name):
    op, _ = build(name, FLOAT64)
    for verb in ("eigvalsh", "eigh"):
        with pytest.raises(TypeError, match=rf"^{verb}: needs a self-adjoint operator"):
            getattr(op, verb)()


@pytest.mark.parametrize("name", SELF_ADJOINT)
@every_dtype
def test_eigenpairs(name, dtype, device):
    op, dense = build(name, dtype, device)
    scale = torch.linalg.eigvalsh(dense).abs().max()
    eps = torch.finfo(dtype).eps
    # Of all eigenvalues, those that the node knows; and of the default ones.
    for pairs in (op.eigh(), op.eigh(select=lambda evals: range(len(evals)))):
        evals, evecs = pairs
        assert evals.dtype == evecs.dtype == dtype
        assert evals.device == evecs.device == op.device
        assert evecs.shape == (len(dense), len(evals)) == (len(dense), len(pairs))
        assert torch.equal(evals, evals.sort().values)
        evals, evecs = evals.double(), evecs.double()
        gram = evecs.T @ evecs
        assert (gram - torch.eye(len(gram)).to(gram)).norm() <= 50 * eps
        assert (dense @ evecs - evecs * evals).norm() <= 50 * eps * scale
    # What is left out is zero, or the damping: all else is in the pairs.
    shift = op.damping if isinstance(op, Damped) else 0.0
    shifted = dense - shift * torch.eye(len(dense)).to(dense)
    rebuilt = (evecs * (evals - shift)) @ evecs.T
    assert (shifted - rebuilt).norm() <= 100 * eps * scale


@pytest.mark.parametrize("name", SELF_ADJOINT)
def test_k_gives_the_largest_eigenvalues(name, device):
    op, dense = build(name, FLOAT64, device)
    expected = torch.linalg.eigvalsh(dense)
    known = len(op.eigh(select=lambda evals: range(len(evals))))
    for k in {1, 2, min(3, len(dense)), len(dense)}:
        # Low-rank nodes know fewer pairs than they have rows. Where the others are
        # among the largest, as the zeros of -V V.T are, there must be an error.
        unknown = k > known or (known < len(dense) and "negative" in name)
        if unknown:
            with pytest.raises(ValueError, match=r"^k: "):
                op.eigh(k=k)
        else:
            pairs = op.eigh(k=k)
            assert len(pairs) == k
            error = pairs.eigenvalues - expected[-k:]
            assert error.abs().max() <= 1e-13 * expected.abs().max()


def test_inverses_and_roots_of_small_operators_have_all_pairs():
    """Also those that V knows nothing of; derivatives in δ pass to the eigenvalues."""
    V = vl.Dense(Draw(FLOAT64)(8, 2))
    A = V.matrix @ V.matrix.T
    delta = torch.tensor(0.5, dtype=FLOAT64, requires_grad=True)
    S = (V @ V.T + delta * vl.Identity(8)).inv()
    evals, evecs = S.eigh()
    assert_near((evecs * evals) @ evecs.T, (A + 0.5 * torch.eye(8)).inverse(), 1e-12)
    (slope,) = torch.autograd.grad(evals.sum(), delta)
    expected = -(A + 0.5 * torch.eye(8)).inverse().square().sum()
    assert_near(slope, expected, 1e-12)
    for which, places in (("LA", [-2, -1]), ("SA", [0, 1]), ("LM", [-2, -1])):
        evals, evecs = S.eigh(k=2, which=which)
        known = torch.linalg.eigvalsh(S.to_dense().detach())[places]
        assert_near(evals.detach(), known, 1e-12)
        assert_near(S @ evecs, evecs * evals, 1e-12)
    blocks = vl.BlockDiagonal(
        [(V @ V.T + vl.Identity(8)).sqrt(), torch.eye(2).double()]
    )
    evals, evecs = blocks.eigh()
    assert_near((evecs * evals) @ evecs.T, blocks.to_dense(), 1e-12)


def test_the_damping_of_a_low_rank_block_is_an_eigenvalue(device):
    # 10 is the eigenvalue of six vectors that V Vᵀ knows nothing about.
    draw = Draw(FLOAT64, device)
    V, A = vl.Dense(draw(8, 2)), draw.definite(3)
    op = vl.BlockDiagonal([V @ V.T + 10 * vl.Identity(8), A])
    expected = torch.linalg.eigvalsh(op.to_dense())
    assert_near(op.eigvalsh(), expected, 1e-13)
    assert_near(op.eigh(k=2).eigenvalues, expected[-2:], 1e-13)
    with pytest.raises(ValueError, match=r"^k: "):
        op.eigh(k=5)


# What eigh is asked for ---------------------------------------------------------------

FACTORS = {
    "tall": lambda draw: vl.Dense(draw(9, 4)),
    "square": lambda draw: vl.Dense(draw(5, 5)),
    "wide": lambda draw: vl.Dense(draw(4, 9)),
    "Khatri-Rao": lambda draw: vl.KhatriRao(draw(3, 5), draw(4, 5)),
}
every_factor = pytest.mark.parametrize("kind", FACTORS)


def outer(V):
    """V Vᵀ as an operator and as a matrix."""
    matrix = V.matrix if isinstance(V, vl.Dense) else khatri_rao_of(V.left, V.right)
    return V @ V.T, matrix.double() @ matrix.double().T


def projector(vectors):
    return vectors.double() @ vectors.double().T


@every_factor
@every_dtype
@pytest.mark.parametrize("k", [1, 3, np.int64(4)])
def test_k_largest(kind, dtype, k, device):
    G, dense = outer(FACTORS[kind](Draw(dtype, device)))
    evals, evecs = G.eigh(k=k)
    expected, vectors = torch.linalg.eigh(dense)
    eps = torch.finfo(dtype).eps
    assert_near(evals, expected[-k:], 20 * eps)
    gap = (expected[-k] - expected[-k - 1]) / expected[-1] if k < len(dense) else 1.0
    error = projector(evecs) - projector(vectors[:, -k:])
    assert error.norm() <= 50 * eps / gap


@every_factor
def test_k_of_all(kind, device):
    G, dense = outer(FACTORS[kind](Draw(FLOAT64, device)))
    count = len(G.eigvalsh())
    assert count == min(G.factor.shape)
    assert_near(
        G.eigh(k=count).eigenvalues, torch.linalg.eigvalsh(dense)[-count:], 1e-13
    )
    with pytest.raises(ValueError, match=rf"^k: .*{count} eigenvalues.*{count + 1}"):
        G.eigh(k=count + 1)


@every_factor
@pytest.mark.parametrize("choice", [[0, 3], [3, 0], [2], [-1], [1, -1, 0], []], ids=str)
@pytest.mark.parametrize(
    "given",
    [list, tuple, np.array, torch.tensor, partial(torch.tensor, dtype=torch.int32)],
    ids=["list", "tuple", "array", "tensor", "int32"],
)
def test_select_respects_the_order(kind, choice, given, device):
    G, dense = outer(FACTORS[kind](Draw(FLOAT64, device)))
    known = torch.linalg.eigvalsh(dense)[-len(G.eigvalsh()) :]
    evals, evecs = G.eigh(select=lambda evals: given(choice))
    expected = known[torch.tensor(choice, dtype=torch.long)]
    assert evecs.shape == (len(dense), len(choice))
    torch.testing.assert_close(evals, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense @ evecs, evecs * evals, rtol=1e-11, atol=1e-11)


def test_select_takes_masks(device):
    G, dense = outer(FACTORS["tall"](Draw(FLOAT64, device)))
    expected = torch.linalg.eigvalsh(dense)
    cut = expected[-3:-1].mean().item()
    for pairs in (
        G.eigh(select=lambda evals: evals > cut),
        G.eigh(select=lambda evals: (evals > cut).tolist()),
        G.eigh(select=lambda evals: (evals > cut).cpu().numpy()),
    ):
        assert_near(pairs.eigenvalues, expected[-2:], 1e-13)


def test_criteria_are_given_all_eigenvalues_and_may_change_them():
    G, dense = outer(FACTORS["tall"](Draw(FLOAT64)))
    seen = []

    def criterion(evals):
        seen.append(evals.clone())
        evals.zero_()
        return [len(evals) - 1]

    pairs = G.eigh(select=criterion)
    (evals,) = seen
    assert_near(evals, torch.linalg.eigvalsh(dense)[-4:], 1e-13)
    assert_near(pairs.eigenvalues, torch.linalg.eigvalsh(dense)[-1:], 1e-13)


@pytest.mark.parametrize(
    "choice",
    [
        [4],
        [-5],
        [0, 99],
        [0.0, 1.0],
        torch.tensor([1.5]),
        np.array([1.0]),
        [1, 1],
        [3, -1],
        3,
        torch.tensor(2),
        [[0, 1]],
        [True, False],
        torch.tensor([True, False, True]),
        None,
        "top",
        ["0"],
        [None],
        {0: 1},
    ],
    ids=repr,
)
def test_bad_criteria(choice):
    G, _ = outer(FACTORS["tall"](Draw(FLOAT64)))
    with pytest.raises((ValueError, TypeError), match=r"^select: the criterion"):
        G.eigh(select=lambda evals: choice)


@pytest.mark.parametrize("select", [[0, 1], 3, "top", torch.tensor([0])])
def test_criteria_are_functions(select):
    G, _ = outer(FACTORS["tall"](Draw(FLOAT64)))
    with pytest.raises(TypeError, match=r"^select: a function"):
        G.eigh(select=select)


@pytest.mark.parametrize("k", [0, -1, 5, 10**9])
def test_k_out_of_range(k):
    G, _ = outer(FACTORS["tall"](Draw(FLOAT64)))
    with pytest.raises(ValueError, match=rf"^k: this operator has 4 .*{k}"):
        G.eigh(k=k)


@pytest.mark.parametrize("k", [1.0, 2.5, "2", True, [1], torch.tensor(2.0)], ids=repr)
def test_k_is_an_integer(k):
    G, _ = outer(FACTORS["tall"](Draw(FLOAT64)))
    with pytest.raises(TypeError, match=r"^k: an integer"):
        G.eigh(k=k)


def test_k_and_select_exclude_each_other():
    G, _ = outer(FACTORS["tall"](Draw(FLOAT64)))
    with pytest.raises(ValueError, match="k, select"):
        G.eigh(k=1, select=lambda evals: [0])


@pytest.mark.parametrize("rcond", [-1e-3, math.nan, "small"])
def test_bad_rcond(rcond):
    G, _ = outer(FACTORS["tall"](Draw(FLOAT64)))
    with pytest.raises((ValueError, TypeError), match="rcond"):
        G.eigh(rcond=rcond)


@pytest.mark.parametrize("shape", [(9, 5), (5, 5), (5, 9)], ids=str)
def test_rcond_cuts(shape, device):
    V, _ = graded(*shape, FLOAT64, device, decades=2)  # λ = 1, 1e-1, …, 1e-4
    G = V @ V.T
    for rcond, count in ((0.0, 5), (3e-4, 4), (3e-3, 3), (0.3, 1), (1.0, 0)):
        pairs = G.eigh(rcond=rcond)
        assert len(pairs) == count
        expected = torch.logspace(1 - count, 0, count, dtype=FLOAT64, device=device)
        torch.testing.assert_close(pairs.eigenvalues, expected, rtol=1e-11, atol=1e-14)
        # Relative to the largest in magnitude, of whatever sign.
        assert len((-3 * G).eigh(rcond=rcond)) == count
    assert len(G.eigh()) == 5


def test_rcond_is_relative_to_the_shifted_eigenvalues():
    op = vl.Diagonal(torch.tensor([1.0, 2.0, 4.0])) + vl.Identity(3)
    assert op.eigh(rcond=0.5).eigenvalues.tolist() == [3.0, 5.0]


# Numerical zeros ----------------------------------------------------------------------


def repeated(shape, dtype, device, distinct=2):
    """A factor with a few distinct columns, again and again."""
    columns = Draw(dtype, device)(shape[0], distinct)
    return vl.Dense(columns.repeat(1, shape[1])[:, : shape[1]].clone())


def orthonormality_error(vectors):
    gram = vectors.double().T @ vectors.double()
    return (gram - torch.eye(len(gram)).to(gram)).norm()


@pytest.mark.parametrize("shape", [(20, 6), (6, 6), (6, 15), (7, 6)], ids=str)
@every_dtype
def test_repeated_columns(shape, dtype, device):
    G, dense = outer(repeated(shape, dtype, device))
    eps = torch.finfo(dtype).eps
    expected = torch.linalg.eigvalsh(dense)
    pairs = G.eigh()
    assert len(pairs) == 2
    assert_near(pairs.eigenvalues, expected[-2:], 20 * eps)
    assert orthonormality_error(pairs.eigenvectors) <= 50 * eps
    # Asked for explicitly, numerical zeros have orthonormal vectors too.
    for pairs in (
        G.eigh(select=lambda evals: range(len(evals))),
        G.eigh(k=min(shape)),
        G.eigh(rcond=0.0),
    ):
        evals, evecs = pairs
        assert orthonormality_error(evecs) <= 50 * eps
        residual = dense @ evecs.double() - evecs.double() * evals.double()
        assert residual.norm() <= 50 * eps * expected[-1]


def test_numerical_zeros_in_the_chosen_order(device):
    G, dense = outer(repeated((20, 6), FLOAT64, device))
    evals, evecs = G.eigh(select=lambda evals: [5, 0, 4, 2])
    expected = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(evals[[0, 2]], expected[[-1, -2]], rtol=1e-13, atol=0)
    assert evals[[1, 3]].abs().max() <= 1e-14 * expected[-1]
    assert orthonormality_error(evecs) <= 1e-14
    assert (dense @ evecs - evecs * evals).norm() <= 1e-14 * expected[-1]


@pytest.mark.parametrize("shape", [(6, 2), (3, 3), (2, 6)], ids=str)
@every_dtype
def test_a_zero_factor_has_no_nonzero_pairs(shape, dtype, device):
    V = vl.Dense(torch.zeros(shape, dtype=dtype, device=device))
    G = LowRank(V)
    assert G.eigvalsh().tolist() == [0.0] * min(shape)
    evals, evecs = G.eigh(k=1)
    assert evals.tolist() == [0.0]
    assert orthonormality_error(evecs) <= 10 * torch.finfo(dtype).eps
    assert G.eigh(rcond=0.0).eigenvectors.shape == (shape[0], 0)
    assert G.eigh().eigenvectors.shape == (shape[0], 0)


def test_blocks_leave_out_their_numerical_zeros(device):
    G, _ = outer(repeated((8, 4), FLOAT64, device))
    pairs = vl.BlockDiagonal([G, 2 * G]).eigh()
    assert len(pairs) == 4
    assert pairs.eigenvalues.min() > 1e-6


@pytest.mark.parametrize("decades", [2, 3.2])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_lifted_vectors_of_small_eigenvalues_are_orthonormal(decades, dtype, device):
    # The Gram matrix squares the condition: λ spans twice the decades.
    decades = decades if dtype == torch.float32 else 2.3 * decades
    V, dense = graded(60, 12, dtype, device, decades=decades)
    pairs = (V @ V.T).eigh(k=12)
    eps = torch.finfo(dtype).eps
    assert orthonormality_error(pairs.eigenvectors) <= 50 * eps
    expected = torch.linalg.eigvalsh(dense @ dense.T)[-12:]
    assert (pairs.eigenvalues.double() - expected).abs().max() <= 20 * eps
    residual = dense @ (dense.T @ pairs.eigenvectors.double())
    residual -= pairs.eigenvectors.double() * pairs.eigenvalues.double()
    assert residual.norm() <= 200 * eps


def test_eigenvalues_of_a_low_rank_operator_are_no_larger_than_its_smaller_side():
    # D × D would be 320 GB.
    draw = Draw(FLOAT64)
    V = vl.KhatriRao(draw(400, 3), draw(500, 3))
    G, unit = V @ V.T, vl.Identity(200_000)
    gram = (V.left.T @ V.left) * (V.right.T @ V.right)
    evals = torch.linalg.eigvalsh(gram)
    assert_near(G.eigvalsh(), evals, 1e-13)
    assert_near(G.trace(), gram.trace(), 1e-13)
    assert_near(G.diagonal().sum(), gram.trace(), 1e-13)
    damped = 2 * G + 0.5 * unit
    logdet = 199_997 * math.log(0.5) + (2 * evals + 0.5).log().sum()
    assert_near(damped.logdet(), logdet, 1e-13)
    assert_near(damped.trace(), 2 * gram.trace() + 100_000, 1e-13)
    _, evecs = damped.eigh(k=2)
    assert orthonormality_error(evecs) <= 1e-13
    assert_near(G @ evecs, evecs * evals[-2:], 1e-13)
    error = damped.inv() @ evecs - evecs / (2 * evals[-2:] + 0.5)
    assert error.norm() <= 1e-14 / 0.5  # what Woodbury divides by


# Eigenpairs ---------------------------------------------------------------------------


def test_pairs_unpack():
    G, _ = outer(FACTORS["tall"](Draw(FLOAT64)))
    pairs = G.eigh(k=2)
    evals, evecs = pairs
    assert evals is pairs.eigenvalues
    assert evecs is pairs.eigenvectors  # formed once
    assert len(pairs) == 2
    assert re.fullmatch(r"<\w*Eigenpairs: 2 in \[.*, .*\]>", repr(pairs))
    assert "none" in repr(G.eigh(select=lambda evals: []))


@every_factor
def test_combinations_and_components(kind, device):
    V = FACTORS[kind](Draw(FLOAT64, device))
    G, _ = outer(V)
    pairs = (2 * G).eigh(k=3)
    evecs = pairs.eigenvectors
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=FLOAT64, device=device)
    torch.testing.assert_close(pairs.combine(weights), evecs @ weights)
    for factor in (V, vl.Dense(Draw(FLOAT64, device, seed=5)(V.shape[0], 2))):
        expected = factor.to_dense().T @ evecs
        torch.testing.assert_close(pairs.components(factor), expected)


# Gram operators -----------------------------------------------------------------------


def test_gram_matrix_is_computed_once(device):
    V = vl.KhatriRao(*(Draw(FLOAT64, device)(n, 4) for n in (3, 2)))
    gram = Gram(V, V)
    assert gram.matrix is gram.matrix
    dense = khatri_rao_of(V.left, V.right)
    assert_near(gram.to_dense(), dense.T @ dense, 1e-14)
    assert gram.to_dense() is not gram.matrix


def test_gram_has_the_spectrum_of_the_outer_product(device):
    for kind, scale in itertools.product(FACTORS, (1.0, 3.0)):
        V = FACTORS[kind](Draw(FLOAT64, device))
        gram = (scale * Gram(V, V)).eigvalsh()
        evals = (scale * LowRank(V)).eigvalsh()
        assert_near(gram[-len(evals) :], evals, 1e-12)
