"""Data of any length, and data that are not the same in every pass."""

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests.cases import Lambda, dense, mlp, problem
from tests.comparing import jacobian
from tests.data_cases import Drawn
from tests.toys import Noisy, Snapshot, random_vector, toy
from vivit_linop.net.linearized import linearizations

# Streams ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["ce_everything", "uneven_batches", "mse_image"])
def test_streams_in_two_cuts_are_the_dense_matrix(name: str, size: int) -> None:
    case, truth = problem(name), dense(name)
    X, y = (torch.cat(parts) for parts in zip(*case.batches(), strict=True))
    batches = Batches(list(zip(X.split(size), y.split(size), strict=True)))
    (model, loss, _, params), keywords = case.arguments()
    risk = vl.EmpiricalRisk(model, loss, batches, params, memory=0, **keywords)
    assert len(risk.batch_sizes) > 1
    G, x = vl.GGN(risk), random_vector(truth.D)
    V = G.factor

    def close(value: Tensor, expected: Tensor) -> bool:
        return bool((value - expected).norm() <= 1e-10 * expected.norm())

    assert close(risk.gradient(), truth.gradient)
    assert close(G @ x, truth.G @ x)
    assert close(V @ (V.T @ x), truth.G @ x)
    assert close(vl.EmpiricalFisher(risk) @ x, truth.F @ x)
    evals = torch.linalg.eigvalsh(truth.G)
    got = G.eigvalsh()
    assert (got - evals[-len(got) :]).abs().max() <= 1e-10 * evals[-1]


class Batches:
    """An iterable of the user's own."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def kept_bytes(count: int) -> int:
    """What the tensors take that are alive after products with a stream."""
    torch.manual_seed(0)
    net = mlp(50, 3, 3)
    loader = DataLoader(Drawn(count, 50), batch_size=20)
    gc.collect()
    before = {id(t) for t in gc.get_objects() if issubclass(type(t), Tensor)}
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), loader, memory=0)
    G, F = vl.GGN(risk), vl.EmpiricalFisher(risk)
    x = random_vector(risk.num_params)
    results = [risk.gradient(), G @ x, F @ x, G.factor @ (G.factor.T @ x), G.diagonal()]
    del results
    gc.collect()
    alive = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    return sum(t.nbytes for t in alive if id(t) not in before)


def test_only_outputs_and_targets_are_kept_of_a_stream() -> None:
    kept_bytes(20)  # what is made once for the process
    few, many = kept_bytes(40), kept_bytes(240)
    # Per sample 3 outputs, a target, and a sum of its input, by which other data are
    # seen: of 8 bytes each, as what these may be off by, of each batch. Inputs have 50
    # entries.
    assert many - few == 200 * 40 + 10 * 8


@pytest.mark.parametrize("kind", ["vjp", "jvp", "unused"])
def test_a_linearisation_is_freed_with_its_graph(kind: str) -> None:
    """Nodes of the graph that hold what they save, and that what holds them, leak."""

    class Token:
        pass

    tokens: list[Any] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x).relu()  # saves its output
        if h.grad_fn is not None:
            token = Token()
            h.grad_fn.metadata["token"] = token
            tokens.append(weakref.ref(token))
        return m.second(h)

    net = Lambda(forward, first=nn.Linear(4, 5), second=nn.Linear(5, 3)).double()
    _, loss, (X, y) = toy()
    risk = vl.EmpiricalRisk(net, loss, [(X[:3], y[:3]), (X[3:], y[3:])], memory=0)
    for linearization in linearizations(risk):
        if kind == "vjp":
            linearization.vjp(torch.ones(9, 1, dtype=torch.float64))
        elif kind == "jvp":
            linearization.jvp(torch.ones(risk.num_params, 1, dtype=torch.float64))
    del linearization
    gc.collect()
    assert len(tokens) >= 2
    assert all(token() is None for token in tokens)


@pytest.mark.parametrize("used", [True, False])
def test_a_graph_is_freed_before_the_next_is_made(used: bool) -> None:
    """Also while the loop still refers to the linearisation before."""

    class Token:
        pass

    tokens: list[Any] = []
    alive: list[int] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        alive.append(sum(token() is not None for token in tokens))
        h = m.first(x).relu()
        if h.grad_fn is not None:
            token = Token()
            h.grad_fn.metadata["token"] = token
            tokens.append(weakref.ref(token))
        return m.second(h)

    net = Lambda(forward, first=nn.Linear(4, 5), second=nn.Linear(5, 3)).double()
    _, loss, (X, y) = toy()
    risk = vl.EmpiricalRisk(net, loss, [(X[:3], y[:3]), (X[3:], y[3:])], memory=0)
    gc.collect()
    tokens.clear(), alive.clear()
    for linearization in linearizations(risk):
        if used:
            linearization.jvp(torch.ones(risk.num_params, 1, dtype=torch.float64))
    assert linearization.outputs.shape[1] == 3
    assert len(alive) >= 2
    assert not any(alive)


def test_linearisations_count_with_what_makes_products_possible() -> None:
    """A trace or a second graph is kept beside the graph of the outputs."""
    net, loss, data = toy()
    (first,) = linearizations(vl.EmpiricalRisk(net, loss, data))
    assert first.kept_bytes > first.nbytes > 0
    for memory, kept in ((first.kept_bytes, True), (first.kept_bytes - 1, False)):
        risk = vl.EmpiricalRisk(net, loss, data, memory=memory)
        (again,) = linearizations(risk)
        assert again.kept == kept
        assert (next(iter(linearizations(risk))) is again) == kept


def test_blocks_beyond_the_bound_are_formed_anew() -> None:
    net, loss, data = toy()
    expected = vl.GGNFactor(net, loss, data).to_dense()
    X, y = data
    batches, of_one = [(X[:3], y[:3]), (X[3:], y[3:])], 3 * 3 * 2 * 8
    factor = vl.GGNFactor(net, loss, batches, memory=of_one)
    for _ in range(2):
        assert (factor.to_dense() - expected).norm() <= 1e-12 * expected.norm()
        assert len(factor.root._blocks) == 1
    # A draw is kept: it is one matrix.
    drawn = vl.GGNFactor(
        net, loss, data, mc_samples=2, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(drawn.to_dense(), drawn.to_dense())


# Data that are not the same in every pass ---------------------------------------------


def own_generator(data: TensorDataset) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(data, batch_size=3, shuffle=True, generator=generator)


class Shrinking(Batches):
    """A pass that ends earlier than the one before."""

    def __iter__(self) -> Iterator[Any]:
        self.batches, now = self.batches[:-1], self.batches
        return iter(now)


class Growing(Batches):
    """One that ends later."""

    def __iter__(self) -> Iterator[Any]:
        self.batches, now = self.batches + self.batches[:1], self.batches
        return iter(now)


UNSTEADY: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "shuffled": lambda X, y: DataLoader(TensorDataset(X, y), 3, shuffle=True),
    "own generator": lambda X, y: own_generator(TensorDataset(X, y)),
    "workers": lambda X, y: DataLoader(
        TensorDataset(X, y), 3, shuffle=True, num_workers=1
    ),
    "torch noise": lambda X, y: DataLoader(Noisy(X, y, "torch"), 4),
    "numpy noise": lambda X, y: DataLoader(Noisy(X, y, "numpy"), 4),
    "shrinking": lambda X, y: Shrinking([(X, y), (X, y), (X, y)]),
    "growing": lambda X, y: Growing([(X, y), (X, y), (X, y)]),
}


no_workers_with_a_gpu = pytest.mark.host("workers that are forked have no GPU")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[no_workers_with_a_gpu] if kind == "workers" else [])
        for kind in UNSTEADY
    ],
)
def test_unsteady_data_are_refused_before_the_model_runs(kind: str) -> None:
    net, loss, (X, y) = toy(12)
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=r"^data: .*shuffle=False.*check_data=False"):
        vl.EmpiricalRisk(net, loss, UNSTEADY[kind](X, y))
    assert torch.equal(torch.random.get_rng_state(), state)
    # These are found out at the end only.
    assert not calls or kind in ("shrinking", "growing")


STEADY: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "loader": lambda X, y: DataLoader(TensorDataset(X, y), 5),
    "workers": lambda X, y: DataLoader(
        TensorDataset(X, y), 5, num_workers=1, persistent_workers=True
    ),
    "batches": lambda X, y: Batches([(X, y)]),
}


@pytest.mark.parametrize(
    "kind",
    ["loader", pytest.param("workers", marks=no_workers_with_a_gpu), "batches"],
)
def test_steady_data_pass_the_check(kind: str) -> None:
    net, loss, (X, y) = toy(12)
    x = random_vector(47)
    expected = vl.GGN(net, loss, (X, y)) @ x[: sum(p.numel() for p in net.parameters())]
    before = Snapshot(net, (X, y))
    risk = vl.EmpiricalRisk(net, loss, STEADY[kind](X, y))
    before.check()
    got = vl.GGN(risk) @ x[: risk.num_params]
    assert (got - expected).norm() <= 1e-10 * expected.norm()


@no_workers_with_a_gpu
def test_workers_that_persist_belong_to_the_users_loop() -> None:
    # Their loader has one iterator: another pass would end or repeat that of the loop.
    net, loss, (X, y) = toy(7)
    loader = DataLoader(TensorDataset(X, y), 2, num_workers=1, persistent_workers=True)
    seen, workers = [], []
    for part, _ in loader:
        seen.append(part)
        workers.append(loader._iterator)
        if len(seen) == 2:
            risk = vl.EmpiricalRisk(net, loss, loader)
            product = vl.GGN(risk) @ random_vector(risk.num_params)
    assert torch.equal(torch.cat(seen), X)
    assert workers[0] is workers[-1] and loader.persistent_workers
    whole = vl.GGN(net, loss, (X, y))
    x = random_vector(risk.num_params)
    torch.testing.assert_close(product, whole @ x, rtol=1e-10, atol=1e-12)
    # Passes inside of passes, and a copy, which workers would not let be made.
    expected = jacobian(net(X), net.parameters())
    for J in (vl.Jacobian(risk), pickle.loads(pickle.dumps(vl.Jacobian(risk)))):
        torch.testing.assert_close(J.to_dense(), expected, rtol=1e-10, atol=1e-12)


def test_a_fixed_draw_is_one_matrix() -> None:
    # What the error advises.
    net, loss, (X, y) = toy(12)
    loader = UNSTEADY["torch noise"](X, y)
    G = vl.GGN(net, loss, list(loader))
    x = random_vector(G.shape[0])
    assert torch.equal(G @ x, G @ x)
    risk = vl.EmpiricalRisk(net, loss, loader, check_data=False, memory=0)
    first = vl.GGN(risk) @ x
    torch.rand(5)
    torch.testing.assert_close(vl.GGN(risk) @ x, first, rtol=1e-12, atol=0)


# Memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["G", "V", "V.T", "J", "J.T", "H"])
def test_data_that_change_after_a_product(kind: str) -> None:
    # What is kept for further products is not the memory of the user.
    net, loss, (X, y) = toy()
    data = X.clone(), y.clone()
    risk = vl.EmpiricalRisk(net, loss, data)
    J, V = vl.Jacobian(risk), vl.GGNFactor(risk)
    operators = {"G": vl.GGN(risk), "V": V, "V.T": V.T, "J": J, "J.T": J.T}
    op = operators.get(kind, vl.Hessian(risk))
    x = random_vector(op.shape[1])
    before = op @ x
    data[0].numpy()[:] *= 3.0  # a change that torch does not see
    data[1].zero_()
    assert torch.equal(op @ x, before)


@pytest.mark.parametrize("memory", [0, None])
def test_batches_that_vanish(memory: int | None) -> None:
    net, loss, (X, y) = toy()
    data = [(X[:2], y[:2]), (X[2:], y[2:])]
    risk = vl.EmpiricalRisk(net, loss, data, memory=memory)
    D = risk.num_params
    data.pop()
    uses: list[Callable[[], Any]] = [
        risk.gradient,
        lambda: vl.Jacobian(risk) @ random_vector(D),
        lambda: vl.GGN(risk) @ random_vector(D),
        lambda: vl.Hessian(risk) @ random_vector(D),
        lambda: vl.GGN(risk).eigvalsh(),
        lambda: vl.EmpiricalFisher(risk).trace(),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="1 batches, when the risk was built"):
            use()
