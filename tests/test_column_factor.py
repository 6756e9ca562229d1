"""Factors that are given by the columns of single parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import placing
from vivit_linop.net.columns.base import DenseColumns, LayerColumns
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns
from vivit_linop.operators.lowrank import LowRank
from vivit_linop.testing import check_operator
from vivit_linop.vivit.column_factor import ColumnFactor, formed

F64 = torch.float64
SAMPLES, WIDTH = 3, 2
# Groups, a, b, positions, and whether the parameter is laid out with a first.
SHAPES = {
    "linear": (1, 4, 3, 1, False),
    "tokens": (1, 4, 3, 5, False),
    "convolution": (2, 3, 2, 4, False),
    "transposed convolution": (2, 3, 2, 4, True),
}


def khatri_rao(
    name: str, width: int = WIDTH, samples: int = SAMPLES
) -> tuple[KhatriRaoColumns, Tensor]:
    """Columns, and the same formed from their definition, ``[n·R, numel]``."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + width)
    groups, a, b, positions, inputs_first = SHAPES[name]
    inputs = torch.randn(samples, groups, a, positions, generator=generator, dtype=F64)
    cotangents = torch.randn(
        samples, width, groups, b, positions, generator=generator, dtype=F64
    )
    columns = KhatriRaoColumns(inputs, cotangents, inputs_first)
    order = "gab" if inputs_first else "gba"
    formed = torch.einsum(f"ngap,nrgbp->nr{order}", inputs, cotangents)
    return columns, formed.reshape(samples * width, -1)


def factor(parts: list[LayerColumns]) -> ColumnFactor:
    return ColumnFactor(parts, F64, placing.device(), 2**20)


def make(width: int = WIDTH) -> tuple[ColumnFactor, Tensor]:
    """A factor over columns of all kinds, and the matrix V."""
    pairs = [khatri_rao(name, width) for name in SHAPES]
    dense = torch.rand(SAMPLES, width, 2, dtype=F64)
    parts: list[LayerColumns] = [columns for columns, _ in pairs]
    rows = [part for _, part in pairs]
    return (
        factor([*parts, DenseColumns(dense)]),
        torch.cat([*rows, dense.view(SAMPLES * width, 2)], dim=1).T,
    )


def test_operator() -> None:
    V, dense = make()
    check_operator(V, dense)
    check_operator(factor([formed(V.columns)]), dense)


def test_low_rank_operator() -> None:
    V, dense = make()
    check_operator(LowRank(V, 0.5), 0.5 * dense @ dense.T)
    torch.testing.assert_close(
        LowRank(V).eigvalsh(), torch.linalg.eigvalsh(dense.T @ dense)
    )


def test_more_columns_than_rows() -> None:
    columns, rows = khatri_rao("linear", width=5)
    V = factor([columns])
    assert V.shape[1] > V.shape[0]
    pairs = LowRank(V).eigh(k=2)
    torch.testing.assert_close(
        pairs.eigenvalues, torch.linalg.eigvalsh(rows.T @ rows)[-2:]
    )


def test_cross_gram_matrix() -> None:
    (V, dense), (U, other) = make(), make(width=1)
    gram = LowRank(V).gram
    torch.testing.assert_close(gram.to_dense(), dense.T @ dense)
    torch.testing.assert_close((U.T @ V).to_dense(), other.T @ dense)
    # Of which one has been formed.
    mixed = factor([part.compacted() for part in U.columns])
    torch.testing.assert_close((mixed.T @ V).to_dense(), other.T @ dense)
    torch.testing.assert_close((V.T @ mixed).to_dense(), dense.T @ other)
