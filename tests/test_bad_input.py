"""Wrong arguments of operators and verbs are refused, by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.bad_cases import CE, CLASSES, X, net, refused, risk_of, toy
from tests.cases import Lambda, mlp

# Vectors ------------------------------------------------------------------------------

CONSTRUCTORS = [
    vl.Jacobian,
    vl.LossHessian,
    vl.GGN,
    vl.GGNFactor,
    vl.PerSampleGradients,
    vl.EmpiricalFisher,
    vl.Hessian,
]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_arguments_of_constructors(constructor: Any) -> None:
    risk = toy()
    refused("risk", lambda: constructor(net()), TypeError)
    refused("risk", lambda: constructor(net(), CE), TypeError)
    refused("risk", lambda: constructor(risk, CE), TypeError)
    refused("risk", lambda: constructor(risk, data=(X, CLASSES)), TypeError)
    refused("risk", lambda: constructor(risk, params=[]), TypeError)
    refused("(risk|model)", lambda: constructor(None, CE, (X, CLASSES)), TypeError)


# Dampings, eigenpairs, blocks ---------------------------------------------------------


def test_blocks() -> None:
    model = net()
    G = vl.GGN(model, CE, (X, CLASSES))
    p = list(model.parameters())
    foreign = nn.Parameter(torch.zeros(3))
    for bad in (
        "layer",
        "parameters",
        [],
        [p[:2]],
        [p, p[:1]],
        [p[:2], p[1:]],
        [p[:2], [*p[2:], foreign]],
        [p[:2], [], p[2:]],
        [{"lr": 0.1}],
        [{"params": p[:3]}],
        [[0, 1, 2, 3]],
        3,
        None,
    ):
        refused("blocks", lambda b=bad: G.block_diagonal(b))


# Subsets, vectors of parameters -------------------------------------------------------


def test_flatten_and_unflatten() -> None:
    risk = toy()
    tensors = [torch.zeros_like(p) for p in risk.params.values()]
    refused("tensors", lambda: risk.flatten(tensors[:-1]), ValueError)
    refused("tensors", lambda: risk.flatten([*tensors, tensors[0]]), ValueError)
    refused("tensors", lambda: risk.flatten(tensors[::-1]), ValueError)
    refused("tensors", lambda: risk.flatten({"0.weight": tensors[0]}), ValueError)
    mixed = [tensors[0].expand(2, 5, 4), *tensors[1:]]
    refused("tensors", lambda: risk.flatten(mixed), ValueError)
    refused("vec", lambda: risk.unflatten(torch.zeros(42)), ValueError)
    refused("vec", lambda: risk.unflatten(torch.zeros(2, 43)), ValueError)
    refused("vec", lambda: risk.unflatten(torch.zeros(43, 2, 1)), ValueError)


# Analyses -----------------------------------------------------------------------------


def test_directions() -> None:
    risk = toy()
    E = torch.eye(43).double()[:, :2]
    pairs = vl.GGN(risk).eigh(k=2)
    small = vl.EmpiricalRisk(mlp(4, 3), CE, (X, CLASSES))
    for function in (
        vl.directional_derivatives,
        lambda r, d: vl.damped_newton_step(r, d, 1.0),
    ):
        refused("directions", lambda f=function: f(risk, E[:, 0]), ValueError)
        refused("directions", lambda f=function: f(risk, E.T), ValueError)
        refused("directions", lambda f=function: f(risk, E[:42]), ValueError)
        refused("directions", lambda f=function: f(risk, E[None]), ValueError)
        refused("directions", lambda f=function: f(risk, E.long()), TypeError)
        refused("directions", lambda f=function: f(risk, E + 0j), TypeError)
        refused("directions", lambda f=function: f(risk, E.numpy()), TypeError)
        refused("directions", lambda f=function: f(risk, vl.GGN(risk)), TypeError)
        refused("directions", lambda f=function: f(risk, None), TypeError)
        refused("directions", lambda f=function: f(small, pairs), ValueError)
        for wrong in (net(), None):
            refused("risk", lambda f=function, w=wrong: f(w, pairs), TypeError)


def test_curvature_risk_of_other_parameters() -> None:
    risk = toy()
    other = vl.EmpiricalRisk(mlp(4, 3), CE, (X, CLASSES))
    E = torch.eye(43).double()[:, :2]
    for directions in (E, vl.GGN(risk).eigh(k=2)):
        refused(
            "curvature_risk",
            lambda d=directions: vl.directional_derivatives(risk, d, other),
            ValueError,
        )
        refused(
            "curvature_risk",
            lambda d=directions: vl.damped_newton_step(risk, d, 1.0, other),
            ValueError,
        )


def test_pairs_of_other_parameters_of_as_many_entries() -> None:
    # D is the same, the parameters are not: their vectors mean nothing here.
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first = vl.EmpiricalRisk(mlp(4, 3), CE, (X, CLASSES))
        second = vl.EmpiricalRisk(
            Lambda(
                lambda m, x: x @ m.w[:4, :3], w=nn.Parameter(torch.ones(5, 3))
            ).double(),
            CE,
            (X, CLASSES),
        )
    assert first.num_params == second.num_params
    pairs = vl.GGN(first).eigh(k=2)
    with pytest.raises(ValueError):
        vl.directional_derivatives(second, pairs)


def test_dampings() -> None:
    risk = toy()
    pairs = vl.GGN(risk).eigh(k=2)

    def step(damping: Any, directions: Any = pairs) -> Callable[[], Tensor]:
        return lambda: vl.damped_newton_step(risk, directions, damping)

    for bad in ("1", None, [1.0, 2.0], True, 1j):
        refused("damping", step(bad), TypeError)
    for bad in (float("nan"), -10.0):
        refused("damping", step(bad), ValueError)
    refused("damping", step(lambda *_: torch.tensor([-10.0, 1.0])), ValueError)
    refused("damping", step(lambda *_: torch.tensor([float("nan"), 1.0])), ValueError)
    refused("damping", step(lambda *_: torch.ones(3)), ValueError)
    refused("damping", step(lambda *_: torch.ones(2, 1)), ValueError)
    refused("damping", step(lambda *_: torch.ones(6, 2)), ValueError)
    refused("damping", step(lambda *_: torch.ones(2) + 0j))
    E = torch.eye(43).double()[:, :2]
    refused("damping", step(lambda *_: torch.ones(2), E), TypeError)
    # A direction without curvature needs damping.
    flat = torch.zeros(43, 1).double()
    flat[0] = 1.0
    model = Lambda(lambda m, x: m.f(x), a=nn.Parameter(torch.zeros(3)), f=mlp(4, 3))
    unused = vl.EmpiricalRisk(model.double(), CE, (X, CLASSES))
    direction = torch.eye(unused.num_params).double()[:, :1]
    refused(
        "damping", lambda: vl.damped_newton_step(unused, direction, 0.0), ValueError
    )


# Combining operators ------------------------------------------------------------------


def test_factors_of_other_parameters() -> None:
    U = vl.PerSampleGradients(toy())
    V = vl.GGNFactor(vl.EmpiricalRisk(mlp(4, 3), CE, (X, CLASSES)))
    with pytest.raises(ValueError):
        U.T @ V


def test_gram_matrix_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    net, X, y = nn.Linear(3, 4), torch.rand(10, 3), torch.randint(4, (10,))
    G = vl.GGN(net, nn.CrossEntropyLoss(), (X, y))
    G.eigvalsh()  # 3 columns a sample, 4 bytes an entry
    for factor in (vl.GGN(G.risk).factor, vl.PerSampleGradients(G.risk)):
        budget = 4 * factor.shape[1] ** 2 - 1
        monkeypatch.setattr(
            "vivit_linop.net.totals.free_memory", lambda _, free=budget: free
        )
        with pytest.raises(MemoryError, match=r"up to 9 samples.*eigh"):
            (factor.T @ factor).to_dense()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "norm",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm],
    ids=["hook", "parametrisation"],
)
def test_power_iterations(norm: Any, training: bool) -> None:
    """Vectors of an iteration are buffers, which each evaluation has as they were."""
    model = nn.Sequential(norm(nn.Linear(4, 3)), nn.Tanh()).double().train(training)
    if training and norm is nn.utils.spectral_norm:
        refused("model", risk_of(model), says="model.eval()")
        return
    risk = vl.EmpiricalRisk(model, CE, (X, CLASSES))
    other = copy.deepcopy(model)
    CE(other(X), CLASSES).backward()
    expected = torch.cat([param.grad.flatten() for param in other.parameters()])
    torch.testing.assert_close(risk.gradient(), expected)
    G = vl.GGN(risk)
    J = vl.Jacobian(G.risk)
    torch.testing.assert_close(
        G.to_dense(), J.to_dense().T @ (vl.LossHessian(G.risk) @ J.to_dense())
    )


def test_classes_and_single_samples() -> None:
    refused("loss", lambda: vl.GGN(net(), nn.MSELoss, (X, X)), TypeError, "MSELoss()")
    refused("model", lambda: vl.GGN(nn.Linear, CE, (X, CLASSES)), TypeError, "class")
    samples = list(zip(X, CLASSES, strict=True))
    refused("data", lambda: vl.GGN(net(), CE, samples), says="batches, not samples")


def test_what_a_model_reaches_and_changes() -> None:
    class Calls:
        """No module, so what it holds is not copied."""

        layer = nn.Linear(4, 3).double()

        def __call__(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
            return self.layer(x) * params["scale"]

    x = torch.ones(3).double()

    def ggn(memory: int | None) -> vl.GGN:
        return vl.GGN(Calls(), CE, (X, CLASSES), {"scale": x}, memory=memory)

    before = ggn(None) @ x
    again, kept = ggn(0), ggn(None)
    with torch.no_grad():
        Calls.layer.weight.add_(1.0)
    for G in (again, kept):
        refused("model", lambda G=G: G @ x, says="no module")
    assert not torch.allclose(ggn(None) @ x, before)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_are_multiplied(layout: torch.layout) -> None:
    H = vl.GGN(toy())
    eye = torch.eye(H.shape[1], dtype=H.torch_dtype)
    torch.testing.assert_close(H @ eye.to_sparse(layout=layout), H.to_dense())


@pytest.mark.parametrize(
    "model", [nn.LazyLinear(3), nn.Linear(4, 3, device="meta")], ids=["lazy", "meta"]
)
def test_parameters_without_values(model: nn.Module) -> None:
    refused("params", risk_of(model), ValueError, says="no values yet")
