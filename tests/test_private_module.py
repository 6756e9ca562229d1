"""Nets of many kinds run on private copies: right, and the user's module untouched."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import cached, register_parametrization
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import vivit_linop as vl
from vivit_linop.checkpoints import RECOMPUTED

N, IN, C = 5, 4, 3
LOSS = nn.CrossEntropyLoss()


def data(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(N, *(shape or (IN,)), generator=generator, dtype=torch.float64)
    return X, torch.arange(N) % C


class Net(nn.Module):
    """Whatever its parts and its forward pass are said to be."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self._run(self, x)


class Stateful(Net):
    """One that keeps something from call to call, and can forget it."""

    def __init__(
        self, forward: Callable[..., Any], forget: Callable[..., Any], **parts: Any
    ) -> None:
        super().__init__(forward, **parts)
        self._forget = forget

    def again(self) -> None:
        self._forget(self)


def linear(inputs: int = IN, outputs: int = IN) -> nn.Linear:
    return nn.Linear(inputs, outputs)


# Kinds of nets ------------------------------------------------------------------------


def layer_three_times() -> nn.Module:
    return nn.Sequential(*[linear(), nn.Tanh()] * 3, linear(IN, C))


def siamese() -> nn.Module:
    tower = nn.Sequential(linear(), nn.Tanh())

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cat([m.left(x[:, :IN]), m.right(x[:, :IN].flip(1))], 1))

    return Net(forward, left=tower, right=tower, head=linear(2 * IN, C))


def shared_batch_norm() -> nn.Module:
    norm = nn.BatchNorm1d(IN)
    norm.running_mean = torch.linspace(-1, 1, IN)
    return nn.Sequential(norm, linear(), nn.Tanh(), norm, linear(IN, C)).eval()


def tied_weights() -> nn.Module:
    net = nn.Sequential(linear(), nn.Tanh(), linear(), linear(IN, C))
    net[2].weight = net[0].weight
    return net


def shared_buffer() -> nn.Module:
    net = Net(
        lambda m, x: m.b(torch.tanh(m.a(x) * m.a.scale) * m.b.scale),
        a=linear(),
        b=linear(IN, C),
    )
    net.a.register_buffer("scale", torch.tensor(0.5))
    net.b.register_buffer("scale", net.a.scale, persistent=False)
    return net


def recurrent(kind: Callable[..., nn.Module]) -> nn.Module:
    rnn = kind(2, 3, num_layers=2, batch_first=True)
    return Net(
        lambda m, x: m.head(m.rnn(x.view(len(x), 2, 2))[0][:, -1]),
        rnn=rnn,
        head=linear(3, C),
    )


class Writes(nn.Module):
    """Puts what it is given into a list."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen, self.own = seen, linear()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.tanh(self.own(x))


class Reads(nn.Module):
    """Takes what is in it."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen, self.own = seen, linear(IN, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x * self.seen.pop())


def shared_list() -> nn.Module:
    seen = list[Tensor]()
    return nn.Sequential(Writes(seen), Reads(seen))


def plain_list() -> nn.Module:
    """Layers in a list are no part of the model: constants."""
    return Net(
        lambda m, x: m.head(torch.tanh(m.hidden[0](m.first(x)))),
        first=linear(),
        hidden=[linear().double()],
        head=linear(IN, C),
    )


def registered_in_plain_containers() -> nn.Module:
    a, b = linear(), linear(IN, C)
    return Net(
        lambda m, x: m.stages["b"][0](torch.tanh(m.order[0](x)) * m.pair.gain.exp()),
        a=a,
        b=b,
        gain=nn.Parameter(torch.ones(IN) / 3),
        order=collections.deque([a]),
        stages=collections.defaultdict(list, {"b": [b]}),
        pair=None,
    )


def with_namedtuple() -> nn.Module:
    net = registered_in_plain_containers()
    net.pair = collections.namedtuple("Pair", "gain other")(net.gain, 3)  # type: ignore[assignment]
    return net


def keyed_by_layer() -> nn.Module:
    a, b = linear(), linear(IN, C)
    return Net(
        lambda m, x: m.b(m.scale[m.a] * torch.tanh(m.a(x))), a=a, b=b, scale={a: 2.0}
    )


def bound_method() -> nn.Module:
    net = Net(lambda m, x: m.b(m.activate(x)), a=linear(), b=linear(IN, C))
    net.activate = types.MethodType(lambda m, x: torch.tanh(m.a(x)), net)
    return net


def method_of_a_part() -> nn.Module:
    net = Net(lambda m, x: m.b(m.first(x).tanh()), a=linear(), b=linear(IN, C))
    net.first = net.a.forward
    return net


def lambda_attribute() -> nn.Module:
    a, b = linear(), linear(IN, C)
    net = Net(lambda m, x: m.whole(x), a=a, b=b)
    net.whole = lambda x: b(torch.tanh(a(x)))
    return net


def recursive_closure() -> nn.Module:
    a, b = linear(), linear(IN, C)

    def repeat(x: Tensor, times: int) -> Tensor:
        return repeat(torch.tanh(a(x)), times - 1) if times else b(x)

    return Net(lambda m, x: m.repeat(x, 2), a=a, b=b, repeat=repeat)


def partial_attribute() -> nn.Module:
    a, b = linear(), linear(IN, C)

    def apply(layer: nn.Module, x: Tensor, *, last: nn.Module) -> Tensor:
        return last(torch.tanh(layer(x)))

    return Net(
        lambda m, x: m.whole(x), a=a, b=b, whole=functools.partial(apply, a, last=b)
    )


def cached_function() -> nn.Module:
    a, b = linear(), linear(IN, C)
    weight = functools.lru_cache(lambda: a.weight.exp())
    return Stateful(
        lambda m, x: b(torch.tanh(x @ m.w().T)),
        lambda m: m.w.cache_clear(),
        a=a,
        b=b,
        w=weight,
    )


def default_argument() -> nn.Module:
    a, b = linear(), linear(IN, C)
    net = Net(lambda m, x, first=a: b(torch.tanh(first(x))), a=a, b=b)
    return net


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.clamp(min=0.1).log()


def mlp(change: Callable[[nn.Module], Any]) -> nn.Module:
    net = nn.Sequential(linear(), nn.Tanh(), linear(IN, C))
    change(net[0])
    return net.eval()


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(
        Net(lambda m, x: m.b(torch.tanh(m.a(x))) + 1.0, a=linear(), b=linear(IN, C))
    )


def keeps_features() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.features = torch.tanh(m.a(x))
        m.history.append(m.features)
        m.cache["x"] = m.features
        return m.b(m.features)

    return Net(forward, a=linear(), b=linear(IN, C), history=[], cache={})


class Output(collections.OrderedDict):  # type: ignore[type-arg]
    """As of transformers."""

    @property
    def logits(self) -> Tensor:
        result: Tensor = self["logits"]
        return result


def keeps_outputs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Output:
        m.last["hidden"] = torch.tanh(m.a(x))
        m.last = Output(logits=m.b(m.last["hidden"]), hidden=m.last["hidden"])
        return m.last

    return Net(forward, a=linear(), b=linear(IN, C), last=Output())


def hooks() -> nn.Module:
    net = nn.Sequential(linear(), nn.Tanh(), linear(IN, C))
    net[1].register_forward_hook(lambda m, args, out: setattr(m, "output", out))
    net[0].register_forward_pre_hook(lambda m, args: (2.0 * args[0],))
    net[2].register_forward_hook(lambda m, args, out: out + net[0].bias.sum())
    return net


def hook_and_module_share_a_cache() -> nn.Module:
    cache: dict[str, Tensor] = {}
    net = Net(
        lambda m, x: m.b(m.a(x)) + m.cache["a"].mean(1, keepdim=True),
        a=linear(),
        b=linear(IN, C),
    )
    net.a.register_forward_hook(lambda m, args, out: cache.update(a=out.sin()))
    net.cache = cache  # type: ignore[assignment]
    return net


def counts_calls() -> nn.Module:
    """Not one function if calls were counted on."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return m.calls * m.b(torch.tanh(m.a(x)))

    return Stateful(
        forward, lambda m: setattr(m, "calls", 0), a=linear(), b=linear(IN, C), calls=0
    )


def compiled_part() -> nn.Module:
    part = torch.compile(nn.Sequential(linear(), nn.Tanh()), backend="eager")
    return nn.Sequential(part, linear(IN, C))


def checkpointed(run: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        block = nn.Sequential(linear(), nn.Tanh(), linear(), nn.Sigmoid())
        return Net(
            lambda m, x: m.last(run(m, m.first(x).tanh())),
            first=linear(),
            block=block,
            last=linear(IN, C),
        )

    return make


def nested(outer: bool, inner: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(m: Any, h: Tensor) -> Tensor:
        def block(h: Tensor) -> Tensor:
            h = m.block[:2](h)
            return h * checkpoint(m.block[2:], h, use_reentrant=inner)

        return checkpoint(block, h, use_reentrant=outer)

    return run


def keeps_and_recomputes(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(m: Any, h: Tensor) -> Tensor:
        m.gate = torch.linspace(0.5, 1.0, IN, dtype=h.dtype)
        return checkpoint(lambda z: m.block(z) * m.gate, h, use_reentrant=reentrant)

    return run


CHECKPOINTED = {
    "method": lambda m, h: checkpoint(m.block, h, use_reentrant=False),
    "reentrant": lambda m, h: checkpoint(m.block, h, use_reentrant=True),
    "sequential": lambda m, h: checkpoint_sequential(
        m.block, 2, h, use_reentrant=False
    ),
    "sequential, reentrant": lambda m, h: checkpoint_sequential(
        m.block, 2, h, use_reentrant=True
    ),
    **{
        f"nested {outer} {inner}": nested(outer, inner)
        for outer in (False, True)
        for inner in (False, True)
    },
    "kept": keeps_and_recomputes(False),
    "kept, reentrant": keeps_and_recomputes(True),
}

NETS: dict[str, Callable[[], nn.Module]] = {
    "layer three times": layer_three_times,
    "siamese": siamese,
    "shared batch norm": shared_batch_norm,
    "tied weights": tied_weights,
    "shared buffer": shared_buffer,
    "LSTM": lambda: recurrent(nn.LSTM),
    "GRU": lambda: recurrent(nn.GRU),
    "bidirectional": lambda: Net(
        lambda m, x: m.head(m.rnn(x.view(len(x), 2, 2))[0][:, -1]),
        rnn=nn.RNN(2, 3, batch_first=True, bidirectional=True),
        head=linear(6, C),
    ),
    "plain list": plain_list,
    "list that parts share": shared_list,
    "containers": with_namedtuple,
    "keyed by layer": keyed_by_layer,
    "bound method": bound_method,
    "method of a part": method_of_a_part,
    "lambda": lambda_attribute,
    "recursive closure": recursive_closure,
    "partial": partial_attribute,
    "lru_cache": cached_function,
    "default argument": default_argument,
    "parametrized": lambda: mlp(
        lambda m: register_parametrization(m, "weight", Exponential())
    ),
    "orthogonal": lambda: mlp(parametrizations.orthogonal),
    "weight norm": lambda: mlp(parametrizations.weight_norm),
    "old weight norm": lambda: mlp(weight_norm),
    "old spectral norm": lambda: mlp(spectral_norm),
    "pruned": lambda: mlp(lambda m: prune.l1_unstructured(m, "weight", 0.3)),
    "traced": traced,
    "keeps features": keeps_features,
    "keeps outputs": keeps_outputs,
    "hooks": hooks,
    "hook and module share a cache": hook_and_module_share_a_cache,
    "counts calls": counts_calls,
    "compiled part": compiled_part,
    **{f"checkpoint, {name}": checkpointed(run) for name, run in CHECKPOINTED.items()},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().double()


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


# Truth --------------------------------------------------------------------------------


def plainly(net: nn.Module, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient and the Jacobian by torch on the user's own net.

    Gradients of ``backward`` are those of reentrant checkpoints as well.
    """
    params = list(net.parameters())

    def gradient(of: Callable[[Tensor], Tensor]) -> Tensor:
        net.zero_grad()
        if isinstance(net, Stateful):
            net.again()
        of(logits(net(X))).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        return torch.cat([g.reshape(-1).clone() for g in grads])

    rows = [gradient(lambda f, i=i: f.reshape(-1)[i]) for i in range(N * C)]
    return gradient(lambda f: LOSS(f, y)), torch.stack(rows)


@pytest.mark.parametrize("name", NETS)
def test_nets(name: str) -> None:
    X, y = data()
    gradient, J = plainly(build(name), X, y)
    net = build(name)
    before = State(net)
    risk = vl.EmpiricalRisk(net, LOSS, (X, y))
    before.check()
    with torch.no_grad():  # training goes on
        for p in net.parameters():
            p.add_(0.3)
    before = State(net)
    G = vl.GGN(risk)
    H = vl.LossHessian(risk).to_dense()
    dense = J.T @ H @ J
    x = torch.linspace(-1, 1, risk.num_params, dtype=torch.float64)
    for got, want in (
        (risk.gradient(), gradient),
        (vl.Jacobian(risk) @ x, J @ x),
        (vl.Jacobian(risk).T @ H[0], J.T @ H[0]),
        (G @ x, dense @ x),
        (vl.GGNFactor(risk).to_dense() @ vl.GGNFactor(risk).to_dense().T, dense),
        (G.diagonal(), dense.diagonal()),
        (vl.PerSampleGradients(risk).to_dense().mean(1), gradient),
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    before.check()


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_checkpoints_are_recomputed_in_any_thread(outer: bool, inner: bool) -> None:
    """A backward pass on a GPU runs in a thread of its own; here another one does."""
    block = nn.Sequential(linear(), nn.Tanh(), linear()).double()
    names = vars(torch.utils.checkpoint).copy()

    with_graph: list[bool] = []

    def last(h: Tensor) -> Tensor:
        with_graph.append(torch.is_grad_enabled())  # torch's reentrant one has none
        return block[2](h)

    def run(h: Tensor, *, times: float) -> Tensor:
        h = block[:2](h)
        return times * h * checkpoint(last, h, use_reentrant=inner)

    x = torch.rand(N, IN, dtype=torch.float64, requires_grad=True)
    h = block[:2](x)
    parameters = list(block.parameters())
    expected = torch.autograd.grad((3 * h * block[2](h)).square().sum(), parameters)
    with RECOMPUTED, ThreadPoolExecutor(1) as thread:
        given = {"use_reentrant": outer}
        if outer:  # which takes no arguments by name
            y = checkpoint(functools.partial(run, times=3.0), x, **given)
        else:
            y = checkpoint(run, x, times=3.0, **given)
        total = y.square().sum()
        found = thread.submit(torch.autograd.grad, total, parameters).result()
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    assert len(with_graph) > 1 and all(with_graph)
    assert vars(torch.utils.checkpoint) == names


# Torch's second derivative of weight_norm is wrong, and refused.
@pytest.mark.parametrize("name", [name for name in NETS if "weight norm" not in name])
def test_hessians(name: str) -> None:
    X, y = data()
    risk = vl.EmpiricalRisk(build(name), LOSS, (X, y))
    x = torch.linspace(-1, 1, risk.num_params, dtype=torch.float64)
    step, slopes = 1e-5, []
    for sign in (1, -1):
        net = build(name)
        parts = (sign * step * x).split([p.numel() for p in net.parameters()])
        with torch.no_grad():
            for p, part in zip(net.parameters(), parts, strict=True):
                p.add_(part.view_as(p))
        slopes.append(vl.EmpiricalRisk(net, LOSS, (X, y)).gradient())
    expected = (slopes[0] - slopes[1]) / (2 * step)
    torch.testing.assert_close(vl.Hessian(risk) @ x, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NETS)
def test_other_parameters(name: str) -> None:
    """What is given by name is what counts, also in what a backward pass recomputes."""
    X, y = data()
    net, other = build(name), build(name)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.2)
    given = {n: p.detach().clone() for n, p in other.named_parameters()}
    gradient, J = plainly(other, X, y)
    risk = vl.EmpiricalRisk(net, LOSS, (X, y), given)
    torch.testing.assert_close(risk.gradient(), gradient, rtol=1e-9, atol=1e-10)
    u = torch.linspace(-1, 1, N * C, dtype=torch.float64)
    torch.testing.assert_close(vl.Jacobian(risk).T @ u, J.T @ u, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["orthogonal", "parametrized", "siamese"])
def test_the_caller_caches_parametrizations(name: str) -> None:
    data_ = data()
    net, other = build(name), build(name)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    expected = [vl.GGN(m, LOSS, data_).to_dense() for m in (net, other)]
    with cached():
        net(data_[0])
        found = [vl.GGN(m, LOSS, data_).to_dense() for m in (net, other)]
        assert name == "siamese" or net[0].weight is net[0].weight
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


class State:
    """What must not change on a user's module."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.before = net, self.state(net)

    @staticmethod
    def state(net: nn.Module) -> list[Any]:
        found: list[Any] = []
        for module in net.modules():
            found.append(id(module))
            for name, value in vars(module).items():
                contents: Any = ()
                if isinstance(value, dict):
                    contents = [(key, id(item)) for key, item in value.items()]
                elif isinstance(value, (list, collections.deque)):
                    contents = [id(item) for item in value]
                found.append((name, id(value), contents))
        for tensor in (*net.parameters(), *net.buffers()):
            versions = tensor._version, tensor.requires_grad, id(tensor.grad)
            found.append((id(tensor), *versions, tensor.detach().sum().item()))
        return found

    def check(self) -> None:
        assert self.state(self.net) == self.before
