"""Linearisations of nets that can and cannot be traced; wrong second derivatives."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vivit_linop as vl
from tests import cases
from tests.cases import NAMES, dense
from tests.curvature_cases import FEW, close, fresh, risk
from vivit_linop.net import linearized as linearizing
from vivit_linop.net.linearization import ReverseTangents
from vivit_linop.net.linearized import NoTangentError, linearizations, linearized
from vivit_linop.net.tracing import tangent_map

# Linearisations -----------------------------------------------------------------------


def _untraceable(*_: Any) -> None:
    raise NotImplementedError


# Bags have no second derivative.
REVERSIBLE = [name for name in NAMES if name != "bags_and_products"]


# That a risk's own linearisations are right, products with J have shown already.
@pytest.mark.parametrize(
    ("name", "method"),
    [(n, "trace") for n in FEW] + [(n, "reverse") for n in REVERSIBLE],
)
def test_linearization(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of, truth = risk(name), dense(name)
    module = "vivit_linop.net.linearized"
    if method == "reverse":
        monkeypatch.setattr(f"{module}.tangent_map", _untraceable)
    monkeypatch.setattr(f"{module}.tracing_pays", lambda _: method == "trace")
    rows = truth.J.split([n * truth.C for n in of.batch_sizes])
    for (X, _), J in zip(of.batches(), rows, strict=True):
        # Some models write into their input.
        function = functools.partial(of.model, X=cases.map_tensors(torch.clone, X))
        linear = linearized(function, of.model.params)
        assert linear.method in (method, "reverse")
        generator = torch.Generator().manual_seed(3)
        for columns in (1, 4, 1):
            x = torch.randn(J.shape[1], columns, generator=generator).double()
            u = torch.randn(J.shape[0], columns, generator=generator).double()
            assert close(linear.jvp(x), J @ x, scale=J.norm() * x.norm())
            assert close(linear.vjp(u), J.T @ u, scale=J.norm() * u.norm())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("cnn", "trace"),
        ("residual", "reverse"),
        ("mlp_ce_mean", "reverse"),
        ("tokens", "reverse"),
        ("transformer", "reverse"),
    ],
)
def test_ordinary_nets_are_traced_where_it_pays(name: str, method: str) -> None:
    # Convolutions have a slow second derivative; a trace of other nets takes time only.
    assert {linear.method for linear in linearizations(fresh(name))} == {method}


@pytest.mark.parametrize("wrong", ["result", "error"])
def test_a_trace_stands_in_for_a_wrong_second_derivative(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "vivit_linop.net.linearized"
    if wrong == "error":

        def impossible(graph: Any) -> None:
            raise NotImplementedError("derivative for f_backward")

        monkeypatch.setattr(f"{module}.ReverseTangents", impossible)
    else:

        class Wrong(ReverseTangents):
            def __call__(self, tangents: list[Tensor], batched: bool) -> Tensor:
                return 1.01 * super().__call__(tangents, batched)

        monkeypatch.setattr(f"{module}.ReverseTangents", Wrong)
    of, truth = fresh("mlp_ce_mean"), dense("mlp_ce_mean")
    x = torch.linspace(-1.0, 1.0, truth.D).double()
    assert close(vl.Jacobian(of) @ x, truth.J @ x)
    assert {linear.method for linear in linearizations(of)} == {"trace"}
    monkeypatch.setattr(f"{module}.tangent_map", _untraceable)
    of = fresh("mlp_ce_mean")  # and columns for both
    assert close(vl.Jacobian(of) @ x, truth.J @ x)
    assert not of.has_tangents
    with pytest.raises(NoTangentError, match="second derivative"):
        next(iter(linearizations(of))).jvp(x.unsqueeze(1))


def test_hessian_of_a_wrong_double_backward() -> None:
    # The double backward of torch 2.13's fused weight_norm is wrong, and so is a
    # product made of it: it must be right or refused, not silently asymmetric.
    name = "parametrised_weight"
    truth = dense(name)
    x = torch.ones(truth.D, dtype=torch.float64)
    try:
        product = vl.Hessian(risk(name)) @ x
    except (ValueError, RuntimeError):
        return
    assert close(product, truth.hessian @ x)


# Forms of construction ----------------------------------------------------------------


def test_a_trace_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    of, truth = fresh("convolutions"), dense("convolutions")
    J, unit = vl.Jacobian(of), torch.eye(truth.J.shape[0], dtype=torch.float64)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(linearizing, "tangent_map", lambda *_: interrupted)
        with pytest.raises(KeyboardInterrupt):
            J @ torch.ones(of.num_params)
    assert (J.T @ unit - truth.J.T).norm() <= 1e-12 * truth.J.norm()
    assert (J @ J.T @ unit - truth.J @ truth.J.T).norm() <= 1e-12 * truth.J.norm() ** 2


def test_trace_of_batch_norms() -> None:
    # torch's formula of their tangents works in place.
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten()
    )
    net = net.double().eval()
    net[1].running_mean.uniform_(), net[1].running_var.uniform_(0.5, 2.0)
    data = torch.randn(4, 2, 5, 5).double(), torch.randn(4, 27).double()
    J = vl.Jacobian(net, nn.MSELoss(), data)
    (linearization,) = linearizations(J.risk)
    expected = J.T.to_dense().T
    for _ in range(2):
        assert close(J.to_dense(), expected, 1e-12)
        x = torch.linspace(-1, 1, J.shape[1], dtype=torch.float64)
        assert close(J @ x, expected @ x, 1e-12)
    assert linearization.method == "trace"


class Multiplications(TorchDispatchMode):
    """Counts products entry by entry."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mul.Tensor
        return func(*args, **(kwargs or {}))


def test_a_norm_in_eval_mode_scales_once() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).double().eval()
    net[1].running_var.uniform_(0.5, 2.0)
    X, theta = torch.rand(4, 2, 5, 5).double(), dict(net.named_parameters())
    theta = {name: p.detach() for name, p in theta.items()}
    x = [torch.rand_like(p) for p in theta.values()]

    def function(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, params, X)

    traced = tangent_map(function, theta)
    with Multiplications() as counted:
        image = traced(*x)
    # That of the activations, and that of the weight's tangent.
    assert counted.count == 2
    named = dict(zip(theta, x, strict=True))
    _, expected = torch.func.jvp(function, (theta,), (named,))
    torch.testing.assert_close(image, expected)


ORDERED = {
    "pool": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)],
    "norm": [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2)],
    "strided": [nn.Conv2d(3, 4, 3, stride=2), nn.ELU(), nn.AdaptiveAvgPool2d(2)],
}


@pytest.mark.host("images in another order in memory are those of a CPU")
@pytest.mark.parametrize("kind", ORDERED)
def test_images_in_another_order_in_memory_are_traced(kind: str) -> None:
    """Tangents then lie in another order than what they are tangents of."""
    torch.manual_seed(0)
    X, body = torch.rand(4, 3, 8, 8), nn.Sequential(*ORDERED[kind])
    net = nn.Sequential(body, nn.Flatten(), nn.Linear(body(X)[0].numel(), 3)).eval()
    of = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, torch.arange(4) % 3))
    assert of.model.channels_last == torch.backends.mkldnn.is_available()
    x = torch.rand(of.num_params)
    product = vl.Jacobian(of) @ x
    (linear,) = linearizations(of)
    assert linear.method == "trace"
    exact = {n: p.detach().double() for n, p in net.named_parameters()}
    parts = of.unflatten(x.double())
    double = copy.deepcopy(net).double()
    _, expected = torch.func.jvp(
        lambda params: torch.func.functional_call(double, params, (X.double(),)),
        (exact,),
        (dict(zip(exact, parts, strict=True)),),
    )
    torch.testing.assert_close(
        product.double(), expected.flatten(), rtol=1e-4, atol=1e-4
    )
