"""Data of any length: streams, what they must be, long jobs, saving, and memory."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import Lambda, dense, mlp, problem
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from toys import Noisy, Snapshot, guest_net, random_vector, toy

import vivit_linop as vl
from vivit_linop.curvature import output_space
from vivit_linop.linalg.decompositions import GramEigenpairs
from vivit_linop.linalg.krylov import watched


class Drawn(Dataset):
    """Samples that are made when they are asked for, and not kept."""

    def __init__(self, count: int, features: int) -> None:
        self.count, self.features = count, features

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(self.features, generator=generator, dtype=torch.float64)
        return x, torch.randint(3, (), generator=generator)


def streamed(**options: Any) -> tuple[nn.Module, vl.EmpiricalRisk]:
    """40 samples from a loader; D = 120 and N·R = 80."""
    torch.manual_seed(0)
    net = mlp(6, 11, 3)
    loader = DataLoader(Drawn(40, 6), batch_size=20)
    return net, vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), loader, **options)


def in_memory(net: nn.Module) -> vl.EmpiricalRisk:
    """The same risk of one batch."""
    samples = [Drawn(40, 6)[index] for index in range(40)]
    X, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))


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
    few, many = kept_bytes(40), kept_bytes(240)
    # Per sample 3 outputs and a target, of 8 bytes each; inputs have 50 entries.
    assert many - few == 200 * 32


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
    for linearization in risk.linearizations():
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
    for linearization in risk.linearizations():
        if used:
            linearization.jvp(torch.ones(risk.num_params, 1, dtype=torch.float64))
    assert linearization.outputs.shape[1] == 3
    assert len(alive) >= 2
    assert not any(alive)


def test_linearisations_count_with_what_makes_products_possible() -> None:
    """A trace or a second graph is kept beside the graph of the outputs."""
    net, loss, data = toy()
    (first,) = vl.EmpiricalRisk(net, loss, data).linearizations()
    assert first.kept_bytes > first.nbytes > 0
    for memory, kept in ((first.kept_bytes, True), (first.kept_bytes - 1, False)):
        risk = vl.EmpiricalRisk(net, loss, data, memory=memory)
        (again,) = risk.linearizations()
        assert again.kept == kept
        assert (next(iter(risk.linearizations())) is again) == kept


def test_blocks_beyond_the_bound_are_formed_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, loss, data = toy()
    expected = vl.GGNFactor(net, loss, data).to_dense()
    monkeypatch.setattr(output_space, "_KEPT_BYTES", 3 * 3 * 2 * 8)  # of one batch
    X, y = data
    factor = vl.GGNFactor(net, loss, [(X[:3], y[:3]), (X[3:], y[3:])])
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


@pytest.mark.parametrize("kind", UNSTEADY)
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


def test_steady_data_pass_the_check() -> None:
    net, loss, (X, y) = toy(12)
    x = random_vector(47)
    expected = vl.GGN(net, loss, (X, y)) @ x[: sum(p.numel() for p in net.parameters())]
    persistent = DataLoader(
        TensorDataset(X, y), 5, num_workers=1, persistent_workers=True
    )
    before = Snapshot(net, (X, y))
    for data in (DataLoader(TensorDataset(X, y), 5), persistent, Batches([(X, y)])):
        risk = vl.EmpiricalRisk(net, loss, data)
        before.check()
        got = vl.GGN(risk) @ x[: risk.num_params]
        assert (got - expected).norm() <= 1e-10 * expected.norm()


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


# Progress and long jobs ---------------------------------------------------------------


def work(risk: vl.EmpiricalRisk) -> None:
    G = vl.GGN(risk)
    risk.gradient()
    x = random_vector(risk.num_params)
    G @ x
    vl.Hessian(risk) @ x
    G.eigh(k=2, route="ARPACK on K")
    G.eigvalsh()
    risk.subset([0, 1]).gradient()


def test_no_output_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    work(streamed(memory=2**12)[1])
    assert capfd.readouterr() == ("", "")


def test_progress(capfd: pytest.CaptureFixture[str]) -> None:
    work(streamed(memory=2**12, progress=True)[1])
    shown, errors = capfd.readouterr()
    assert shown == ""
    for bar in ("check_data", "risk", "gradient", "product", "columns", "subset"):
        assert f"{bar}:   0%|" in errors and "/2 [" in errors, bar
    assert "eigh(k=2):" in errors
    *_, last = [line for line in errors.split("\r") if "eigh(k=2):" in line]
    assert int(last.split("eigh(k=2): ")[1].split(" products")[0]) >= 20


@pytest.mark.parametrize("route", ["ARPACK on K", "ARPACK on G"])
def test_watched_eigenpairs_are_the_same(route: str) -> None:
    (_, quiet), (_, shown) = streamed(), streamed(progress=True)
    expected, got = (vl.GGN(r).eigh(k=3, route=route) for r in (quiet, shown))
    assert got.route == route
    torch.testing.assert_close(
        got.eigenvalues, expected.eigenvalues, rtol=1e-12, atol=0
    )


def test_products_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    """Those of an eigensolver, also with several columns and with the adjoint."""
    A = vl.Dense(torch.linspace(0, 10, 300, dtype=torch.float64).exp().diag())
    multiplied = []

    class Noted(vl.TorchLinearOperator):
        def _multiply(self, X: Tensor) -> Tensor:
            multiplied.append(X.shape[1])
            return A.apply(X)

        _multiply_adjoint = _multiply

    with watched(Noted(A.shape, torch.float64), k=6) as counted:
        start = np.random.default_rng(0).standard_normal(300)
        found, _ = eigsh(counted, k=6, which="LA", v0=start)
        counted @ torch.ones(300, 5).double()
        counted.T @ torch.ones(300).double()
    last = capfd.readouterr().err.split("\r")[-1]
    assert int(last.split("eigh(k=6): ")[1].split(" products")[0]) == sum(multiplied)
    torch.testing.assert_close(
        torch.from_numpy(found), A.eigvalsh()[-6:], rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("route", ["ARPACK on K", "ARPACK on G"])
@pytest.mark.parametrize("progress", [False, True])
def test_interrupted_eigh(route: str, progress: bool) -> None:
    """Ctrl-C inside of a product: all is as before, and can be used again."""
    net = guest_net()
    left = {"calls": 10**9}

    def hook(*_: Any) -> None:
        left["calls"] -= 1
        if left["calls"] <= 0:
            raise KeyboardInterrupt

    net[2].register_forward_pre_hook(hook)
    _, loss, (X, y) = toy(30)
    loader = DataLoader(TensorDataset(X, y), 10)
    risk = vl.EmpiricalRisk(net, loss, loader, memory=0, progress=progress)
    expected = vl.GGN(risk).eigvalsh()[-2:]
    before = Snapshot(net, (X, y))
    for calls in (2, 20):
        left["calls"] = calls
        with pytest.raises(KeyboardInterrupt):
            vl.GGN(risk).eigh(k=2, route=route)
        before.check()
    left["calls"] = 10**9
    got = vl.GGN(risk).eigh(k=2, route=route).eigenvalues
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    before.check()


# Saving -------------------------------------------------------------------------------


RESULTS: dict[str, Callable[[vl.EmpiricalRisk], Any]] = {
    "pairs": lambda r: vl.GGN(r).eigh(k=3),
    "all pairs": lambda r: vl.GGN(r).eigh(),
    "small pairs": lambda r: vl.GGN(r).eigh(select=lambda evals: [40, 41]),
    "scaled": lambda r: (2 * vl.GGN(r)).eigh(k=3),
    "fisher": lambda r: vl.EmpiricalFisher(r).eigh(k=3),
    "drawn": lambda r: vl.GGN(r, mc_samples=1).eigh(k=3),
    "damped": lambda r: (vl.GGN(r) + 0.1 * vl.Identity(r.num_params)).eigh(k=3),
}


@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("name", RESULTS)
def test_loaded_pairs_work_as_before(name: str, formed: bool, tmp_path: Any) -> None:
    net, risk = streamed()
    pairs = RESULTS[name](risk)
    if formed:
        pairs.eigenvectors  # noqa: B018
    vl.save(pairs, tmp_path / "pairs.pt", risk)
    torch.load(tmp_path / "pairs.pt", weights_only=True)
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.pt"]
    for again in (streamed()[1], in_memory(net)):  # cut into batches in two ways
        loaded = vl.load(tmp_path / "pairs.pt", again)
        assert type(loaded) is type(pairs) and loaded.route == pairs.route
        assert torch.equal(loaded.eigenvalues, pairs.eigenvalues)
        torch.testing.assert_close(
            vl.damped_newton_step(again, loaded, 0.1),
            vl.damped_newton_step(risk, pairs, 0.1),
            rtol=1e-9,
            atol=1e-12,
        )
        for got, expected in zip(
            (*vl.directional_derivatives(again, loaded), loaded.eigenvectors),
            (*vl.directional_derivatives(risk, pairs), pairs.eigenvectors),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_pairs_of_arpack_are_loaded(tmp_path: Any) -> None:
    for side in "KG":
        _, risk = streamed()
        pairs = vl.GGN(risk).eigh(k=3, route=f"ARPACK on {side}")
        vl.save(pairs, tmp_path / side, risk)
        loaded = vl.load(tmp_path / side, risk)
        assert loaded.route == f"ARPACK on {side}"
        assert isinstance(loaded, GramEigenpairs) == (side == "K")
        torch.testing.assert_close(loaded.eigenvectors, pairs.eigenvectors)


@pytest.mark.parametrize(
    "build",
    [
        vl.GGN,
        vl.EmpiricalFisher,
        lambda r: 3 * vl.GGN(r),
        lambda r: 3 * vl.EmpiricalFisher(r),
        lambda r: vl.GGN(r, mc_samples=2),
        lambda r: (lambda V: V.T @ V)(vl.GGNFactor(r)),
        lambda r: (lambda J: J @ J.T)(vl.Jacobian(r)),
    ],
)
@pytest.mark.parametrize("captured", [False, True])
def test_loaded_operators_know_their_gram_matrix(
    build: Any, captured: bool, tmp_path: Any
) -> None:
    net, risk = streamed()
    op = build(risk)
    evals = op.eigvalsh() if captured else None
    vl.save(op, tmp_path / "op.pt", risk)
    again = streamed()[1]
    loaded = vl.load(tmp_path / "op.pt", again)
    x = random_vector(op.shape[0])
    assert type(loaded) is type(op)
    torch.testing.assert_close(loaded @ x, op @ x, rtol=1e-10, atol=1e-12)
    if evals is not None:
        net[0].register_forward_hook(lambda *_: pytest.fail("computed again"))
        for module in again.model.module.modules():  # type: ignore[union-attr]
            module.register_forward_pre_hook(lambda *_: pytest.fail("again"))
        assert torch.equal(loaded.eigvalsh(), evals)


def others() -> dict[str, Callable[[], vl.EmpiricalRisk]]:
    """Risks that are not that of ``guest_net`` and ``toy``."""
    _, loss, (X, y) = toy()

    def changed(change: Callable[[nn.Module], Any]) -> vl.EmpiricalRisk:
        torch.manual_seed(0)
        net = guest_net()
        with torch.no_grad():
            change(net)
        return vl.EmpiricalRisk(net, loss, (X, y))

    def given(*arguments: Any) -> vl.EmpiricalRisk:
        torch.manual_seed(0)
        return vl.EmpiricalRisk(guest_net(), *arguments)

    def last_bit(net: nn.Module) -> None:
        net[4].weight[0, 0] = torch.nextafter(
            net[4].weight[0, 0], torch.ones((), dtype=torch.float64)
        )

    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    return {
        "parameters": lambda: changed(last_bit),
        "buffers": lambda: changed(lambda net: net[1].running_mean.add_(1e-3)),
        "frozen": lambda: changed(lambda net: net[0].weight.mul_(1.001)),
        "outputs": lambda: changed(lambda net: net.__setitem__(2, nn.ReLU())),
        "samples": lambda: given(loss, (X, (y + 1) % 3)),
        "samples, order": lambda: given(loss, (X.flip(0), y.flip(0))),
        "samples, fewer": lambda: given(loss, (X[:-1], y[:-1])),
        "value": lambda: given(nn.CrossEntropyLoss(weight=weight), (X, y)),
        "loss": lambda: given(nn.CrossEntropyLoss(reduction="sum"), (X, y)),
    }


@pytest.mark.parametrize("kind", list(others()))
def test_another_risk_is_refused(kind: str, tmp_path: Any) -> None:
    _, loss, data = toy()
    torch.manual_seed(0)
    risk = vl.EmpiricalRisk(guest_net(), loss, data)
    vl.save(vl.GGN(risk), tmp_path / "G", risk)
    vl.load(tmp_path / "G", risk)
    what = kind.split(",")[0]
    with pytest.raises(
        ValueError, match=f"^risk: .* saved for one with .*other .*{what}"
    ):
        vl.load(tmp_path / "G", others()[kind]())


def test_what_cannot_be_saved_or_loaded(tmp_path: Any) -> None:
    _, risk = streamed()
    other = streamed()[1]
    path = tmp_path / "file"
    V, U = vl.GGNFactor(risk), vl.PerSampleGradients(risk)
    pairs = vl.Dense(torch.eye(3)).eigh()
    for result, error in (
        (torch.ones(3), TypeError),
        (V, TypeError),
        (U.T @ V, TypeError),
        (vl.GGN(risk).block_diagonal("parameter").blocks[0], TypeError),
        (vl.GGN(other), ValueError),
        (pairs, ValueError),
    ):
        with pytest.raises(error, match=r"^(result|risk): "):
            vl.save(result, path, risk)
    assert not list(tmp_path.iterdir())
    for function in (lambda r: vl.save(vl.GGN(risk), path, r), vl.load.__get__(path)):
        with pytest.raises(TypeError, match=r"^risk: an EmpiricalRisk, got Linear"):
            function(nn.Linear(2, 2))
    path.write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"^path: .*no file that vl.save wrote"):
        vl.load(path, risk)
    torch.save({"format": "another"}, path)
    with pytest.raises(ValueError, match=r"^path: "):
        vl.load(path, risk)
    with pytest.raises(FileNotFoundError):
        vl.load(tmp_path / "none", risk)


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
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
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


def test_pieces_are_not_smaller_than_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory, data are not passed over once for each sample."""
    monkeypatch.setattr("vivit_linop.net.blocks._LEAST_BYTES", 2**20)
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
