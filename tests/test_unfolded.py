"""Columns of convolutions whose inputs are made of some samples at a time."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.net.columns.unfolded import UnfoldedInputs
from vivit_linop.net.layers import CONV

pytestmark = pytest.mark.host("on a GPU inputs are made at once")

# So many that a cache holds a part of them only.
N = 40
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 24, 24), (18, 2, 5, 5), {}),
    "many positions": ((20, 10, 10), (20, 20, 3, 3), {"padding": 1}),
    "groups": ((4, 20, 20), (6, 2, 5, 5), {"groups": 2, "stride": 2}),
    "same": ((3, 16, 16), (4, 3, 4, 4), {"padding": "same", "dilation": 2}),
    "one axis": ((3, 200), (4, 3, 7), {"stride": 2, "padding": 3}),
    "few positions": ((60, 3, 3), (40, 60, 3, 3), {"padding": 1}),
}


@pytest.fixture(params=CONVOLUTIONS)
def both(request: pytest.FixtureRequest) -> tuple[KhatriRaoColumns, KhatriRaoColumns]:
    """The same columns, of inputs that are made, and of inputs that are not."""
    torch.manual_seed(0)
    shape, weight, options = CONVOLUTIONS[request.param]
    arguments = {"weight_shape": torch.Size(weight), **options}
    X = torch.randn(N, *shape, dtype=torch.float64)
    assert CONV.inputs is not None
    made = CONV.inputs(arguments, X)
    _, groups, channels, positions = made.shape
    B = torch.randn(N, 1, groups, weight[0] // groups, positions, dtype=torch.float64)
    unmade = UnfoldedInputs(X, partial(CONV.inputs, arguments), channels)
    return KhatriRaoColumns(made, B), KhatriRaoColumns(unmade, B)


def close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-10, atol=1e-10)


def test_sums_are_the_same(both: tuple[KhatriRaoColumns, KhatriRaoColumns]) -> None:
    made, unmade = both
    memory = 2**30
    rows = unmade.rows()
    assert close(rows, made.rows())
    assert close(unmade.squared_norms(memory), rows.square().sum(1))
    assert close(unmade.entry_squares(memory), rows.square().sum(0))
    assert close(unmade.sample_entry_squares(memory), rows.square())
    assert close(unmade.entry_sums(), rows.sum(0))
    assert close(unmade.sizes(), made.sizes())
    assert unmade.nbytes == made.nbytes
    if made.inputs.shape[1] == 1:  # rows of several groups take all together
        assert "inputs" not in vars(unmade)
    assert close(unmade.inputs, made.inputs)


def test_sums_show_what_is_wrong(
    both: tuple[KhatriRaoColumns, KhatriRaoColumns],
) -> None:
    made, unmade = both
    weights = torch.randn(N, 1, dtype=torch.float64)
    rows = made.rows()
    expected = weights.squeeze(1) @ rows
    size = float(expected.norm())
    assert unmade.residual(weights, expected).norm() <= 1e-10 * size
    assert close(unmade.squared_norms(2**30), rows.square().sum(1))
    # A wrong entry is about as far off as it is.
    wrong = expected.clone()
    wrong[3] += size
    assert 0.1 * size < unmade.residual(weights, wrong).norm() < 10 * size


@pytest.mark.parametrize(
    "way", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy]
)
def test_columns_travel(
    both: tuple[KhatriRaoColumns, KhatriRaoColumns], way: Any
) -> None:
    made, unmade = both
    assert close(way(unmade).rows(), made.rows())


def test_columns_without_data(both: tuple[KhatriRaoColumns, KhatriRaoColumns]) -> None:
    for columns in both:
        twin = columns.without_data()
        assert twin.cotangents.is_meta
        for width in (1, 3):
            assert twin.cost(N, width, False) == columns.cost(N, width, False)
