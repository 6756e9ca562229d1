"""What does not fit says what would."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Lambda, mlp
from data_cases import Drawn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import random_vector, toy

import vivit_linop as vl

# Memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda r: r.gradient(),
        lambda r: vl.GGN(r) @ random_vector(r.num_params),
        lambda r: vl.Jacobian(r).T @ random_vector(r.num_samples * r.num_outputs),
        None,
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_would_fit(use: Any, error: Exception) -> None:
    room = {"samples": 5 if use is None else 99}

    def forward(m: Any, x: Tensor) -> Tensor:
        if len(x) > room["samples"]:
            raise error
        return m.layer(x)

    _, loss, data = toy()
    net = Lambda(forward, layer=nn.Linear(4, 3)).double()
    advice = (
        r"^data: a batch of 6 samples .*GB.*batch_size=[1-3]\).*memory=0"
        r"|^memory: the columns of 6 samples .*GB.*memory=\d+\)"
    )
    with pytest.raises(MemoryError, match=advice) as raised:
        risk = vl.EmpiricalRisk(net, loss, data)
        room["samples"] = 5
        use(risk)
    assert raised.value.__cause__ is error


def test_out_of_memory_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    net, loss, data = toy()
    risk = vl.EmpiricalRisk(net, loss, data, memory=2**20)

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("vivit_linop.net.certified.CertifiedColumns.columns", fails)
    with pytest.raises(MemoryError, match=r"^memory: .* 6 samples .*memory=262144"):
        vl.GGN(risk).eigvalsh()


def test_other_errors_are_not_explained_away() -> None:
    _, loss, data = toy()
    broken = {"on": False}

    def forward(m: Any, x: Tensor) -> Tensor:
        if broken["on"]:
            raise RuntimeError("shapes do not match")
        return m.layer(x)

    net = Lambda(forward, layer=nn.Linear(4, 3)).double()
    risk = vl.EmpiricalRisk(net, loss, data)
    broken["on"] = True
    with pytest.raises(RuntimeError, match="shapes do not match"):
        risk.gradient()


def test_pieces_are_not_smaller_than_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory, data are not passed over once for each sample."""
    monkeypatch.setattr("vivit_linop.net.pieces._LEAST_BYTES", 2**20)
    passes = []

    class Counting(DataLoader):
        def __iter__(self) -> Iterator[Any]:
            passes.append(1)
            return super().__iter__()

    torch.manual_seed(0)
    net, loader = mlp(6, 11, 3), Counting(Drawn(40, 6), batch_size=4)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), loader, memory=0)
    V, U = vl.GGNFactor(risk), vl.PerSampleGradients(risk)
    before = len(passes)
    gram, cross = (V.T @ V).to_dense(), (U.T @ V).to_dense()
    assert len(passes) - before <= 4  # two to find the structure
    columns = V.to_dense()
    torch.testing.assert_close(gram, columns.T @ columns)
    torch.testing.assert_close(cross, U.to_dense().T @ columns)
