"""Uses of parameters, and what transforms of torch.func cannot follow."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests import placing

from .market import Lambda, Problem, case, classes, features, mlp, parameter

# Uses of parameters -------------------------------------------------------------------


@case
def weights_in_expressions() -> Problem:
    # A weight that is sliced, masked, chunked, normalised and regularises the output.
    def forward(m: Any, x: Tensor) -> Tensor:
        top, bottom = m.w.chunk(2)  # [2, 3] each
        h = F.linear(x, top * m.mask) + torch.einsum("nd,cd->nc", x, bottom)
        h = h + F.linear(x, m.w[1:3], m.b[:2]) + m.w.square().sum()
        return h * m.b[2] + torch.addmm(m.b[1:], x[:, :2], m.w.view(2, 6)[:, 2:4])

    net = Lambda(
        forward,
        w=parameter(4, 3),
        b=parameter(3),
        mask=torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(5, 3), classes(5, 2)))


@case
def parameters_as_inputs() -> Problem:
    # The data stand where a layer has its weight, and a weight multiplies itself.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.linear(m.w, x).T + F.linear(x, F.linear(m.w, m.w))  # [4, 4]
        kernels = x[:, None, :2]
        signal = F.conv1d(m.signal[None, None], kernels)[0]  # [4, 2]
        return (h.tanh() @ m.w)[:, :2] * m.gain + signal

    net = Lambda(forward, w=parameter(4, 4), signal=parameter(3), gain=parameter())
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 4), classes(4, 2)))


@case
def sparse_embedding() -> Problem:
    def dense_gradients(model: Any) -> Any:
        model = copy.deepcopy(model)
        model.tokens.sparse = False
        return model

    net = Lambda(
        lambda m, x: m.tokens(x).tanh().sum(1), tokens=nn.Embedding(5, 2, sparse=True)
    )
    X = torch.tensor([[1, 1], [4, 2], [0, 0], [3, 1]])
    data = (X, classes(4, 2))
    return Problem(net, nn.CrossEntropyLoss(), data, reference=dense_gradients)


@case
def derivatives_inside() -> Problem:
    # The output has a derivative of a net in its input, as for differential equations.
    def forward(m: Any, x: Tensor) -> Tensor:
        slope = vmap(grad(lambda row: m.net(row).sum()))(x)
        return m.net(x) + slope[:, :2]

    net = Lambda(forward, net=mlp(3, 3, 2))
    return Problem(net, nn.MSELoss(), (features(4, 3), features(4, 2)))


@case
def derivatives_by_autograd_inside() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            f = m.net(x)
            (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
        return f + slope[:, :2]

    def by_transforms(model: Any) -> Any:
        model = copy.deepcopy(model)
        model._function = lambda m, x: (
            m.net(x) + vmap(grad(lambda row: m.net(row).sum()))(x)[:, :2]
        )
        return model

    net = Lambda(forward, net=mlp(3, 3, 2))
    data = (features(4, 3), features(4, 2))
    return Problem(net, nn.MSELoss(), data, reference=by_transforms)


@case
def detached_uses() -> Problem:
    # Uses through which no derivative flows, beside one through which it does.
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = m.layer(x).sigmoid()
        return (
            m.layer(x) * gate + m.layer(x).detach() + F.linear(x, m.layer.weight.data)
        )

    net = Lambda(forward, layer=nn.Linear(3, 2))
    data = (features(4, 3), features(4, 2))
    return Problem(net, nn.MSELoss(), data, has_hessian=False)


class WeightNorm(nn.Module):
    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v / v.norm(dim=1, keepdim=True)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.norm(dim=1, keepdim=True), weight


@case
def parametrised_weight() -> Problem:
    def by_hand(params: dict[str, Tensor], x: Tensor) -> Tensor:
        g, v = (params[f"parametrizations.weight.original{i}"] for i in (0, 1))
        return F.linear(x, g * v / v.norm(dim=1, keepdim=True), params["bias"])

    net = nn.Linear(3, 2)
    # On a GPU torch's own takes norms in float32, also of what is float64.
    if placing.device() == placing.HOST:
        nn.utils.parametrizations.weight_norm(net)
    else:
        nn.utils.parametrize.register_parametrization(net, "weight", WeightNorm())
    data = (features(4, 3), classes(4, 2))
    return Problem(
        net,
        nn.CrossEntropyLoss(),
        data,
        reference=lambda _: by_hand,
        has_hessian=False,
    )


@case
def low_rank_adapter() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.base(x) + F.linear(F.linear(x, m.down), m.up) * 0.5

    net = Lambda(forward, base=mlp(4, 3), down=parameter(1, 4), up=parameter(3, 1))
    net.base.requires_grad_(False)
    return Problem(net, nn.CrossEntropyLoss(), (features(5, 4), classes(5, 3)))


# What transforms of torch.func cannot follow ------------------------------------------


@case
def in_place_relu() -> Problem:
    net = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.ReLU(inplace=True)
    )
    with torch.no_grad():
        net[2].bias.add_(1.0)
    return Problem(net, nn.MSELoss(), (features(5, 3), features(5, 2)))


@case
def in_place_writes() -> Problem:
    # Outputs and inputs of layers are overwritten, wholly and in part.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        h *= 2.0
        h[:, 0] = 1.0
        g = m.second(h.tanh())
        out = torch.zeros_like(g)
        out[:, 1:] = g[:, :-1]
        return out.add_(g)

    net = Lambda(forward, first=nn.Linear(3, 3), second=nn.Linear(3, 3))
    return Problem(net, nn.CrossEntropyLoss(), (features(5, 3), classes(5, 3)))


@case
def control_flow() -> Problem:
    # Each sample takes its own way, decided by values of its hidden layer.
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = []
        for h in m.first(x).unbind():
            if h.sum().item() > 0.0:
                rows.append(m.second(h.tanh()))
            else:
                rows.append(m.third(h) * h.norm())
        return torch.stack(rows)

    net = Lambda(
        forward, first=nn.Linear(2, 2), second=nn.Linear(2, 2), third=nn.Linear(2, 2)
    )
    X = features(4, 2)
    X[2:] = -X[:2]
    return Problem(net, nn.CrossEntropyLoss(), (X, classes(4, 2)))


class Cube(torch.autograd.Function):
    """A function with no forward mode and no rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3.0 * x**2 * gradient


@case
def custom_function() -> Problem:
    net = Lambda(
        lambda m, x: m.second(Cube.apply(m.first(x))),
        first=nn.Linear(3, 3),
        second=nn.Linear(3, 2),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 3), classes(4, 2)))


@case
def complex_intermediates() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        # Of negative lengths torch.polar has wrong derivatives.
        spectrum = torch.fft.rfft(m.layer(x)) * torch.polar(m.r.exp(), m.phi)
        return torch.fft.irfft(spectrum, n=4)

    net = Lambda(forward, layer=nn.Linear(3, 4), r=parameter(3), phi=parameter(3))
    return Problem(net, nn.MSELoss(), (features(4, 3), features(4, 4)))


@case
def checkpointed() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = checkpoint(m.first, x, use_reentrant=False) if m.forgets else m.first(x)
        return m.last(h)

    def remembering(model: Any) -> Any:
        model = copy.deepcopy(model)
        model.forgets = False
        return model

    net = Lambda(forward, first=mlp(3, 3, 3), last=nn.Linear(3, 2), forgets=True)
    data = (features(4, 3), classes(4, 2))
    return Problem(net, nn.CrossEntropyLoss(), data, reference=remembering)


@case
def wide_range_of_scales() -> Problem:
    # Eigenvalues over twelve orders of magnitude.
    X = features(6, 5) * torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-6])
    return Problem(nn.Linear(5, 2), nn.MSELoss(), (X, features(6, 2)), likelihood=True)
