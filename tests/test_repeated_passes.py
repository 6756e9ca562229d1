"""What is run again for a quantity, and what is the same in each pass over the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vivit_linop as vl
from tests.capture_cases import close
from tests.cases import Problem, dense_of
from tests.pairs import pairwise
from vivit_linop.net import certified, column_passes
from vivit_linop.net.certified import find_structure


class Runs(nn.Module):
    """Counts how often a net is run, and pulled back."""

    forwards = backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        Runs.forwards += 1
        return _Counted.apply(x) if x.requires_grad else x


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Runs.backwards += 1
        return gradient


def _norms(*problem: Any) -> Tensor:
    return vl.PerSampleGradients(*problem).squared_norms()


def _moments(*problem: Any) -> Tensor:
    return vl.PerSampleGradients(*problem).second_moment()


def _diagonal(*problem: Any) -> Tensor:
    return vl.GGN(*problem, mc_samples=1).diagonal()


def _kfac(*problem: Any) -> Tensor:
    return vl.KFAC(*problem, mc_samples=1).to_dense()


def _kflr(*problem: Any) -> Tensor:
    return vl.KFAC(*problem, variant="exact").to_dense()


@pytest.mark.parametrize(
    ("quantity", "backwards"),
    [(_norms, 6), (_moments, 6), (_diagonal, 6), (_kfac, 6), (_kflr, 6)],
)
def test_backward_passes_of_a_quantity(
    quantity: Callable[..., Tensor], backwards: int
) -> None:
    """Where samples are; columns (of KFLR two together), their check.

    Of a function that is not torch's three more: of a sample alone, of a multiple of
    its cotangent, and of it beside another.
    """
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), Runs()).double()
    X, y = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
    Runs.forwards = Runs.backwards = 0
    quantity(net, nn.CrossEntropyLoss(), (X, y))
    assert Runs.backwards == backwards
    # All samples, some of them twice to see that they are independent, and the first
    # four, since a graph with functions that are not torch's is pulled back through
    # once; and one alone, twice, and two, whose derivatives are compared.
    assert Runs.forwards <= 7


def test_what_is_known_of_a_net_is_certified_once_it_is_asked_for() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
    U = vl.PerSampleGradients(net, nn.CrossEntropyLoss(), (X, y))
    structure = find_structure(U.risk, certify=False)
    assert not structure.certified and not structure.layers
    assert find_structure(U.risk) is structure
    assert structure.certified and set(structure.layers) == set(U.risk.params)


@pytest.mark.parametrize(("memory", "looks"), [(None, 0), (2_000, 1)])
def test_small_batches_need_no_run_on_a_few_samples(
    memory: int | None, looks: int
) -> None:
    """What they show is learnt from the batch itself, if it fits by far."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = torch.randn(2, 9, 5).double(), torch.randint(3, (2, 9))
    batches, loss, runs = [*zip(X, y, strict=True)], nn.CrossEntropyLoss(), list[int]()
    net.register_forward_hook(lambda *_: runs.append(1))
    G = vl.GGN(vl.EmpiricalRisk(net, loss, batches, memory=memory))
    runs.clear()
    K = G.gram.to_dense()
    assert (len(runs) > 2) == bool(looks)
    truth = dense_of(Problem(net, loss, (X.flatten(0, 1), y.flatten())))
    assert close(K.trace(), truth.G.trace())
    assert close(K.square().sum(), truth.G.square().sum())


class _LateUse(nn.Module):
    """A layer on samples of one sign; no known use of its weight on the others."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        if (x[:, 0] > 0.0).all():
            return self.head(F.linear(x, self.w).tanh())
        return self.head(torch.tensordot(x, self.w, dims=([1], [1])).tanh())


@pytest.mark.parametrize(
    ("others", "memory"), [(8, 8_000), (19, 12_000), (12, 13_000), (19, 15_000)]
)
def test_pieces_are_the_same_whatever_is_learnt_between_passes(
    others: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a weight is opaque, which takes memory, is seen when some are held."""
    num_samples = 16 if others == 8 else 24
    X = torch.randn(num_samples, 9, dtype=torch.float64)
    X[:, 0] = X[:, 0].abs()
    X[-others:, 0] *= -1.0
    y = torch.randn(num_samples, 2, dtype=torch.float64)
    problem = Problem(_LateUse().double(), nn.MSELoss(), (X, y))
    truth = dense_of(problem)
    monkeypatch.setattr(column_passes, "LEAST_BYTES", 0)
    risk = vl.EmpiricalRisk(problem.model, problem.loss, (X, y), memory=memory)
    U = vl.PerSampleGradients(risk)
    assert close((U.T @ U).to_dense(), truth.U.T @ truth.U)


@pytest.mark.parametrize("batches", [1, 2])
def test_columns_that_must_be_formed_are_those_of_few_samples(
    batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they must is seen when the first are made, of a batch as one piece."""
    formed, dense = list[int](), certified.CertifiedColumns._dense

    def watched(self: Any, cotangents: Tensor, names: Any) -> Any:
        formed.append(len(cotangents))
        return dense(self, cotangents, names)

    X, y = torch.randn(24, 30).double(), torch.randn(24, 2).double()
    X[:, 0] = X[:, 0].abs()
    X[5:, 0] *= -1.0
    problem = Problem(_LateUse(30).double(), nn.MSELoss(), (X, y))
    truth = dense_of(problem)
    monkeypatch.setattr(column_passes, "LEAST_BYTES", 0)
    monkeypatch.setattr(certified.CertifiedColumns, "_dense", watched)
    data = [*zip(X.chunk(batches), y.chunk(batches), strict=True)]
    risk = vl.EmpiricalRisk(problem.model, problem.loss, data, memory=160_000)
    K = vl.GGN(risk).gram.to_dense()
    assert close(torch.linalg.eigvalsh(K)[-9:], torch.linalg.eigvalsh(truth.G)[-9:])
    assert sum(formed) >= 24
    assert max(formed) <= 8


ASKED: dict[str, Callable[[vl.EmpiricalRisk], Any]] = {
    "G x": lambda risk: vl.GGN(risk) @ torch.ones(risk.num_params).double(),
    "spectrum": lambda risk: vl.GGN(risk).eigvalsh(),
    "diagonal": lambda risk: vl.GGN(risk).diagonal(),
    "H x": lambda risk: vl.Hessian(risk) @ torch.ones(risk.num_params).double(),
    "gradient": lambda risk: risk.gradient(),
    "norms": lambda risk: vl.PerSampleGradients(risk).squared_norms(),
    "subset": lambda risk: risk.subset([0, 4]),
    "at": lambda risk: risk.at(risk.flatten(risk.params)),
}
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "scaled": lambda X: X.mul_(1.01),
    "one number": lambda X: X[4, 1].add_(0.1),
    "samples swapped": lambda X: X.copy_(X.flip(0)),
    "entries swapped": lambda X: X.copy_(X.flip(1)),
    "by .data": lambda X: X.data.add_(0.1),
}


@pytest.mark.parametrize(
    ("change", "batches", "memory"), pairwise(CHANGES, [1, 2], [None, 0])
)
def test_inputs_that_outputs_do_not_show(
    change: str, batches: int, memory: int | None
) -> None:
    """A last layer begins with zeros, where only derivatives depend on the input."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    nn.init.zeros_(net[2].weight)
    X, y = torch.rand(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    data = list(zip(X.chunk(batches), y.chunk(batches), strict=True))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data, memory=memory)
    for ask in ASKED.values():
        ask(risk)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data, memory=memory)
    CHANGES[change](X)
    for ask in ASKED.values():
        with pytest.raises(ValueError, match=r"^data: .* not what (it was|they were)"):
            ask(risk)


def test_inputs_without_numbers_are_those_that_they_were() -> None:
    """NaN that a net replaces, and inputs without entries."""
    net = nn.Linear(4, 3).double()
    X, y = torch.rand(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    X[2, 1] = float("nan")
    data = (X, torch.zeros(6, 0)), y
    risk = vl.EmpiricalRisk(
        net,
        nn.CrossEntropyLoss(),
        [data],
        predict=lambda net, X: net(X[0].nan_to_num(0.5)),
    )
    for ask in ASKED.values():
        ask(risk)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_inputs_in_less_than_the_precision_of_sums(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(300, 2), nn.Linear(2, 3)).double()
    nn.init.zeros_(net[1].weight)
    X, y = torch.rand(6, 300).to(dtype), torch.randint(3, (6,))
    risk = vl.EmpiricalRisk(
        *(net, nn.CrossEntropyLoss(), [(X, y)]),
        predict=lambda net, X: net(X.double()),
    )
    other, full = X.double(), vl.GGN(net, nn.CrossEntropyLoss(), (X.double(), y))
    assert torch.allclose(vl.GGN(risk).diagonal(), full.diagonal())
    other[3, 1] += 0.5
    X.copy_(other)
    for ask in (ASKED["diagonal"], ASKED["subset"], ASKED["at"]):
        with pytest.raises(ValueError, match=r"^data: .* not what (it was|they were)"):
            ask(risk)


class Bag(nn.Module):
    """Of the entries of a sparse row, whose columns are too many to be written out."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, X: Tensor) -> Tensor:
        X = X.to_sparse_coo().coalesce()
        rows, columns = X.indices()
        values = self.e(columns % 7) * X.values().unsqueeze(1)
        h = torch.zeros(len(X), 5, dtype=values.dtype).index_add(0, rows, values)
        return self.o(torch.tanh(h))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("columns", [9, 10**12])
def test_sparse_inputs_are_not_written_out(columns: int, layout: torch.layout) -> None:
    places = torch.tensor([[0, 0, 1, 2, 4, 5], [3, 8, 1, 7, 8, 0]])
    places[1] *= columns // 9
    values = torch.rand(6, dtype=torch.float64)
    X = torch.sparse_coo_tensor(places, values, (6, columns)).coalesce()
    X = X.to_sparse(layout=layout) if layout != X.layout else X
    net, y = Bag().double(), torch.randint(3, (6,))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), [(X, y)])
    params = list(net.parameters())
    gradient = torch.autograd.grad(nn.CrossEntropyLoss()(net(X), y), params)
    torch.testing.assert_close(risk.gradient(), risk.flatten(gradient))
    for ask in ASKED.values():
        ask(risk)
    X.values().mul_(1.01)
    for ask in ASKED.values():
        with pytest.raises(ValueError, match=r"^data: .* not what (it was|they were)"):
            ask(vl.EmpiricalRisk.at(risk, risk.flatten(risk.params)))
