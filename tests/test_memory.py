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
from vivit_linop.net import certified
from vivit_linop.net.certified import find_structure

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]

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
@pytest.mark.parametrize("error", ERRORS)
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


class Crowded(nn.Module):
    """A weight without a structure; some error on batches of one sample."""

    error: Exception | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.w = nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and Crowded.error is not None:
            raise Crowded.error
        rows = [(row.sum() > 0) * (self.w @ row).sin() for row in self.a(x)]
        return self.b(torch.stack(rows).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("error", [*ERRORS, RuntimeError("two samples at least")])
def test_out_of_memory_is_no_matter_of_the_batch(
    error: Exception, memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample by sample is not given up for what there was no room for once."""
    _, loss, (X, y) = toy()
    wanted = vl.GGN(Crowded().double(), loss, (X, y)).factor.to_dense()
    on_batches = []
    way = certified.on_the_batch
    count = lambda *given: on_batches.append(1) or way(*given)  # noqa: E731
    monkeypatch.setattr(certified, "on_the_batch", count)
    risk = vl.EmpiricalRisk(Crowded().double(), loss, (X, y), memory=memory)
    V = vl.GGNFactor(risk)
    find_structure(risk).singly |= {"w"}
    with monkeypatch.context() as context:
        context.setattr(Crowded, "error", error)
        if error in ERRORS:
            with pytest.raises(MemoryError):
                V.to_dense()
        else:
            torch.testing.assert_close(V.to_dense(), wanted)
    torch.testing.assert_close(V.to_dense(), wanted)
    assert bool(on_batches) == (error not in ERRORS)


@pytest.mark.parametrize("error", ERRORS)
def test_second_derivatives_without_memory_are_not_missing(error: Exception) -> None:
    class Heavy(torch.autograd.Function):
        """x², whose gradient takes too much where it is differentiated."""

        room = False

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not Heavy.room:
                raise error
            return 2.0 * ctx.saved_tensors[0] * g  # type: ignore[no-any-return]

    _, loss, data = toy()
    net = Lambda(lambda m, x: Heavy.apply(m.layer(x)), layer=nn.Linear(4, 3)).double()
    same = Lambda(lambda m, x: m.layer(x).square(), layer=net.layer)
    H = vl.Hessian(net, loss, data)
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        H.to_dense()
    assert "second derivative" not in str(raised.value)
    Heavy.room = True
    wanted = vl.Hessian(same, loss, data).to_dense()
    torch.testing.assert_close(H.to_dense(), wanted)


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
    monkeypatch.setattr("vivit_linop.net.pieces.LEAST_BYTES", 2**20)
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
