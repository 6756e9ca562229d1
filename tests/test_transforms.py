"""Operators in functions that ``torch.func`` transforms: right, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import vivit_linop as vl
from tests.cases import mlp
from tests.pairs import pairwise

LOSS = nn.CrossEntropyLoss()
DELTA = torch.tensor(0.3, dtype=torch.float64)


def risk() -> vl.EmpiricalRisk:
    torch.manual_seed(0)
    net = mlp(3, 4, 3).double()
    return vl.EmpiricalRisk(net, LOSS, (torch.rand(5, 3).double(), torch.arange(5) % 3))


SIZE = risk().num_params
VECTOR = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
UNIT = torch.eye(SIZE, dtype=torch.float64)
G = vl.GGN(risk()).to_dense()

Function = Callable[[Tensor], Tensor]
TRANSFORMS: dict[str, Callable[[Function], Tensor]] = {
    "grad": lambda f: grad(lambda x: f(x).sin().sum())(VECTOR),
    "jvp": lambda f: jvp(f, (VECTOR,), (VECTOR.cos(),))[1],
    "vjp": lambda f: vjp(f, VECTOR)[1](f(VECTOR).cos())[0],
    "jacrev": lambda f: jacrev(f)(VECTOR),
    "jacfwd": lambda f: jacfwd(f)(VECTOR),
    "vmap": lambda f: vmap(f)(torch.stack([VECTOR, VECTOR.sin()])),
    "hessian": lambda f: hessian(lambda x: f(x).sin().sum())(VECTOR),
}
OPERATORS: dict[str, Callable[[vl.EmpiricalRisk], Any]] = {
    "GGN": vl.GGN,
    "Jacobian": vl.Jacobian,
    "Vᵀ": lambda risk: vl.GGNFactor(risk).T,
    "Hessian": vl.Hessian,
    "U Uᵀ": vl.EmpiricalFisher,
}


@pytest.mark.parametrize(
    ("transform", "name", "used"), pairwise(TRANSFORMS, OPERATORS, [False, True])
)
def test_products_are_transformed(transform: str, name: str, used: bool) -> None:
    op, way = OPERATORS[name](risk()), TRANSFORMS[transform]
    matrix = OPERATORS[name](risk()).to_dense()
    if used:
        op @ VECTOR, op @ UNIT
    found = way(lambda x: op @ x + (op @ VECTOR).cos())
    torch.testing.assert_close(
        found, way(lambda x: matrix @ x + (matrix @ VECTOR).cos())
    )
    torch.testing.assert_close(op @ UNIT, matrix)


PASSES: dict[str, Callable[[vl.EmpiricalRisk], Tensor]] = {
    "diagonal": lambda risk: vl.GGN(risk).diagonal(),
    "K": lambda risk: vl.GGN(risk).gram.to_dense(),
    "eigenvalues": lambda risk: vl.GGN(risk).eigvalsh(),
    "U": lambda risk: vl.PerSampleGradients(risk).to_dense(),
    "gradient": lambda risk: risk.gradient(),
    "KFAC": lambda risk: vl.KFAC(risk, variant="exact").to_dense(),
    "determinant": lambda risk: (vl.GGN(risk) + DELTA * vl.Identity(SIZE)).logdet(),
}


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("name", PASSES)
def test_passes_over_data_are_refused(name: str, transform: str) -> None:
    """Ordinary derivatives are zero there; nothing of it is kept."""
    use, same = PASSES[name], risk()
    with pytest.raises(ValueError, match=r"torch\.func: a pass over the data"):
        TRANSFORMS[transform](lambda x: x * use(same).sum())
    torch.testing.assert_close(use(same), use(risk()))


TRACERS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "jit.trace": lambda f: torch.jit.trace(f, VECTOR, check_trace=False),
    "export": lambda f: torch.export.export(Called(f), (VECTOR,)),
    "fake tensors": lambda f: _among_fakes(lambda: f(VECTOR)),
}


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _among_fakes(function: Callable[[], Tensor]) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return function()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("name", "tracer"),
    [(name, tracer) for tracer in TRACERS for name in ("gradient", "U", "J")]
    + [(name, tracer) for tracer in [*TRACERS][1:] for name in ("K", "G", "H")],
)
def test_tracers_are_refused(name: str, tracer: str) -> None:
    """What they record has no values, and must not be what is kept."""
    same = risk()
    makes = {"G": vl.GGN, "J": vl.Jacobian, "H": vl.Hessian}

    def use(risk: vl.EmpiricalRisk, x: Tensor = VECTOR) -> Tensor:
        return makes[name](risk) @ x if name in makes else PASSES[name](risk) * x.sum()

    with pytest.raises(ValueError, match=r"torch\.jit\.trace, torch\.export, Fake"):
        TRACERS[tracer](lambda x: use(same, x))
    torch.testing.assert_close(use(same), use(risk()))


def test_what_is_made_of_products() -> None:
    H = vl.Hessian(risk())
    expected = vl.Hessian(risk()).to_dense().diagonal()
    for _ in range(2):
        found = grad(lambda x: (x * H.diagonal()).sum())(VECTOR)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(H.diagonal(), expected)


def warm() -> vl.GGN:
    """The GGN, with K known."""
    op = vl.GGN(risk())
    op.gram.to_dense()
    return op


SCALARS: dict[str, tuple[Callable[[Any, Any, Tensor], Any], Callable[..., Any]]] = {
    "determinant": (
        lambda G, I, d: (G + d * I).logdet(),
        lambda G, I, d: (G + d * I).logdet(),
    ),
    "trace": (
        lambda G, I, d: (G + d * I).inv().trace(),
        lambda G, I, d: (G + d * I).inverse().trace(),
    ),
    "scaled": (
        lambda G, I, d: (d * G) @ VECTOR,
        lambda G, I, d: (d * G) @ VECTOR,
    ),
    "both": (
        lambda G, I, d: (d * G + I) @ (d.exp() * VECTOR),
        lambda G, I, d: (d * G + I) @ (d.exp() * VECTOR),
    ),
    "a prior": (
        lambda G, I, d: (G + vl.Diagonal(d.sin() * VECTOR)) @ VECTOR,
        lambda G, I, d: (G + (d.sin() * VECTOR).diag()) @ VECTOR,
    ),
    "eigenvalues": (
        lambda G, I, d: (G + d * I).eigvalsh()[-3:],
        lambda G, I, d: torch.linalg.eigvalsh(G + d * I)[-3:],
    ),
}


@pytest.mark.parametrize("name", SCALARS)
def test_derivatives_in_numbers(name: str) -> None:
    op, unit = warm(), vl.Identity(SIZE)
    of_operators, dense = SCALARS[name]
    found = jvp(lambda d: of_operators(op, unit, d), (DELTA,), (DELTA.exp(),))
    torch.testing.assert_close(
        found, jvp(lambda d: dense(G, UNIT, d), (DELTA,), (DELTA.exp(),))
    )
    found = grad(lambda d: of_operators(op, unit, d).sin().sum())(DELTA)
    torch.testing.assert_close(
        found, grad(lambda d: dense(G, UNIT, d).sin().sum())(DELTA)
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(DELTA, DELTA.exp())
        tangent = forward_ad.unpack_dual(of_operators(op, unit, dual)).tangent
        expected = forward_ad.unpack_dual(dense(G, UNIT, dual)).tangent
        assert tangent is not None and expected is not None
    torch.testing.assert_close(tangent, expected)


def test_entries_in_a_batch() -> None:
    op = warm()
    rows = torch.stack([VECTOR, VECTOR.square()])
    found = vmap(lambda p: (op + vl.Diagonal(p)) @ VECTOR)(rows)
    torch.testing.assert_close(found, G @ VECTOR + rows * VECTOR)
    found = vmap(lambda p: vl.Dense(p.outer(VECTOR)) @ VECTOR)(rows)
    torch.testing.assert_close(found, rows * VECTOR.square().sum())
