"""Which operators of the market have which verbs."""

import pytest
import torch

import vivit_linop as vl
from tests.operator_market import MARKET, Draw, build

FLOAT64 = torch.float64
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)


def on_market(condition):
    """The names of the operators on the market whose matrix fulfils a condition."""
    return [name for name in MARKET if condition(*build(name, FLOAT64))]


SQUARE = on_market(lambda op, dense: op.shape[0] == op.shape[1])


def assert_near(got, expected, rtol):
    """Compare in norm, with what was computed in float64."""
    assert got.shape == expected.shape
    error = (got.double() - expected).norm().item()
    assert error <= rtol * expected.norm().item(), f"off by {error:.1e}"


def graded(rows, columns, dtype, device, decades=3):
    """A factor with singular values over some decades, and its matrix."""
    draw = Draw(FLOAT64, seed=2)
    rank = min(rows, columns)
    left = torch.linalg.qr(draw(rows, rank)).Q
    right = torch.linalg.qr(draw(columns, rank)).Q
    values = torch.logspace(0, -decades, rank, dtype=FLOAT64)
    V = ((left * values) @ right.T).to(device, dtype)
    return vl.Dense(V), V.double()
