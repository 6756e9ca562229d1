"""What does not fit says what would."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import vivit_linop as vl
from tests.cases import Lambda, mlp
from tests.data_cases import Drawn
from tests.toys import random_vector, toy
from vivit_linop import devices
from vivit_linop.curvature import hessian_products
from vivit_linop.net import certified, linearization
from vivit_linop.net.certified import find_structure

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]

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
@pytest.mark.parametrize("error", ERRORS)
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
        risk = vl.EmpiricalRisk(net, loss, data, memory=0)
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


class Crowded(nn.Module):
    """A weight without a structure; some error on batches of one sample."""

    error: Exception | None = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.w = nn.Parameter(torch.rand(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and Crowded.error is not None:
            raise Crowded.error
        rows = [(row.sum() > 0) * (self.w @ row).sin() for row in self.a(x)]
        return self.b(torch.stack(rows).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("error", [*ERRORS, RuntimeError("two samples at least")])
def test_out_of_memory_is_no_matter_of_the_batch(
    error: Exception, memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample by sample is not given up for what there was no room for once."""
    _, loss, (X, y) = toy()
    wanted = vl.GGN(Crowded().double(), loss, (X, y)).factor.to_dense()
    on_batches = []
    way = certified.on_the_batch
    count = lambda *given: on_batches.append(1) or way(*given)  # noqa: E731
    monkeypatch.setattr(certified, "on_the_batch", count)
    risk = vl.EmpiricalRisk(Crowded().double(), loss, (X, y), memory=memory)
    V = vl.GGNFactor(risk)
    find_structure(risk).singly |= {"w"}
    with monkeypatch.context() as context:
        context.setattr(Crowded, "error", error)
        if error in ERRORS:
            with pytest.raises(MemoryError):
                V.to_dense()
        else:
            torch.testing.assert_close(V.to_dense(), wanted)
    torch.testing.assert_close(V.to_dense(), wanted)
    assert bool(on_batches) == (error not in ERRORS)


@pytest.mark.parametrize("error", ERRORS)
def test_second_derivatives_without_memory_are_not_missing(error: Exception) -> None:
    class Heavy(torch.autograd.Function):
        """x², whose gradient takes too much where it is differentiated."""

        room = False

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not Heavy.room:
                raise error
            return 2.0 * ctx.saved_tensors[0] * g  # type: ignore[no-any-return]

    _, loss, data = toy()
    net = Lambda(lambda m, x: Heavy.apply(m.layer(x)), layer=nn.Linear(4, 3)).double()
    same = Lambda(lambda m, x: m.layer(x).square(), layer=net.layer)
    H = vl.Hessian(net, loss, data)
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        H.to_dense()
    assert "second derivative" not in str(raised.value)
    Heavy.room = True
    wanted = vl.Hessian(same, loss, data).to_dense()
    torch.testing.assert_close(H.to_dense(), wanted)


def test_other_errors_are_not_explained_away() -> None:
    _, loss, data = toy()
    broken = {"on": False}

    def forward(m: Any, x: Tensor) -> Tensor:
        if broken["on"]:
            raise RuntimeError("shapes do not match")
        return m.layer(x)

    net = Lambda(forward, layer=nn.Linear(4, 3)).double()
    risk = vl.EmpiricalRisk(net, loss, data, memory=0)
    broken["on"] = True
    with pytest.raises(RuntimeError, match="shapes do not match"):
        risk.gradient()


def test_pieces_are_not_smaller_than_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memory, data are not passed over once for each sample."""
    monkeypatch.setattr("vivit_linop.net.column_passes.LEAST_BYTES", 2**20)
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


# Vectors together ---------------------------------------------------------------------

CUDA = torch.device("cuda")


def free(
    monkeypatch: pytest.MonkeyPatch, free: int, held: int = 0, used: int = 0
) -> None:
    """A GPU with so much memory: free, held by torch, and used of that."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: held)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: used)


def test_what_torch_holds_without_using_it_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free(monkeypatch, 4000)
    assert devices.columns_at_a_time(CUDA, 10) == 100
    free(monkeypatch, 0, held=5000, used=1000)
    assert devices.columns_at_a_time(CUDA, 10) == 100
    free(monkeypatch, 0, held=1000, used=1000)
    assert devices.columns_at_a_time(CUDA, 10) == 1


class Device:
    """A product that runs out of memory beyond some rows; how many it was given."""

    def __init__(self, fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fits, self.free, self.given = fits, 100, list[int]()
        monkeypatch.setattr("vivit_linop.devices.free_memory", lambda _: self.free)

    def product(self, rows: Tensor) -> Tensor:
        count = len(rows) if rows.ndim == 2 else 1
        self.given.append(count)
        if count > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 2 * rows


def test_fewer_vectors_are_taken_where_memory_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    X = torch.rand(5, 12)
    device, parts = Device(3, monkeypatch), linearization.Chunks(torch.device("cpu"))
    parts.trusted = True
    assert torch.equal(parts.apply(device.product, X, 5, 12, "twice"), 2 * X)
    assert device.given == [12, 6, 3, 3, 3, 3]
    device.given.clear()
    # Not tried again while no more is free ...
    assert torch.equal(parts.apply(device.product, X, 5, 12, "twice"), 2 * X)
    assert device.given == [3, 3, 3, 3]
    device.given.clear()
    # ... and all together as soon as there is.
    device.fits, device.free = 12, 200
    assert torch.equal(parts.apply(device.product, X, 5, 12, "twice"), 2 * X)
    assert device.given == [12]


def test_a_single_vector_that_does_not_fit_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, parts = Device(0, monkeypatch), linearization.Chunks(torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        parts.apply(device.product, torch.rand(5, 4), 5, 4, "twice")
    device.fits = 4
    X = torch.rand(5, 4)
    assert torch.equal(parts.apply(device.product, X, 5, 4, "twice"), 2 * X)


def test_the_check_of_vectors_together_may_run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which says nothing about torch's rules."""
    device, parts = Device(2, monkeypatch), linearization.Chunks(torch.device("cpu"))
    X = torch.rand(5, 4)
    assert torch.equal(parts.apply(device.product, X, 5, 4, "twice"), 2 * X)
    assert device.given == [4, 2, 1, 2]  # the third is the check


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["GPU", "CPU"],
)
def test_products_with_a_hessian_together_run_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    net, loss, data = toy()
    H = vl.Hessian(vl.EmpiricalRisk(net, loss, data))
    D = H.shape[0]
    expected, fits, given, available = (
        H @ torch.eye(D).double(),
        [3],
        list[int](),
        [100],
    )
    monkeypatch.setattr("vivit_linop.devices.free_memory", lambda _: available[0])
    together = hessian_products.batched_gradients

    def limited(outputs: Any, inputs: Any, vectors: Any) -> Any:
        given.append(len(vectors[0]))
        if len(vectors[0]) > fits[0]:
            raise error
        return together(outputs, inputs, vectors)

    monkeypatch.setattr(hessian_products, "batched_gradients", limited)
    found = H @ torch.eye(D).double()
    torch.testing.assert_close(found, expected)
    assert max(given) > 3 and any(1 < count <= 3 for count in given)
    given.clear()
    torch.testing.assert_close(H @ torch.eye(D).double(), expected)
    assert given and max(given) <= 3
    fits[0], available[0] = 99, 1000
    torch.testing.assert_close(H @ torch.eye(D).double(), expected)
    assert max(given) > 3


# Passes over many batches -------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda r: None,
        lambda r: r.gradient(),
        lambda r: vl.GGN(r) @ random_vector(r.num_params),
        lambda r: vl.PerSampleGradients(r).squared_norms(),
    ],
)
def test_a_pass_has_the_graph_of_one_batch_at_a_time(use: Any) -> None:
    held: list[weakref.ref[Tensor]] = []
    others: list[int] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        if len(x) == 16:
            others.append(sum(ref() is not None for ref in held))
        h = m.layer(x)
        if len(x) == 16:
            held.append(weakref.ref(h))
        return h * h  # the graph keeps h

    net = Lambda(forward, layer=nn.Linear(4, 3)).double()
    data = [
        (torch.rand(16, 4, dtype=torch.float64), torch.randint(3, (16,)))
        for _ in range(5)
    ]
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data, memory=0)
    use(risk)
    assert len(others) >= 5
    assert max(others) == 0


@pytest.mark.parametrize(("batches", "times"), [(7, 0), (8, 1), (17, 2)])
def test_memory_goes_back_to_the_system_in_long_passes(
    batches: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, loss, (X, y) = toy()
    data = [(X, y)] * batches
    risk = vl.EmpiricalRisk(net, loss, data, memory=0)
    returned: list[int] = []
    monkeypatch.setattr(devices, "_trim", returned.append)
    gradient = risk.gradient()
    assert returned == [0] * (times if risk.device.type == "cpu" else 0)
    monkeypatch.setattr(devices, "_trim", None)  # another C library
    assert torch.equal(risk.gradient(), gradient)


@pytest.mark.parametrize("memory", [1e3, 1e6, float("inf"), torch.tensor(5e4)])
def test_memory_is_any_number_of_bytes(memory: Any) -> None:
    """As 2e9 is written, and infinity for as much as there is."""
    net, loss, data = toy()
    risk = vl.EmpiricalRisk(net, loss, data, memory=memory)
    truth = vl.EmpiricalRisk(net, loss, data, memory=int(min(float(memory), 2**40)))
    for quantity in (
        lambda r: vl.GGN(r).eigvalsh(),
        lambda r: vl.GGN(r).diagonal(),
        lambda r: vl.PerSampleGradients(r).squared_norms(),
        lambda r: vl.PerSampleGradients(r).gram.to_dense(),
        lambda r: vl.Hessian(r).diagonal(),
        lambda r: vl.KFAC(r, variant="exact").trace(),
    ):
        torch.testing.assert_close(quantity(risk), quantity(truth))
