"""The risk of other data at the same parameters, and whether a model is what it was."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from vivit_linop.risk.model.functional import FunctionalModel

D64 = torch.float64


def mlp() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return net.double().eval()


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 3, generator=generator, dtype=D64)
    return X, torch.randint(3, (n,), generator=generator)


def dense_ggn(net: nn.Module, X: Tensor, reduction: str) -> Tensor:
    """Jᵀ H J with H of cross-entropy in closed form."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    jacobians = jacrev(lambda p: functional_call(net, p, (X,)))(params)
    J = torch.cat([part.flatten(2) for part in jacobians.values()], 2)
    p = net(X).detach().softmax(1)
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    G = torch.einsum("ncd,nce,nef->df", J, H, J)
    return G / len(X) if reduction == "mean" else G


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["batch", "batches", "loader"])
def test_it_is_the_risk_of_these_data(reduction: str, form: str) -> None:
    net, loss = mlp(), nn.CrossEntropyLoss(reduction=reduction)
    risk = vl.EmpiricalRisk(net, loss, data(6))
    vl.GGN(risk).gram.to_dense()  # what is known of the net goes over
    X, y = data(9, seed=5)
    forms: dict[str, Any] = {
        "batch": (X, y),
        "batches": [(X[:2], y[:2]), (X[2:], y[2:])],
        "loader": DataLoader(TensorDataset(X, y), batch_size=4),
    }
    other = risk.on(forms[form])
    value = loss(net(X), y)
    gradient = torch.autograd.grad(value, list(net.parameters()))
    assert other.num_samples == 9 and risk.num_samples == 6
    assert torch.allclose(other.value(), value)
    assert torch.allclose(other.gradient(), torch.cat([g.flatten() for g in gradient]))
    G, truth = vl.GGN(other), dense_ggn(net, X, reduction)
    assert torch.allclose(G.to_dense(), truth)
    assert torch.allclose(G.eigvalsh()[-3:], torch.linalg.eigvalsh(truth)[-3:])
    before = vl.GGN(risk).to_dense()
    assert torch.allclose(before, dense_ggn(net, data(6)[0], reduction))


def test_at_the_parameters_of_the_risk() -> None:
    net, (X, y) = mlp(), data(5, seed=3)
    risk, loss = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data(6)), nn.functional
    before = loss.cross_entropy(net(X), y)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    assert torch.allclose(risk.on((X, y)).value(), before)
    now = risk.at().on((X, y)).value()
    assert torch.allclose(now, loss.cross_entropy(net(X), y))


def test_the_net_runs_once() -> None:
    calls, net = list[int](), mlp()
    net.register_forward_hook(lambda *_: calls.append(1))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data(6))
    calls.clear()
    risk.on(data(6, seed=2))
    assert len(calls) == 1


def test_samples_and_targets_are_where_they_were() -> None:
    """On the second axis, and under a name that only the user knows."""
    lstm = nn.LSTM(3, 2).double()
    (X, _), y = data(20), torch.randn(4, 2, dtype=D64)
    steps = X.reshape(5, 4, 3)

    def last(model: nn.Module, batch: Any) -> Tensor:
        result: Tensor = model(batch["x"])[0][-1]
        return result

    def risk_of(batch: dict[str, Tensor]) -> vl.EmpiricalRisk:
        return vl.EmpiricalRisk(
            *(lstm, nn.MSELoss(), batch),
            predict=last,
            target=lambda batch: batch["wanted"],
            sample_axis={"x": 1, "wanted": 0},
        )

    other = {"x": steps.flip(0)[:, :3], "wanted": y[1:]}
    found = risk_of({"x": steps, "wanted": y}).on(other)
    value = nn.functional.mse_loss(lstm(other["x"])[0][-1], other["wanted"])
    assert found.num_samples == 3 and torch.allclose(found.value(), value)
    J = vl.Jacobian(found).to_dense()
    assert torch.allclose(J, vl.Jacobian(risk_of(other)).to_dense())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y: (X.where(X < 1, torch.nan), y), "NaN or Inf for sample"),
        (lambda X, y: (X, y + 2), "class indices must lie"),
        (lambda X, y: (X, y[:-1]), r"needs class indices \[8\]"),
        (lambda X, y: (X[:0], y[:0]), "finds 0 samples"),
        (lambda X, y: (X.float(), y), "float32"),
        (lambda X, y: ((X, X), y), "^data: batch 0 has not 8 samples in all tensors"),
    ],
)
def test_data_are_checked(change: Any, message: str) -> None:
    risk = vl.EmpiricalRisk(mlp(), nn.CrossEntropyLoss(), data(6))
    with pytest.raises((ValueError, TypeError), match=message):
        risk.on(change(*data(8, seed=4)))


class Opens(nn.Module):
    """Takes a tensor, or a mapping that holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, given: Any) -> Tensor:
        out: Tensor = self.net(given["x"] if isinstance(given, dict) else given)
        return out


@pytest.mark.parametrize("is_first_whole", [False, True])
def test_inputs_in_another_form(is_first_whole: bool) -> None:
    X, y = data(6)
    first, other = (X, {"x": X}) if is_first_whole else ({"x": X}, X)
    risk = vl.EmpiricalRisk(Opens(), nn.CrossEntropyLoss(), (first, y))
    assert risk.on((other, y)).value() == risk.value()


def test_a_loader_that_shuffles_is_refused() -> None:
    risk = vl.EmpiricalRisk(mlp(), nn.CrossEntropyLoss(), data(6))
    shuffled = DataLoader(TensorDataset(*data(8)), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        risk.on(shuffled)


@pytest.mark.parametrize(
    "change", ["parameter", "NaN", "shape", "buffer", "attribute", "hook", "gone"]
)
def test_whether_the_model_is_what_it_was(change: str) -> None:
    net: Any = mlp()
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data(6))
    assert risk.is_current() and risk.on(data(4)).is_current()
    net.train().eval()
    assert risk.is_current()
    with torch.no_grad():
        if change == "parameter":
            net[3].bias[0] += 1e-9
        elif change == "NaN":
            net[3].bias[0] = torch.nan
        elif change == "shape":
            net[3].bias = nn.Parameter(net[3].bias[:1].clone())
        elif change == "buffer":
            net[1].running_mean[1] = 1.0
        elif change == "attribute":
            net[1].eps = 0.1
        elif change == "hook":
            net[0].register_forward_hook(lambda *args: args[-1] * 2)
        else:
            del net
    assert not risk.is_current()
    assert not risk.on(data(4)).is_current()


class Gains(nn.Module):
    """Layers that functions lead to, each of which closes over a number of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.outer = mlp(), nn.Linear(3, 3).double()
        self.gains = (
            self._take("f", self.inner, how),
            self._take("g", self.outer, how),
        )

    def _take(self, name: str, layer: nn.Module, how: str) -> Any:
        gain = 1.0

        def scaled(x: Tensor) -> Tensor:
            out: Tensor = gain * layer(x)
            return out

        def by_default(x: Tensor, layer: nn.Module = layer) -> Tensor:
            out: Tensor = gain * layer(x)
            return out

        def change(to: float) -> None:
            nonlocal gain
            gain = to

        function = by_default if how == "defaults" else scaled
        setattr(self, name, partial(function) if how == "partial" else function)
        return change

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.g(self.f(x).tanh())
        return out


@pytest.mark.parametrize("how", ["closures", "defaults", "partial"])
@pytest.mark.parametrize("which", [0, 1])
def test_each_of_several_functions_is_looked_into(which: int, how: str) -> None:
    net, (X, y) = Gains(how).eval(), data(6)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    assert risk.is_current()
    net.gains[which](3.0)
    assert not risk.is_current()
    expected = nn.functional.cross_entropy(net(X), y)
    assert torch.allclose(risk.at().value(), expected)


@pytest.mark.parametrize("kind", ["buffer", "frozen", "attribute", "list"])
def test_what_is_not_a_number_stays_what_it_is(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that is not filled yet, as a cache has them."""
    net: Any = mlp()
    empty = torch.full((2,), torch.nan, dtype=D64)
    if kind == "buffer":
        net.register_buffer("cache", empty)
    elif kind == "frozen":
        net.cache = nn.Parameter(empty, requires_grad=False)
    else:
        net[0].cache = empty if kind == "attribute" else [empty]
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data(6))
    assert risk.is_current()
    with monkeypatch.context() as patch:
        patch.setattr(FunctionalModel, "anew", None)
        assert risk.at().is_current()
    empty[1] = 2.0
    assert not risk.is_current()


@pytest.mark.host("GPUs have orders of their own")
def test_other_data_change_nothing_of_the_risk() -> None:
    """Whether its images come in the order that is the fastest is its own business."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    X, y = torch.randn(5, 2, 4, 4), torch.arange(5) % 3
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    assert risk.model.channels_last
    risk.on((X[:2], y[:2])), risk.subset([1])
    assert risk.model.channels_last


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
def test_what_hooks_compute_in_each_pass_is_no_change(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net: Any = mlp()
    if kind == "prune":
        prune.l1_unstructured(net[3], "weight", amount=0.4)
    else:
        nn.utils.weight_norm(net[3])
    (X, y), loss = data(6), nn.CrossEntropyLoss()
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    monkeypatch.setattr(FunctionalModel, "anew", None)
    for _ in range(2):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(0.9)
        now = risk.at()
        value = loss(net(X), y)
        own = torch.autograd.grad(value, list(net.parameters()))
        assert now.is_current()
        assert torch.allclose(now.value(), value)
        assert torch.allclose(now.gradient(), now.flatten(own))


@pytest.mark.parametrize("kind", [set, frozenset])
def test_sets_of_parameters(kind: Any) -> None:
    net: Any = mlp()
    net.decayed = kind([net[0].weight, net[3].weight])
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data(6))
    assert risk.is_current()
    net.decayed = kind([net[0].weight])
    assert not risk.is_current()
    assert risk.at().is_current()
