"""A net's factors by the structure of its layers, beside plain Jacobians."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import vivit_linop as vl
from tests.cases import Lambda, call, classes, fast_path, features

N = 3
# The layers whose weights have Khatri–Rao factors.
FACTORED = {"linear", "conv", "conv_transpose", "embedding", "embedding_bag"}
OPAQUE = "dense: no structure"
# The ways to the Gram matrix of such factors.
WAYS = ("pairs", "blocks", "inputs")


def problem_of(net: nn.Module, X: Any) -> tuple[nn.Module, nn.Module, tuple[Any, Any]]:
    """A risk of a net with few outputs, which alternates between two losses."""
    net = net.double().eval()
    with fast_path(False):
        n, C = call(net, {}, X).shape
    if C == 3:
        return net, nn.CrossEntropyLoss(), (X, classes(n, 3))
    return net, nn.MSELoss(reduction="sum"), (X, features(n, C).double())


def truth(risk: vl.EmpiricalRisk, net: nn.Module, loss: Any, data: Any) -> Any:
    """J and JᵀHJ, parameter by parameter in the order of the risk."""
    X, y = data
    theta = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    assert list(theta) == list(risk.params)
    with fast_path(False), sdpa_kernel(SDPBackend.MATH):
        outputs = call(net, theta, X)
        jacobians = jacrev(lambda params: call(net, params, X), chunk_size=1)(theta)
    J = torch.cat([part.reshape(outputs.numel(), -1) for part in jacobians.values()], 1)
    H = hessian(lambda flat: loss(flat.view(outputs.shape), y))(outputs.reshape(-1))
    return J.detach(), (J.T @ H @ J).detach()


def close(got: Tensor, expected: Tensor) -> bool:
    assert got.shape == expected.shape
    return bool((got - expected).norm() <= 1e-10 * expected.norm())


def check(net: nn.Module, X: Any, uses: dict[str, str]) -> None:
    """Compare all that is made of the columns, and how they were found.

    Args:
        net: The net.
        X: Its input.
        uses: By parameter, what ``explain`` should call its use; with ``"dense: "`` in
            front where its columns have no factors, ``"mixed: "`` where parts do.
    """
    net, loss, data = problem_of(net, X)
    risk = vl.EmpiricalRisk(net, loss, data)
    V = vl.GGNFactor(risk)
    found = {}
    for cost in V.explain():
        ways = set(cost.contraction.split(" + "))
        assert ways <= {"dense", "rows", *WAYS}
        # A bias is so short that it does not matter.
        if ways == {"dense"} or cost.name.rpartition(".")[2] in ("b", "bias"):
            found[cost.name] = f"dense: {cost.use}"
        else:
            found[cost.name] = "mixed: " * ("dense" in ways) + cost.use
    assert found == uses
    J, G = truth(risk, net, loss, data)
    factor = J.T @ V.output.to_dense()
    assert close((V.T @ V).to_dense(), factor.T @ factor)
    assert close((V @ V.T).diagonal(), G.diagonal())
    dense = V.to_dense()
    assert close(dense, factor) and close(dense @ dense.T, G)


def one_layer(layer: nn.Module, *shape: int) -> tuple[nn.Module, Tensor]:
    """A net of a layer and a fixed readout with two or three outputs, and its input."""
    X = features(N, *shape).double()
    width = call(layer.double().eval(), {}, X)[0].numel()
    readout = torch.randn(width, 2 + len(shape) % 2)
    net = Lambda(
        lambda m, x: m.layer(x).flatten(1).sin() @ m.readout,
        layer=layer,
        readout=readout,
    )
    return net, X


Spec = tuple[str, "functools.partial[nn.Module]", tuple[int, ...]]


class Rows(nn.Embedding):
    """An embedding of indices that features tell."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x > 0).long() + (x > 1).long())


class Bags(nn.EmbeddingBag):
    """Bags of such indices, each with a weight; with offsets, one after the other."""

    def __init__(self, *args: Any, offsets: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.has_offsets = offsets

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        tokens = (x > 0).long() + (x > 1).long()
        weights = x.square() if self.mode == "sum" else None
        if not self.has_offsets:
            return super().forward(tokens, None, weights)
        there = x > -0.5  # of some samples nothing is left
        offsets = torch.cat([torch.zeros(1).long(), there.sum(1).cumsum(0)])
        weights = None if weights is None else weights[there]
        offsets = offsets if self.include_last_offset else offsets[:-1]
        return super().forward(tokens[there], offsets, weights)


def spec(kind: str, *shape: int) -> Callable[..., Spec]:
    """A layer given as to ``partial``, for samples of a shape."""
    return lambda *args, **kwargs: (kind, functools.partial(*args, **kwargs), shape)


def convolutions(dims: int, **options: Any) -> Spec:
    shape = (2, *(5, 4, 3)[:dims])
    return spec("conv", *shape)(getattr(nn, f"Conv{dims}d"), 2, 4, **options)


def transposed(dims: int, **options: Any) -> Spec:
    shape = (2, *(3, 2, 2)[:dims])
    layer = getattr(nn, f"ConvTranspose{dims}d")
    return spec("conv_transpose", *shape)(layer, 2, 4, **options)


DIMS = (1, 2, 3)
# Each with and without bias.
LINEAR: list[Spec] = [
    # As many tokens as samples, and not.
    *(spec("linear", *s, 3)(nn.Linear, 3, 2) for s in [(), (3,), (4,), (2, 2)]),
    *(convolutions(d, kernel_size=2) for d in DIMS),
    *(convolutions(d, kernel_size=3, padding=1, stride=2) for d in DIMS),
    *(convolutions(d, kernel_size=2, dilation=2, groups=2) for d in DIMS),
    *(
        convolutions(d, kernel_size=2, padding=1, padding_mode=mode)
        for mode in ("zeros", "reflect", "replicate", "circular")
        for d in DIMS
    ),
    # An even kernel needs more padding on one side than on the other.
    *(convolutions(d, kernel_size=2, padding="same") for d in DIMS),
    convolutions(1, kernel_size=4, padding="same"),
    convolutions(1, kernel_size=4, padding="same", padding_mode="reflect"),
    convolutions(1, kernel_size=2, padding="same", dilation=3, groups=2),
    convolutions(2, kernel_size=(2, 3), padding="same", dilation=(1, 2)),
    convolutions(2, kernel_size=2, padding="valid", stride=(2, 1)),
    convolutions(1, kernel_size=1),
    convolutions(2, kernel_size=(5, 4), groups=2),
    convolutions(3, kernel_size=(2, 1, 3), stride=(1, 2, 1), padding=(0, 1, 2)),
    convolutions(
        2,
        kernel_size=(3, 2),
        padding=(2, 1),
        padding_mode="circular",
        stride=(1, 2),
        dilation=(2, 1),
        groups=2,
    ),
    *(transposed(d, kernel_size=2) for d in DIMS),
    *(transposed(d, kernel_size=3, padding=1, stride=2) for d in DIMS),
    *(transposed(d, kernel_size=2, dilation=2, groups=2) for d in DIMS),
    transposed(1, kernel_size=3, stride=2, output_padding=1),
    # Outputs that a stride or more beyond the last input adds.
    transposed(1, kernel_size=2, dilation=2, output_padding=1),
    transposed(1, kernel_size=2, stride=2, dilation=3, output_padding=2, groups=2),
    transposed(3, kernel_size=2, stride=(1, 2, 1), output_padding=(0, 1, 0)),
    transposed(
        2,
        kernel_size=(3, 2),
        stride=(2, 3),
        padding=(1, 0),
        output_padding=(1, 2),
        dilation=(1, 2),
        groups=2,
    ),
]
OTHERS: list[Spec] = [
    spec("embedding")(Rows, 4, 2),
    spec("embedding", 3)(Rows, 4, 2),
    spec("embedding", 2, 3)(Rows, 4, 2, padding_idx=1),
    spec("embedding", 4)(Rows, 4, 2, padding_idx=-3),
    *(
        spec("embedding_bag", 3)(Bags, 4, 2, mode=mode, offsets=offsets, **options)
        for mode in ("mean", "sum")
        for offsets in (False, True)
        for options in ({}, {"padding_idx": 1}, {"padding_idx": -3})
    ),
    spec("embedding_bag", 3)(
        Bags, 4, 2, mode="sum", offsets=True, include_last_offset=True
    ),
    *(spec("prelu", *s)(nn.PReLU) for s in [(3,), (4, 2), (2, 3)]),
    *(spec("prelu", *s)(nn.PReLU, 3) for s in [(3,), (3, 2), (3, 2, 2)]),
    spec("layer_norm", 4)(nn.LayerNorm, 4),
    spec("layer_norm", 3, 4)(nn.LayerNorm, 4, bias=False),
    spec("layer_norm", 3, 2, 4)(nn.LayerNorm, (2, 4)),
    spec("rms_norm", 4)(nn.RMSNorm, 4),
    spec("rms_norm", 3, 2, 4)(nn.RMSNorm, (2, 4), eps=0.1),
    spec("group_norm", 4)(nn.GroupNorm, 2, 4),
    spec("group_norm", 4, 3)(nn.GroupNorm, 2, 4),
    spec("group_norm", 4, 2, 2)(nn.GroupNorm, 1, 4, eps=0.1),
    spec("batch_norm", 4)(nn.BatchNorm1d, 4),
    spec("batch_norm", 4, 3)(nn.BatchNorm1d, 4),
    spec("batch_norm", 4, 2, 2)(nn.BatchNorm2d, 4, eps=0.1),
    spec("batch_norm", 2, 2, 1, 2)(nn.BatchNorm3d, 2),
    spec("instance_norm", 3, 4)(nn.InstanceNorm1d, 3, affine=True),
    spec("instance_norm", 3, 2, 2)(nn.InstanceNorm2d, 3, affine=True, eps=0.1),
    spec("instance_norm", 2, 2, 3)(
        nn.InstanceNorm2d, 2, affine=True, track_running_stats=True
    ),
    spec("instance_norm", 2, 2, 2, 1)(nn.InstanceNorm3d, 2, affine=True),
]
LAYERS: list[Spec] = OTHERS + [
    (kind, functools.partial(build, bias=bias), shape)
    for kind, build, shape in LINEAR
    for bias in (True, False)
]


def title(layer: Spec) -> str:
    _, build, shape = layer
    arguments = [
        *map(str, build.args),
        *(f"{k}={v}" for k, v in build.keywords.items()),
    ]
    return f"{build.func.__name__}({', '.join(arguments)}) of {list(shape)}"


def drawn(layer: nn.Module) -> nn.Module:
    """Give weights and statistics of norms other values than the initial ones."""
    for tensor in itertools.chain(layer.parameters(), layer.buffers()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return layer
