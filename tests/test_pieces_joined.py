"""Pieces of stored columns are put together where each would take launches."""

import pytest
import torch
from torch import nn

import vivit_linop as vl
from vivit_linop.net.column_passes import accumulate_own
from vivit_linop.net.pieces import StoredColumns
from vivit_linop.net.totals import AllColumns

GPU = torch.device("cuda")


def stored(net, X, memory):
    loss, y = nn.CrossEntropyLoss(), torch.arange(len(X)) % 3
    V = vl.GGNFactor(net, loss, (X, y), memory=memory)
    total = AllColumns(V)
    accumulate_own(V, [total])
    return V, total.pieces


NETS = {
    "linear": (lambda: [nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)], (8,)),
    "convolutions": (
        lambda: [
            *(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 9, 2)),
            *(nn.Flatten(), nn.Linear(9 * 4, 3)),
        ],
        (1, 5, 5),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_one_piece_has_the_same_columns(name):
    layers, shape = NETS[name]
    net, X = nn.Sequential(*layers()).double().eval(), torch.rand(12, *shape).double()
    V, pieces = stored(net, X, 5_000)
    assert len(pieces) > 2
    apart = StoredColumns(stored(net, X, 5_000)[1])
    joined = StoredColumns.kept_on(GPU, pieces)
    assert len(joined.pieces) == 1
    assert joined.nbytes == apart.nbytes
    u, x = torch.rand(V.shape[1], 2).double(), torch.rand(V.shape[0], 2).double()
    torch.testing.assert_close(joined.multiply(u), V.to_dense() @ u)
    torch.testing.assert_close(joined.multiply_adjoint(x), V.to_dense().T @ x)
    assert len(StoredColumns.kept_on(torch.device("cpu"), apart.pieces).pieces) > 2


def test_what_has_no_such_columns_stays_apart():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    V, pieces = stored(net, torch.randint(7, (12, 3)), 3_000)
    joined = StoredColumns.kept_on(GPU, pieces)
    assert joined.pieces == pieces and len(pieces) > 1
    x = torch.rand(V.shape[0], 1).double()
    torch.testing.assert_close(joined.multiply_adjoint(x), V.to_dense().T @ x)
