"""Layer kinds from outside: their columns are used, and certified."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

import vivit_linop as vl
from tests.cases import Lambda
from vivit_linop.net import kinds
from vivit_linop.net.columns.base import DenseColumns, LayerColumns
from vivit_linop.net.kinds import Arguments, Kind, Signature, register

N = 5


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    own = {function: list(pairs) for function, pairs in kinds._READINGS.items()}
    monkeypatch.setattr(kinds, "_READINGS", own)
    torch.manual_seed(0)
    yield


def check(net: nn.Module, X: Tensor) -> dict[str, str]:
    """Products, Gram matrix and norms are right; returns the uses by parameter."""
    net, X = net.double(), X.double()
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, torch.arange(N) % 2))
    params = {name: p.detach() for name, p in net.named_parameters()}
    jacobian = jacrev(lambda given: functional_call(net, given, X))(params)
    J = torch.cat([part.flatten(0, 1).flatten(1) for part in jacobian.values()], dim=1)
    H = vl.LossHessian(risk).to_dense()
    V, G = vl.GGNFactor(risk), J.T @ H @ J
    torch.testing.assert_close(V @ V.T @ torch.eye(len(G)).double(), G)
    K = V.gram.to_dense()
    torch.testing.assert_close(K.trace(), G.trace())
    torch.testing.assert_close(K.square().sum(), G.square().sum())
    torch.testing.assert_close((V @ V.T).diagonal(), G.diagonal())
    return {cost.name: cost.use for cost in V.explain()}


def gate(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x ∘ w − b, of tensors that broadcast, seen as one call."""
    if has_torch_function((x, w, b)):
        return handle_torch_function(gate, (x, w, b), x, w, b)
    return torch.stack([row * w - b for row in x])


def summed(columns: Tensor, axes: int) -> LayerColumns:
    return DenseColumns(columns.flatten(2, -1 - axes).sum(2))


def gate_kind(sign: float) -> Kind:
    return Kind(
        name="gate",
        signatures=[Signature([gate], "input weight bias")],
        samples="broadcast",
        weight=lambda arguments, X, B: summed(
            B * X.unsqueeze(1), len(arguments["weight_shape"])
        ),
        bias=lambda arguments, B: summed(sign * B, len(arguments["bias_shape"])),
    )


class Gated(nn.Module):
    """Scales and shifts tokens of channels, samples in the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(gate(x.transpose(0, 1), self.w, self.b).tanh().mean(0))


def test_own_function() -> None:
    register(gate_kind(sign=-1.0))
    uses = check(Gated(), torch.rand(N, 4, 3))
    assert uses["w"] == uses["b"] == "gate"


def test_wrong_rule_gives_no_wrong_number() -> None:
    register(gate_kind(sign=1.0))
    uses = check(Gated(), torch.rand(N, 4, 3))
    assert (uses["w"], uses["b"]) == ("gate", "no structure")


@pytest.mark.parametrize("rule", ["weight", "bias"])
@pytest.mark.parametrize("outputs", [2, 3])
def test_a_rule_that_raises_is_no_structure_of_its_parameter(
    rule: str, outputs: int
) -> None:
    """All other parameters keep theirs, for one column a sample and for several."""

    def fails(*_: object) -> LayerColumns:
        raise TypeError("an error of the rule")

    register(replace(gate_kind(sign=-1.0), **{rule: fails}))
    net = Gated()
    net.last = nn.Linear(3, outputs)
    uses = check(net, torch.rand(N, 4, 3))
    # The call is one use: neither of its parameters has columns then.
    assert uses["w"] == uses["b"] == "no structure"
    assert uses["last.weight"] == uses["last.bias"] == "linear"


@pytest.mark.parametrize("length", [1, 2, 4])
def test_columns_of_another_size_are_no_structure(length: int) -> None:
    def cut(arguments: Arguments, B: Tensor) -> LayerColumns:
        return DenseColumns(B.new_ones(*B.shape[:2], length))

    register(replace(gate_kind(sign=-1.0), bias=cut))
    uses = check(Gated(), torch.rand(N, 4, 3))
    assert (uses["w"], uses["b"]) == ("gate", "no structure")


@pytest.mark.parametrize("wrong", ["samples", "positions", "channels"])
def test_factors_that_do_not_fit_are_no_structure(wrong: str) -> None:
    def inputs(arguments: Arguments, X: Tensor) -> Tensor:
        a = X.mT.unsqueeze(1)
        return a[:, :, :, :1] if wrong == "positions" else a[1:]

    def cotangents(arguments: Arguments, B: Tensor) -> Tensor:
        return B.mT.unsqueeze(2)[:, :, :, : 1 if wrong == "channels" else None]

    right = inputs if wrong != "channels" else lambda _, X: X.mT.unsqueeze(1)
    linear = Signature([F.linear], "input weight bias")
    register(
        Kind(name="mine", signatures=[linear], inputs=right, cotangents=cotangents)
    )
    net = Lambda(
        lambda m, x: m.layer(x).tanh().sum(1), layer=nn.Linear(3, 2, bias=False)
    )
    assert check(net, torch.rand(N, 4, 3)) == {"layer.weight": "no structure"}


def test_missing_rule_is_no_structure() -> None:
    register(replace(gate_kind(sign=-1.0), bias=None))
    uses = check(Gated(), torch.rand(N, 4, 3))
    assert uses["w"] == uses["b"] == "no structure"


def test_last_registered_comes_first_and_may_decline() -> None:
    never = Signature([F.linear], "input weight bias", lambda given: None)
    register(Kind(name="never", signatures=[never], bias=gate_kind(1.0).bias))
    net = nn.Linear(3, 2)
    assert set(check(net, torch.rand(N, 3)).values()) == {"linear"}


def test_same_name_takes_the_place() -> None:
    register(gate_kind(sign=1.0))
    register(gate_kind(sign=-1.0))
    assert len(kinds.readings(gate)) == 1
    assert check(Gated(), torch.rand(N, 4, 3))["b"] == "gate"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": "second", "bias": gate_kind(1.0).bias}, "samples: found 'second'"),
        ({"inputs": lambda arguments, X: X}, "inputs, cotangents"),
        ({}, "no rule"),
    ],
)
def test_entries_are_checked(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kind(name="mine", signatures=[], **given)


def shifted(x: Tensor, b: Tensor) -> Tensor:
    if has_torch_function((x, b)):
        return handle_torch_function(shifted, (x, b), x, b)
    return x + b


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.rand(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return shifted(x, self.b).flatten(1)


@pytest.mark.parametrize(
    ("rule", "error", "says"),
    [
        (lambda arguments, B: DenseColumns(B.flatten(2)), None, ""),
        (lambda arguments, B: DenseColumns(B), ValueError, "values to unpack"),
        (lambda arguments, B: DenseColumns(2 * B.flatten(2)), AssertionError, "0.b"),
        (
            lambda arguments, B: DenseColumns(B.flatten(2).flip(2)),
            AssertionError,
            "0.b",
        ),
        (lambda arguments, B: B.no_such_method(), AttributeError, "no_such_method"),
    ],
)
def test_what_is_wrong_with_a_kind_is_said_when_asked(
    rule: Any, error: type[Exception] | None, says: str
) -> None:
    net = nn.Sequential(Shift(), nn.Tanh(), nn.Linear(6, 2))
    data = torch.rand(N, 3, 2).double(), torch.arange(N) % 2
    signatures = [Signature([shifted], "input bias")]
    register(Kind(name="shift", signatures=signatures, bias=rule))
    uses = check(net, data[0])
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
    if error is None:
        assert uses["0.b"] == "shift"
        vl.testing.check_kind("shift", risk)
        return
    assert uses["0.b"] == "no structure"
    with pytest.raises(error, match=says):
        vl.testing.check_kind("shift", risk)


def test_a_kind_that_no_call_has_is_said() -> None:
    data = torch.rand(N, 3), torch.arange(N) % 2
    risk = vl.EmpiricalRisk(nn.Linear(3, 2), nn.CrossEntropyLoss(), data)
    with pytest.raises(AssertionError, match="no call of kind 'shift'"):
        vl.testing.check_kind("shift", risk)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Signature(F.relu, "input"), "functions: a list"),  # type: ignore[arg-type]
        (lambda: Signature(["relu"], "input"), "functions: a function"),  # type: ignore[list-item]
        (lambda: Signature([F.relu], ["input"]), "arguments: one string"),  # type: ignore[arg-type]
        (lambda: Kind(name="z", signatures=gate_kind(1.0).signatures[0]), "signatures"),  # type: ignore[arg-type]
        (lambda: Kind(name="z", signatures=[F.relu]), "signatures"),  # type: ignore[list-item]
        (lambda: register(Kind), "kind: a Kind"),  # type: ignore[arg-type]
        (lambda: vl.testing.check_kind("z", "z"), "risk: an Emp"),  # type: ignore[arg-type]
    ],
)
def test_entries_of_another_type_are_refused(build: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        build()
