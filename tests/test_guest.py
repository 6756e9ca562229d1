"""The library is a guest: in threads, at errors, where a net escapes its copy."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from backpack.extensions import DiagGGNExact
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vivit_linop as vl
from tests.comparing import jacobian
from vivit_linop.modes import as_guest, replayed

LOSS = nn.CrossEntropyLoss()
CPU = torch.device("cpu")


def toy(n: int = 6) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return net, (torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3)


def vector(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def switches() -> dict[str, Any]:
    cuda = torch.backends.cuda
    return {
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "generator": torch.get_rng_state().tolist(),
        "recurrences": torch.backends.cudnn.enabled,
        "checkpoints": torch.utils.checkpoint.CheckpointFunction,
    }


# Threads ------------------------------------------------------------------------------

USES: dict[str, Callable[[vl.EmpiricalRisk], Tensor]] = {
    "G x": lambda r: vl.GGN(r) @ vector(r.num_params),
    "H x": lambda r: vl.Hessian(r) @ vector(r.num_params),
    "gradient": lambda r: r.gradient(),
    "eigvalsh": lambda r: vl.GGN(r).eigvalsh(),
    "diagonal": lambda r: vl.GGN(r).diagonal(),
    "KFAC": lambda r: vl.KFAC(r, variant="exact") @ vector(r.num_params),
}


def checkpointed(reentrant: bool) -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = toy()[0]

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.net[:2], x, use_reentrant=reentrant)
            result: Tensor = self.net[2](h)
            return result

    return Checkpointed()


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("kind", ["plain", "checkpoint", "reentrant"])
def test_one_risk_in_threads(kind: str, memory: int | None) -> None:
    net, (X, y) = toy(12)
    if kind != "plain":
        net = checkpointed(kind == "reentrant")  # type: ignore[assignment]
    data = [(X[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    expected = {k: use(vl.EmpiricalRisk(net, LOSS, data)) for k, use in USES.items()}
    before, slots = switches(), {n: id(p) for n, p in net.named_parameters()}
    risk = vl.EmpiricalRisk(net, LOSS, data, memory=memory)
    with ThreadPoolExecutor(4) as pool:
        names = [*USES] * 2
        found = list(pool.map(lambda name: USES[name](risk), names))
    for name, result in zip(names, found, strict=True):
        torch.testing.assert_close(result, expected[name], rtol=1e-9, atol=1e-12)
    assert switches() == before
    assert {n: id(p) for n, p in net.named_parameters()} == slots


def test_the_user_trains_in_another_thread() -> None:
    """Their net is at all times what it would be without us."""
    net, data = toy()
    alone = copy.deepcopy(net)
    risk = vl.EmpiricalRisk(net, LOSS, data, memory=0)
    expected, stop, results = USES["G x"](risk), threading.Event(), []

    def products() -> None:
        while not stop.is_set():
            results.append(USES["G x"](risk))

    def train(net: nn.Module) -> list[float]:
        optimiser, values = torch.optim.SGD(net.parameters(), 0.1), []
        for _ in range(60):
            optimiser.zero_grad()
            value = LOSS(net(data[0]), data[1])
            value.backward()
            optimiser.step()
            values.append(value.item())
        return values

    thread = threading.Thread(target=products)
    thread.start()
    try:
        values = train(net)
    finally:
        stop.set()
        thread.join()
    assert values == train(alone)
    assert len(results) > 1
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


def test_switches_are_put_back_by_the_last_thread() -> None:
    before = switches()
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with as_guest(CPU):
            torch.rand(3)
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    with as_guest(CPU):
        thread.start()
        inside.wait()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert not torch.backends.mha.get_fastpath_enabled()  # the other is inside
    leave.set()
    thread.join()
    assert switches() == before


def test_replays_of_two_threads_draw_their_own_numbers() -> None:
    before = torch.get_rng_state()
    states = [torch.Generator().manual_seed(s).get_state() for s in (1, 2)]
    expected = [
        torch.rand(50, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    ]

    def draw(state: Tensor) -> Tensor:
        with replayed([state], CPU):
            return torch.stack([torch.rand(()) for _ in range(50)])

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(draw, states * 20))
    for number, result in enumerate(found):
        assert torch.equal(result, expected[number % 2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.Linear])
def test_recurrent_nets_run_without_cudnn(kind: type[nn.Module]) -> None:
    """Whose recurrences have no derivatives in eval mode, and no second ones."""
    seen = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.fails = kind(4, 3), False

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.enabled)
            if self.fails:
                raise KeyboardInterrupt
            result = self.part(x[None])  # one step
            return (result[0] if isinstance(result, tuple) else result)[0]

    net, before = Asks().double().eval(), torch.backends.cudnn.enabled
    for net.fails in (False, True):
        try:
            risk = vl.EmpiricalRisk(net, LOSS, toy()[1])
            assert vl.Hessian(risk) @ vector(risk.num_params) is not None
        except KeyboardInterrupt:
            assert net.fails
        assert torch.backends.cudnn.enabled is before
    assert set(seen) == {kind is nn.Linear}


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("use", USES)
def test_nothing_is_left_after_an_error(
    use: str, error: type[BaseException], memory: int | None
) -> None:
    """Nor is the error taken for one that means another way."""
    raises = {"now": False}

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.features = toy()[0], None

        def forward(self, x: Tensor) -> Tensor:
            self.eval()
            self.features = self.net[:2](x)
            torch.rand(1)
            if raises["now"]:
                raise error("of the user")
            result: Tensor = self.net[2](self.features)
            return result

    net = Fails().train()
    before = switches(), dict(vars(net)), dict(vars(net.net[0]))
    risk = vl.EmpiricalRisk(net, LOSS, toy()[1], memory=memory)
    raises["now"] = True
    with pytest.raises(error, match="of the user"):
        USES[use](risk)
    assert (switches(), dict(vars(net)), dict(vars(net.net[0]))) == before
    assert net.features is None and net.training


# What the copy cannot follow ----------------------------------------------------------

GLOBAL = nn.Linear(5, 3).double()


class Holder:
    """No module."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Escapes(nn.Module):
    """A net that reaches a layer of its own by another way."""

    def __init__(self, way: str, recompute: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5).double(), GLOBAL
        self.way, self.recompute = way, recompute
        self.holder = Holder(self.last)
        self.twice = self.last if way == "both" else None

    def end(self, h: Tensor) -> Tensor:
        layer = GLOBAL if self.way == "global" else self.holder.layer
        self.kept = layer(h)
        layer.kept = self.kept  # type: ignore[assignment]
        return self.kept + (0.0 if self.twice is None else self.twice(h))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.recompute:
            result: Tensor = checkpoint(self.end, h, use_reentrant=False)
            return result
        return self.end(h)


@pytest.mark.parametrize(
    ("way", "recompute"),
    [("global", False), ("holder", False), ("both", False), ("global", True)],
)
def test_a_net_that_escapes(way: str, recompute: bool) -> None:
    net, (_, data) = Escapes(way, recompute), toy()
    params = list(net.parameters())
    J = jacobian(net(data[0]), params)
    del net.kept, GLOBAL.kept
    before = dict(vars(net)), dict(vars(GLOBAL)), dict(GLOBAL._parameters)
    risk = vl.EmpiricalRisk(net, LOSS, data)
    with torch.no_grad():
        for p in params:
            p.mul_(1.5)
    x, u = vector(J.shape[1]), vector(J.shape[0])
    torch.testing.assert_close(vl.Jacobian(risk) @ x, J @ x)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: vl.Jacobian(risk).T @ u, range(6)):
            torch.testing.assert_close(found, J.T @ u)
    torch.testing.assert_close(
        vl.GGN(risk).diagonal(), vl.GGN(risk).to_dense().diagonal()
    )
    after = dict(vars(net)), dict(vars(GLOBAL)), dict(GLOBAL._parameters)
    assert after == before


def test_what_escapes_and_is_recomputed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"last\.\w+ of your own module.*self.layer"):
        vl.EmpiricalRisk(Escapes("holder", recompute=True), LOSS, toy()[1])


@pytest.mark.parametrize("what", ["transposed", "prototypes"])
def test_what_was_computed_from_parameters_before_is_refused(what: str) -> None:
    net, data = toy()

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.transposed = net[2].weight.T
            self.parts = {"prototypes": net[2].weight.exp()}

        def forward(self, x: Tensor) -> Tensor:
            W = self.transposed if what == "transposed" else self.parts[what].T
            result: Tensor = self.net[:2](x) @ W
            return result

    with pytest.raises(ValueError, match=r"model: its forward pass uses .*computed"):
        vl.EmpiricalRisk(Cached(), LOSS, data)


class Buffered(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3).double(), nn.Linear(3, 3).double()
        W = self.last.weight
        buffers = {"part": W[:1], "prototypes": W.exp(), "constant": W.detach()}
        self.last.register_buffer("buffer", buffers[what])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        result: Tensor = self.last(hidden) + hidden @ self.last.buffer.T
        return result


@pytest.mark.parametrize("what", ["part", "prototypes"])
def test_buffers_that_were_computed_from_parameters_are_refused(what: str) -> None:
    _, data = toy()
    refused = r"model: its forward pass uses 'last.buffer', .*computed"
    with pytest.raises(ValueError, match=refused):
        vl.EmpiricalRisk(Buffered(what), LOSS, data)
    net: Any = Buffered("constant")
    risk = vl.EmpiricalRisk(net, LOSS, data)
    own = torch.autograd.grad(LOSS(net(data[0]), data[1]), list(net.parameters()))
    torch.testing.assert_close(risk.gradient(), risk.flatten(own))
    net.last.buffer = net.last.weight.exp()
    assert not risk.is_current()
    with pytest.raises(ValueError, match=refused):
        risk.at()
    net.last.forward = lambda x: x  # it is used no more
    net.forward = net.first.forward
    net.last.buffer = net.last.weight.exp()
    assert vl.EmpiricalRisk(net, LOSS, data).is_current()


class WithProperty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    @functools.cached_property
    def weight(self) -> Tensor:
        return self.log_weight.exp()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_a_cached_property_is_computed_anew() -> None:
    net, (_, (X, y)) = WithProperty(), toy()
    LOSS(net(X), y).backward()  # it is cached now
    assert net.log_weight.grad is not None
    gradient = vl.EmpiricalRisk(net, LOSS, (X, y)).gradient()
    torch.testing.assert_close(gradient, net.log_weight.grad.reshape(-1))


@pytest.mark.parametrize("how", ["given", "closed over"])
def test_predict_runs_on_the_copy(how: str) -> None:
    net, (X, y) = toy()
    layers = [net[0], net[2]]

    def closed(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = layers[1](torch.tanh(layers[0](x)))
        return result

    predict = closed if how == "closed over" else lambda model, x: model[:3](x)
    expected = vl.EmpiricalRisk(net, LOSS, (X, y)).gradient()
    risk = vl.EmpiricalRisk(net, LOSS, (X, y), predict=predict)
    with torch.no_grad():
        net[0].weight.zero_()
    torch.testing.assert_close(risk.gradient(), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_a_function_with_a_module_inside(shared: bool) -> None:
    """torch's own functional_call replaces shared parameters for good."""
    layer, last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
    net = nn.Sequential(layer, nn.Tanh(), *([layer] if shared else []), last)
    before = {name: id(p) for name, p in net.named_parameters()}
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    data = toy()[1]

    def function(params: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(net, params, (x,))
        return result

    risk = vl.EmpiricalRisk(function, LOSS, data, params)
    expected = vl.EmpiricalRisk(net, LOSS, data)
    torch.testing.assert_close(risk.gradient(), expected.gradient())
    x = vector(risk.num_params)
    torch.testing.assert_close(vl.GGN(risk) @ x, vl.GGN(expected) @ x)
    assert {name: id(p) for name, p in net.named_parameters()} == before


def with_unused_draws() -> nn.Module:
    net = nn.Sequential(nn.Linear(18, 4), nn.Sigmoid(), nn.Linear(4, 3))

    def draw(*_: object) -> None:
        torch.rand(2)

    net[1].register_forward_hook(draw)
    return nn.Sequential(nn.Flatten(), *net)


def with_convolution(pool: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 2, bias=False),
        nn.Sigmoid(),
        pool,
        nn.Flatten(),
        nn.Linear(3, 3),
    )


DRAWING: dict[str, Callable[[], nn.Module]] = {
    "draws that are not used": with_unused_draws,
    "a pooling that becomes a convolution": lambda: with_convolution(nn.AvgPool2d(2)),
    "another": lambda: with_convolution(nn.AdaptiveAvgPool2d(1)),
}
RECURSIONS: list[Callable[[vl.EmpiricalRisk], Any]] = [
    lambda risk: vl.Hessian(risk).diagonal(),
    lambda risk: vl.Hessian(risk).sample_diagonals(),
    lambda risk: vl.from_backpack(risk, DiagGGNExact()),
    lambda risk: vl.KFRA(risk),
]


@pytest.mark.parametrize("name", DRAWING)
def test_packages_draw_none_of_the_users_numbers(name: str) -> None:
    net = DRAWING[name]().double()
    data = torch.rand(4, 2, 3, 3).double(), torch.arange(4) % 3
    risk = vl.EmpiricalRisk(net, LOSS, data)
    before = switches()
    for use in RECURSIONS:
        with contextlib.suppress(ValueError):  # what a package cannot do
            use(risk)
        assert switches() == before


# Copies of risks, and packages that work on modules -----------------------------------


def with_features() -> nn.Module:
    net, (X, _) = toy()
    net[1].register_forward_hook(lambda m, args, out: setattr(m, "seen", out))
    net(X)
    return net


def with_lock() -> nn.Module:
    net, _ = toy()
    net[1].lock = threading.Lock()  # type: ignore[assignment]
    return net


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return toy()[0]


UNCOPIED = [with_features, with_lock, made_in_inference_mode]


@pytest.mark.parametrize("make", UNCOPIED)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_packages_get_a_module_that_deepcopy_does_not(
    make: Callable[[], nn.Module], mode: Any
) -> None:
    data = toy()[1]
    net = make()
    before = [dict(vars(m)) for m in net.modules()]
    with mode():
        risk = vl.EmpiricalRisk(net, LOSS, data)
        found = vl.from_backpack(risk, DiagGGNExact()).diagonal()
        torch.testing.assert_close(found, vl.GGN(risk).diagonal())
        H = vl.Hessian(risk)
        dense = H.to_dense().diagonal()
        torch.testing.assert_close(H.diagonal(), dense)
        torch.testing.assert_close(H.sample_diagonals().mean(0), dense)
        H.explain_diagonal()
        assert vl.KFRA(risk).shape == vl.PositiveCurvatureHessian(risk).shape
    assert [dict(vars(m)) for m in net.modules()] == before


class Keeps(nn.Module):
    """Of a kind that BackPACK has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy()[0]

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.net[:2](x)
        result: Tensor = self.net[2](self.features)
        return result


def test_what_backpack_cannot_do_is_done_by_products_or_refused() -> None:
    net, data = Keeps(), toy()[1]
    net(data[0])
    features = net.features
    risk, plain = (vl.EmpiricalRisk(m, LOSS, data) for m in (net, toy()[0]))
    H, expected = vl.Hessian(risk), vl.Hessian(plain)
    torch.testing.assert_close(H.diagonal(), expected.diagonal())
    torch.testing.assert_close(H.sample_diagonals(), expected.sample_diagonals())
    for make in (vl.KFRA, vl.PositiveCurvatureHessian):
        with pytest.raises(ValueError, match="model: BackPACK cannot compute"):
            make(risk)
    assert net.features is features


@pytest.mark.parametrize(
    "travel", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))]
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_risks_travel(travel: Callable[[Any], Any], reentrant: bool) -> None:
    risk = vl.EmpiricalRisk(Travels(reentrant), LOSS, toy()[1])
    again = travel(risk)
    for use in USES.values():
        torch.testing.assert_close(use(again), use(risk))


class Travels(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = toy()[0], reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.net[:2], x, use_reentrant=self.reentrant)
        result: Tensor = self.net[2](h)
        return result
