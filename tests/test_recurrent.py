"""Recurrent layers give their weights the columns of linear layers, step by step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

import vivit_linop as vl
from tests.capture_cases import OPAQUE, N, check
from tests.cases import Lambda, classes, features, parameter
from vivit_linop.net import recurrent

T = 5
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"batch_first": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "dropout": 0.5, "bias": False},
]


def classifier(cell: nn.Module) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        if m.cell.batch_first:
            return m.head(m.cell(x)[0][:, -1])  # type: ignore[no-any-return]
        h, last = m.cell(x.transpose(0, 1))
        last = last if isinstance(last, Tensor) else last[1]  # of the cell
        head = nn.functional.linear(last[-1], m.head.weight[:, : last.shape[-1]])
        return m.head(h[-1]) + head  # type: ignore[no-any-return]

    width = cell.hidden_size * (1 + cell.bidirectional)
    if cell.proj_size:
        width = cell.proj_size * (1 + cell.bidirectional)
    return Lambda(forward, cell=cell, head=nn.Linear(width, 3))


def uses_of(net: nn.Module, is_cell: bool = False) -> dict[str, str]:
    """A weight of inputs is used once, all others at each step; biases likewise."""
    uses = {}
    for name, p in net.named_parameters():
        once = "head" in name or ("_ih" in name and not is_cell)
        uses[name] = "linear" if once else f"{T} linear"
        if once and p.ndim == 1:
            uses[name] = f"dense: {uses[name]}"
    return uses


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str, options: dict[str, Any]) -> None:
    net = classifier(LAYERS[kind](2, 2, **({"batch_first": True} | options)))
    uses = uses_of(net)
    if not net.cell.batch_first:
        uses["head.weight"] = "linear + linear"
    check(net, features(N, T, 2).double(), uses)


@pytest.mark.parametrize("both", [True, False])
def test_projections(both: bool) -> None:
    cell = nn.LSTM(2, 3, 2, batch_first=True, bidirectional=both, proj_size=2)
    net = classifier(cell)
    check(net, features(N, T, 2).double(), uses_of(net))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda kind: kind.__name__
)
def test_cells(cell: type[nn.Module], bias: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.cell(x[:, 0])
        for t in range(1, T):
            state = m.cell(x[:, t], state)
        return m.head(state if isinstance(state, Tensor) else state[0])

    net = Lambda(forward, cell=cell(2, 3, bias), head=nn.Linear(3, 3))
    check(net, features(N, T, 2).double(), uses_of(net, is_cell=True))


def test_first_states_that_are_learnt() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        state = m.h[:, None].expand(1, len(x), 2), m.c.repeat(1, len(x), 1)
        return m.head(m.cell(x, state)[0][:, -1])  # type: ignore[no-any-return]

    net = Lambda(
        forward,
        cell=nn.LSTM(2, 2, batch_first=True),
        head=nn.Linear(2, 3),
        h=parameter(1, 2),
        c=parameter(1, 1, 2),
    )
    uses = dict.fromkeys("hc", "") | uses_of(net)
    uses |= {"h": "dense: expand", "c": OPAQUE}
    check(net, features(N, T, 2).double(), uses)


def test_samples_one_by_one() -> None:
    """Where no axis is of samples, and the first state is a parameter itself."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows = torch.stack([m.cell(sample, m.start)[0][-1] for sample in x])
        return m.head(rows)  # type: ignore[no-any-return]

    net = Lambda(
        forward, cell=nn.GRU(2, 2), head=nn.Linear(2, 3), start=parameter(1, 2)
    )
    uses = {n: u if "head" in n else OPAQUE for n, u in uses_of(net).items()}
    check(net, features(N, T, 2).double(), uses)


def test_packed_sequences() -> None:
    """Samples have no axis in them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        lengths = 2 + (x[:, 0, 0] > 0).long() * (T - 2)
        packed = rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return m.head(m.cell(packed)[1][-1])  # type: ignore[no-any-return]

    net = Lambda(forward, cell=nn.GRU(2, 2, batch_first=True), head=nn.Linear(2, 3))
    X, y = features(N, T, 2).double(), classes(N, 3)
    net = net.double()
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    expected = []
    for x, target in zip(X.split(1), y.split(1), strict=True):
        loss = nn.functional.cross_entropy(net(x), target)
        found = torch.autograd.grad(loss, list(net.parameters()))
        expected.append(torch.cat([part.flatten() for part in found]))
    U = vl.PerSampleGradients(risk)
    torch.testing.assert_close(U.to_dense(), torch.stack(expected, 1))
    assert {cost.use for cost in U.explain()} == {"no structure", "linear"}


def test_frozen_layers_are_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("vivit_linop.net.recorder.unrolled", never)
    net = classifier(nn.LSTM(2, 2, batch_first=True))
    net.cell.requires_grad_(False)
    uses = {"head.weight": "linear", "head.bias": "dense: linear"}
    check(net, features(N, T, 2).double(), uses)


def test_gradients_and_products_take_torch_s_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which are several times as fast for long sequences."""
    net = classifier(nn.GRU(2, 2, batch_first=True)).double()
    data = features(N, T, 2).double(), classes(N, 3)
    calls = list[Any]()

    def counted(*given: Any) -> Any:
        calls.append(given[0])
        return recurrent.unrolled(*given)

    monkeypatch.setattr("vivit_linop.net.recorder.unrolled", counted)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
    g, G = risk.gradient(), vl.GGN(risk)
    Gg = G @ g
    assert not calls
    dense = (V := G.factor.to_dense()) @ V.T
    assert calls and set(calls) == {torch.gru}
    torch.testing.assert_close(Gg, dense @ g)


def test_what_is_computed_otherwise_is_no_structure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Should a version of torch have another recurrence, its own is taken."""

    def other(x: Tensor, h: Tensor, state: list[Tensor]) -> list[Tensor]:
        return [(x + h).sin()]

    monkeypatch.setitem(recurrent.LAYERS, torch.rnn_tanh, other)
    net = classifier(nn.RNN(2, 2, batch_first=True))
    uses = {n: u if "head" in n else OPAQUE for n, u in uses_of(net).items()}
    check(net, features(N, T, 2).double(), uses)


@pytest.mark.parametrize("kind", LAYERS)
def test_kfac(kind: str) -> None:
    """Of one step all sums over positions have one term."""
    net = classifier(LAYERS[kind](2, 2, batch_first=True)).double()
    X, y = features(1, 1, 2).double(), classes(1, 3)
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    found = vl.KFAC(risk, variant="exact").to_dense()
    G = vl.GGN(risk).block_diagonal("parameter").to_dense()
    torch.testing.assert_close(found, G)
