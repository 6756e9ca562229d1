"""Backends for laplace-torch against its own, in its own API, and dense matrices."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests.pairs import pairwise

BACKENDS = "vivit_linop.interop.laplace"
D64 = torch.float64


def test_without_laplace_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "laplace", None)
    monkeypatch.delitem(sys.modules, BACKENDS, raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vivit-linop\[lap"):
        importlib.import_module(BACKENDS)


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """Some backends of laplace-torch compute in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def data(likelihood: str) -> TensorDataset:
    torch.manual_seed(0)
    X = torch.randn(18, 5, dtype=D64)
    if likelihood == "classification":
        return TensorDataset(X, torch.arange(18) % 3)
    return TensorDataset(X, torch.randn(18, 3, dtype=D64))


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


class Scaled(nn.Module):
    """A net with a parameter of its own, which BackPACK and curvlinops do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = mlp(), nn.Parameter(torch.ones(3, dtype=D64))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x) * self.scale
        return result


def fitted(
    backend: type, likelihood: str, where: str, structure: str, **options: Any
) -> Any:
    laplace = pytest.importorskip("laplace")
    net = options.pop("net", mlp)()
    la = laplace.Laplace(net, likelihood, where, structure, backend=backend, **options)
    la.fit(DataLoader(data(likelihood), batch_size=9, shuffle=True))
    return la


def ours(name: str) -> Any:
    pytest.importorskip("laplace")
    return getattr(importlib.import_module(BACKENDS), name)


def theirs(name: str) -> Any:
    return getattr(pytest.importorskip("laplace.curvature"), name)


def matrix(la: Any) -> Tensor:
    precision = la.posterior_precision
    return precision if isinstance(precision, Tensor) else precision.to_matrix()


THEIRS = {
    "LinopGGN": ["BackPackGGN", "CurvlinopsGGN"],
    "LinopEF": ["BackPackEF", "CurvlinopsEF"],
}


@pytest.mark.parametrize(
    ("structure", "mine", "where", "likelihood"),
    pairwise(
        ["full", "kron", "diag"],
        THEIRS,
        ["all", "last_layer"],
        ["classification", "regression"],
    ),
)
def test_agrees_with_its_own(
    structure: str, mine: str, where: str, likelihood: str
) -> None:
    X, _ = data(likelihood).tensors
    la = fitted(ours(mine), likelihood, where, structure)
    # Not possible there, or (last layer, diagonal) not the Fisher of that layer.
    skipped = {("BackPackEF", "kron"), ("CurvlinopsEF", "diag")}
    for name in THEIRS[mine]:
        if (name, structure) in skipped:
            continue
        other = fitted(theirs(name), likelihood, where, structure)
        for found, expected in [
            (matrix(la), matrix(other)),
            (la.loss, other.loss),
            (la.log_marginal_likelihood(), other.log_marginal_likelihood()),
            (la(X)[0], other(X)[0]),
            (la(X)[1], other(X)[1]),
        ]:
            torch.testing.assert_close(
                torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-9, atol=1e-11
            )


def dense_ggn(net: nn.Module, likelihood: str) -> Tensor:
    """Σ_n J_nᵀ H_n J_n by autograd, sample by sample."""
    X, _ = data(likelihood).tensors
    names, params = zip(*net.named_parameters(), strict=True)
    total: Any = 0.0
    for x in X:

        def outputs(*values: Tensor, x: Tensor = x) -> Tensor:
            state = dict(zip(names, values, strict=True))
            result: Tensor = torch.func.functional_call(net, state, x[None])[0]
            return result

        f = outputs(*params)
        J = torch.cat(
            [
                j.flatten(1)
                for j in torch.autograd.functional.jacobian(outputs, tuple(params))
            ],
            dim=1,
        )
        p = f.detach().softmax(0)
        H = p.diag() - p.outer(p) if likelihood == "classification" else torch.eye(3)
        total = total + J.T @ H.to(J) @ J
    result: Tensor = total
    return result


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_nets_that_others_refuse(likelihood: str) -> None:
    la = fitted(ours("LinopGGN"), likelihood, "all", "full", net=Scaled)
    truth = dense_ggn(Scaled(), likelihood)
    torch.testing.assert_close(la.H, truth)
    diagonal = fitted(ours("LinopGGN"), likelihood, "all", "diag", net=Scaled).H
    torch.testing.assert_close(diagonal, truth.diagonal())
    kron = fitted(ours("LinopGGN"), likelihood, "all", "kron", net=Scaled).H
    names = [name for name, _ in Scaled().named_parameters()]
    place = slice(0, 3) if names[0] == "scale" else slice(-3, None)
    torch.testing.assert_close(kron.to_matrix()[place, place], truth[place, place])


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_low_rank(likelihood: str) -> None:
    net = mlp()
    low_rank = ours("LowRankLaplace")
    la = low_rank(net, likelihood, backend_kwargs={"low_rank": 6})
    la.fit(DataLoader(data(likelihood), batch_size=9))
    truth = dense_ggn(net, likelihood)
    evecs, evals = la.H
    torch.testing.assert_close(evals, torch.linalg.eigvalsh(truth)[-6:])
    torch.testing.assert_close(truth @ evecs, evals * evecs, rtol=1e-8, atol=1e-10)
    X, _ = data(likelihood).tensors
    full = fitted(ours("LinopGGN"), likelihood, "all", "full", prior_precision=1e4)
    many = low_rank(
        mlp(), likelihood, prior_precision=1e4, backend_kwargs={"low_rank": 999}
    )
    many.fit(DataLoader(data(likelihood), batch_size=9))
    torch.testing.assert_close(many(X)[0], full(X)[0], rtol=1e-8, atol=1e-10)


def test_subnetworks() -> None:
    chosen = torch.tensor([0, 3, 20, 30], device="cpu")  # a LongTensor, they say
    options: Any = {"subnetwork_indices": chosen}
    for structure in ("full", "diag"):
        la = fitted(
            ours("LinopGGN"), "classification", "subnetwork", structure, **options
        )
        other = fitted(
            theirs("BackPackGGN"), "classification", "subnetwork", structure, **options
        )
        torch.testing.assert_close(la.H, other.H)
        X, _ = data("classification").tensors
        torch.testing.assert_close(la(X), other(X))


def test_jacobians_and_gradients() -> None:
    """Those of torch.func; differentiable in the input by these."""
    X, y = data("classification").tensors
    backend = ours("LinopEF")(mlp(), "classification")
    plain = theirs("EFInterface")(mlp(), "classification")
    for found, expected in [
        (backend.jacobians(X), plain.jacobians(X)),
        (backend.gradients(X, y), plain.gradients(X, y)),
    ]:
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
        assert not found[0].requires_grad
    own = X.clone().requires_grad_()
    assert backend.jacobians(own, enable_backprop=True)[0].requires_grad


def test_inputs_in_a_dict_and_several_batches() -> None:
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            result: Tensor = self.net(batch["x"])
            return result

    X, y = data("classification").tensors
    for method in ("full", "diag"):
        plain, mapping = (
            getattr(ours("LinopGGN")(net, "classification"), method)(x, y)
            for net, x in ((mlp(), X), (Dict(), {"x": X, "labels": y}))
        )
        torch.testing.assert_close(mapping, plain)


@pytest.mark.parametrize("where", ["all", "last_layer"])
def test_a_net_is_looked_at_once(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers, and that samples are independent, on the largest batch so far."""
    from vivit_linop.net import certified
    from vivit_linop.risk import first_pass

    counts = {"_run_on_few": 0, "independent_samples": 0}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def count(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, count)

    counted(certified, "_run_on_few")
    counted(first_pass, "independent_samples")
    seen = []
    for batch_size in (18, 6, 7):
        counts.update(_run_on_few=0, independent_samples=0)
        loader = DataLoader(data("classification"), batch_size=batch_size)
        for structure in ("kron", "diag"):
            la = pytest.importorskip("laplace").Laplace(
                mlp(), "classification", where, structure, backend=ours("LinopGGN")
            )
            la.fit(loader)
        seen.append(counts.copy())
    assert seen[0]["independent_samples"] == 2 and seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("change", ["step", "dropout", "attribute"])
def test_batches_follow_from_the_first_while_the_model_stays(change: str) -> None:
    """After a change the backend looks at the model anew, and refuses what it must."""
    net = nn.Sequential(mlp(), nn.Dropout(0.5)).eval()
    backend = ours("LinopGGN")(net, "classification")
    X, y = data("classification").tensors
    backend.diag(X[:9], y[:9])
    with pytest.raises(ValueError, match="NaN or Inf for sample 2"):
        backend.diag(X.where(torch.arange(18)[:, None] != 11, torch.nan)[9:], y[9:])
    with pytest.raises(ValueError, match="class indices must lie"):
        backend.diag(X[9:], y[9:] + 1)
    if change == "dropout":
        net.train()
        with pytest.raises(ValueError, match="drops units at random"):
            backend.diag(X[9:], y[9:])
        return
    if change == "step":
        with torch.no_grad():
            net[0][2].weight.mul_(2.0)
    else:
        net[0][1] = nn.Sigmoid()
    loss, found = backend.diag(X[9:], y[9:])
    truth = theirs("CurvlinopsGGN")(net, "classification").full(X[9:], y[9:], N=9)
    assert torch.allclose(loss, nn.functional.cross_entropy(net(X[9:]), y[9:]) * 9)
    assert torch.allclose(found, truth[1].diagonal())


def test_samples_that_are_mixed_are_refused_in_a_larger_batch() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            mixed = x.mean(0, keepdim=True) if len(x) > 4 else 0.0
            result: Tensor = self.net(x + mixed)
            return result

    X, y = data("classification").tensors
    backend = ours("LinopGGN")(Mixing(), "classification")
    backend.diag(X[:4], y[:4])
    with pytest.raises(ValueError, match="samples"):
        backend.diag(X, y)


def test_monte_carlo() -> None:
    X, y = data("classification").tensors
    exact = ours("LinopGGN")(mlp(), "classification")
    random = ours("LinopGGN")(
        mlp(), "classification", stochastic=True, num_samples=4000
    )
    torch.manual_seed(0)
    for structure in ("full", "diag"):
        truth = getattr(exact, structure)(X, y)[1]
        found = getattr(random, structure)(X, y)[1]
        assert (found - truth).norm() < 0.1 * truth.norm()
    truth = exact.kron(X, y, N=18)[1].to_matrix()
    assert (random.kron(X, y, N=18)[1].to_matrix() - truth).norm() < 0.1 * truth.norm()


def test_the_model_is_a_guest() -> None:
    net = mlp().eval()
    before = copy.deepcopy(net.state_dict())
    la = pytest.importorskip("laplace").Laplace(
        net, "classification", "all", "kron", backend=ours("LinopGGN")
    )
    la.fit(DataLoader(data("classification"), batch_size=9))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(vars(module).get("_forward_hooks") for module in net.modules())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.last = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.table(x).mean(1))
        return result


def test_factors_of_an_embedding() -> None:
    """That of the inputs stands first: a mean over samples, also of several batches."""
    X, y = torch.arange(24).reshape(12, 2) % 7, torch.arange(12) % 3
    la = pytest.importorskip("laplace").Laplace(
        Words(), "classification", "all", "kron", backend=ours("LinopGGN")
    )
    la.fit(DataLoader(TensorDataset(X, y), batch_size=4))
    risk = vl.EmpiricalRisk(Words(), nn.CrossEntropyLoss(reduction="sum"), (X, y))
    whole = vl.KFAC(risk, variant="exact").to_dense()
    expected = whole + torch.eye(len(whole))
    torch.testing.assert_close(la.posterior_precision.to_matrix(), expected)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 2, groups=2),
        nn.ConvTranspose2d(2, 3, 2),
        nn.ConvTranspose2d(2, 2, 2),
    ],
)
def test_factors_without_a_place(layer: nn.Module) -> None:
    net = nn.Sequential(copy.deepcopy(layer), nn.Flatten()).double()
    X = torch.rand(6, 2, 3, 3)
    backend = ours("LinopGGN")(net, "classification")
    with pytest.raises(ValueError, match=r"factors of '0\.weight'"):
        backend.kron(X, torch.zeros(6).long(), N=6)


def test_convolutions() -> None:
    def net() -> nn.Module:
        torch.manual_seed(1)
        layers = nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
        return nn.Sequential(*layers)

    X, y = torch.rand(9, 1, 3, 3), torch.arange(9) % 3
    loader = DataLoader(TensorDataset(X, y), batch_size=5)
    for structure in ("full", "diag", "kron"):
        found = []
        for backend in (ours("LinopGGN"), theirs("CurvlinopsGGN")):
            if (backend, structure) == (theirs("CurvlinopsGGN"), "diag"):
                backend = theirs("BackPackGGN")
            la = pytest.importorskip("laplace").Laplace(
                net(), "classification", "all", structure, backend=backend
            )
            la.fit(loader)
            found.append(matrix(la) if structure != "kron" else la.H_facs)
        mine, other = found
        if structure == "kron":  # the bias of a convolution is not approximated here
            for k in (0, 2, 3):
                for a, b in zip(mine.kfacs[k], other.kfacs[k], strict=True):
                    torch.testing.assert_close(a, b)
        else:
            torch.testing.assert_close(mine, other)


def test_predictive_is_that_of_our_expressions() -> None:
    """laplace-torch's functional variance is J Σ Jᵀ of our posterior covariance."""
    la = fitted(ours("LinopGGN"), "regression", "all", "full", prior_precision=2.0)
    X, y = data("regression").tensors
    risk = vl.EmpiricalRisk(mlp(), nn.MSELoss(reduction="sum"), (X, y))
    Sigma = (0.5 * vl.GGN(risk) + 2.0 * vl.Identity(risk.num_params)).inv()
    J = vl.Jacobian(risk)
    covariance = (J @ Sigma @ J.T).to_dense()
    n = torch.arange(18)
    blocks = covariance.reshape(18, 3, 18, 3)[n, :, n, :]
    torch.testing.assert_close(la(X)[1], blocks)


@pytest.mark.parametrize("size", [1, 2])
def test_jacobians_of_few_inputs_follow_the_model(size: int) -> None:
    """One after the other, also after a step; those of torch.func."""
    net = mlp()
    backend = ours("LinopGGN")(net, "classification")
    plain = theirs("GGNInterface")(net, "classification")
    X, y = data("classification").tensors
    for change in (1.0, 2.0):
        with torch.no_grad():
            net[2].weight.mul_(change)
        for x in X[:6].split(size):
            for found, expected in zip(
                backend.jacobians(x), plain.jacobians(x), strict=True
            ):
                torch.testing.assert_close(found, expected)
        backend.diag(X, y)  # of another loss


def test_a_last_layer_that_changes_is_seen() -> None:
    """Its numbers and hooks of the user's; laplace-torch's own hook stays."""
    utils = pytest.importorskip("laplace.utils")
    net = mlp()
    extractor = utils.FeatureExtractor(net, last_layer_name="2")
    backend = ours("LinopGGN")(extractor, "classification", last_layer=True)
    X, y = data("classification").tensors
    recording = set(net[2]._forward_hooks)

    def truth() -> Tensor:
        copied = copy.deepcopy(net)
        features = copied[1](copied[0](X)).detach()
        p = (copied(X)).softmax(1).detach()
        H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        factor = 9.0 if net[2]._forward_hooks.keys() - recording else 1.0
        blocks = torch.einsum("ni,ncd->cid", features.square(), H)
        return factor * torch.cat(
            [blocks.diagonal(dim1=0, dim2=2).T.flatten(), H.diagonal(0, 1, 2).sum(0)]
        )

    torch.testing.assert_close(backend.diag(X, y)[1], truth())
    with torch.no_grad():
        net[2].weight.mul_(2.0)
    torch.testing.assert_close(backend.diag(X, y)[1], truth())
    torch.testing.assert_close(backend.diag(X[:5], y[:5])[0] > 0, torch.tensor(True))
    net[2].register_forward_hook(lambda *given: 3.0 * given[-1])
    torch.testing.assert_close(backend.diag(X, y)[1], truth())
    assert recording < set(net[2]._forward_hooks)
