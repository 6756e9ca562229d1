"""A lack of memory is not taken for another failure: it is seen, or less is tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.sample_truth import close
from vivit_linop.curvature import hessian
from vivit_linop.devices import is_out_of_memory, saved_bytes
from vivit_linop.net import linearized
from vivit_linop.net.capture import Capture

LACKS: dict[str, Callable[[], Exception]] = {
    "GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB"),
    "CPU": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"),
    "cuBLAS": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"
    ),
    "Python": lambda: MemoryError("data: a batch of 6 samples does not fit"),
}


@pytest.fixture(params=LACKS)
def lack(request: pytest.FixtureRequest) -> Exception:
    """An error that says that there is no memory."""
    return LACKS[request.param]()


def test_what_says_that_there_is_no_memory(lack: Exception) -> None:
    assert is_out_of_memory(lack)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be"))


# Of the batches that nets were asked for; what belongs to a net is copied.
SIZES: list[int] = []


class Failing(nn.Module):
    """A net that fails where it is told to."""

    def __init__(self, fails: Callable[[Tensor], bool], error: Exception) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.fails, self.error = fails, error
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        SIZES.append(len(x))
        if self.fails(x):
            raise self.error
        out: Tensor = self.layers(x)
        return out


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(6, 4, dtype=torch.float64), torch.randint(3, (6,))


def _raises(lack: Exception, ask: Callable[[], Any]) -> None:
    with pytest.raises((type(lack), MemoryError)) as caught:
        ask()
    assert is_out_of_memory(caught.value)


def test_few_samples_that_do_not_fit_are_no_reason_to_take_all(lack: Exception) -> None:
    told: list[bool] = []
    net = Failing(lambda x: bool(told) and len(x) < 6, lack)
    X, y = _data()
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    told.append(True)
    SIZES.clear()
    _raises(lack, lambda: Capture.of_few(risk, X, 6, 4))
    assert 6 not in SIZES


def test_halves_for_which_memory_lacks_do_not_fit_into_subsets(lack: Exception) -> None:
    """It is no batch size that the model does not take."""
    net = Failing(lambda x: len(x) == 2, lack)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), _data(), check=False)
    _raises(lack, lambda: risk.subset([0, 3]))


def test_a_model_without_memory_is_not_called_in_another_way(lack: Exception) -> None:
    class Either(Failing):
        def forward(self, *xs: Any) -> Tensor:
            return super().forward(xs[0][0] if len(xs) == 1 else xs[0])

    X, y = _data()
    net = Either(lambda x: True, lack)
    SIZES.clear()
    _raises(lack, lambda: vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), [([X], y)]))
    assert SIZES.count(6) == 1  # what one sample takes is asked for the message


def test_what_is_saved_is_not_counted_a_second_time(lack: Exception) -> None:
    runs: list[int] = []

    def build() -> None:
        runs.append(1)
        raise lack

    if isinstance(lack, RuntimeError):
        with pytest.raises(type(lack)):
            saved_bytes(build)
        assert len(runs) == 1


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_losses_of_parts_that_do_not_fit(samples: int, lack: Exception) -> None:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        if len(f) == samples:
            raise lack
        return (f - y).square().sum()

    X, _ = _data()
    net = Failing(lambda x: False, lack)
    data = X, torch.rand(6, 3, dtype=torch.float64)
    try:
        risk = vl.EmpiricalRisk(net, loss, data, reduction="sum")
    except (RuntimeError, MemoryError, ValueError) as error:
        assert is_out_of_memory(error)
    else:  # nobody has asked for as many
        assert close(risk.value(), loss(net(X), risk.targets()[0]).detach())


def test_a_lack_in_the_first_way_lets_the_second_one_be_taken(
    monkeypatch: pytest.MonkeyPatch, lack: Exception
) -> None:
    """J x through the graph takes less memory than a trace."""

    def no_memory(*_: Any) -> Any:
        raise lack

    monkeypatch.setattr(linearized, "tracing_pays", lambda output: True)
    monkeypatch.setattr(linearized, "tangent_map", no_memory)
    net, (X, _) = Failing(lambda x: False, lack), _data()
    J = vl.Jacobian(net, X)
    x = torch.rand(J.shape[1], dtype=torch.float64)
    parts = dict(zip(dict(net.named_parameters()), J.risk.unflatten(x), strict=True))
    theta = {name: p.detach() for name, p in net.named_parameters()}

    def outputs(p: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(net, p, (X,))
        return out

    image = torch.func.jvp(outputs, (theta,), (parts,))[1]
    assert close(J @ x, image.flatten())


def test_a_lack_in_the_last_way_is_seen(
    monkeypatch: pytest.MonkeyPatch, lack: Exception
) -> None:
    """Where J x through the graph is impossible, and not for want of memory."""

    def no_memory(*_: Any) -> Any:
        raise lack

    def no_derivative(*_: Any) -> Any:
        raise NotImplementedError("derivative of it")

    monkeypatch.setattr(linearized, "ReverseTangents", no_derivative)
    monkeypatch.setattr(linearized, "tangent_map", no_memory)
    J = vl.Jacobian(Failing(lambda x: False, lack), _data()[0])
    _raises(lack, lambda: J @ torch.rand(J.shape[1], dtype=torch.float64))


def test_recursions_without_memory_leave_the_diagonal_to_products(
    monkeypatch: pytest.MonkeyPatch, lack: Exception
) -> None:
    def no_memory(*_: Any) -> Any:
        raise lack

    monkeypatch.setattr(hessian, "_by_backpack", no_memory)
    H = vl.Hessian(Failing(lambda x: False, lack), nn.CrossEntropyLoss(), _data())
    assert close(H.diagonal(), H.to_dense().diagonal())
    _raises(lack, lambda: H.diagonal(route="backpack"))
