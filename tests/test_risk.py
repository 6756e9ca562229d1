"""The risk: its values, its parameters, and that it leaves the user's things alone."""

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import NAMES, Lambda, dense, mlp, problem
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import vivit_linop as vl

OPERATORS = [
    vl.Jacobian,
    vl.LossHessian,
    vl.GGN,
    vl.GGNFactor,
    vl.PerSampleGradients,
    vl.EmpiricalFisher,
    vl.Hessian,
]


def toy(N: int = 6) -> tuple[nn.Sequential, nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (N,), generator=generator)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return mlp(4, 5, 3), nn.CrossEntropyLoss(), (X, y)


def random_vector(n: int, *columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, *columns, generator=generator, dtype=torch.float64)


def use_everything(risk: vl.EmpiricalRisk) -> list[Tensor]:
    """Results of all kinds of computations, for comparison."""
    x = random_vector(risk.num_params)
    G, U = vl.GGN(risk), vl.PerSampleGradients(risk)
    pairs = G.eigh(k=2)
    return [
        risk.value(),
        risk.gradient(),
        G @ x,
        vl.Jacobian(risk) @ x,
        vl.Hessian(risk) @ x,
        vl.EmpiricalFisher(risk) @ x,
        G.eigvalsh(),
        G.diagonal(),
        (U.T @ G.factor).to_dense(),
        (G + 0.1 * vl.Identity(len(x))).solve(x),
        vl.damped_newton_step(risk, pairs, 0.1),
        risk.subset(range(min(2, risk.num_samples))).gradient(),
        torch.cat([b.eigvalsh() for b in G.block_diagonal("parameter").blocks]),
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


# Values -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_gradient_and_sizes(name: str, dtype: torch.dtype) -> None:
    case, truth = problem(name, dtype), dense(name)
    arguments, keywords = case.arguments()
    risk = vl.EmpiricalRisk(*arguments, **keywords)
    assert (risk.num_params, risk.num_samples) == (truth.D, truth.N)
    assert risk.num_outputs == truth.C
    assert list(risk.params) == list(case.chosen())
    rtol = 1e-12 if dtype == torch.float64 else case.rtol32
    value, gradient = risk.value(), risk.gradient()
    assert value.shape == () and value.dtype == gradient.dtype == dtype
    assert abs(value.double() - truth.value) <= rtol * (1.0 + abs(truth.value))
    # Where gradients of samples cancel, their size is what rounding goes by.
    size = truth.r * truth.U.norm() * truth.N**0.5
    assert (gradient.double() - truth.gradient).norm() <= rtol * size
    assert not gradient.requires_grad and not value.requires_grad


@pytest.mark.parametrize(
    ("loss", "make_target"),
    [
        (nn.MSELoss(), lambda f: f.sin()),
        (nn.MSELoss(reduction="sum"), lambda f: f.sin()),
        (nn.CrossEntropyLoss(), lambda f: f.argmin(1)),
        (nn.CrossEntropyLoss(reduction="sum"), lambda f: f.argmin(1)),
        (nn.BCEWithLogitsLoss(), lambda f: (f > 0.1).double()),
        (nn.HuberLoss(), lambda f: f.sin()),
    ],
)
def test_per_sample_gradients_are_those_of_torch(loss: Any, make_target: Any) -> None:
    """∇ℓ_n is what torch gives for sample n alone."""
    net, _, (X, _) = toy()
    y = make_target(net(X).detach())
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    U = vl.PerSampleGradients(risk).to_dense()
    for n in range(len(X)):
        single = loss(net(X[n : n + 1]), y[n : n + 1])
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(single, list(net.parameters()))]
        )
        torch.testing.assert_close(U[:, n], gradient, rtol=1e-12, atol=1e-14)


def test_uneven_batches_are_one_mean() -> None:
    # Not the mean of the batches' means.
    net, loss, (X, y) = toy(7)
    whole = loss(net(X), y).detach()
    for sizes in ([3, 4], [6, 1], [1] * 7):
        batches = list(zip(X.split(sizes), y.split(sizes), strict=True))
        risk = vl.EmpiricalRisk(net, loss, batches)
        torch.testing.assert_close(risk.value(), whole, rtol=1e-13, atol=0.0)
        assert risk.batch_sizes == sizes


# Parameters as vectors ----------------------------------------------------------------


@pytest.mark.parametrize("columns", [(), (1,), (3,)])
@pytest.mark.parametrize(
    "name", ["mlp_ce_mean", "callable_model", "noncontiguous_parameters", "cnn"]
)
def test_flatten_and_unflatten(name: str, columns: tuple[int, ...]) -> None:
    case = problem(name)
    arguments, keywords = case.arguments()
    risk = vl.EmpiricalRisk(*arguments, **keywords)
    vector = random_vector(risk.num_params, *columns)
    tensors = risk.unflatten(vector)
    shapes = [(*columns, *p.shape) for p in case.chosen().values()]
    assert [tuple(t.shape) for t in tensors] == shapes
    assert torch.equal(risk.flatten(tensors), vector)
    named = dict(zip(reversed(risk.params), reversed(tensors), strict=True))
    assert torch.equal(risk.flatten(named), vector)
    # The order is that of the parameters, each row-major.
    flat = torch.cat([p.detach().reshape(-1) for p in case.chosen().values()])
    assert torch.equal(risk.flatten(risk.params), flat)
    assert torch.equal(risk.flatten(iter(risk.params.values())), flat)
    if columns:
        for k in range(*columns):
            single = risk.unflatten(vector[:, k])
            assert all(
                torch.equal(t[k], s) for t, s in zip(tensors, single, strict=True)
            )


def test_flatten_takes_none_for_zeros() -> None:
    risk = vl.EmpiricalRisk(*toy())
    gradients: list[Tensor | None] = [p.detach() for p in risk.params.values()]
    gradients[1] = None
    flat = risk.flatten(gradients)
    assert torch.equal(risk.unflatten(flat)[1], torch.zeros(5, dtype=torch.float64))
    assert torch.equal(risk.unflatten(flat)[2], gradients[2])


def test_gradient_is_that_of_torch() -> None:
    net, loss, data = toy()
    risk = vl.EmpiricalRisk(net, loss, data)
    loss(net(data[0]), data[1]).backward()
    expected = risk.flatten([p.grad for p in net.parameters()])
    torch.testing.assert_close(risk.gradient(), expected, rtol=1e-13, atol=1e-15)


# Subsets ------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[4, 0], [2], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize(
    "name", ["mlp_ce_mean", "mlp_mse_sum", "uneven_batches", "ce_everything", "poisson"]
)
def test_subset(name: str, indices: list[int]) -> None:
    case = problem(name)
    if name == "ce_everything":
        indices = [i for i in indices if i != 4] or [0]  # never all ignored
    if name == "poisson":
        indices = [i for i in indices if i < 5]
    arguments, keywords = case.arguments()
    whole = vl.EmpiricalRisk(*arguments, **keywords)
    part = whole.subset(indices)
    batches = case.batches()
    X = torch.cat([X for X, _ in batches])[indices]
    y = torch.cat([y for _, y in batches])[indices]
    model, loss, _, params = case.arguments()[0]
    expected = vl.EmpiricalRisk(model, loss, (X, y), params, **keywords)
    assert part.num_samples == len(indices)
    for got, want in zip(
        use_everything(part)[:11], use_everything(expected)[:11], strict=True
    ):
        # Bases of an eigenspace may differ, so the step is compared with k=2 distinct.
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    J, order = vl.Jacobian(whole).to_dense(), torch.tensor(indices)
    rows = J.reshape(whole.num_samples, -1, whole.num_params)[order].flatten(0, 1)
    torch.testing.assert_close(
        vl.Jacobian(part).to_dense(), rows, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array, range])
def test_subset_indices_of_all_kinds(kind: Any) -> None:
    risk = vl.EmpiricalRisk(*toy())
    indices = range(1, 3) if kind is range else kind([1, 2])
    expected = risk.subset([1, 2])
    assert torch.equal(risk.subset(indices).gradient(), expected.gradient())


def test_subset_of_subset_and_of_inputs_with_several_leaves() -> None:
    for name in ("mapping_input", "tuple_input"):
        arguments, keywords = problem(name).arguments()
        whole, truth = vl.EmpiricalRisk(*arguments, **keywords), dense(name)
        part = whole.subset([3, 1, 4]).subset([2, 0])  # samples 4 and 3
        U = vl.PerSampleGradients(part).to_dense()
        if truth.r == 1.0 or name == "mapping_input":
            torch.testing.assert_close(U, truth.U[:, [4, 3]], rtol=1e-12, atol=1e-14)
        J = truth.J.reshape(truth.N, truth.C, truth.D)[[4, 3]].flatten(0, 1)
        torch.testing.assert_close(
            vl.Jacobian(part).to_dense(), J, rtol=1e-12, atol=1e-14
        )


def test_subset_across_batches_with_a_leaf_without_samples() -> None:
    # Two samples come from a batch, and the shared leaf has two entries.
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(2, generator=generator).double()
    net = Lambda(lambda m, x, s: m.layer(x + s), layer=nn.Linear(2, 2)).double()
    batches = []
    for _ in range(2):
        X = torch.randn(4, 2, generator=generator).double()
        batches.append(((X, shift), torch.randint(2, (4,), generator=generator)))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), batches)
    part = risk.subset([0, 1, 6])
    rows = vl.Jacobian(risk).to_dense().reshape(8, 2, -1)[[0, 1, 6]].flatten(0, 1)
    torch.testing.assert_close(
        vl.Jacobian(part).to_dense(), rows, rtol=1e-12, atol=1e-14
    )
    gram = (vl.Jacobian(part) @ vl.Jacobian(part).T).to_dense()
    torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-12, atol=1e-14)


# Inputs whose leaves look as if they counted samples ----------------------------------


def _shared_leaf(N: int) -> tuple[nn.Module, Any, Tensor]:
    """A leaf without sample axis that is as long as there are samples."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(N, N, generator=generator).double()
    shift = torch.randn(N, generator=generator).double()
    net = Lambda(lambda m, x, s: m.layer(x + s), layer=nn.Linear(N, 2)).double()
    return net, (X, shift), torch.randint(2, (N,), generator=generator)


@pytest.mark.parametrize("memory", [None, 2 * 8 * 2 * 8 * 3])
def test_shared_leaf_as_long_as_a_batch_is_not_cut(memory: int | None) -> None:
    """It must be right, or refused: a shift [d] broadcasts also when it is cut."""
    net, (X, shift), y = _shared_leaf(4)

    def model(m: Any, x: Tensor) -> Tensor:
        return m.inner(x, shift)

    try:
        risk = vl.EmpiricalRisk(
            net, nn.CrossEntropyLoss(), ((X, shift), y), memory=memory
        )
        gram = (vl.Jacobian(risk) @ vl.Jacobian(risk).T).to_dense()
    except ValueError:
        return
    closed = vl.EmpiricalRisk(
        Lambda(model, inner=net).double(), nn.CrossEntropyLoss(), (X, y)
    )
    expected = vl.Jacobian(closed).to_dense()
    torch.testing.assert_close(gram, expected @ expected.T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("memory", [0, 500, 1000, None])
def test_shared_leaf_as_long_as_a_piece_of_a_batch(memory: int | None) -> None:
    # Gram matrices may be made of some samples at a time; shared leaves stay whole.
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3):
        X = torch.randn(5, length, generator=generator).double()
        shift = torch.randn(length, generator=generator).double()
        net = Lambda(lambda m, x, s: m.layer(x * s), layer=mlp(length, 3, 2)).double()
        data = ((X, shift), torch.randint(2, (5,), generator=generator))
        risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data, memory=memory)
        J = vl.Jacobian(risk)
        unit = torch.eye(risk.num_params, dtype=torch.float64)
        rows = J @ unit  # by products, which see whole batches
        gram = (J @ J.T).to_dense()
        torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(J.to_dense(), rows, rtol=1e-12, atol=1e-14)


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


class Counting(Dataset):
    """A dataset that counts how often it is read."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors, self.reads = tensors, 0

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.reads += 1
        return tuple(t[index] for t in self.tensors)


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


class Noisy(Dataset):
    """Random augmentations, of torch's generator or of numpy's."""

    def __init__(self, X: Tensor, y: Tensor, source: str) -> None:
        self.X, self.y, self.source = X, y, source

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = (
            torch.randn(4, dtype=torch.float64)
            if self.source == "torch"
            else torch.from_numpy(np.random.standard_normal(4))
        )
        return self.X[index] + noise, self.y[index]


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


# Guest behaviour ----------------------------------------------------------------------


class Snapshot:
    """What must be as it was: the model, the data and the generators."""

    def __init__(self, model: nn.Module, data: Any) -> None:
        self.model, self.data = model, data
        self.before = self.state()

    def state(self) -> dict[str, Any]:
        tensors = {
            **dict(self.model.named_parameters()),
            **dict(self.model.named_buffers()),
            **{f"data{i}": t for i, t in enumerate(self.data)},
        }
        return {
            "values": {n: t.detach().clone() for n, t in tensors.items()},
            "identity": {n: (id(t), t.data_ptr()) for n, t in tensors.items()},
            "version": {n: t._version for n, t in tensors.items()},
            "requires_grad": {n: t.requires_grad for n, t in tensors.items()},
            "grad": {
                n: (id(t.grad), copy.deepcopy(t.grad)) for n, t in tensors.items()
            },
            "modes": [m.training for m in self.model.modules()],
            "hooks": [
                [len(v) for k, v in sorted(vars(m).items()) if k.endswith("_hooks")]
                for m in self.model.modules()
            ],
            "tensor hooks": [
                len(p._backward_hooks or {}) for p in self.model.parameters()
            ],
            "torch": torch.random.get_rng_state(),
            "numpy": np.random.get_state(),
            "python": random.getstate(),
            "grad mode": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
            "sdp": (
                torch.backends.cuda.flash_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled(),
                torch.backends.cuda.math_sdp_enabled(),
            ),
            "default dtype": torch.get_default_dtype(),
            "threads": torch.get_num_threads(),
        }

    def check(self) -> None:
        after = self.state()
        for key, before in self.before.items():
            assert _equal(before, after[key]), key


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def guest_net() -> nn.Sequential:
    """Modes, buffers, hooks, gradients and frozen parameters, in a mixed state."""
    net = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
    ).double()
    net.eval()
    net[0].train()  # harmless, and to be kept
    net[0].weight.requires_grad_(False)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[4].weight.grad = torch.full_like(net[4].weight, 2.0)
    net[2].register_forward_hook(lambda m, args, output: None)
    return net


def test_guest() -> None:
    _, loss, data = toy()
    net = guest_net()
    called: list[str] = []
    net[4].bias.register_hook(lambda g: called.append("bias"))
    net[4].weight.register_post_accumulate_grad_hook(lambda p: called.append("weight"))
    before = Snapshot(net, data)
    risk = vl.EmpiricalRisk(net, loss, data)
    before.check()
    use_everything(risk)
    before.check()
    assert not called
    loader = DataLoader(TensorDataset(*data), batch_size=4, shuffle=True)
    before = Snapshot(net, data)
    use_everything(vl.EmpiricalRisk(net, loss, loader, memory=0, check_data=False))
    before.check()


def test_mc_samples_with_a_generator_leave_the_global_one() -> None:
    net, loss, data = toy()
    risk = vl.EmpiricalRisk(net, loss, data)
    before = Snapshot(net, data)
    G = vl.GGN(risk, mc_samples=3, generator=torch.Generator().manual_seed(0))
    G.eigvalsh()
    before.check()


class Stop(Exception):
    """Raised inside of a user's forward pass."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_guest_after_an_error_in_forward(error: type[BaseException]) -> None:
    """Raised at construction, and at every later call of the model in turn."""
    _, loss, data = toy()
    net = guest_net()
    calls = {"left": -1}

    def hook(module: nn.Module, args: Any) -> None:
        torch.rand(1)  # the generator has moved on when the error comes
        if calls["left"] == 0:
            raise error("stop")
        calls["left"] -= 1

    def quiet(module: nn.Module, args: Any) -> None:
        if calls["left"] == 0:
            raise error("stop")
        calls["left"] -= 1

    handle = net[2].register_forward_pre_hook(hook)
    before = Snapshot(net, data)
    calls["left"] = 0
    with pytest.raises(error):
        vl.EmpiricalRisk(net, loss, data)
    before.check()
    handle.remove()

    calls["left"] = -1
    net[2].register_forward_pre_hook(quiet)
    before = Snapshot(net, data)
    expected = use_everything(vl.EmpiricalRisk(net, loss, data))
    x = random_vector(vl.EmpiricalRisk(net, loss, data).num_params)
    uses: list[Callable[[vl.EmpiricalRisk], Any]] = [
        lambda r: r.gradient(),
        lambda r: vl.GGN(r) @ x,
        lambda r: vl.GGN(r).eigvalsh(),
        lambda r: vl.Hessian(r) @ x,
        lambda r: r.subset([0, 2]),
    ]
    for use in uses:
        for delay in range(2):
            calls["left"] = -1
            risk = vl.EmpiricalRisk(net, loss, data)
            calls["left"] = delay
            try:
                use(risk)
            except error:
                pass
            calls["left"] = -1
            before.check()
            # An interrupted risk is as good as new.
            got = [risk.gradient(), vl.GGN(risk) @ x, vl.GGN(risk).eigvalsh()]
            for result, index in zip(got, (1, 2, 6), strict=True):
                torch.testing.assert_close(
                    result, expected[index], rtol=1e-9, atol=1e-12
                )


def test_interrupt_is_not_swallowed() -> None:
    """Where errors of a tracer mean another way, an interrupt means stop."""
    net, loss, data = toy()
    raised = {"on": False}

    def hook(module: nn.Module, args: Any) -> None:
        if raised["on"]:
            raise KeyboardInterrupt

    net[1].register_forward_pre_hook(hook)
    risk = vl.EmpiricalRisk(net, loss, data)
    x = random_vector(risk.num_params)
    raised["on"] = True
    for use in (
        risk.gradient,
        lambda: vl.GGN(risk) @ x,
        lambda: vl.GGN(risk).eigvalsh(),
        lambda: vl.Hessian(risk) @ x,
    ):
        with pytest.raises(KeyboardInterrupt):
            use()


def test_errors_of_the_model_come_through() -> None:
    """A model that fails at a later pass fails with its own error."""
    net, loss, data = toy()
    broken = {"on": False}

    def hook(module: nn.Module, args: Any) -> None:
        if broken["on"]:
            raise Stop("of the user")

    net[1].register_forward_pre_hook(hook)
    risk = vl.EmpiricalRisk(net, loss, data)
    broken["on"] = True
    x = random_vector(risk.num_params)
    for use in (
        risk.gradient,
        lambda: vl.GGN(risk) @ x,
        lambda: vl.GGN(risk).eigvalsh(),
        lambda: vl.Hessian(risk) @ x,
    ):
        with pytest.raises(Stop, match="of the user"):
            use()


# Operators are of the parameters at construction ------------------------------------


def _updates(net: nn.Sequential) -> Iterator[tuple[str, Callable[[], None]]]:
    def step() -> None:
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1.0)

    def data() -> None:
        for p in net.parameters():
            p.data.mul_(2.0)

    def replaced() -> None:
        net[0].weight = nn.Parameter(torch.zeros_like(net[0].weight))

    def buffers() -> None:
        net[1].running_mean.add_(1.0)
        net[1].running_var = 3.0 * net[1].running_var

    def frozen() -> None:
        for p in net.parameters():
            p.requires_grad_(False)

    def modes() -> None:
        net.train()

    yield from {
        "step": step,
        "data": data,
        "replaced": replaced,
        "buffers": buffers,
        "frozen": frozen,
        "modes": modes,
    }.items()


@pytest.mark.parametrize("chosen", ["all", "last layer"])
@pytest.mark.parametrize("kind", [kind for kind, _ in _updates(guest_net())])
def test_operators_stay_when_the_model_changes(kind: str, chosen: str) -> None:
    """Also parameters that are not chosen, and buffers, are those at construction."""
    _, loss, data = toy()
    net = guest_net()
    net[0].weight.requires_grad_(True)
    params = None if chosen == "all" else list(net[4].parameters())
    expected = use_everything(
        vl.EmpiricalRisk(copy.deepcopy(net), loss, data, _same(net, params))
    )
    risk = vl.EmpiricalRisk(net, loss, data, params)
    dict(_updates(net))[kind]()
    for number, (got, want) in enumerate(
        zip(use_everything(risk), expected, strict=True)
    ):
        torch.testing.assert_close(
            got, want, rtol=1e-9, atol=1e-12, msg=lambda m, n=number: f"{n}: {m}"
        )


def _same(net: nn.Module, params: Any) -> Any:
    if params is None:
        return None
    names = {id(p): n for n, p in net.named_parameters()}
    return {names[id(p)]: p.detach().clone() for p in params}


def test_operators_stay_when_a_dict_of_parameters_changes() -> None:
    values = {"w": random_vector(4, 3)}

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["w"]).tanh()

    _, loss, data = toy()
    risk = vl.EmpiricalRisk(model, loss, data, values)
    expected = use_everything(vl.EmpiricalRisk(model, loss, data, dict(risk.params)))
    values["w"].zero_()
    values["other"] = torch.zeros(3)
    for got, want in zip(use_everything(risk), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_results_are_not_views_of_the_state() -> None:
    risk = vl.EmpiricalRisk(*toy())
    before = use_everything(risk)
    for result in (*use_everything(risk), vl.GGN(risk).eigh().eigenvalues):
        result.add_(1.0)
    G = vl.GGN(risk)
    G.eigvalsh().zero_()
    G.factor.gram.to_dense().zero_()
    G.diagonal().zero_()
    assert G.eigvalsh().max() > 0 and G.factor.gram.to_dense().norm() > 0
    for got, want in zip(use_everything(risk), before, strict=True):
        # Kept graphs may sum in another order than the first pass.
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


# Grad modes ---------------------------------------------------------------------------

CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("inside", ["construction", "use", "data and both"])
@pytest.mark.parametrize("name", ["mlp_ce_mean", "poisson", "control_flow"])
def test_grad_modes(name: str, inside: str, context: str) -> None:
    case = problem(name)
    arguments, keywords = case.arguments()
    expected = use_everything(vl.EmpiricalRisk(*arguments, **keywords))
    mode = CONTEXTS[context]
    if inside == "data and both":
        with mode():
            X, y = arguments[2]
            arguments = (*arguments[:2], (X.clone(), y.clone()), *arguments[3:])
    if inside == "use":
        risk = vl.EmpiricalRisk(*arguments, **keywords)
    else:
        with mode():
            risk = vl.EmpiricalRisk(*arguments, **keywords)
    if inside == "construction":
        results = use_everything(risk)
    else:
        with mode():
            results = use_everything(risk)
    for number, (got, want) in enumerate(zip(results, expected, strict=True)):
        torch.testing.assert_close(
            got, want, rtol=1e-9, atol=1e-12, msg=lambda m, n=number: f"{n}: {m}"
        )


def test_a_model_built_in_inference_mode() -> None:
    # Its parameters are inference tensors, which autograd refuses unless copied.
    _, loss, data = toy()
    with torch.inference_mode():
        net, _, _ = toy()
        params = {n: p.clone() for n, p in net.named_parameters()}
    expected = use_everything(vl.EmpiricalRisk(toy()[0], loss, data))
    for got, want in zip(
        use_everything(vl.EmpiricalRisk(toy()[0], loss, data, params)),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_default_dtype_does_not_matter() -> None:
    # float64 stays float64, and the eigenvectors' completion too.
    net, loss, (X, y) = toy()
    data = (X.float(), y)
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            risk = vl.EmpiricalRisk(copy.deepcopy(net).float(), loss, data)
            results = use_everything(risk)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {r.dtype for r in results} == {torch.float32}


# Memory -------------------------------------------------------------------------------


def test_a_risk_can_be_freed() -> None:
    net, loss, data = toy()
    risk = vl.EmpiricalRisk(net, loss, data)
    use_everything(risk)
    alive = weakref.ref(risk)
    del risk
    gc.collect()
    assert alive() is None


def test_data_are_read_no_more_often_than_needed() -> None:
    # Kept linearisations and columns spare passes over the data.
    net, loss, (X, y) = toy()
    dataset = Counting(X, y)
    loader = DataLoader(dataset, batch_size=4)
    vl.EmpiricalRisk(net, loss, loader)
    assert dataset.reads == 12
    risk = vl.EmpiricalRisk(net, loss, loader, check_data=False)
    assert dataset.reads == 18
    x = random_vector(risk.num_params)
    vl.GGN(risk) @ x
    vl.Jacobian(risk) @ x
    first = dataset.reads
    vl.GGN(risk) @ x
    vl.Jacobian(risk) @ x
    assert dataset.reads == first


# What is not one function of each sample --------------------------------------------


@pytest.mark.parametrize("quantity", ["product", "gram"])
@pytest.mark.parametrize("mixing", ["mean", "softmax", "batch_norm", "neighbour"])
def test_models_that_mix_samples(mixing: str, quantity: str) -> None:
    """Per-sample curvature is undefined: refused, not one of several numbers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x)
        if mixing == "mean":
            return h - h.mean(0)
        if mixing == "softmax":
            return h.softmax(0)
        if mixing == "batch_norm":
            return F.batch_norm(h, None, None, training=True)
        return h + h.roll(1, 0)

    _, loss, data = toy()
    net = Lambda(forward, layer=nn.Linear(4, 3)).double()
    with pytest.raises(ValueError, match="model"):
        risk = vl.EmpiricalRisk(net, loss, data)
        if quantity == "gram":
            vl.GGN(risk).eigvalsh()
        else:
            vl.GGN(risk) @ random_vector(risk.num_params)


def test_a_model_that_changes_from_call_to_call() -> None:
    # Here by a counter, unnoticed by the generators: right or refused.
    calls = {"n": 0}

    def forward(m: Any, x: Tensor) -> Tensor:
        calls["n"] += 1
        return m.layer(x) * (1.0 + calls["n"])

    _, loss, data = toy()
    net = Lambda(forward, layer=nn.Linear(4, 3)).double()
    for use in (
        lambda r: vl.GGN(r) @ random_vector(15),
        lambda r: vl.GGN(r).eigvalsh(),
        lambda r: r.gradient(),
        lambda r: vl.Hessian(r) @ random_vector(15),
    ):
        with pytest.raises(ValueError):
            use(vl.EmpiricalRisk(net, loss, data))


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_of_a_loss_are_copied(name: str) -> None:
    net, _, (X, y) = toy()
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss: nn.Module = nn.CrossEntropyLoss(weight=weight)
    if name == "pos_weight":
        loss, y = (
            nn.BCEWithLogitsLoss(pos_weight=weight),
            torch.rand(len(X), 3).double(),
        )
    risk = vl.EmpiricalRisk(net, loss, (X, y))
    value, gradient, diagonal = risk.value(), risk.gradient(), vl.GGN(risk).diagonal()
    weight.mul_(torch.tensor([5.0, 1.0, 1.0]))
    assert torch.equal(risk.gradient(), gradient)
    assert torch.equal(vl.GGN(risk).diagonal(), diagonal)
    assert torch.equal(risk.value_and_gradient()[0], value)


def test_a_layer_whose_input_is_overwritten() -> None:
    # As without hooks, a backward pass that would use the new values is an error.
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.clone()
        h = m.first(x)
        x.add_(1.0)
        return m.second(h.tanh()) + x[:, :1]

    _, loss, data = toy()
    net = Lambda(forward, first=nn.Linear(4, 3), second=nn.Linear(3, 3)).double()
    for use in (
        lambda r: r.gradient(),
        lambda r: vl.Jacobian(r) @ random_vector(27),
        lambda r: vl.Jacobian(r).T @ random_vector(r.num_samples * 3),
        lambda r: vl.GGN(r) @ random_vector(27),
    ):
        with pytest.raises(RuntimeError, match=r"in ?place"):
            use(vl.EmpiricalRisk(net, loss, data))


def _of_a_guest(risk: vl.EmpiricalRisk) -> dict[str, Tensor]:
    """What no mode of the caller may change."""
    D = risk.num_params
    G, U, x = vl.GGN(risk), vl.PerSampleGradients(risk), torch.ones(D)
    pairs = G.eigh(k=2)
    return {
        "G x": vl.GGN(risk) @ x,
        "V z": G.factor @ torch.ones(G.factor.shape[1]),
        "J.T u": vl.Jacobian(risk).T @ torch.ones(risk.num_samples * risk.num_outputs),
        "H x": vl.Hessian(risk) @ x,
        "S": vl.LossHessian(risk).sqrt().to_dense(),
        "K": G.gram.to_dense(),
        "projector": vl.projector(pairs).to_dense(),
        "diagonal": G.diagonal(),
        "diagonals of samples": G.sample_diagonals(),
        "inverse": (G + 0.1 * vl.Identity(D)).inv() @ x,
        "norms": U.squared_norms(),
        "norms of blocks": U.squared_norms("parameter"),
        "variance": U.variance(),
        "curvatures": vl.directional_derivatives(risk, pairs)[1],
        "step": vl.damped_newton_step(risk, pairs, 0.1),
        "dense": vl.Dense(torch.linspace(0, 1, D * D).view(D, D)) @ x,
        "gradient": risk.gradient(),
    }


@pytest.mark.parametrize("name", ["autocast", "inference"])
def test_modes_of_the_caller_change_nothing(name: str) -> None:
    modes = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode,
    }
    net, loss, (X, y) = toy()
    arguments = copy.deepcopy(net).float(), loss, (X.float(), y)
    expected = _of_a_guest(vl.EmpiricalRisk(*arguments))
    with modes[name]():
        results = _of_a_guest(vl.EmpiricalRisk(*arguments))
        kept = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
    assert kept == (name == "autocast", name == "inference")
    for key, want in expected.items():
        torch.testing.assert_close(
            results[key], want, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
