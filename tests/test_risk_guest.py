"""The user's model is left as it was, also after an error."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests import sample_truth
from tests.sample_truth import truth_of
from tests.toys import Snapshot, guest_net, random_vector, toy, use_everything

# Guest behaviour ----------------------------------------------------------------------


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


class Hooking(nn.Module):
    """Puts hooks on its parameters in each forward pass."""

    def __init__(self, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        super().__init__()
        self.net, self.hook = guest_net(), hook

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.net[4].weight
        if weight.requires_grad:
            weight.register_hook(self.hook)
            self.net[4].bias.register_post_accumulate_grad_hook(lambda p: None).remove()
        result: torch.Tensor = self.net(x)
        return result


@pytest.mark.parametrize(
    "hook", [lambda g: 2.0 * g, lambda g: g / g.norm(), lambda g: None]
)
@pytest.mark.parametrize("check", [True, False])
def test_hooks_on_parameters_that_a_pass_makes(
    hook: Callable[[torch.Tensor], torch.Tensor | None], check: bool
) -> None:
    """They are for an optimiser, and one more in each pass."""
    _, loss, data = toy()
    net = Hooking(hook)
    samples = [
        (lambda m, x=x: m(x[None])[0], lambda f, y=y: loss(f[None], y[None]))
        for x, y in zip(*data, strict=True)
    ]
    truth = truth_of(net.net, samples, 1.0 / len(samples))
    risk = vl.EmpiricalRisk(net, loss, data, check=check)
    sample_truth.check(risk, truth)
    sample_truth.check(risk, truth)


class Sines(nn.Module):
    """Uses a parameter in a way that has no known structure."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.sin()


See = Callable[[torch.Tensor], None]


def on_outputs(layer: nn.Module, see: See) -> None:
    layer.register_forward_hook(lambda m, inputs, output: see(output))


def on_gradients(layer: nn.Module, see: See) -> None:
    layer.register_full_backward_hook(lambda m, before, after: see(after[0]))


def in_the_graph(layer: nn.Module, see: See) -> None:
    def hooked(m: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(see)

    layer.register_forward_hook(hooked)


def on_nodes(layer: nn.Module, see: See) -> None:
    def hooked(m: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.grad_fn is not None:
            output.grad_fn.register_hook(lambda before, after: see(after[0]))

    layer.register_forward_hook(hooked)


@pytest.mark.parametrize("hook", [on_outputs, on_gradients, in_the_graph, on_nodes])
def test_hooks_that_keep_what_they_see(hook: Callable[[nn.Module, See], None]) -> None:
    """Means over passes are made of tensors that live on."""
    _, loss, data = toy()
    net = nn.Sequential(guest_net(), Sines())
    samples = [
        (lambda m, x=x: m(x[None])[0], lambda f, y=y: loss(f[None], y[None]))
        for x, y in zip(*data, strict=True)
    ]
    truth = truth_of(net, samples, 1.0 / len(samples))
    means: dict[torch.Size, Any] = {}

    def see(tensor: torch.Tensor) -> None:
        means[tensor.shape] = 0.9 * means.get(tensor.shape, 0.0) + 0.1 * tensor.detach()

    for layer in (*net[0][1:], net[1]):
        hook(layer, see)
    sample_truth.check(vl.EmpiricalRisk(net, loss, data), truth)
    for mean in means.values():
        assert mean.sum().isfinite()
    loss(net(data[0]), data[1]).backward()


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


@pytest.mark.parametrize("is_leaf", [True, False])
def test_inputs_that_require_grad_get_none(is_leaf: bool) -> None:
    """Neither they nor what they were computed from, whose graph stays as it was."""
    torch.manual_seed(0)
    encoder, net = nn.Linear(3, 4).double(), guest_of_backpack()
    raw, y = torch.randn(6, 3).double(), torch.randint(3, (6,))
    X = torch.randn(6, 4).double().requires_grad_() if is_leaf else encoder(raw).sin()
    loss, params = nn.CrossEntropyLoss(), dict(net.named_parameters())

    def value(*values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(params, values, strict=True))
        return loss(torch.func.functional_call(net, named, X.detach()), y)

    given = tuple(p.detach() for p in params.values())
    blocks: Any = torch.autograd.functional.hessian(value, given)
    pairs = zip(enumerate(given), blocks, strict=True)
    diagonal = torch.cat(
        [row[i].reshape(p.numel(), -1).diagonal() for (i, p), row in pairs]
    )
    for parts in [(X, y)], [(X[:4], y[:4]), (X[4:], y[4:])]:
        risk = vl.EmpiricalRisk(net, loss, parts)
        H = vl.Hessian(risk)
        found = [H.diagonal(route="backpack"), H.sample_diagonals().mean(0)]
        for of_H in found:
            torch.testing.assert_close(of_H, diagonal, rtol=1e-10, atol=1e-12)
        use_everything(risk)
        assert vl.KFRA(risk).trace() > 0.0
        assert vl.PositiveCurvatureHessian(risk).trace() > 0.0
    assert all(p.grad is None for p in (*net.parameters(), *encoder.parameters()))
    if is_leaf:
        assert X.grad is None
        return
    X.sum().backward()
    expected = (encoder(raw).cos().detach().mT @ raw).detach()
    torch.testing.assert_close(encoder.weight.grad, expected)


def guest_of_backpack() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


# What torch and others do with the tensors -------------------------------------------


@pytest.mark.parametrize("change", ["to", "load_state_dict", "swap_tensors"])
def test_tensors_may_be_exchanged(change: str) -> None:
    """Torch refuses to exchange one that somebody has a weak reference to."""
    net, loss, data = toy()
    first, second = [*net[0].parameters()], [*net[2].parameters()]
    risk = vl.EmpiricalRisk(net, loss, data)
    G = vl.GGN(risk)
    expected = use_everything(risk)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if change == "to":
            net.to(torch.float32).to(torch.float64)
        elif change == "load_state_dict":
            net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()})
        else:
            other = nn.Parameter(torch.zeros(5, 4).double())
            torch.utils.swap_tensors(net[0].weight, other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for found, value in zip(use_everything(risk), expected, strict=True):
        torch.testing.assert_close(found, value)
    blocks = G.block_diagonal([first, second])
    assert [block.shape[0] for block in blocks.blocks] == [25, 18]


class Gained(nn.Linear):
    """Reads what somebody has set on its parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = getattr(self.weight, "gain", 1.0) * getattr(self.bias, "gain", 1.0)
        return super().forward(x) * gain


class Marked(nn.Parameter):
    """A parameter of another class."""


@pytest.mark.parametrize("kind", [nn.Parameter, Marked])
@pytest.mark.parametrize("frozen", [False, True])
def test_attributes_of_parameters_are_seen(
    kind: type[nn.Parameter], frozen: bool
) -> None:
    net, loss, (X, y) = toy()
    net[0] = Gained(4, 5).double()
    net[0].weight = kind(net[0].weight.detach())
    net[0].weight.gain, net[0].bias.gain = 3.0, 0.5
    net[0].weight.requires_grad_(not frozen)
    params = [p for p in net.parameters() if p.requires_grad]

    def gradient() -> torch.Tensor:
        found = torch.autograd.grad(loss(net(X), y), params)
        return torch.cat([g.flatten() for g in found])

    risk, expected = vl.EmpiricalRisk(net, loss, (X, y)), gradient()
    assert risk.is_current()
    for each in (risk, copy.deepcopy(risk), pickle.loads(pickle.dumps(risk))):
        torch.testing.assert_close(each.gradient(), expected)
        dense = vl.Jacobian(each).to_dense()
        torch.testing.assert_close(vl.Jacobian(each) @ torch.eye(len(expected)), dense)
    net[0].weight.gain = 2.0
    torch.testing.assert_close(risk.gradient(), expected)
    assert not risk.is_current()
    torch.testing.assert_close(risk.at().gradient(), gradient())
