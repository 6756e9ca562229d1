"""Graphs show that samples stay apart; then columns take one backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import handle_torch_function, has_torch_function

import vivit_linop as vl
from tests.cases import Lambda
from tests.comparing import jacobian
from vivit_linop.net import kinds, layers
from vivit_linop.net.certificate import in_layers, met_apart
from vivit_linop.net.columns.base import DenseColumns
from vivit_linop.net.recorder import Recorder

# As many samples as channels, rows and columns: no length tells which axis is which.
N = 4
LOSS = nn.CrossEntropyLoss()
Forward = Callable[[Any, Tensor], Tensor]


def net(forward: Forward) -> nn.Module:
    return Lambda(
        forward,
        f=nn.Linear(4, 4),
        o=nn.Linear(4, 4),
        norm=nn.BatchNorm2d(4).eval(),
        conv=nn.Conv2d(4, 4, 3, padding=1),
        group=nn.GroupNorm(2, 4),
        last=nn.LayerNorm(4),
        e=nn.Embedding(4, 4),
        w=nn.Parameter(torch.rand(4)),
    ).double()


def images(forward: Forward) -> Forward:
    return lambda m, x: forward(m, x[:, :, None, None] * x[:, None, :, None].sin())


def tokens(x: Tensor) -> Tensor:
    return x[:, :, None] * x[:, None].sin()


def heads(h: Tensor) -> Tensor:
    return h.view(len(h), -1, 2, 2).transpose(1, 2)


def attends(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.f(tokens(x))), heads(m.o(tokens(x))), heads(m.f(tokens(x).cos()))
    with sdpa_kernel(SDPBackend.MATH):
        h = F.scaled_dot_product_attention(q, k, v)
    scores = (q @ k.mT).softmax(-1)
    h = m.last(h.permute(0, 2, 1, 3).reshape(N, -1, 4)) + m.e((N * x).long())
    return m.o(h)[:, 0] + torch.bmm(scores[:, 0], h).mean(1)


def takes_parts(m: Any, x: Tensor) -> Tensor:
    left, right = m.f(x).split(2, -1)
    a, b, *_ = m.o(x).unbind(1)
    first, second = m.f(x.cos()).split([2, 2], 1)
    return torch.cat([torch.stack([a, b], -1) * left, right * second + first], 1)


APART: dict[str, Forward] = {
    "layers": lambda m, x: m.o(m.f(x).relu()),
    "activations": lambda m, x: m.o(F.silu(F.gelu(m.f(x).tanh().sigmoid().exp()))),
    "a branch": lambda m, x: m.o((h := m.f(x)) + h.sin() * x - h / 2),
    "a norm": lambda m, x: m.last(m.f(x)).log_softmax(1),
    "images": images(
        lambda m, x: (
            F.max_pool2d(F.pad(m.norm(m.conv(x.expand(-1, -1, -1, 4))), (0, 1)), 2)
            .mean((2, 3))
            .softmax(-1)
        )
    ),
    "a U": images(
        lambda m, x: torch.cat(
            [
                F.interpolate(F.avg_pool2d(h := m.group(m.conv(x)), (2, 1)), (4, 1)),
                F.mish(F.interpolate(h, (4, 2), mode="bilinear"))[..., :1],
            ],
            1,
        ).mean((2, 3))[:, ::2]
    ),
    "sequences": images(
        lambda m, x: F.max_pool1d(m.conv(x).squeeze(-1).abs().clamp(0.1), 4).squeeze(-1)
    ),
    "a view": images(lambda m, x: m.conv(x).reshape(N, 16)[:, ::4]),
    "a factor of weights": lambda m, x: m.o(m.f(x) * m.w + m.w),
    "tokens": lambda m, x: m.o(m.f(tokens(x)).tanh()).mean(1),
    "rows of tokens": lambda m, x: (
        m.o(m.f(tokens(x).flatten(0, 1)).sin()).view(N, 4, 4).sum(1)
    ),
    "tokens of one more axis": lambda m, x: m.o(m.f(tokens(x)[:, None])).sin()[:, 0, 1],
    "attention": attends,
    "parts": takes_parts,
    "constants of others": lambda m, x: m.o(m.f(x) * x.flip(0)),
}
# Samples of these meet, or who reads the graph cannot know that they do not.
UNKNOWN: dict[str, Forward] = {
    "mean": lambda m, x: m.o((h := m.f(x)) - h.mean(0)),
    "mean, kept": lambda m, x: m.o((h := m.f(x)) - h.mean(-2, keepdim=True)),
    "sum": lambda m, x: m.o((h := m.f(x)) - h.sum()),
    "order": lambda m, x: m.o(m.f(x)[[1, 0, 2, 3]]),
    "sorted": lambda m, x: m.o(m.f(x).sort(0)[0]),
    "an axis before": lambda m, x: m.o(m.f(x)[None].squeeze(-3)),
    "joined": lambda m, x: m.o(torch.cat([m.f(x)[:2], m.f(x)[2:]], -2)),
    "flipped": lambda m, x: m.o(m.f(x).flip(0)),
    "transposed": lambda m, x: m.o(m.f(x).T),
    "swapped": lambda m, x: m.o(m.f(x).transpose(0, 1)),
    "permuted": lambda m, x: m.o(m.f(x).permute(1, 0)),
    "softmax": lambda m, x: m.o(m.f(x).softmax(0)),
    "log softmax": lambda m, x: m.o(m.f(x).log_softmax(-2)),
    "first": lambda m, x: m.o((h := m.f(x)) + h[:1]),
    "norm of the batch": lambda m, x: m.o(
        F.batch_norm(m.f(x), None, None, training=True)
    ),
    "norm of all": lambda m, x: m.o(F.layer_norm(m.f(x), [4, 4])),
    "products of samples": lambda m, x: m.o((h := m.f(x)) @ h.T),
    "weights from samples": lambda m, x: F.linear(m.f(x), m.o(x)),
    "samples times samples": lambda m, x: m.o(x @ m.f(x)),
    "channels": lambda m, x: m.o(
        m.conv(m.f(x)[None, :, :, None].expand(-1, -1, -1, 4))[0].mean(2)
    ),
    "merged": lambda m, x: m.o(m.f(x).view(2, 8).sin().view(4, 4)),
    "padded": lambda m, x: m.o(F.pad(m.f(x), (0, 0, 1, 0))[:4]),
    "written": lambda m, x: m.o(torch.zeros_like(x).index_add(0, torch.arange(4), x)),
    "in place": lambda m, x: m.o(_written(m.f(x))),
    "tokens first": lambda m, x: m.o(m.f(tokens(x)).transpose(-2, 0)).mean(1),
    "rows of other samples": lambda m, x: (
        m.o(m.f(tokens(x)).permute(1, 0, 2).reshape(16, 4)).view(4, 4, 4).mean(1)
    ),
    "rows of two": lambda m, x: m.o(m.f(tokens(x)).view(2, 8, 4).softmax(1))[:, :4],
    "one of all": lambda m, x: m.o(m.f(x)[None].select(0, 0)),
    "one for all": lambda m, x: m.o(m.f(x)[:1].expand(4, -1)),
    "all for one": lambda m, x: m.o(m.f(x).expand(4, 4, 4)).select(1, 0),
    "other parts": lambda m, x: m.o(torch.cat(m.f(x).split(2)[::-1], 0)),
    "unbound": lambda m, x: m.o(torch.stack(m.f(x).unbind(-2)[::-1], -2)),
    "parts of unequal size": lambda m, x: m.o(m.f(x).split([4, 0], -2)[0]),
}


def _written(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[1:] = h[:-1]
    return out


def signals_of_one(output: Tensor, wanted: list[Tensor], sample: int) -> list[Tensor]:
    cotangent = torch.zeros_like(output)
    cotangent[sample] = torch.rand(output.shape[1])
    return list(torch.autograd.grad(output, wanted, cotangent, retain_graph=True))


@pytest.mark.parametrize("name", APART)
def test_samples_met_apart(name: str) -> None:
    """Known from the graph, and true."""
    model = net(APART[name])
    seen: list[Tensor] = []
    for layer in (model.f, model.o, model.conv):
        layer.register_forward_hook(lambda _, __, out: seen.append(out))
    output = model(torch.rand(N, 4).double())
    assert met_apart(output, N) is not None
    for sample in range(N):
        for signal in signals_of_one(output, seen, sample):
            rows = signal.reshape(N, -1)  # one sample may have several
            rows[sample] = 0.0
            assert not rows.any()


@pytest.mark.parametrize("name", UNKNOWN)
def test_samples_may_meet(name: str) -> None:
    output = net(UNKNOWN[name])(torch.rand(N, 4).double())
    # The constant has no graph; all others might.
    assert met_apart(output, N) is None or name == "written"


def passes_of(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    count = 0
    grad = torch.autograd.grad

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return grad(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", counted)
        run()
    return count


def truth(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(model(X), y, reduction="none")
    return jacobian(losses, model.parameters()).T


@pytest.mark.parametrize("name", sorted(APART.keys() - {"constants of others"}))
def test_columns_are_those_of_autograd(name: str) -> None:
    model, X, y = net(APART[name]), torch.rand(N, 4).double(), torch.arange(N)
    U = truth(model, X, y)
    of = vl.PerSampleGradients(model, LOSS, (X, y))
    for got, expected in [
        (of.squared_norms(), U.square().sum(0)),
        (of.second_moment(), U.square().mean(1)),
        (of.variance(), U.var(1, unbiased=False)),
        (of.to_dense(), U),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_one_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers whose columns have been right before; two where hooks do anything."""
    X, y = torch.rand(64, 4).double(), torch.arange(64) % 4

    def hooked(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        if h.requires_grad:
            h.register_hook(lambda g: g)
        return m.o(h.relu())

    def count(forward: Forward) -> int:
        model = net(forward)
        used = [*model.f.parameters(), *model.o.parameters()]
        of = vl.PerSampleGradients(model, LOSS, (X, y), params=used)
        of.second_moment()  # where samples are in the layers is known then
        return passes_of(of.squared_norms, monkeypatch)

    assert count(APART["layers"]) == 1
    assert count(hooked) == 2


class BareNode:
    """A node of a torch that saves what sums need by other names."""

    next_functions = ()
    _input_metadata = (SimpleNamespace(shape=(N, N)),)

    def __init__(self, name: str) -> None:
        self.name = lambda: name


def test_nodes_that_save_something_else_say_nothing() -> None:
    for name, known in {"SumBackward1": False, "TanhBackward0": True}.items():
        output: Any = SimpleNamespace(grad_fn=BareNode(name), numel=lambda: N * N)
        assert (met_apart(output, N) is not None) == known


def test_hooks_that_let_samples_meet() -> None:
    def hooked(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        if h.requires_grad:
            h.register_hook(lambda g: g + g.roll(1, 0))
        return m.o(h.relu())

    data = torch.rand(N, 4).double(), torch.arange(N)
    with pytest.raises(ValueError, match="its derivatives are not"):
        vl.PerSampleGradients(net(hooked), LOSS, data)
    of = vl.PerSampleGradients(net(hooked), LOSS, data, check=False)
    with pytest.raises(ValueError, match="other samples"):
        of.squared_norms()


def scale(x: Tensor, w: Tensor) -> Tensor:
    if has_torch_function((x, w)):
        result: Tensor = handle_torch_function(scale, (x, w), x, w)
        return result
    return x * w


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "samples in another order": lambda rows: rows.flip(0),
    "two exchanged": lambda rows: rows[[0, 2, 1, *range(3, len(rows))]],
    "one larger": lambda rows: torch.cat([rows[:1] * 1.1, rows[1:]]),
    "mean": lambda rows: rows.mean(0, keepdim=True).expand_as(rows),
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_of_kinds_are_seen(
    name: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the graph is known to leave samples apart, and gradients are small."""
    kind = kinds.Kind(
        name="scale",
        signatures=[kinds.Signature([scale], "input weight")],
        weight=lambda _, X, B: DenseColumns(WRONG[name](B * X.unsqueeze(1))),
    )
    monkeypatch.setitem(kinds._READINGS, scale, [(kind.signatures[0], kind)])
    model = net(lambda m, x: m.o(scale(m.f(x), m.w)))
    X, y = torch.rand(9, 4).double(), torch.arange(9) % 4
    if small:
        X[:3] *= 1e-3
    of = vl.PerSampleGradients(model, LOSS, (X, y))
    expected = truth(model, X, y)
    torch.testing.assert_close(of.squared_norms(), expected.square().sum(0))
    torch.testing.assert_close(of.to_dense(), expected)


# Parameters that the graph shows in layers alone ------------------------------------


class Doubled(Tensor):
    """A tensor that layers take twice of."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
        if func is F.linear:
            plain[0] = 2.0 * plain[0]
        return func(*plain, **(kwargs or {}))


def _writes_after(m: Any, x: Tensor) -> Tensor:
    x = x + 1.0
    h = m.f(x)
    x.mul_(2.0)
    return m.o(h + x)


F_LAYER, O_LAYER = {"f.weight", "f.bias"}, {"o.weight", "o.bias"}
E_LAYER = {"e.weight"}
# Of parameters that are met at all, those that are met in layers alone.
IN_LAYERS: dict[str, tuple[Forward, set[str]]] = {
    "layers": (APART["layers"], F_LAYER | O_LAYER),
    "twice": (lambda m, x: m.o(m.f(m.f(x).tanh())), F_LAYER | O_LAYER),
    "a norm": (APART["a norm"], F_LAYER | {"last.weight", "last.bias"}),
    "images": (
        APART["images"],
        {"conv.weight", "conv.bias", "norm.weight", "norm.bias"},
    ),
    "products": (lambda m, x: m.o(x @ m.f.weight), {"f.weight"} | O_LAYER),
    "slopes": (lambda m, x: m.o(F.prelu(m.f(x), m.o.bias)), F_LAYER | O_LAYER),
    "slopes of a product": (
        lambda m, x: m.o(F.prelu(m.f(x), m.f.bias) * m.f.bias.view(1, 4)),
        {"f.weight"} | O_LAYER,
    ),
    "a bias used again": (lambda m, x: m.o(m.f(x) * m.f.bias), {"f.weight"} | O_LAYER),
    "another's use": (APART["a factor of weights"], F_LAYER | O_LAYER),
    "inputs of another kind": (lambda m, x: m.o(m.f(x.as_subclass(Doubled))), O_LAYER),
    "inputs written into": (_writes_after, O_LAYER),
    "tokens": (lambda m, x: m.o(m.f(tokens(x)).relu_()).mean(1), F_LAYER | O_LAYER),
    "rows of tokens": (APART["rows of tokens"], F_LAYER | O_LAYER),
    "products of tokens": (
        lambda m, x: m.o(tokens(x) @ m.f.weight).mean(1),
        {"f.weight"} | O_LAYER,
    ),
    "a bias of tokens used again": (
        lambda m, x: m.o(m.f(tokens(x)) + m.f.bias).mean(1),
        {"f.weight"} | O_LAYER,
    ),
    "tokens written into": (
        lambda m, x: _writes_after(m, tokens(x)).mean(1),
        O_LAYER,
    ),
    "an embedding": (lambda m, x: m.o(m.e((N * x).long()).sum(1)), E_LAYER | O_LAYER),
    "an embedding used again": (
        lambda m, x: m.o(m.e((N * x).long()).sum(1) * m.e.weight),
        O_LAYER,
    ),
}


@pytest.mark.parametrize("name", IN_LAYERS)
def test_parameters_in_layers_alone(name: str) -> None:
    forward, expected = IN_LAYERS[name]
    model, X = net(forward), torch.rand(N, 4).double()
    with Recorder(dict(model.named_parameters())) as recorder:
        output = model(X)
    met = met_apart(output, N)
    assert met is not None
    names = {id(p): n for n, p in model.named_parameters()}
    found = in_layers(met, recorder.uses, dict(model.named_parameters()))
    assert found & {names[id(leaf)] for leaf, _, _ in met} == expected


def large(forward: Forward) -> tuple[nn.Module, Tensor, Tensor]:
    """A net whose run takes more memory than is asked for again without thought."""
    model = Lambda(
        forward, conv=nn.Conv2d(2, 16, 3, padding=1), o=nn.Linear(16, 4)
    ).double()
    return model, torch.rand(120, 2, 16, 16).double(), torch.arange(120) % 4


LARGE: dict[str, Forward] = {
    "layers": lambda m, x: m.o(m.conv(x).tanh().mean((2, 3))),
    "zeros for many samples": lambda m, x: m.o(
        (m.conv(x) * (x[:, :1, :1, :1] > 0.7)).mean((2, 3))
    ),
    "tokens": lambda m, x: m.o(m.conv(x).flatten(2).mT.tanh()).mean(1),
    "the weight is used again": lambda m, x: (
        m.o(m.conv(x).tanh().mean((2, 3))) + F.linear(x[:, 0, 0], m.o.weight)
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_columns_of_large_runs(name: str) -> None:
    """In one batch, and in several, the later ones of other sizes."""
    model, X, y = large(LARGE[name])
    parts = [*zip(X.split([100, 15, 5]), y.split([100, 15, 5]), strict=True)]
    U = truth(model, X, y)
    for data in ([(X, y)], parts):
        of = vl.PerSampleGradients(model, LOSS, data)
        torch.testing.assert_close(of.squared_norms(), U.square().sum(0))
        torch.testing.assert_close(of.second_moment(), U.square().mean(1))
        torch.testing.assert_close((of.T @ of).to_dense(), U.T @ U)
        fisher = vl.EmpiricalFisher(of.risk)
        torch.testing.assert_close(fisher.diagonal(), U.square().mean(1))


def test_weights_have_no_gradients_where_they_are_not_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of few samples are, for the certificate of the rules."""
    model, X, y = large(LARGE["layers"])
    asked, grad = list[int](), torch.autograd.grad

    def watched(outputs: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        if any(isinstance(each, Tensor) for each in inputs):
            asked.append(len(outputs))
        return grad(outputs, inputs, *args, **options)

    of = vl.PerSampleGradients(model, LOSS, (X, y))
    monkeypatch.setattr(torch.autograd, "grad", watched)
    of.squared_norms()
    assert 0 < max(asked) < len(X)


def test_wrong_rules_of_layers_are_seen_on_few_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = replace(layers.CONV, cotangents=lambda a, B: 1.1 * _cotangents(a, B))
    signature = wrong.signatures[0]
    monkeypatch.setitem(kinds._READINGS, F.conv2d, [(signature, wrong)])
    model, X, y = large(LARGE["layers"])
    of = vl.PerSampleGradients(model, LOSS, (X, y))
    expected = truth(model, X, y).square().sum(0)
    torch.testing.assert_close(of.squared_norms(), expected)


@pytest.mark.parametrize("zeros", ["all", "of one batch", "none"])
def test_columns_that_are_zero_certify_no_rule(
    zeros: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of gradients where a net has learnt all targets."""
    wrong = replace(layers.LINEAR, cotangents=lambda a, B: 1.1 * _of_linear(a, B))
    reading = wrong.signatures[0], wrong
    monkeypatch.setitem(kinds._READINGS, F.linear, [reading])
    model, X = net(APART["layers"]), torch.rand(2 * N, 4).double()
    targets = model(X).detach()
    targets[{"all": 2 * N, "of one batch": N, "none": 0}[zeros] :] += 1.0
    data = [*zip(X.split(N), targets.split(N), strict=True)]
    U = vl.PerSampleGradients(model, nn.MSELoss(), data)
    output = model(X)
    losses = (output - targets).square().mean(1)
    expected = jacobian(losses, model.parameters())
    for columns in (U.gram.to_dense(), U.squared_norms().diag()):
        got = columns.diagonal()
        torch.testing.assert_close(got, expected.square().sum(1))
    J = jacobian(output.flatten(), model.parameters())
    G = vl.GGN(U.risk)
    exact = 2 / output.numel() * J.square().sum(0)
    torch.testing.assert_close(G.diagonal(), exact)
    torch.testing.assert_close(G.trace(), exact.sum())


def _of_linear(arguments: Any, B: Tensor) -> Tensor:
    assert layers.LINEAR.cotangents is not None
    return layers.LINEAR.cotangents(arguments, B)


def _cotangents(arguments: Any, B: Tensor) -> Tensor:
    assert layers.CONV.cotangents is not None
    return layers.CONV.cotangents(arguments, B)


def test_derivatives_that_are_no_numbers_are_refused_wherever_they_are() -> None:
    """Also of samples that no certificate is made on."""
    model, X, y = large(lambda m, x: m.o(m.conv(x).mean((2, 3)).pow(2).sqrt()))
    with torch.no_grad():
        model.conv.bias.zero_()
    of = vl.PerSampleGradients(model, LOSS, (X, y))
    assert of.squared_norms().isfinite().all()
    X[20] = 0.0
    of = vl.PerSampleGradients(model, LOSS, (X, y))
    with pytest.raises(ValueError, match="NaN"):
        of.squared_norms()
