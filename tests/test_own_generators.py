"""Generators of random numbers that a net or a loss has for itself are the user's."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import Lambda, mlp

X, Y = torch.rand(8, 4).double(), torch.arange(8) % 3
CE = nn.CrossEntropyLoss()
x = torch.linspace(-1.0, 1.0, 43, dtype=torch.float64)

# A generator of each kind, what it draws, and its state as bytes.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch": (
        lambda: torch.Generator("cpu").manual_seed(3),
        lambda g: torch.rand(4, generator=g, dtype=torch.float64, device="cpu"),
    ),
    "NumPy": (
        lambda: np.random.default_rng(3),
        lambda g: torch.as_tensor(g.random(4), device="cpu"),
    ),
    "NumPy, before": (
        lambda: np.random.RandomState(3),
        lambda g: torch.as_tensor(g.rand(4), device="cpu"),
    ),
    "Python": (lambda: random.Random(3), lambda g: g.random()),
}


def state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return str(generator.get_state())


def as_attribute(generator: Any, forward: Any) -> nn.Module:
    net = Lambda(lambda m, x: forward(m.f, x, m.generator), f=mlp(4, 5, 3))
    net.generator = generator
    return net


def in_a_list(generator: Any, forward: Any) -> nn.Module:
    net = Lambda(lambda m, x: forward(m.f, x, m.kept["some"][0]), f=mlp(4, 5, 3))
    net.kept = {"some": [generator]}
    return net


def closed_over(generator: Any, forward: Any) -> nn.Module:
    net = mlp(4, 5, 3)
    net.register_forward_pre_hook(
        lambda m, given: forward(lambda x: x, given[0], generator)
    )
    return net


PLACES = [as_attribute, in_a_list, closed_over]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_and_used_is_refused(kind: str, place: Any) -> None:
    make, draw = KINDS[kind]
    generator = make()
    net = place(generator, lambda f, x, g: f(x + 0.1 * draw(g)))
    before = copy.deepcopy(state_of(generator))
    for data in ((X, Y), [(X[:3], Y[:3]), (X[3:], Y[3:])]):
        with pytest.raises(ValueError, match="a generator of its own"):
            vl.EmpiricalRisk(net, CE, data)
    assert state_of(generator) == before


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_and_not_used(kind: str, place: Any) -> None:
    """As layers do that are off in evaluation mode."""
    make, draw = KINDS[kind]
    generator = make()
    net = place(generator, lambda f, x, g: f(x + 0.0 * draw(g)))
    before = copy.deepcopy(state_of(generator))
    plain = net.f if hasattr(net, "f") else copy.deepcopy(net)
    plain._forward_pre_hooks.clear()
    truth = vl.GGN(plain, CE, (X, Y)).to_dense()
    G = vl.GGN(net, CE, (X, Y))
    for _ in range(2):
        torch.testing.assert_close(G @ x, truth @ x)
        torch.testing.assert_close(G.to_dense(), truth)
    assert G.risk.is_current() and state_of(generator) == before
    draw(generator)
    assert G.risk.is_current()
    torch.testing.assert_close(G.risk.at().gradient(), G.risk.gradient())


def test_numbers_after_a_seed_are_a_constant() -> None:
    """A generator that each pass puts at one state."""
    generator = torch.Generator("cpu").manual_seed(3)

    def forward(f: Any, x: Tensor, g: torch.Generator) -> Tensor:
        shift = torch.rand(4, generator=g.manual_seed(5), dtype=x.dtype, device="cpu")
        result: Tensor = f(x + shift.to(x.device))
        return result

    net = as_attribute(generator, forward)
    before = generator.get_state()
    shift = forward(lambda x: x, torch.zeros_like(X), torch.Generator("cpu"))
    truth = vl.GGN(net.f, CE, (X + shift, Y)).to_dense()
    G = vl.GGN(net, CE, (X, Y))
    for _ in range(2):
        torch.testing.assert_close(G @ x, truth @ x)
    torch.testing.assert_close(G.to_dense(), truth)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_loss_and_of_a_function(kind: str) -> None:
    make, draw = KINDS[kind]
    generator = make()
    before = copy.deepcopy(state_of(generator))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return CE(output, target) * (1.0 + torch.as_tensor(draw(generator)).mean())

    def model(params: Any, X: Tensor) -> Tensor:
        return (X + 0.1 * draw(generator)) @ params["w"]

    with pytest.raises(ValueError, match="another value when it is called again"):
        vl.EmpiricalRisk(mlp(4, 5, 3), loss, (X, Y), reduction="mean")
    with pytest.raises(ValueError, match="a generator of its own"):
        vl.EmpiricalRisk(model, CE, (X, Y), {"w": torch.rand(4, 3).double()})
    assert state_of(generator) == before


def test_it_is_copied_with_the_operator() -> None:
    net = mlp(4, 5, 3)
    net.generator = torch.Generator("cpu").manual_seed(3)
    G = vl.GGN(net, CE, (X, Y))
    torch.testing.assert_close(copy.deepcopy(G).to_dense(), G.to_dense())
