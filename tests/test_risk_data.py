"""The forms that data come in; data and models that change are right or refused."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests import sample_truth
from tests.toys import Noisy, guest_net, random_vector, toy
from vivit_linop.risk import passes

OPERATORS = [
    vl.Jacobian,
    vl.LossHessian,
    vl.GGN,
    vl.GGNFactor,
    vl.PerSampleGradients,
    vl.EmpiricalFisher,
    vl.Hessian,
]


QUANTITIES: dict[str, Callable[[vl.EmpiricalRisk], Tensor]] = {
    "product": lambda r: vl.GGN(r) @ random_vector(r.num_params),
    "spectrum": lambda r: vl.GGN(r).eigvalsh(),
    "diagonal": lambda r: vl.GGN(r).diagonal(),
    "dense": lambda r: vl.GGN(r).to_dense(),
    "fisher": lambda r: vl.EmpiricalFisher(r).eigvalsh(),
    "blocks": lambda r: vl.GGN(r).block_diagonal("parameter").eigvalsh(),
    "newton": lambda r: vl.damped_newton_step(r, vl.GGN(r).eigh(k=3), 0.1),
    "gradient": lambda r: r.gradient(),
    "hessian": lambda r: vl.Hessian(r) @ random_vector(r.num_params),
    "subset": lambda r: r.subset([2, 0]).gradient(),
}


def right_or_refused(
    quantity: str, risk: vl.EmpiricalRisk, expected: vl.EmpiricalRisk
) -> None:
    """What has become impossible is an error, never another number."""
    try:
        got = QUANTITIES[quantity](risk)
    except ValueError as error:
        assert "data" in str(error) or "model" in str(error)
        return
    rtol = 1e-9 if got.dtype == torch.float64 else 1e-4
    wanted = QUANTITIES[quantity](expected)
    assert (got - wanted).norm() <= rtol * wanted.norm()


# Forms of data ------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_constructors_take_a_model_a_loss_and_data(operator: Any) -> None:
    net, loss, data = toy()
    params = list(net[0].parameters())
    risk = vl.EmpiricalRisk(net, loss, data, params)
    x = random_vector(operator(risk).shape[1])
    expected = operator(risk) @ x
    assert torch.equal(operator(net, loss, data, params) @ x, expected)
    assert torch.equal(operator(net, loss, data, params=params) @ x, expected)
    assert torch.equal(operator(net, loss, [data], params) @ x, expected)
    assert operator(net, loss, data).shape != operator(risk).shape or (
        operator is vl.LossHessian
    )


def test_forms_of_params() -> None:
    net, loss, data = toy()
    expected = vl.EmpiricalRisk(net, loss, data, [net[2].weight, net[0].bias])
    for params in (
        iter([net[2].weight, net[0].bias]),
        (net[2].weight, net[0].bias),
        {"2.weight": net[2].weight, "0.bias": net[0].bias},
        {"2.weight": net[2].weight.detach(), "0.bias": net[0].bias.detach().clone()},
    ):
        risk = vl.EmpiricalRisk(net, loss, data, params)
        assert list(risk.params) == ["2.weight", "0.bias"]
        assert torch.equal(risk.gradient(), expected.gradient())


def test_batches_as_lists() -> None:
    # As a DataLoader gives them; also a list of two batches is no pair.
    net, loss, (X, y) = toy()
    expected = vl.EmpiricalRisk(net, loss, (X, y)).gradient()
    for data in (
        [X, y],
        [[X, y]],
        ([X[:2], y[:2]], [X[2:], y[2:]]),
        [(X[:3], y[:3]), (X[3:], y[3:])],
    ):
        got = vl.EmpiricalRisk(net, loss, data).gradient()
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("memory", [None, 0])
def test_data_loader_shuffled_by_the_global_generator(memory: int | None) -> None:
    """Unchecked, every pass gives the batches of the first, whatever the user draws."""
    net, loss, (X, y) = toy(7)
    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(X, y), batch_size=3, shuffle=True)
    risk = vl.EmpiricalRisk(net, loss, loader, memory=memory, check_data=False)
    straight = vl.EmpiricalRisk(net, loss, (X, y))
    x = random_vector(risk.num_params)
    for seed in range(3):
        torch.manual_seed(seed)
        G, F_ = vl.GGN(risk), vl.EmpiricalFisher(risk)
        torch.testing.assert_close(G @ x, vl.GGN(straight) @ x, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            G.eigvalsh(), vl.GGN(straight).eigvalsh(), rtol=1e-10, atol=1e-14
        )
        torch.testing.assert_close(
            F_ @ x, vl.EmpiricalFisher(straight) @ x, rtol=1e-12, atol=1e-14
        )
        gram = (vl.PerSampleGradients(risk).T @ G.factor).to_dense()
        U, V = vl.PerSampleGradients(risk).to_dense(), G.factor.to_dense()
        torch.testing.assert_close(gram, U.T @ V, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(
            risk.gradient(), straight.gradient(), atol=1e-14, rtol=0
        )


def _new_structure(net: nn.Sequential, kind: str) -> None:
    if kind == "activation":
        net[2] = nn.ReLU()
    elif kind == "hook":
        net[2].register_forward_hook(lambda m, args, output: 2.0 * output)
    elif kind == "setting":
        net[1].eps = 1.0
    else:
        net.forward = lambda x: net[0](x)[:, :3]


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("kind", ["activation", "hook", "setting", "forward"])
def test_model_that_becomes_another_function(kind: str, quantity: str) -> None:
    _, loss, data = toy()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = guest_net()
    expected = vl.EmpiricalRisk(copy.deepcopy(net), loss, data)
    risk = vl.EmpiricalRisk(net, loss, data)
    _new_structure(net, kind)
    right_or_refused(quantity, risk, expected)


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_data_loader_shuffled_by_its_own_generator(
    quantity: str, memory: int | None
) -> None:
    """Its passes differ, unlike those with the global generator."""
    net, loss, (X, y) = toy(7)
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(X, y), batch_size=3, shuffle=True, generator=own)
    own.manual_seed(0)
    batches = [(inputs, labels) for inputs, labels in loader]
    own.manual_seed(0)
    risk = vl.EmpiricalRisk(net, loss, loader, memory=memory, check_data=False)
    right_or_refused(quantity, risk, vl.EmpiricalRisk(net, loss, batches))


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("source", ["torch", "numpy"])
def test_random_augmentations(source: str, quantity: str) -> None:
    net, loss, (X, y) = toy()
    loader = DataLoader(Noisy(X, y, source), batch_size=4)
    state = np.random.get_state()
    try:
        np.random.seed(0)
        torch.manual_seed(0)
        risk = vl.EmpiricalRisk(net, loss, loader, check_data=False)
        np.random.seed(0)
        torch.manual_seed(0)
        batches = [(inputs, labels) for inputs, labels in loader]
        expected = vl.EmpiricalRisk(net, loss, batches)
        right_or_refused(quantity, risk, expected)
    finally:
        np.random.set_state(state)


@pytest.mark.parametrize("quantity", [vl.GGN, vl.EmpiricalFisher, vl.Hessian])
def test_targets_changed_in_place(quantity: Any) -> None:
    # The Hessian of a cross-entropy does not depend on the label, unless classes have
    # weights; the gradient does.
    net, _, (X, y) = toy()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    data = (X, y.clone())
    changed, still = (vl.EmpiricalRisk(net, loss, d) for d in (data, (X, y)))
    data[1].copy_((y + 1) % 3)
    x = random_vector(still.num_params)
    try:
        got = quantity(changed) @ x
    except ValueError as error:
        assert "data" in str(error)
        return
    torch.testing.assert_close(got, quantity(still) @ x, rtol=1e-9, atol=1e-12)


class Grows:
    """A loader that gives a batch more, or less, from its third pass on."""

    def __init__(self, first: int, later: int) -> None:
        self.counts, self.passes = (first, first, later), 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = self.counts[min(self.passes, 2)]
        self.passes += 1
        X = torch.arange(24.0).reshape(8, 3).sin()
        yield from [(X[i : i + 2], X[i : i + 2, :1]) for i in range(0, 2 * count, 2)]


@pytest.mark.parametrize(("first", "later"), [(3, 4), (3, 2), (1, 4)])
def test_another_number_of_batches(first: int, later: int) -> None:
    """Found in whatever pass it is, beside batches that have stayed."""
    for use in (
        lambda risk: risk.gradient(),
        lambda risk: vl.GGN(risk).gram.to_dense(),
        lambda risk: vl.GGN(risk).diagonal(),
        lambda risk: risk.subset([0, 1]),
        lambda risk: risk.at(),
        lambda risk: vl.Hessian(risk) @ torch.ones(4),
    ):
        net = nn.Linear(3, 1)
        risk = vl.EmpiricalRisk(net, nn.MSELoss(), Grows(first, later), memory=0)
        with pytest.raises(ValueError, match=r"^data: there are \d+ (or more )?batch"):
            use(risk)


class Stream(torch.utils.data.IterableDataset[Any]):
    """Gives one sample again and again; says how many there are, if anything."""

    def __init__(self, number: int, length: int | None = None) -> None:
        self.number, self.given = number, length

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.number):
            yield torch.ones(4).double(), torch.tensor(1)

    def __len__(self) -> int:
        if self.given is None:
            raise TypeError("no length")
        return self.given


@pytest.mark.parametrize("check_data", [True, False])
@pytest.mark.parametrize("as_loader", [True, False])
def test_data_that_may_never_end(
    as_loader: bool, check_data: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches without end are waited for, with a word."""
    monkeypatch.setattr(passes, "_ENDLESS", 5)
    net, loss, _ = toy()

    def build(stream: Stream) -> vl.EmpiricalRisk:
        loader: Any = DataLoader(stream, batch_size=2)
        data = loader if as_loader else Batches(loader)
        return vl.EmpiricalRisk(net, loss, data, check_data=check_data)

    class Batches:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Iterator[Any]:
            return iter(self.loader)

    with pytest.warns(UserWarning, match=r"data: .* has given 5 batches.*islice"):
        risk = build(Stream(16))
    assert risk.num_samples == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(Stream(8))
        vl.GGN(risk).trace()
        if as_loader:
            build(Stream(16, 16))


def test_two_batches_in_a_tuple() -> None:
    """A tuple of two is a pair; an error says that a list is meant."""
    net, loss, (X, y) = toy()
    batches = ((X[:3], y[:3]), (X[3:6], y[3:6]))
    with pytest.raises(TypeError, match=r"data: .*\(a tensor.*a list holds batches"):
        vl.EmpiricalRisk(net, loss, batches)
    with pytest.raises(TypeError, match=r"data: .*a list holds batches"):
        vl.EmpiricalRisk(net, loss, batches, predict=lambda net, X: net(X[0]))
    listed = vl.EmpiricalRisk(net, loss, [*batches])
    torch.testing.assert_close(listed.value(), loss(net(X[:6]), y[:6]).detach())


@pytest.mark.parametrize("writes", ["classes", "numbers", "numbers again"])
def test_losses_that_write_into_targets(writes: str) -> None:
    """The user's stay as they are."""
    net, _, (X, y) = toy()
    classes = (y % 3).clone()
    classes[0] = 9
    numbers = torch.linspace(-1.0, 1.0, 3 * len(y)).double().reshape(-1, 3)

    def by_classes(f: Tensor, y: Tensor) -> Tensor:
        y[y == 9] = 2
        return nn.CrossEntropyLoss()(f, y)

    def by_numbers(f: Tensor, y: Tensor) -> Tensor:
        return nn.MSELoss()(
            f, y.clamp_(-0.5, 0.5) if writes == "numbers" else y.mul_(2)
        )

    target, loss = (
        (classes, by_classes) if writes == "classes" else (numbers, by_numbers)
    )
    before = target.clone()
    risk = vl.EmpiricalRisk(net, loss, (X, target), reduction="mean")
    value = loss(net(X), target.clone())
    slopes = torch.autograd.grad(value, list(net.parameters()))
    for _ in range(2):
        torch.testing.assert_close(risk.gradient(), risk.flatten(slopes))
    assert torch.equal(target, before)


class OneBuffer:
    """Gives all batches in the same memory, as some loaders do."""

    def __init__(self, batches: list[Any], of_numpy: bool) -> None:
        self.batches = batches
        self.buffer = torch.empty_like(batches[0][0])
        self.array = np.empty(self.buffer.shape) if of_numpy else None

    def __iter__(self) -> Iterator[Any]:
        for X, y in self.batches:
            if self.array is not None:
                self.array[:] = X.cpu().numpy()
                yield torch.from_numpy(self.array).to(X.device), y
            else:
                yield self.buffer.copy_(X), y


@pytest.mark.parametrize("of_numpy", [True, False])
def test_batches_in_the_same_memory(of_numpy: bool) -> None:
    net, loss, (X, y) = toy()
    listed = [(X[:3], y[:3]), (X[3:6], y[3:6])]
    risk = vl.EmpiricalRisk(net, loss, OneBuffer(listed, of_numpy))
    samples = [
        (lambda m, x=x: m(x[None])[0], lambda f, y=y: loss(f[None], y[None]))
        for x, y in zip(X[:6], y[:6], strict=True)
    ]
    truth = sample_truth.truth_of(net, samples, 1.0 / 6.0)
    for _ in range(2):
        sample_truth.check(risk, truth)
