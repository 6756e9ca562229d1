"""Kronecker approximations of transposed convolutions, BackPACK's and ours."""

from typing import Any

import pytest
import torch
from backpack import extensions as bp
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests import backpack_peer
from tests.backpack_peer import peer_risk
from tests.comparing import close, draw
from vivit_linop.curvature.kfac import WEIGHT_SHARINGS
from vivit_linop.testing import check_operator

RTOL = 1e-10
TRANSPOSED = ["transposed_1d", "transposed_2d", "transposed_3d"]


# One sample at one output position: every form is the GGN's block -------------------


def _one_output(dims: int, inputs: int, outputs: int, bias: bool) -> vl.EmpiricalRisk:
    """The kernel covers the input, of which the padding leaves one output."""
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    with torch.random.fork_rng([]):
        torch.manual_seed(dims)
        net = nn.Sequential(
            kind(inputs, outputs, 2, padding=1, bias=bias),
            nn.Sigmoid(),
            kind(outputs, 2, 1),
            nn.Flatten(),
        ).double()
    return vl.EmpiricalRisk(
        net, nn.MSELoss(), (draw(1, inputs, *[2] * dims), torch.ones(1, 2).double())
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims, inputs, outputs", [(1, 2, 3), (2, 3, 3), (3, 3, 2)])
def test_one_output_is_exact(dims: int, inputs: int, outputs: int, bias: bool) -> None:
    risk = _one_output(dims, inputs, outputs, bias)
    exact = vl.GGN(risk).block_diagonal("parameter").to_dense()
    for sharing in WEIGHT_SHARINGS:
        for kind in (vl.KFAC, vl.EKFAC):
            K = kind(risk, variant="exact", weight_sharing=sharing)
            assert close(K.to_dense(), exact)
    for K in (vl.KFRA(risk), *(vl.from_backpack(risk, e) for e in (bp.KFLR(),))):
        assert close(K.to_dense(), exact)
        check_operator(K, exact)


# As BackPACK, and as the definition --------------------------------------------------


@pytest.mark.parametrize("name", TRANSPOSED)
def test_from_backpack(name: str) -> None:
    net = backpack_peer.run_on_net(name, "mean", bp.KFLR(), bp.KFAC())
    risk = peer_risk(name)
    expected = backpack_peer.from_factors(net, "kflr")
    K = vl.KFAC(risk, variant="exact", weight_sharing="backpack")
    unit = torch.eye(risk.num_params, dtype=torch.float64)
    damped = expected + 0.1 * unit
    for op in (
        K,
        vl.from_backpack(risk, bp.KFLR()),
        vl.from_backpack(net, "kflr"),
    ):
        assert close(op @ unit, expected)
        assert close(op.diagonal(), expected.diagonal())
        assert close(op.trace(), expected.trace())
        assert close(op.eigvalsh(), torch.linalg.eigvalsh(expected))
        plus = op + 0.1 * vl.Identity(risk.num_params)
        assert close(plus.inv() @ unit, torch.linalg.inv(damped))
        assert close(plus.logdet(), torch.logdet(damped))
        for root, truth in (
            (op.sqrt(), expected),
            (plus.sqrt(), damped),
            (plus.inv().sqrt(), torch.linalg.inv(damped)),
        ):
            matrix = root @ unit
            assert close(matrix @ matrix.T, truth)
        evals, evecs = op.eigh(k=3)
        assert (expected @ evecs - evecs * evals).norm() <= RTOL * evals.max()
    drawn = backpack_peer.from_factors(net, "kfac")
    assert close(vl.from_backpack(net, "kfac").to_dense(), drawn)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_other_quantities_have_the_parameters_axes(name: str) -> None:
    extensions = bp.DiagGGNExact(), bp.SqrtGGNExact(), bp.BatchGrad(), bp.DiagHessian()
    net = backpack_peer.run_on_net(name, "mean", *extensions)
    risk = peer_risk(name)
    G = vl.GGN(risk).to_dense()
    V = vl.from_backpack(net, "sqrt_ggn_exact").to_dense()
    assert close(V @ V.T, G)
    assert close(vl.from_backpack(net, "diag_ggn_exact").diagonal(), G.diagonal())
    U = risk.num_samples * vl.from_backpack(net, "grad_batch").to_dense()
    assert close(U, vl.PerSampleGradients(risk).to_dense())
    H = vl.Hessian(risk).to_dense()
    assert close(vl.from_backpack(net, "diag_h").diagonal(), H.diagonal())


def _convolve(X: Tensor, W: Tensor, options: dict[str, Any]) -> Tensor:
    return getattr(F, f"conv_transpose{X.ndim - 2}d")(X, W, **options)


def _inputs(X: Tensor, W: Tensor, options: dict[str, Any]) -> Tensor:
    """What outputs see, ``[n, P, in/G·k]`` by group: derivatives in the weight."""
    groups = options.get("groups", 1)
    a = torch.func.jacrev(lambda W: _convolve(X, W, options))(W.detach())
    outputs = a.shape[1]
    of_group = []
    for g in range(groups):
        channel = g * (outputs // groups)  # its first output, by its first kernels
        a_g = a[:, channel].flatten(1, X.ndim - 2)  # [n, P, in, out/G, *k]
        part = slice(g * len(W) // groups, (g + 1) * len(W) // groups)
        of_group.append(a_g[:, :, part, 0].flatten(2))
    return torch.stack(of_group)


CALLS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "strided": ((3, 2, 4), (2, 3, 3), {"stride": 2, "padding": 1}),
    "output padding": (
        (3, 2, 3),
        (2, 2, 2),
        {"stride": 3, "padding": 1, "output_padding": 2},
    ),
    "dilated": ((2, 2, 2, 3), (2, 3, 2, 2), {"dilation": (2, 1), "stride": (1, 2)}),
    "grouped": ((3, 4, 3), (4, 2, 2), {"groups": 2, "stride": 2}),
    "channel by channel": ((2, 3, 2, 2), (3, 1, 2, 2), {"groups": 3, "padding": 1}),
    "volumes": ((2, 2, 2, 1, 2), (2, 2, 1, 2, 2), {"stride": (2, 1, 1)}),
}


@pytest.mark.parametrize("joint_bias", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_factors_are_those_of_the_definition(name: str, joint_bias: bool) -> None:
    """The layer's output at p is W a_p; the loss is a sum of squares of all outputs."""
    shape, weight, options = CALLS[name]
    X, W = draw(*shape), draw(*weight)
    groups = options.get("groups", 1)
    bias = draw(weight[1] * groups)
    params = {"weight": W, "bias": bias}

    def net(params: dict[str, Tensor], X: Tensor) -> Tensor:
        out = _convolve(X, params["weight"], {"bias": params["bias"], **options})
        return out.flatten(1).tanh() @ mix

    outputs = _convolve(X, W, options)
    mix = draw(outputs[0].numel(), 2)
    y = draw(len(X), 2)
    risk = vl.EmpiricalRisk(net, nn.MSELoss(), (X, y), params)
    # Columns √(2/(N C)) d f_nc / d output, [n, 2, G, out/G, P].
    slopes = 1 - (outputs + bias.view(-1, *[1] * (outputs.ndim - 2))).tanh().square()
    b = torch.einsum("np,pc->ncp", slopes.flatten(1), mix) * (2 / y.numel()) ** 0.5
    b = b.view(len(X), 2, groups, weight[1], -1)
    a = _inputs(X, W, options).permute(1, 0, 3, 2)  # [n, G, a, P]
    if joint_bias:
        a = torch.cat([a, torch.ones_like(a[:, :, :1])], dim=2)
    P = a.shape[-1]
    for sharing in WEIGHT_SHARINGS:
        inputs = a.mean(3, keepdim=True) if sharing == "reduce" else a
        columns = b if sharing == "expand" else b.sum(4, keepdim=True)
        A = torch.einsum("ngap,ngcp->gac", inputs, inputs) / len(X)
        A = A / P if sharing == "expand" else A
        B = torch.einsum("nrgbp,nrgcp->gbc", columns, columns)
        expected = torch.zeros(risk.num_params, risk.num_params).double()
        numbers = torch.arange(W.numel()).view(
            groups, weight[0] // groups, weight[1], -1
        )
        numbers = numbers.transpose(1, 2).flatten(2)
        if joint_bias:
            own = torch.arange(W.numel(), risk.num_params).view(groups, -1, 1)
            numbers = torch.cat([numbers, own], dim=2)
        for index, B_g, A_g in zip(numbers.flatten(1), B, A, strict=True):
            expected[index[:, None], index] = torch.kron(B_g, A_g)
        G = vl.GGN(risk).to_dense()
        if not joint_bias:
            expected[W.numel() :, W.numel() :] = G[W.numel() :, W.numel() :]
        given: dict[str, Any] = {
            "variant": "exact",
            "weight_sharing": sharing,
            "joint_bias": joint_bias,
        }
        K = vl.KFAC(risk, **given)
        assert close(K.to_dense(), expected)
        cut = [(X[:1], y[:1]), (X[1:], y[1:])]
        parts = vl.KFAC(net, nn.MSELoss(), cut, params, **given)
        assert close(parts.to_dense(), expected)
        # EKFAC has the GGN's own diagonal in that basis.
        E = vl.EKFAC(risk, **given)
        for block, index in zip(K.blocks, K.indices or [], strict=True):
            if isinstance(block, vl.Kronecker):
                Q = block.eigenvectors.to_dense()
                evals = (Q.T @ G[index][:, index] @ Q).diagonal()
                expected[index[:, None], index] = (Q * evals) @ Q.T
        assert close(E.to_dense(), expected)


def test_a_weight_used_twice() -> None:
    """More uses are more positions, of other sizes too."""
    layer = nn.ConvTranspose1d(2, 2, 2, stride=2, bias=False).double()
    X, y = draw(3, 2, 3), draw(3, 2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, X: Tensor) -> Tensor:
            return self.layer(self.layer(X)).mean(2)  # linear in what is seen

    risk = vl.EmpiricalRisk(Twice(), nn.MSELoss(), (X, y))
    K = vl.KFAC(risk, variant="exact", weight_sharing="expand")
    B, A = K.blocks[0].factors
    W = layer.weight.detach()
    first, second = X, layer(X).detach()
    a = torch.cat([_inputs(part, W, {"stride": 2})[0] for part in (first, second)], 1)
    assert close(A.to_dense(), torch.einsum("npa,npc->ac", a, a) / (3 * a.shape[1]))
    hidden = layer(X).detach().requires_grad_()
    b = []
    for c in range(2):
        (grad,) = torch.autograd.grad(layer(hidden).mean(2)[:, c].sum(), hidden)
        b.append(grad.transpose(1, 2).flatten(0, 1))
        last = torch.zeros(3 * 12, 2).double()
        last[:, c] = 1 / 12
        b.append(last)
    columns = torch.cat(b) * (2 / 6) ** 0.5
    assert close(B.to_dense(), columns.T @ columns)


# What is refused --------------------------------------------------------------------


def test_kernels_that_parameters_alone_leave_open() -> None:
    net = backpack_peer.run_on_net("transposed_2d", "mean", bp.KFLR())
    with pytest.raises(
        ValueError, match=r"source: parameter 0, \[2, 2, 2, 3\].*module"
    ):
        vl.from_backpack(net.parameters(), "kflr")
    expected = backpack_peer.from_factors(net, "kflr")
    assert close(vl.from_backpack(net, "kflr").to_dense(), expected)
    # The shapes tell where they differ.
    net = backpack_peer.run_on_net("transposed_3d", "mean", bp.KFLR())
    expected = backpack_peer.from_factors(net, "kflr")
    assert close(vl.from_backpack(net.parameters(), "kflr").to_dense(), expected)


def test_layers_that_backpack_does_not_do() -> None:
    grouped = nn.Sequential(nn.ConvTranspose1d(4, 2, 2, groups=2), nn.Flatten())
    longer = nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1, output_padding=1)
    for net, X, message in (
        (grouped, draw(2, 4, 3), "groups"),
        (nn.Sequential(longer, nn.Flatten()), draw(2, 2, 3), "output_padding"),
    ):
        net = net.double()
        risk = vl.EmpiricalRisk(net, nn.MSELoss(), (X, torch.zeros_like(net(X))))
        with pytest.raises(ValueError, match=f"model: BackPACK.*{message}.*vl.KFAC"):
            vl.KFRA(risk)
        vl.KFAC(risk, variant="exact", weight_sharing="backpack")
