"""Small risks whose compositions are compared with dense matrices."""

import torch
from torch import nn

import vivit_linop as vl

EPS = {torch.float32: 2e-5, torch.float64: 1e-12}


def net_of(kind, dtype):
    torch.manual_seed(0)
    nets = {
        "tall": lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)),
        # More columns than parameters.
        "wide": lambda: nn.Linear(4, 3, bias=False),
        # Positions, a table, and a weight that is used twice.
        "convolution": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 4)),
            nn.Conv1d(1, 3, 2),
            nn.ReLU(),
            nn.Conv1d(3, 2, 2),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        "tied": Tied,
    }
    return nets[kind]().to(dtype)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        rows = (5 * x).long().clamp(max=4)
        mean = self.table(rows).mean(1)
        return self.layer(torch.tanh(self.layer(mean)))


def risks(kind, dtype):
    """Train data, with a sample that is there twice, and test data."""
    net = net_of(kind, dtype)
    X, y = torch.rand(10, 4, dtype=dtype), torch.randint(3, (10,))
    X[6], y[6] = X[1], y[1]
    loss = nn.CrossEntropyLoss()
    train = vl.EmpiricalRisk(net, loss, [(X[:4], y[:4]), (X[4:7], y[4:7])])
    return train, vl.EmpiricalRisk(net, loss, (X[7:], y[7:]))


def close(got, expected, dtype):
    assert got.dtype == dtype
    error = (got.double() - expected).norm() / expected.norm()
    assert error <= EPS[dtype], error
