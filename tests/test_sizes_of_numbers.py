"""Low-rank nodes of very small and very large numbers: their pairs, or a refusal."""

import pytest
import torch

import vivit_linop as vl
from tests.operator_market import Draw
from tests.verb_cases import every_dtype
from vivit_linop.operators import LowRank

FLOAT64 = torch.float64
SHAPES = [(20, 20), (20, 5), (10, 20), (150, 140), (300, 140)]


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
