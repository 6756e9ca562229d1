"""Operators inside of a function that the caller compiles: the graph breaks there."""

import functools
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.pairs import in_turn

pytestmark = pytest.mark.host("graphs of the compiler")

BACKENDS = ["eager", "aot_eager"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def risk():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = torch.rand(6, 4).double(), torch.randint(3, (6,))
    return vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)


FUNCTIONS = {
    "product": lambda G, V, I, v: v - 0.1 * (G @ v),
    "from the left": lambda G, V, I, v: (v + 1) @ G,
    "adjoint": lambda G, V, I, v: (V.T @ (2 * v)).sum() * v,
    "SciPy's name": lambda G, V, I, v: G.matvec(v) * 2,
    "expression": lambda G, V, I, v: (2 * (G @ G) - G / 3 + I) @ v * 2,
    "inverse": lambda G, V, I, v: v - (G + 0.1 * I).inv() @ v,
    "verbs": lambda G, V, I, v: G.diagonal() * (v - (G + 0.1 * I).solve(v)),
    "matrix": lambda G, V, I, v: G @ torch.stack([v, 2 * v], dim=1),
    "integers": lambda G, V, I, v: G @ torch.ones_like(v, dtype=torch.long) + v,
}


@pytest.mark.parametrize(("name", "backend"), in_turn(FUNCTIONS, BACKENDS))
def test_values_and_gradients(name, backend, risk):
    G, V = vl.GGN(risk), vl.GGNFactor(risk)
    unit = vl.Identity(G.shape[0])

    def function(v):
        return FUNCTIONS[name](G, V, unit, v)

    compiled = torch.compile(function, backend=backend)
    x = torch.rand(G.shape[0]).double()
    for _ in range(2):
        torch.testing.assert_close(compiled(x), function(x))
    results = []
    for f in (function, compiled):
        v = x.clone().requires_grad_()
        f(v).square().sum().backward()
        results.append(v.grad)
    torch.testing.assert_close(*results)


@every_backend
def test_operators_change_from_call_to_call(backend, risk):
    x = torch.rand(5).double()
    compiled = torch.compile(lambda op, v: v + op @ v, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        A = torch.rand(5, 5).double()
        for op, dense in (
            (vl.Dense(A), A),
            (vl.Dense(A).T, A.T),
            (vl.Diagonal(A[0]), A[0].diag()),
            (vl.Kronecker(A), A),
        ):
            torch.testing.assert_close(compiled(op, x), x + dense @ x)


def parts():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return net, nn.CrossEntropyLoss(), (torch.rand(6, 4).double(), torch.arange(6) % 3)


# The net of one of them is made inside too; to trace that takes longer than the rest.
PARTS = parts()
MADE_INSIDE = {
    "net and risk": lambda risk: vl.GGN(vl.EmpiricalRisk(*parts())),
    "its parts": lambda risk: vl.Hessian(*PARTS),
    "inputs": lambda risk: vl.Jacobian(PARTS[0], PARTS[2][0]),
    "KFAC": lambda risk: vl.KFAC(risk, variant="exact"),
    "EKFAC": lambda risk: vl.EKFAC(risk, variant="exact"),
    "KFRA": vl.KFRA,
    "positive curvature": lambda risk: vl.PositiveCurvatureHessian(
        risk, blocks="module"
    ),
    "other parameters": lambda risk: vl.GGN(
        risk.at({name: p + 0.1 for name, p in risk.params.items()})
    ),
    "some parameters": lambda risk: vl.GGN(risk.over(["0.weight"])),
    "some samples": lambda risk: vl.GGN(risk.subset([0, 2])),
    "other data": lambda risk: vl.GGN(risk.on(PARTS[2])),
}


@pytest.mark.parametrize("name", MADE_INSIDE)
def test_what_is_made_inside(name, risk):
    make = MADE_INSIDE[name]
    dense = make(risk).to_dense()
    x = torch.linspace(-1.0, 1.0, dense.shape[1]).double()
    compiled = torch.compile(lambda v: v.sum() + make(risk) @ v, backend="eager")
    torch.testing.assert_close(compiled(x), x.sum() + dense @ x)


@every_backend
def test_arrays(backend):
    A = vl.Dense(torch.arange(9.0).reshape(3, 3).double())
    compiled = torch.compile(lambda v: v - A @ v, backend=backend)
    x = torch.ones(3).double().numpy()
    assert (compiled(x) == x - A @ x).all()


def squares(output, target):
    return (output - target).square().sum(1).mean()


def doubled(function):
    """What it makes has the name of a loss of torch, and is another one."""

    @functools.wraps(function)
    def decorated(*given):
        return 2.0 * function(*given)

    return decorated


# With what is compiled when it is called.
LOSSES = {
    "of torch": (lambda: torch.compile(F.mse_loss), None, nn.MSELoss(), 1.0),
    "of torch, by classes": (
        lambda: torch.compile(F.cross_entropy),
        None,
        nn.CrossEntropyLoss(),
        1.0,
    ),
    "with options": (
        lambda: functools.partial(torch.compile(F.cross_entropy), label_smoothing=0.1),
        None,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        1.0,
    ),
    "of one's own": (lambda: torch.compile(squares), "mean", nn.MSELoss(), 3.0),
    "a module": (lambda: torch.compile(nn.HuberLoss()), None, nn.HuberLoss(), 1.0),
    "decorated": (lambda: doubled(F.mse_loss), "mean", nn.MSELoss(), 2.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_losses_are_what_was_compiled(name):
    loss, reduction, plain, factor = LOSSES[name]
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    X, y = torch.rand(6, 4).double(), torch.arange(6) % 3
    y = y if "classes" in name or "options" in name else torch.rand(6, 3).double()
    risk = vl.EmpiricalRisk(net, loss(), (X, y), reduction=reduction)
    value = factor * plain(net(X), y)
    slopes = torch.autograd.grad(value, list(net.parameters()))
    torch.testing.assert_close(risk.value(), value.detach())
    torch.testing.assert_close(risk.gradient(), risk.flatten(slopes))
    outputs = net(X).detach()
    H = torch.autograd.functional.hessian(lambda f: factor * plain(f, y), outputs)
    torch.testing.assert_close(vl.LossHessian(risk).to_dense(), H.reshape(18, 18))


def test_the_compiler_is_not_imported():
    code = (
        "import sys, torch, vivit_linop as vl; "
        "op = vl.Dense(torch.eye(2)); (2 * op + op).inv() @ torch.ones(2); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
