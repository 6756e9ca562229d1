"""What torch's modes and the caller's settings do to results: nothing."""

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import vivit_linop as vl
from tests.cases import problem
from tests.pairs import pairwise
from tests.toys import toy, use_everything

# Grad modes ---------------------------------------------------------------------------

CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize(
    ("name", "inside", "context"),
    pairwise(
        ["mlp_ce_mean", "poisson", "control_flow"],
        ["construction", "use", "data and both"],
        CONTEXTS,
    ),
)
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


class WithConstants(nn.Module):
    """A net that makes constants of the default dtype, in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.linspace(0.1, 1.7, 5)
        out: Tensor = self.last(torch.tanh(self.first(x)) * scale.sin() / 3)
        return out


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_net_has_the_default_dtype_of_construction(
    first: torch.dtype, frozen: bool
) -> None:
    """What is kept and what is made later are of one net, to the last digit."""
    _, loss, (X, y) = toy()
    net, others = WithConstants(), {torch.float32, torch.float64} - {first}
    theta = dict(net.named_parameters())
    called = torch.func.functional_call
    model = (lambda p, x: called(net, p, (x,))) if frozen else net
    args = model, loss, (X, y), (theta if frozen else None)
    torch.set_default_dtype(first)
    try:
        expected = use_everything(vl.EmpiricalRisk(*args))
        risk = vl.EmpiricalRisk(*args)
        vl.GGN(risk) @ torch.ones(risk.num_params, dtype=torch.float64)
        torch.set_default_dtype(others.pop())
        found = use_everything(risk)
        assert torch.get_default_dtype() is not first
        assert torch.equal(risk.at(risk.flatten(risk.params)).value(), risk.value())
    finally:
        torch.set_default_dtype(torch.float32)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


# What is not one function of each sample ----------------------------------------------


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


def _halved(tensor: Tensor) -> tuple[Tensor, torch.dtype]:
    """Save in half of the memory, as those do who compress activations."""
    is_float = tensor.is_floating_point()
    return tensor.bfloat16() if is_float else tensor, tensor.dtype


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "hooks that round": lambda: saved_tensors_hooks(
        _halved, lambda saved: saved[0].to(saved[1])
    ),
    "hooks that keep signs only": lambda: saved_tensors_hooks(
        lambda tensor: tensor.sign(), lambda tensor: tensor
    ),
    "hooks that save on the host": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("name", MODES)
def test_modes_of_the_caller_change_nothing(name: str) -> None:
    net, loss, (X, y) = toy()
    arguments = copy.deepcopy(net).float(), loss, (X.float(), y)
    expected = _of_a_guest(vl.EmpiricalRisk(*arguments))
    with MODES[name]():
        results = _of_a_guest(vl.EmpiricalRisk(*arguments))
        kept = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
    assert kept == (name == "autocast", name == "inference")
    for key, want in expected.items():
        torch.testing.assert_close(
            results[key], want, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("data", ["vectors", "images", "a loader"])
def test_subsets_are_taken_under_autocast(data: str) -> None:
    """Sums over inputs, by which others are seen, are not those of rounded inputs."""
    torch.manual_seed(0)
    X, y = torch.randn(9, 3, 4, 4), torch.randn(9, 2)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    if data != "images":
        X, net = (
            X.flatten(1),
            nn.Sequential(nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 2)),
        )
    given = TensorDataset(X, y)
    batches = DataLoader(given, batch_size=4) if data == "a loader" else (X, y)
    risk = vl.EmpiricalRisk(net, nn.MSELoss(), batches)
    index = [0, 3, 8]
    with MODES["autocast"]():
        gradient = risk.subset(index).gradient()
    exact = copy.deepcopy(net).double()
    value = nn.functional.mse_loss(exact(X[index].double()), y[index].double())
    expected = torch.autograd.grad(value, [*exact.parameters()])
    torch.testing.assert_close(
        gradient.double(),
        torch.cat([part.flatten() for part in expected]),
        rtol=1e-4,
        atol=1e-6,
    )


class Cosh(nn.Module):
    reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).cosh().sum(1).mean()


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("make", [vl.GGN, vl.Hessian, vl.LossHessian])
def test_losses_are_certified_in_any_mode(make: Callable[..., Any], name: str) -> None:
    """Where the first who asks for the curvature of one by autograd is inside."""
    net, _, (X, _) = toy()
    arguments = net, Cosh(), (X, X[:, :3].sin())
    expected = make(vl.EmpiricalRisk(*arguments)).to_dense()
    risk = vl.EmpiricalRisk(*arguments)
    with MODES[name]():
        found = make(risk).to_dense()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(), Cosh()])
def test_torch_counts_the_operations_of_a_risk(loss: nn.Module) -> None:
    """By hooks on all modules, and on gradients of what enters them."""
    net, X = nn.Linear(3, 2).double(), torch.rand(8, 3).double()
    y = torch.rand(8, 2).double().softmax(1)
    arguments = net, loss, (X, y)
    expected = vl.EmpiricalRisk(*arguments)
    with FlopCounterMode(display=False) as counter:
        risk = vl.EmpiricalRisk(*arguments)
        found = vl.GGN(risk).to_dense(), vl.Hessian(risk).to_dense(), risk.gradient()
        evals = vl.GGN(risk).eigvalsh()
    assert counter.get_total_flops() > 0
    G, H = (op(expected).to_dense() for op in (vl.GGN, vl.Hessian))
    for got, want in zip(found, (G, H, expected.gradient()), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(evals, torch.linalg.eigvalsh(G)[-len(evals) :])


@pytest.mark.parametrize("name", [name for name in MODES if "hooks" in name])
@pytest.mark.parametrize("inside", ["construction", "use", "both"])
def test_graphs_keep_what_was_computed(inside: str, name: str) -> None:
    """By autograd: of a loss, of columns without a structure, of a prior."""

    def quartic(output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) ** 4).sum(1).mean()

    net = Wide().double()
    X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
    arguments = net, quartic, (X, X.cos()[:, :3])

    def built() -> vl.EmpiricalRisk:
        return vl.EmpiricalRisk(*arguments, reduction="mean")

    def used(risk: vl.EmpiricalRisk) -> list[Tensor]:
        posterior = vl.Laplace(risk, 0.5)
        return [
            vl.GGN(risk).gram.to_dense(),
            vl.Hessian(risk).to_dense(),
            vl.LossHessian(risk).to_dense(),
            posterior.optimize_prior(),
        ]

    expected = used(built())
    with MODES[name]() if inside != "use" else contextlib.nullcontext():
        risk = built()
    with MODES[name]() if inside != "construction" else contextlib.nullcontext():
        results = used(risk)
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


class Wide(nn.Module):
    """Its parameters meet no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3).sin())

    def forward(self, X: Tensor) -> Tensor:
        return torch.einsum("ni,ij->nj", X.exp(), self.weight.cumsum(0)).tanh()


def test_what_a_net_has_overwritten_is_found_under_hooks_too() -> None:
    class Overwrites(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            once = super().forward(X).exp()
            twice = 2 * once
            return twice + once.mul_(3)  # the derivative of exp needs its result

    _, loss, data = toy()
    for name in ["hooks that save on the host", "hooks that round"]:
        with MODES[name](), pytest.raises(RuntimeError, match="inplace operation"):
            vl.EmpiricalRisk(Overwrites(4, 3).double(), loss, data).gradient()


has_precisions = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"),
    reason="torch has a precision for each of its libraries since 2.9",
)


class Precise(vl.TorchLinearOperator):
    """The identity; writes down the precisions in which it is asked."""

    def __init__(self, size: int) -> None:
        super().__init__((size, size), torch.float32, "cpu")
        self.seen: set[str] = set()

    def _multiply(self, X: Tensor) -> Tensor:
        mkldnn = torch.backends.mkldnn
        parts = [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
        self.seen |= {part.fp32_precision for part in parts}
        return X.clone()

    _multiply_adjoint = _multiply


@has_precisions
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_operators_of_any_kind_multiply_in_full_precision(precision: str) -> None:
    op, x = Precise(4), torch.ones(4)
    damped = op @ op.T + 0.5 * vl.Identity(4)
    torch.set_float32_matmul_precision(precision)
    set_by_caller = torch.backends.mkldnn.matmul.fp32_precision
    try:
        products = [op @ x, damped @ x, op.T @ x, op @ (op @ x)]
        columns = [op.to_dense(), op.diagonal(), op.trace()]
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.mkldnn.matmul.fp32_precision == set_by_caller
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(products + columns) == 7
    assert op.seen <= {"ieee", "none"}


@has_precisions
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_nets_run_in_full_precision(precision: str) -> None:
    seen = []

    class Asks(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return super().forward(X)

    _, loss, (X, y) = toy()
    torch.set_float32_matmul_precision(precision)
    try:
        vl.EmpiricalRisk(Asks(4, 3), loss, (X.float(), y)).gradient()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen and set(seen) <= {"ieee", "none"}


@has_precisions
def test_the_precision_comes_back_after_an_error() -> None:
    class Fails(Precise):
        def _multiply(self, X: Tensor) -> Tensor:
            raise ZeroDivisionError

    conv = torch.backends.mkldnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "bf16"
    try:
        with pytest.raises(ZeroDivisionError):
            Fails(3) @ torch.ones(3)
        assert conv.fp32_precision == "bf16"
    finally:
        conv.fp32_precision = before


def test_random_numbers_are_saved_once_a_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU it takes time; J and its transpose share it."""
    net, loss, data = toy()
    G = vl.GGN(vl.EmpiricalRisk(net, loss, data))
    x = torch.rand(G.shape[0], 3, dtype=torch.float64)
    for _ in range(3):  # what products run on is decided
        G @ x
    saved, get_rng_state = [], torch.get_rng_state

    def counted() -> Tensor:
        saved.append(1)
        return get_rng_state()

    monkeypatch.setattr(torch, "get_rng_state", counted)
    for product in (lambda: G @ x, lambda: G @ x[:, 0], lambda: G.factor.T @ x):
        saved.clear()
        product()
        assert len(saved) <= 1


def test_the_package_may_be_imported_in_any_mode() -> None:
    """As where it is needed, inside of a function that evaluates."""
    code = """
import os, sys, torch
other = os.fork()  # one process each, which imports the package for itself
with torch.no_grad() if other else torch.inference_mode():
    import vivit_linop as vl
X, y = torch.rand(6, 3), torch.arange(6) % 2
G = vl.GGN(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), (X, y))
x = torch.rand(8, requires_grad=True)
(G @ x).sum().backward()
assert torch.allclose(x.grad, G @ torch.ones(8), atol=1e-6)
delta = torch.tensor(0.5, requires_grad=True)
(G + delta * vl.Identity(8)).logdet().backward()
trace = (G + 0.5 * vl.Identity(8)).inv().trace()
assert torch.allclose(delta.grad, trace)
if other:
    sys.exit(os.waitpid(other, 0)[1] != 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
