"""Operators travel: copies and threads give the same products; memory is freed."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import operator
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

import vivit_linop as vl
from tests.curvature_cases import close
from tests.pairs import pairwise
from vivit_linop.net import linearized as linearizing
from vivit_linop.net.linearized import linearizations, young_circles_collected
from vivit_linop.risk.passes import Passes

N, C = 12, 3


def _mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, C))
    return net.double(), torch.rand(N, 5).double()


def _convolutions() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(3, C)
    )
    return net.double(), torch.rand(N, 2, 5, 5).double()


def _convolution() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, C))
    return net.double(), torch.rand(N, 2, 4, 4).double()


def _risk(
    net: Callable[[], tuple[nn.Module, Tensor]] = _mlp,
    memory: int | None = None,
    sizes: tuple[int, ...] = (7, 5),
) -> vl.EmpiricalRisk:
    torch.manual_seed(1)
    module, X = net()
    y = torch.randint(C, (N,))
    data = [*zip(X.split(sizes), y.split(sizes), strict=True)]
    return vl.EmpiricalRisk(module, nn.CrossEntropyLoss(), data, memory=memory)


Make = Callable[[vl.EmpiricalRisk], Any]


def _drawn(risk: vl.EmpiricalRisk) -> vl.GGN:
    return vl.GGN(risk, mc_samples=2, generator=torch.Generator().manual_seed(0))


OPERATORS: dict[str, Make] = {
    "J": vl.Jacobian,
    "Jᵀ": lambda risk: vl.Jacobian(risk).T,
    "J Jᵀ": lambda risk: (lambda J: J @ J.T)(vl.Jacobian(risk)),
    "V": vl.GGNFactor,
    "Vᵀ": lambda risk: vl.GGNFactor(risk).T,
    "VᵀV": lambda risk: (lambda V: V.T @ V)(vl.GGNFactor(risk)),
    "G": vl.GGN,
    "G, drawn": _drawn,
    "2 G + I": lambda risk: 2 * vl.GGN(risk) + vl.Identity(risk.num_params),
    "U": vl.PerSampleGradients,
    "F": vl.EmpiricalFisher,
    "blocks": lambda risk: vl.GGN(risk).block_diagonal("parameter"),
    "Woodbury": lambda risk: (vl.GGN(risk) + vl.Identity(risk.num_params)).inv(),
}


def _use(op: Any, how: str) -> None:
    if how == "products":
        x = torch.linspace(-1.0, 1.0, op.shape[1]).double()
        op @ x, op @ x.repeat(3, 1).T
        op.T @ torch.ones(op.shape[0]).double()
    if how == "spectra":
        if isinstance(op, vl.GGN):
            op.eigh(k=2).eigenvectors, op.eigvalsh()
        op.to_dense()


def _by_torch_save(op: Any) -> Any:
    file = io.BytesIO()
    torch.save(op, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda op: pickle.loads(pickle.dumps(op)),
    "deepcopy": copy.deepcopy,
    "torch.save": _by_torch_save,
}


CONDITIONS = [("", None), ("products", None), ("products", 0), ("spectra", None)]


@pytest.mark.parametrize(
    ("name", "condition", "way"), pairwise(OPERATORS, CONDITIONS, WAYS)
)
def test_copies(name: str, condition: tuple[str, int | None], way: str) -> None:
    used, memory = condition
    op = OPERATORS[name](_risk(memory=memory))
    _use(op, used)
    copied = WAYS[way](op)
    X = torch.randn(op.shape[1], 2, generator=torch.Generator().manual_seed(2)).double()
    expected = OPERATORS[name](_risk(memory=memory)) @ X
    assert close(op @ X, expected) and close(copied @ X, expected)
    assert close(copied.T @ expected, op.T @ expected)
    assert close(WAYS[way](copied) @ X[:, 0], expected[:, 0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["J", "V", "G", "U", "Woodbury"])
def test_copies_in_inference_mode(name: str, way: str) -> None:
    """All that is loaded there is of a kind that autograd refuses."""
    op = OPERATORS[name](_risk())
    with torch.inference_mode():
        copied = WAYS[way](op)
        x = torch.ones(op.shape[1]).double()
        within = copied @ x
    expected = OPERATORS[name](_risk()) @ torch.ones(op.shape[1]).double()
    assert close(within, expected) and close(copied @ x, expected)
    assert close(WAYS[way](copied) @ x, expected)


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_traced_nets(way: str) -> None:
    J = vl.Jacobian(_risk(_convolutions))
    x = torch.ones(J.shape[1]).double()
    expected = J @ x
    assert {part.method for part in linearizations(J.risk)} == {"trace"}
    assert close(WAYS[way](J) @ x, expected)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_known_goes_along(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrices and eigenpairs are data; graphs and linearisations are not."""
    G = vl.GGN(_risk())
    K, pairs = G.gram.to_dense(), G.eigh(k=2)
    G @ torch.ones(G.shape[0]).double()
    copied, copied_pairs = WAYS[way](G), WAYS[way](pairs)
    assert close(copied_pairs.eigenvectors, pairs.eigenvectors)

    def refused(*_: Any) -> None:
        raise AssertionError("a pass over the data")

    monkeypatch.setattr(Passes, "batches", refused)
    assert torch.equal(copied.gram.to_dense(), K)


# Functions that lead to modules: ``deepcopy`` and pickles share those.

GLOBAL = nn.Linear(6, C).double()


class Holder:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class Outside(nn.Module):
    """A net whose last layer is reached through what is no module."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(5, 6).double(), GLOBAL, way
        self.holder = Holder(GLOBAL)

    def forward(self, x: Tensor) -> Tensor:
        layer = GLOBAL if self.way == "global" else self.holder.layer
        result: Tensor = layer(self.first(x).tanh())
        return result


def _closure(net: nn.Module) -> None:
    forward = net[0].forward  # type: ignore[index]
    net[0].forward = lambda x: 2.0 * forward(x)  # type: ignore[index]


def _hook_of_another_layer(net: nn.Module) -> None:
    net[0].register_forward_hook(lambda m, args, out: out * net[2].weight.mean())  # type: ignore[index]


def _hook_of_a_parameter(net: nn.Module) -> None:
    weight = net[2].weight  # type: ignore[index]
    net[2].register_forward_pre_hook(lambda m, args: (args[0] @ weight.T @ weight,))  # type: ignore[index]


def _columns(net: nn.Module, X: Tensor, predict: Any = None) -> Tensor:
    parameters = list(net.parameters())
    rows = [
        torch.autograd.grad(o, parameters, retain_graph=True, materialize_grads=True)
        for o in (net(X) if predict is None else predict(net, X)).flatten()
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("used", ["", "products"])
@pytest.mark.parametrize(
    "change", [_closure, _hook_of_another_layer, _hook_of_a_parameter, "predict"]
)
def test_functions_go_with_their_modules(change: Any, used: str) -> None:
    torch.manual_seed(1)
    net, X = _mlp()
    predict = None
    if change == "predict":
        first, last = net[0], net[2]  # type: ignore[index]
        predict = lambda m, x: last(first(x).sin())  # noqa: E731
    else:
        change(net)
    J = _columns(net, X, predict)
    data = X, torch.randint(C, (N,))
    op = vl.Jacobian(net, nn.CrossEntropyLoss(), data, predict=predict)
    _use(op, used)
    copied = copy.deepcopy(copy.deepcopy(op))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    unit = torch.eye(J.shape[1]).double()
    assert close(op @ unit, J) and close(copied @ unit, J)
    assert close(copied.to_dense(), J)
    new = {name: 0.5 * p for name, p in copied.risk.params.items()}
    moved = vl.Jacobian(copied.risk.at(new)).to_dense()
    with torch.no_grad():
        for p, value in zip(net.parameters(), new.values(), strict=True):
            p.copy_(value)
    assert close(moved, _columns(net, X, predict))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outside", ["global", "holder"])
def test_modules_outside_of_the_net(outside: str, way: str) -> None:
    torch.manual_seed(1)
    net, X = Outside(outside), torch.rand(N, 5).double()
    op = vl.Jacobian(net, nn.CrossEntropyLoss(), (X, torch.randint(C, (N,))))
    J = _columns(net, X)
    copied = WAYS[way](op)
    if outside == "global" and way != "deepcopy":
        for _ in range(2):
            with pytest.raises(ValueError, match=r"model: .*global variable"):
                copied @ torch.ones(J.shape[1]).double()
        return
    assert close(copied @ torch.eye(J.shape[1]).double(), J)
    assert close(copied.to_dense(), J)


def test_parts_stay_together() -> None:
    G = vl.GGN(_risk())
    pair = pickle.loads(pickle.dumps((G, G.factor, G.risk)))
    assert pair[0].factor is pair[1] and pair[1].risk is pair[2]
    J = vl.Jacobian(_risk())
    copied = copy.deepcopy(J.T)
    assert copied.T.T is copied and copied.jacobian.risk is copied.risk


@pytest.mark.parametrize(
    ("name", "used", "way"),
    pairwise([*OPERATORS, "H"], ["products", "spectra"], WAYS),
)
def test_what_scipy_keeps(
    name: str, used: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators of SciPy 1.18 hold a module, and say how they travel without it."""

    def without(self: Any) -> dict[str, Any]:
        return self.__dict__ | {"_xp": np.empty(0)}

    def arrived(self: Any, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_xp": np})

    initialise = LinearOperator.__init__

    def initialised(self: Any, *args: Any, **given: Any) -> None:
        initialise(self, *args, **given)
        self._xp = np

    for method, function in [
        ("__init__", initialised),
        ("__getstate__", without),
        ("__setstate__", arrived),
    ]:
        monkeypatch.setattr(LinearOperator, method, function, raising=False)
    op = vl.Hessian(_risk()) if name == "H" else OPERATORS[name](_risk())
    _use(op, used)
    X = torch.ones(op.shape[1], 2).double()
    copied = WAYS[way](op)
    assert copied._xp is np and close(copied @ X, op @ X)


def test_adjoints_of_adjoints() -> None:
    J = vl.Jacobian(_risk())
    assert J.T is J.T and J.T.T is J
    Jt = vl.Jacobian(_risk()).T  # of a J that is gone
    assert Jt.T.T is Jt
    assert close(Jt.T.to_dense(), Jt.to_dense().T)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_joblib(backend: str) -> None:
    op = vl.GGN(_risk())
    x = torch.ones(op.shape[1]).double()
    expected = op @ x
    calls = [delayed(operator.matmul)(op, x) for _ in range(2)]
    for found in Parallel(n_jobs=2, backend=backend)(calls):
        assert close(found, expected)


def test_spawned_process() -> None:
    op = vl.Jacobian(_risk()).T
    x = torch.ones(op.shape[1]).double()
    expected = op @ x
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert close(pool.apply(operator.matmul, (op, x)), expected)


# Threads ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "memory", "net"),
    pairwise(
        ["J", "Jᵀ", "V", "Vᵀ", "G", "U", "VᵀV", "Woodbury"],
        [None, 0, 4000],
        [_mlp, _convolutions],
    ),
)
def test_threads(name: str, memory: int | None, net: Any) -> None:
    """Also the first products, which make what is kept."""
    expected_of = OPERATORS[name](_risk(net))
    X = torch.randn(expected_of.shape[1], 12).double()
    expected = expected_of @ X
    for _ in range(2):
        op = OPERATORS[name](_risk(net, memory))
        start = threading.Barrier(4)

        def product(x: Tensor, op: Any = op, start: Any = start) -> Tensor:
            start.wait()
            result: Tensor = op @ x
            return result

        with ThreadPoolExecutor(4) as pool:
            found = torch.stack(list(pool.map(product, X.T)), dim=1)
        assert close(found, expected)
        assert close(op @ X, expected)


def test_threads_keep_each_batch_once() -> None:
    risk = _risk()
    G = vl.GGN(risk)
    G.factor._decided = True  # products run on linearisations
    start = threading.Barrier(4)

    def product(x: Tensor) -> Tensor:
        start.wait()
        return G @ x

    X = torch.randn(G.shape[0], 4).double()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(product, X.T))
    assert [
        len(part.outputs) for part in risk.kept.values["linearizations"]
    ] == risk.batch_sizes


@pytest.mark.parametrize("verb", ["eigvalsh", "diagonal", "to_dense"])
def test_threads_that_ask_for_the_same(verb: str) -> None:
    expected = getattr(vl.GGN(_risk()), verb)()
    G = vl.GGN(_risk())
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: getattr(G, verb)(), range(8)):
            assert close(found, expected)


def test_threads_of_a_positive_curvature_hessian() -> None:
    """Its products hook one module, which threads must not do at once."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    P = vl.PositiveCurvatureHessian(net, nn.MSELoss(), data, blocks="module")
    X = torch.randn(P.shape[0], 16).double()
    expected = P @ X
    with ThreadPoolExecutor(4) as pool:
        found = torch.stack(list(pool.map(lambda x: P @ x, X.T)), dim=1)
    assert close(found, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"blocks": "module", "modify": "abs"}, {"as_published": True}],
    ids=["BackPACK's", "modules", "as published"],
)
@pytest.mark.parametrize("way", WAYS)
def test_positive_curvature_hessians_travel(way: str, options: Any) -> None:
    """BackPACK's products are local functions, which cannot be pickled."""
    P = vl.PositiveCurvatureHessian(_risk(), **options)
    X = torch.randn(P.shape[1], 3, dtype=torch.float64)
    expected = P @ X
    copied = WAYS[way](P)
    assert close(copied @ X, expected)
    assert copied.risk is not P.risk and len(copied.blocks) == len(P.blocks)


# Memory -----------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


USES: dict[str, Callable[[vl.EmpiricalRisk], Any]] = {
    **{
        name: lambda risk, make=make: (lambda op: (_use(op, "products"), op))(
            make(risk)
        )
        for name, make in {**OPERATORS, "H": vl.Hessian}.items()
    },
    "gradient": lambda risk: risk.gradient(),
    "eigh": lambda risk: vl.GGN(risk).eigh().eigenvectors,
    "eigh(k)": lambda risk: vl.GGN(risk).eigh(k=2),
    "logdet": lambda risk: (vl.GGN(risk) + vl.Identity(risk.num_params)).logdet(),
    "sqrt": lambda risk: vl.GGN(risk).sqrt(),
    "KFAC": lambda risk: vl.KFAC(risk),
    "NTK": lambda risk: (lambda J: (J @ J.T).to_dense())(vl.Jacobian(risk)),
}


# A trace of one batch holds all that those of several would.
@pytest.mark.parametrize(("net", "sizes"), [(_mlp, (7, 5)), (_convolution, (N,))])
@pytest.mark.parametrize("name", USES)
@pytest.mark.usefixtures("no_collector")
def test_freed_with_the_last_reference(
    name: str, net: Any, sizes: tuple[int, ...]
) -> None:
    risk = _risk(net, sizes=sizes)
    for linearization in linearizations(risk):
        linearization.vjp(torch.ones(linearization.outputs.numel(), 1).double())
    result = USES[name](risk)
    held: list[Any] = [risk, risk.model, *risk.outputs, *risk.params.values()]
    held += [
        *risk.kept.values["linearizations"],
        *(part._graph.output for part in risk.kept.values["linearizations"]),
    ]
    left = [weakref.ref(thing) for thing in held]
    del risk, result, linearization, held
    assert not any(thing() is not None for thing in left)


@pytest.mark.usefixtures("no_collector")
def test_a_traced_net_is_freed() -> None:
    risk = _risk(_convolutions)
    J = vl.Jacobian(risk)
    J.T @ torch.ones(J.shape[0]).double()
    inputs, _ = (
        part._find.__self__._function.keywords["X"]
        for part in risk.kept.values["linearizations"]
    )
    J @ torch.ones(J.shape[1]).double()
    left = [
        weakref.ref(thing)
        for thing in (risk, J, inputs, *risk.kept.values["linearizations"])
    ]
    del risk, J, inputs
    assert not any(thing() is not None for thing in left)


# Interruptions ----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["Linearization", "copied", "check_outputs"])
def test_interrupted_while_linearising(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    J = vl.Jacobian(_risk())
    x = torch.ones(J.shape[1]).double()
    expected = vl.Jacobian(_risk()) @ x
    owner: Any = vl.EmpiricalRisk if where == "check_outputs" else linearizing
    original, calls = getattr(owner, where), [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:  # in the second batch
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            J @ x
    assert len(J.risk.kept.values["linearizations"]) == 1
    assert close(J @ x, expected)
    assert [
        len(part.outputs) for part in J.risk.kept.values["linearizations"]
    ] == J.risk.batch_sizes


@pytest.mark.parametrize("is_on", [False, True])
def test_the_collector_is_on_as_the_caller_had_it(is_on: bool) -> None:
    """Tracing, which convolutions take, stops it for a while; also where it fails."""
    (gc.enable if is_on else gc.disable)()
    try:
        _use(vl.GGN(_risk(_convolutions)), "products")
        assert gc.isenabled() == is_on
        with pytest.raises(KeyboardInterrupt), young_circles_collected():
            raise KeyboardInterrupt
        assert gc.isenabled() == is_on
    finally:
        gc.enable()
