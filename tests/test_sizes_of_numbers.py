"""Very small and very large numbers: the right answer in their size, or a refusal."""

import math

import pytest
import torch

import vivit_linop as vl
from tests.operator_market import MARKET, Draw, build
from tests.pairs import in_turn
from tests.verb_cases import assert_near, every_dtype
from vivit_linop.operators import LowRank

FLOAT64 = torch.float64
SHAPES = [(20, 20), (20, 5), (10, 20), (150, 140), (300, 140)]


# So far from 1 that squares are no numbers of the dtype; powers of two round nothing.
FAR = {torch.float32: 2.0**80, FLOAT64: 2.0**600}


def ones(op: vl.TorchLinearOperator, side: int) -> torch.Tensor:
    return torch.ones(op.shape[side], dtype=op.torch_dtype, device=op.device)


def covariance(R: vl.TorchLinearOperator) -> torch.Tensor:
    """R Rᵀ, of which products in a dtype may be no numbers."""
    R = R.to_dense().double()
    return R @ R.T


def eigenvalues(op: vl.TorchLinearOperator) -> torch.Tensor:
    """All, with the zeros of low-rank operators."""
    evals = op.eigvalsh()
    zeros = evals.new_zeros(op.shape[0] - len(evals))
    return torch.cat([evals, zeros]).sort().values


# By which power of a size the answer grows, what is asked, and the dense truth.
VERBS = {
    "matrix": (1, lambda op: op.to_dense(), lambda A: A),
    "product": (1, lambda op: op @ ones(op, 1), lambda A: A.sum(1)),
    "adjoint": (1, lambda op: op.T @ ones(op, 0), lambda A: A.sum(0)),
    "diagonal": (1, lambda op: op.diagonal(), lambda A: A.diagonal()),
    "trace": (1, lambda op: op.trace(), lambda A: A.trace()),
    "inverse": (-1, lambda op: op.inv().to_dense(), torch.linalg.inv),
    "solution": (-1, lambda op: op.solve(ones(op, 0)), lambda A: A.inverse().sum(1)),
    "pinv": (-1, lambda op: op.pinv().to_dense(), torch.linalg.pinv),
    "logdet": ("log", lambda op: op.logdet(), lambda A: torch.linalg.slogdet(A)[1]),
    "root": (1, lambda op: covariance(op.sqrt()), lambda A: A),
    "eigenvalues": (1, eigenvalues, torch.linalg.eigvalsh),
    "largest": (
        1,
        lambda op: op.eigh(k=1).eigenvalues,
        lambda A: torch.linalg.eigvalsh(A)[-1:],
    ),
}
# Rounding in these is that of the largest of many numbers.
SUMS = "trace", "largest"


def degree(name: str) -> float:
    """By which power of the size of its numbers an operator of the market grows."""
    one, two = (MARKET[name](Draw(FLOAT64, size=size))[1] for size in (1.0, 2.0))
    power = math.log2(two.norm() / one.norm()) if one.any() else 0.0
    whole = abs(power - round(power)) < 1e-9
    homogeneous = torch.allclose(two, 2.0**power * one, rtol=1e-9)
    return power if whole and homogeneous else 0.0


GROWING = [name for name in MARKET if degree(name)]


def check_verbs(op, at_one, A: torch.Tensor, far: float) -> None:
    """What an operator has of verbs it has in another size, that many times as large.

    Args:
        op: far A.
        at_one: A.
        A: Its matrix.
        far: The size.
    """
    rtol = 3e-2 if op.torch_dtype == torch.float32 else 1e-8
    asked = set[str]()
    for name, (power, ask, truth) in VERBS.items():
        try:
            expected = truth(A)
            size = A.norm() if name in SUMS else expected.norm()
            assert (ask(at_one).double() - expected).norm() <= rtol * size
        # Not all have all verbs, and what is singular has no inverse.
        except (AssertionError, ArithmeticError, RuntimeError, TypeError, ValueError):
            continue
        found = ask(op).double()
        if power == "log":
            found, size = found - len(A) * math.log(far), 1.0 + size
        else:
            found = found / far**power
        assert (found - expected).norm() <= 2.0 * rtol * size, name
        asked.add(name)
    assert asked  # what no verb is right for at size one is compared with nothing


@pytest.mark.parametrize(("name", "dtype"), in_turn(MARKET, FAR), ids=str)
def test_multiples_have_the_verbs_of_what_they_are_of(
    name: str, dtype: torch.dtype
) -> None:
    op, A = build(name, dtype)
    for far in (FAR[dtype], 1.0 / FAR[dtype]):
        check_verbs(far * op, op, A, far)


@pytest.mark.parametrize(("name", "dtype"), in_turn(GROWING, FAR), ids=str)
def test_numbers_of_any_size_have_the_verbs_of_those_near_one(
    name: str, dtype: torch.dtype
) -> None:
    op, A = build(name, dtype)
    for far in (FAR[dtype], 1.0 / FAR[dtype]):
        size = far ** (1.0 / degree(name))
        small = MARKET[name](Draw(dtype, size=size))[0]
        check_verbs(small, op, A, size ** degree(name))


@pytest.mark.parametrize(("name", "dtype"), in_turn(GROWING, FAR), ids=str)
def test_multiples_of_multiples_are_of_the_dtype_again(
    name: str, dtype: torch.dtype
) -> None:
    """Products of numbers need not be ones of the dtype, nor even floats."""
    op, A = build(name, dtype)
    for far in (FAR[dtype], 1.0 / FAR[dtype]):
        size = far ** (-1.0 / degree(name))
        small = MARKET[name](Draw(dtype, size=size))[0]
        check_verbs(far * (far * small), op, A, far * (far * size ** degree(name)))


@every_dtype
@pytest.mark.parametrize("name", GROWING)
def test_norms_of_multiples_have_squares_that_are_numbers(
    name: str, dtype: torch.dtype
) -> None:
    _, A = build(name, dtype)
    rtol = 1e-3 if dtype == torch.float32 else 1e-10
    for far in (FAR[dtype], 1.0 / FAR[dtype]):
        small = MARKET[name](Draw(dtype, size=far ** (-1.0 / degree(name))))[0]
        for ask, axis in (
            (vl.linalg.row_norms_squared, 1),
            (vl.linalg.column_norms_squared, 0),
        ):
            expected = A.square().sum(axis)
            assert_near(ask(far * small).double(), expected, rtol)


def test_a_number_beyond_the_dtype_scales_what_is_within() -> None:
    for far in (1e44, 1e-44):
        entries = torch.tensor([1.0, 2.0, 3.0]) / far**0.5
        found = (far * vl.Diagonal(entries)).to_dense()
        assert_near(found.double(), far**0.5 * torch.arange(1.0, 4.0).diag(), 1e-5)


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e22), (FLOAT64, 1e170)])
def test_dampings_of_inverses_have_squares_that_are_no_numbers(
    dtype: torch.dtype, far: float
) -> None:
    V, unit = Draw(dtype)(6, 2), torch.eye(6, dtype=FLOAT64)
    V = V * (2.0 ** round(math.log2(far) / 2))
    inner = vl.Dense(V) @ vl.Dense(V).T + far * vl.Identity(6)
    found = (inner.inv() + 1.0 / far * vl.Identity(6)).inv()
    W = V.double() / far**0.5
    expected = torch.linalg.inv(torch.linalg.inv(W @ W.T + unit) + unit)
    assert_near(found.to_dense().double() / far, expected, 1e-5)


def singular(D: int, R: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A factor with singular values over eight orders of magnitude."""
    draw, k = Draw(FLOAT64), min(D, R)
    U, W = (torch.linalg.qr(draw(n, k)).Q for n in (D, R))
    return U, torch.logspace(-8, 0, k, dtype=FLOAT64), W


@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choice", ["all", "largest", "smallest", "chosen"])
def test_pairs_where_squares_are_hardly_numbers(
    shape: tuple[int, int], choice: str, dtype: torch.dtype
) -> None:
    """What is lost is what squares lose; no vector is NaN, and all are orthonormal."""
    U, s, W = singular(*shape)
    info = torch.finfo(dtype)
    size = info.tiny**0.5
    A = LowRank(vl.Dense(((U * s) @ W.T * size).to(dtype)))
    k = len(s)
    if choice == "all":
        evals, evecs = A.eigh()
    elif choice == "largest":
        evals, evecs = A.eigh(k=2)
    else:
        indices = [0, 1] if choice == "smallest" else [k - 3, k - 1]
        evals, evecs = A.eigh(select=lambda _: indices)
    evecs, evals = evecs.double(), evals.double()
    unit = torch.eye(len(evals), dtype=FLOAT64)
    assert (evecs.T @ evecs - unit).abs().max() <= 1e3 * info.eps
    exact = (U * s.square()) @ U.T
    residual = exact @ evecs - evecs * (evals / size / size)
    assert residual.norm(dim=0).max() <= 1e4 * info.eps


@every_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_squares_that_are_no_numbers_are_refused(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    V = torch.full(shape, 2.0 * torch.finfo(dtype).max ** 0.5, dtype=dtype)
    for ask in (
        lambda A: A.eigh(),
        lambda A: A.eigh(k=2),
        lambda A: A.eigvalsh(),
        lambda A: A.eigh(select=lambda evals: [0]),
    ):
        with pytest.raises(ValueError, match="infs or NaNs"):
            ask(LowRank(vl.Dense(V)))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_factors_are_of_what_is_not_negative(scale: float) -> None:
    V = vl.Dense(torch.rand(4, 2))
    with pytest.raises(ValueError, match="scale: c V Vᵀ is positive semi-definite"):
        LowRank(V, scale)
    evals = (-1.0 * (V @ V.T)).eigh().eigenvalues
    assert evals.tolist() == sorted(evals.tolist()) and (evals < 0).all()
