"""KFAC and EKFAC do not depend on how the samples are cut into batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import Lambda

# Both find the positions of samples in the same way.
SPLITS = {
    vl.KFAC: [(1, 3), (1, 1, 2), (2, 2)],
    vl.EKFAC: [(3, 1), (2, 1, 1), (1, 1, 1, 1)],
}


def _attention(d: int, heads: int, T: int, token: int) -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(d, heads, 3, dropout=0.0, batch_first=True)
    net = Lambda(lambda self, X: self.layer(X)[:, token], layer=layer)
    return net, torch.randn(4, T, d)


def _samples_last() -> tuple[nn.Module, Tensor]:
    """The samples are on the third axis where the weight is used."""
    net = Lambda(
        lambda self, X: self.f(X.permute(1, 2, 0, 3)).tanh().sum((0, 1)),
        f=nn.Linear(3, 2),
    )
    return net, torch.randn(4, 3, 2, 3)


def _convolution_of_frames() -> tuple[nn.Module, Tensor]:
    """A convolution sees samples and frames on one axis."""
    net = Lambda(
        lambda self, X: (
            self.f(X.flatten(0, 1)).tanh().unflatten(0, X.shape[:2]).sum(1).flatten(1)
        ),
        f=nn.Conv1d(2, 2, 2),
    )
    return net, torch.randn(4, 2, 2, 3)


def _middle_token_of_time_first() -> tuple[nn.Module, Tensor]:
    """Rows are numbered t n + s; of three tokens the second alone is looked at."""
    net = Lambda(
        lambda self, X: self.g(
            self.f(X.transpose(0, 1).flatten(0, 1)).tanh()
        ).unflatten(0, (3, len(X)))[1],
        f=nn.Linear(3, 4),
        g=nn.Linear(4, 2),
    )
    return net, torch.randn(4, 3, 3)


def _routed() -> tuple[nn.Module, Tensor]:
    """A sample takes one of two ways; of single ones, a layer sees none."""

    def forward(self: Any, X: Tensor) -> Tensor:
        left = X.sum(1) > 0
        out = X.new_empty(len(X), 2)
        out[left], out[~left] = self.f(X[left]), self.g(X[~left])
        return out.tanh()

    net = Lambda(forward, f=nn.Linear(3, 2), g=nn.Linear(3, 2))
    return net, torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None] * torch.rand(4, 3)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{
        f"attention, width {d}, {heads} heads, token {token} of {T}": (
            lambda d=d, heads=heads, T=T, token=token: _attention(d, heads, T, token)
        )
        for d, heads, T, token in [
            (4, 2, 1, 0),
            (4, 2, 2, 1),
            (4, 2, 4, 3),
            (6, 1, 3, 1),
            (6, 3, 2, 0),
        ]
    },
    "samples last": _samples_last,
    "convolution of frames": _convolution_of_frames,
    "middle token": _middle_token_of_time_first,
    "routed": _routed,
}
# Where no batch of whatever size tells, the blocks are exact.
OPAQUE = ["convolution of frames"]


def built(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net, X = NETS[name]()
        net, X = net.double().eval(), X.double()
        return net, X, torch.randn_like(net(X)).detach()


@pytest.mark.parametrize("kind", [vl.KFAC, vl.EKFAC])
@pytest.mark.parametrize("name", NETS)
def test_splits_do_not_matter(name: str, kind: Any) -> None:
    net, X, y = built(name)
    given = {"variant": "exact", "weight_sharing": "expand"}
    whole = kind(net, nn.MSELoss(), (X, y), **given)
    # Each weight's use is told.
    matrices = sum(p.ndim > 1 for p in net.parameters())
    found = [b for b in whole.blocks if not isinstance(b, vl.Dense)]
    expected, unit = whole.to_dense(), torch.eye(whole.shape[0]).double()
    assert len(found) == (0 if name in OPAQUE else matrices) and expected.norm() > 0.01
    for sizes in SPLITS[kind]:
        data = list(zip(X.split(sizes), y.split(sizes), strict=True))
        cut = kind(net, nn.MSELoss(), data, **given)
        assert cut.names == whole.names
        error = (cut @ unit - expected).norm()
        assert error <= 1e-12 * expected.norm(), sizes


@pytest.mark.parametrize("name", [name for name in NETS if name not in OPAQUE])
def test_factors_are_those_of_hooks(name: str) -> None:
    """B and A of linear layers from all rows that they see, wherever samples are."""
    net, X, y = built(name)
    K = vl.KFAC(net, nn.MSELoss(), [(X[:1], y[:1]), (X[1:], y[1:])], variant="exact")
    blocks = dict(zip([names[0] for names in K.names], K.blocks, strict=True))
    layers = {
        name: layer
        for name, layer in net.named_modules()
        if type(layer) is nn.Linear  # not the one inside of attention
    }
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = given[0].detach().flatten(0, -2), output

        return hook

    for layer_name, layer in layers.items():
        layer.register_forward_hook(keep(layer_name))
    columns = (2 / y.numel()) ** 0.5 * net(X).flatten()
    assert outputs
    for layer_name, output in outputs.items():
        b = torch.stack(
            [torch.autograd.grad(c, output, retain_graph=True)[0] for c in columns]
        ).flatten(0, -2)
        a = inputs[layer_name]
        # A sample has as many positions as any other, or as in "routed", one or none.
        count = len(X) if name == "routed" else len(a)
        expected = torch.kron(b.T @ b, a.T @ a / count)
        got = blocks[f"{layer_name}.weight"].to_dense()
        assert (got - expected).norm() <= 1e-12 * expected.norm()


class Cancelled(nn.Module):
    """A norm of one feature hides what is before it, but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.RMSNorm(1), nn.Linear(1, 1))
        self.norm, self.unused = nn.RMSNorm(1), nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x).sin())


@pytest.mark.parametrize("kind", [vl.KFAC, vl.EKFAC])
@pytest.mark.parametrize("seed", range(6))
def test_layers_without_derivatives_have_no_curvature(kind: type, seed: int) -> None:
    torch.manual_seed(seed)
    net, X = Cancelled().double(), torch.randn(1, 2, 1).double()
    risk = vl.EmpiricalRisk(net, nn.MSELoss(), (X, torch.randn(1, 2, 1).double()))
    K = kind(risk, variant="exact")
    G = vl.GGN(risk)
    assert (K.diagonal() - G.diagonal()).abs().max() <= 1e-12
    assert K.diagonal()[-4:].abs().max() == 0.0  # of the layer that is not used


def _turned(self: Any, X: Tensor) -> Tensor:
    """Negative inputs meet the weight's rows in the opposite order."""
    if X.sum() > 0:
        return self.o(self.a(X).tanh())
    turned = nn.functional.linear(X, self.a.weight.flip(0)).flip(1)
    return self.o((turned + self.a.bias).tanh())


@pytest.mark.parametrize("kind", [vl.KFAC, vl.EKFAC])
def test_a_weight_that_some_batches_use_otherwise(kind: type[vl.KFAC]) -> None:
    """It has no factors on all samples, so the block is the GGN's own."""
    net = Lambda(_turned, a=nn.Linear(3, 4), o=nn.Linear(4, 3)).double()
    X, y = torch.rand(6, 3).double(), torch.randint(3, (6,))
    X[3:] *= -1
    batches = [*zip(X.split(3), y.split(3), strict=True)]
    K = kind(net, nn.CrossEntropyLoss(), batches, variant="exact")

    def outputs(weight: Tensor) -> Tensor:
        return net.o((X @ weight.T + net.a.bias).tanh())

    J = torch.func.jacrev(outputs)(net.a.weight).detach().flatten(2)
    p = outputs(net.a.weight).detach().softmax(1)
    H = (p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)) / len(X)
    assert not isinstance(K.blocks[0], vl.Kronecker)
    torch.testing.assert_close(K.blocks[0].to_dense(), (J.mT @ H @ J).sum(0))
