"""Few pairs that a criterion chooses of many: without the vectors of the others."""

import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy.linalg import hadamard
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

import vivit_linop as vl
from tests.operator_market import Draw
from tests.verb_cases import every_dtype
from vivit_linop.linalg.decompositions import GramEigenpairs, orthonormalise_rows
from vivit_linop.operators import LowRank, symmetric
from vivit_linop.operators.symmetric import Tridiagonal

FLOAT64 = torch.float64
D, R = 400, 150
CHOICES = {
    "largest": list(range(R - 10, R)),
    "in another order": [R - 1, R - 5, R - 3],
    "from the middle": [R // 2, R // 2 + 3],
    "small ones": [R - 30, R - 1],
    "negative indices": [-2, -1],
    "one": [R - 1],
    "none": [],
    "many": list(range(R // 2)),
    "null": [0, R - 1],
}


def factor(dtype: torch.dtype, rank: int = R) -> Tensor:
    """V with singular values over two orders of magnitude, and zeros beyond a rank."""
    draw = Draw(FLOAT64)
    U, W = (torch.linalg.qr(draw(n, rank)).Q for n in (D, R))
    return (U * torch.logspace(0, -2, rank, dtype=FLOAT64)) @ W.T.to(dtype)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of matrices of which all pairs are computed."""
    calls, function = list[int](), symmetric.symmetric_eigenpairs

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(matrix))
        return function(matrix)

    monkeypatch.setattr(symmetric, "symmetric_eigenpairs", counted)
    return calls


@pytest.mark.host("on other devices all pairs are computed")
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("scale", [1.0, 3.0, 1e-12])
def test_chosen_pairs_are_those_of_the_dense_matrix(
    name: str, scale: float, whole: list[int]
) -> None:
    V = factor(FLOAT64, rank=R - 5 if name == "null" else R)
    indices = CHOICES[name]
    dense = scale * V @ V.T
    given = list[Tensor]()

    def criterion(evals: Tensor) -> list[int]:
        given.append(evals)
        return indices

    evals, evecs = LowRank(vl.Dense(V), scale).eigh(select=criterion)
    expected = torch.linalg.eigvalsh(dense)[-R:]
    size = expected.max()
    assert (given[0] - expected).abs().max() <= 1e-13 * size
    chosen = expected[indices]
    assert evals.shape == (len(indices),)
    assert ((evals - chosen).abs() <= 1e-13 * size).all()
    unit = torch.eye(len(indices), dtype=FLOAT64)
    assert (evecs.T @ evecs - unit).abs().sum() <= 1e-13 * max(1, len(indices)) ** 2
    residual = (dense @ evecs - evecs * chosen).norm(dim=0)
    assert (residual <= 1e-12 * size).all()
    assert whole == ([R] if name in ("many", "null", "none") else [])


@pytest.mark.host("on other devices all pairs are computed")
@every_dtype
def test_small_pairs_are_as_exact_as_by_all_pairs(dtype: torch.dtype) -> None:
    V = factor(FLOAT64).to(dtype)
    chosen = CHOICES["small ones"]
    few = LowRank(vl.Dense(V)).eigh(select=lambda _: chosen).eigenvectors.double()
    with_all = LowRank(vl.Dense(V))
    with_all.eigh()
    assert with_all.kept.decomposed
    known = with_all.eigh(select=lambda _: chosen).eigenvectors.double()
    exact = torch.linalg.svd(V.double()).U[:, :R].flip(1)[:, chosen]

    def error(vectors: Tensor) -> float:
        return float((1.0 - (vectors * exact).sum(0).abs()).max())

    eps = torch.finfo(dtype).eps
    assert error(few) <= 2.0 * error(known) + 10.0 * eps
    unit = torch.eye(2, dtype=FLOAT64)
    assert (few.T @ few - unit).abs().max() <= 40.0 * eps


@pytest.mark.host("on other devices all pairs are computed")
def test_one_reduction_serves_every_criterion(
    whole: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()

    class Counted(Tridiagonal):
        def __init__(self, matrix: Tensor) -> None:
            calls.append(len(matrix))
            super().__init__(matrix)

    monkeypatch.setattr(symmetric, "Tridiagonal", Counted)
    G = LowRank(vl.Dense(factor(FLOAT64)))
    dense = G.to_dense()
    assert not G.gram.known  # one node, from here on, of all multiples
    for scale in (1.0, 2.0):
        for last in (R - 1, R - 2):
            evals = (scale * G).eigh(select=lambda _, last=last: [last]).eigenvalues
            expected = torch.linalg.eigvalsh(scale * dense)
            torch.testing.assert_close(evals, expected[[last - R]])
    assert calls == [R]
    assert whole == []
    G.eigh()
    G.eigh(select=lambda evals: [0])
    assert calls == whole == [R]


@pytest.mark.host("LAPACK is the CPU's")
@every_dtype
@pytest.mark.parametrize("part", [None, -0.9, -0.25, 0.25, 0.9])
def test_a_matrix_of_any_size(dtype: torch.dtype, part: float | None) -> None:
    """From nearly the smallest to nearly the largest numbers; its spectrum is known."""
    least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    size = 1.0 if part is None else most**part if part > 0 else least**-part
    size = 2.0 ** round(math.log2(size))
    # Sums of whole numbers, over 256: nothing is rounded.
    numbers = torch.arange(256).double() * 37 % 1021 - 400
    signs = torch.from_numpy(hadamard(256)).double()
    A = (size * ((signs * numbers) @ signs / 256)).to(dtype)
    before = A.clone()
    reduced = Tridiagonal.of(A)
    assert reduced is not None
    evals = size * numbers.sort().values
    # LAPACK promises a modest multiple of eps, that grows with the rows.
    rounding = len(A) / 8 * torch.finfo(dtype).eps * evals.abs().max()
    assert (reduced.eigenvalues - evals).abs().max() <= rounding
    vectors = reduced.eigenvectors(20, 24)
    assert vectors is not None
    residual = A.double() @ vectors.double() - vectors * evals[20:25]
    assert (residual / evals.abs().max()).norm() <= 100 * torch.finfo(dtype).eps
    assert torch.equal(A, before)
    zero = Tridiagonal.of(torch.zeros(256, 256, dtype=dtype))
    assert zero is not None and not zero.eigenvalues.any()


def turned(values: Tensor) -> Tensor:
    """A matrix with some eigenvalues, none of which is exact."""
    Q = torch.linalg.qr(Draw(FLOAT64)(len(values), len(values))).Q
    return (Q * values) @ Q.T


@pytest.mark.host("LAPACK is the CPU's")
@every_dtype
@pytest.mark.parametrize(
    "values",
    [
        torch.ones(200),
        torch.tensor([1.0, 1.0 + 1e-12, 2.0, 3.0, 1e-9]).repeat_interleave(40),
        torch.tensor([0.0, 1.0]).repeat_interleave(100),
    ],
)
@pytest.mark.parametrize("size", [1.0, 1e-37, 1e37])
def test_eigenvalues_that_are_nearly_the_same(
    values: Tensor, size: float, dtype: torch.dtype
) -> None:
    """There are vectors of them, or none; LAPACK finds some only."""
    A = (size * turned(values.double())).to(dtype)
    reduced = Tridiagonal.of(A)
    assert reduced is not None
    found = []
    for first, last in [(190, 199), (100, 140), (0, 199)]:
        vectors = reduced.eigenvectors(first, last)
        found.append(vectors)
        if vectors is not None:
            evals = reduced.eigenvalues[first : last + 1].double() / size
            residual = A.double() / size @ vectors.double() - vectors * evals
            assert residual.abs().max() <= 100 * torch.finfo(dtype).eps
            unit = torch.eye(last + 1 - first, dtype=FLOAT64)
            assert (vectors.T @ vectors - unit).abs().max() <= 1e-3
    assert any(vectors is not None for vectors in found)


@pytest.mark.host("on other devices all pairs are computed")
@every_dtype
def test_all_pairs_serve_where_few_are_not_found(dtype: torch.dtype) -> None:
    root = turned(torch.ones(200, dtype=FLOAT64)).to(dtype)
    G = LowRank(vl.Dense(torch.cat([root, root])))
    evals, evecs = G.eigh(select=lambda _: range(190, 200))
    eps = torch.finfo(dtype).eps
    assert (evals - 2.0).abs().max() <= 100 * eps
    assert (evecs.T @ evecs - torch.eye(10, dtype=dtype)).abs().max() <= 100 * eps
    assert (G @ evecs - 2.0 * evecs).abs().max() <= 100 * eps


@pytest.mark.host("LAPACK is the CPU's")
@every_dtype
@pytest.mark.parametrize("rows", [140, 1000])
def test_eigenvalues_are_of_the_lower_triangle_by_either_library(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = Draw(FLOAT64).symmetric(160).to(dtype)
    expected = torch.linalg.eigvalsh(A.double())
    monkeypatch.setattr(symmetric, "_FEW_ROWS", 150)
    monkeypatch.setattr(symmetric, "_ONE_STAGE_ROWS", {dtype: rows})
    eps = torch.finfo(dtype).eps * expected.abs().max()
    for half in (A.tril(), A.triu().T, A.tril() + 3.0 * A.triu(1)):
        evals = symmetric.symmetric_eigenvalues(half)
        assert (evals - expected).abs().max() <= 20 * eps
    A[2, 1] = float("inf")
    with pytest.raises(ValueError, match="infs or NaNs"):
        symmetric.symmetric_eigenvalues(A)


@pytest.mark.host("MKL is the CPU's")
def test_threads_of_mkl_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another thread meanwhile, and after an error."""
    A, inside = Draw(FLOAT64).symmetric(160), list[str]()
    monkeypatch.setattr(symmetric, "_ONE_STAGE_ROWS", {FLOAT64: 140})
    expected, threads = torch.linalg.eigvalsh(A), torch.get_num_threads()
    real = torch.linalg.eigvalsh

    def watched(matrix: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            inside.append(pool.submit(torch.__config__.parallel_info).result())
        if len(inside) > 1:
            raise RuntimeError("as LAPACK may")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", watched)
    torch.set_num_threads(2)
    try:
        before = torch.__config__.parallel_info()
        evals = symmetric.symmetric_eigenvalues(A)
        with pytest.raises(RuntimeError, match="as LAPACK may"):
            symmetric.symmetric_eigenvalues(A)
        assert torch.__config__.parallel_info() == before
        assert symmetric._set_mkl_threads() is None or inside == [before] * 2
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(evals, expected)


@pytest.mark.host("LAPACK is the CPU's")
def test_what_is_no_number_is_refused_and_threads_are_as_before() -> None:
    A = Draw(FLOAT64).symmetric(140)
    A[3, 3] = float("nan")

    def of_blas() -> list[int]:
        return [lib["num_threads"] for lib in threadpool_info()]

    with threadpool_limits(2, user_api="blas"):
        before = of_blas()
        with pytest.raises(ValueError, match="infs or NaNs"):
            Tridiagonal(A)
        Tridiagonal(Draw(FLOAT64).symmetric(140)).eigenvectors(0, 3)
        assert of_blas() == before


@pytest.mark.host("numpy's arrays are the CPU's")
def test_a_reduction_travels() -> None:
    G = LowRank(vl.Dense(factor(FLOAT64)))
    before = G.eigh(select=lambda _: [R - 1])
    after = pickle.loads(pickle.dumps(G)).eigh(select=lambda _: [R - 1])
    assert torch.equal(before.eigenvalues, after.eigenvalues)


@every_dtype
@pytest.mark.parametrize("noise", [0.0, 1e-3, 3.0])
@pytest.mark.parametrize("sizes", [[20_000], [9_000, 3, 0, 10_997]])
def test_rows_in_parts_are_orthonormal(
    sizes: list[int], noise: float, dtype: torch.dtype
) -> None:
    draw = Draw(FLOAT64)
    rows = torch.linalg.qr(draw(sum(sizes), 5)).Q.T
    rows = (rows + noise * rows.flip(0).roll(1, 0)).to(dtype)
    before = rows.double()
    values = torch.tensor([3.0, 5.0, 4.0, 2.0, 1.0], dtype=dtype)
    parts = [part.clone() for part in rows.split(sizes, dim=1)]
    orthonormalise_rows(parts, values)
    after = torch.cat(parts, dim=1).double()
    eps = torch.finfo(dtype).eps
    unit = torch.eye(5, dtype=FLOAT64, device=after.device)
    assert (after @ after.T - unit).abs().max() <= 32 * eps
    # The first ones span what they did, those of the largest eigenvalues.
    order = values.argsort(descending=True)
    components = (after @ before.T)[order][:, order]
    assert components.tril(-1).abs().max() <= 100 * eps
    assert (components.diagonal() > 0.0).all()


@every_dtype
@pytest.mark.parametrize("spread", [1.0, 4.0, 1e3])
@pytest.mark.host("of others the host does not wait for overlaps")
def test_a_known_gram_matrix_makes_pairs_orthonormal_before_they_are_lifted(
    spread: float, dtype: torch.dtype
) -> None:
    """Unless eigenvalues are so different that rounding in it is as large."""
    draw, chosen = Draw(FLOAT64), [R - 1, 0, R // 2]
    U, Q = (torch.linalg.qr(draw(n, R)).Q for n in (D, R))
    values = torch.linspace(1.0 / spread, 1.0, R, dtype=FLOAT64)
    matrix = ((U * values.sqrt()) @ Q.T).to(dtype)
    G = 2.0 * LowRank(vl.Dense(matrix))
    assert isinstance(G, LowRank)
    assert G.gram.matrix.shape == (R, R)
    q = Q[:, chosen] + 1e-3 * Q[:, chosen].roll(1, 1)
    pairs = GramEigenpairs(2.0 * values[chosen].to(dtype), G, q.to(dtype))
    unit, eps = torch.eye(3, dtype=FLOAT64), torch.finfo(dtype).eps
    lifted = matrix.double() @ pairs.coefficients.double()
    off = (lifted.T @ lifted - unit).abs().max()
    assert (off <= 32 * eps) == (spread <= 32)
    E = pairs.eigenvectors.double()
    assert (E.T @ E - unit).abs().max() <= 32 * eps
    # What belongs to the largest eigenvalue keeps its direction.
    mixed = 1e-3 * (values[R // 2] / values[R - 1]) ** 0.5
    assert abs((E[:, 0] @ U[:, R // 2]).abs() - mixed) <= 1e-6
