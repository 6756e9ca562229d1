"""Problems that BackPACK can do, and what it computes on them.

Its quantities have scalings of their own; the tests state them. With r the reduction
factor, N the samples, ℓ_n without r.
"""

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vivit_linop as vl

Builder = Callable[[str], tuple[nn.Sequential, nn.Module, tuple[Tensor, Tensor]]]

REDUCTIONS = ["mean", "sum"]
PROBLEMS: dict[str, Builder] = {}


def problem(build: Builder) -> Builder:
    PROBLEMS[build.__name__] = build
    return build


@functools.cache
def built(name: str, reduction: str) -> tuple[nn.Module, nn.Module, Any]:
    """The net, loss and data of a problem, in float64."""
    with torch.random.fork_rng([]):
        torch.manual_seed(sum(map(ord, name)))
        net, loss, (X, y) = PROBLEMS[name](reduction)
    X, y = (t.double() if t.is_floating_point() else t for t in (X, y))
    return net.double().eval(), loss, (X, y)


@functools.cache
def peer_risk(name: str, reduction: str = "mean") -> vl.EmpiricalRisk:
    return vl.EmpiricalRisk(*built(name, reduction))


def run(name: str, reduction: str, *extensions: Any) -> list[nn.Parameter]:
    """Run BackPACK's extensions; returns parameters that hold their results."""
    return list(run_on_net(name, reduction, *extensions).parameters())


def run_on_net(name: str, reduction: str, *extensions: Any) -> nn.Module:
    """Run BackPACK's extensions; returns a net whose parameters hold their results."""
    from backpack import backpack, extend

    net, loss, (X, y) = built(name, reduction)
    net, loss = extend(copy.deepcopy(net)), extend(copy.deepcopy(loss))
    # Some of its rules make matrices of the default dtype.
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings(), backpack(*extensions):
            warnings.simplefilter("ignore")
            loss(net(X), y).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    return net


def from_factors(net: nn.Module, field: str) -> Tensor:
    """The matrix of Kronecker factors, in the order of the parameters' entries."""
    blocks = []
    for layer in net.modules():
        for p in layer.parameters(recurse=False):
            factors = [factor.contiguous() for factor in getattr(p, field)]
            block = functools.reduce(torch.kron, factors)
            if type(layer).__name__.startswith("ConvTranspose") and p.ndim > 1:
                inputs, outputs, *kernel = p.shape
                axes = outputs, inputs, math.prod(kernel)
                block = block.view(*axes, *axes).transpose(0, 1).transpose(3, 4)
                block = block.reshape(p.numel(), p.numel())
            blocks.append(block)
    return torch.block_diag(*blocks)


def _classes(n: int, count: int) -> Tensor:
    return torch.randint(count, (n,))


@problem
def mlp_ce(reduction: str) -> Any:
    net = nn.Sequential(
        nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.rand(6, 7), _classes(6, 4))


@problem
def mlp_mse(reduction: str) -> Any:
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    return net, nn.MSELoss(reduction=reduction), (torch.randn(5, 5), torch.rand(5, 3))


@problem
def bce(reduction: str) -> Any:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    loss = nn.BCEWithLogitsLoss(reduction=reduction)
    return net, loss, (torch.randn(5, 5), torch.randint(2, (5, 1)).double())


@problem
def cnn_ce(reduction: str) -> Any:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, stride=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(4, 2, 6, 6), _classes(4, 3))


@problem
def conv_1d(reduction: str) -> Any:
    net = nn.Sequential(
        nn.Conv1d(2, 3, 3, dilation=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, 3)
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(4, 2, 8), _classes(4, 3))


@problem
def grouped_and_transposed(reduction: str) -> Any:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 2, groups=2),
        nn.Sigmoid(),
        nn.ConvTranspose2d(6, 2, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 2),
    )
    return (
        net,
        nn.MSELoss(reduction=reduction),
        (torch.randn(3, 4, 3, 3), torch.rand(3, 2)),
    )


@problem
def transposed_1d(reduction: str) -> Any:
    """Strides, and outputs that no input reaches."""
    net = nn.Sequential(
        nn.ConvTranspose1d(3, 2, 2, stride=4, padding=1, dilation=2, bias=False),
        nn.Tanh(),
        nn.ConvTranspose1d(2, 2, 3, padding=1),
        nn.Flatten(),
        nn.Linear(10, 3),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(4, 3, 2), _classes(4, 3))


@problem
def transposed_2d(reduction: str) -> Any:
    """As many channels in as out."""
    net = nn.Sequential(
        nn.ConvTranspose2d(2, 2, (2, 3), stride=(2, 1), padding=(0, 1)),
        nn.Sigmoid(),
        nn.Conv2d(2, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    return (
        net,
        nn.MSELoss(reduction=reduction),
        (torch.randn(5, 2, 2, 3), torch.rand(5, 2)),
    )


@problem
def transposed_3d(reduction: str) -> Any:
    net = nn.Sequential(
        nn.ConvTranspose3d(3, 2, 2, stride=(1, 2, 1), dilation=(2, 1, 1)),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(96, 2),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(3, 3, 2, 2, 2), _classes(3, 2))


@problem
def tokens_mse(reduction: str) -> Any:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(15, 2))
    return (
        net,
        nn.MSELoss(reduction=reduction),
        (torch.randn(4, 5, 4), torch.rand(4, 2)),
    )


@problem
def batch_norm(reduction: str) -> Any:
    norm = nn.BatchNorm1d(4)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    nn.init.normal_(norm.weight)
    net = nn.Sequential(nn.Linear(5, 4), norm, nn.Sigmoid(), nn.Linear(4, 3))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(5, 5), _classes(5, 3))


@problem
def rnn(reduction: str) -> Any:
    from backpack.custom_module.reduce_tuple import ReduceTuple

    net = nn.Sequential(
        nn.RNN(3, 4, batch_first=True), ReduceTuple(0), nn.Flatten(), nn.Linear(20, 3)
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(4, 5, 3), _classes(4, 3))


@problem
def lstm_of_tokens(reduction: str) -> Any:
    """A row of the table that no sample has, and labels for each position."""
    from backpack.custom_module.permute import Permute
    from backpack.custom_module.reduce_tuple import ReduceTuple

    net = nn.Sequential(
        nn.Embedding(6, 3),
        nn.LSTM(3, 2, batch_first=True),
        ReduceTuple(0),
        nn.Linear(2, 3),
        Permute(0, 2, 1),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randint(5, (4, 5)), torch.randint(3, (4, 5)))


@problem
def embedding(reduction: str) -> Any:
    net = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(12, 3))
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randint(5, (5, 4)), _classes(5, 3))


@problem
def padded_and_sliced(reduction: str) -> Any:
    from backpack.custom_module.pad import Pad
    from backpack.custom_module.slicing import Slicing

    everything = slice(None)
    net = nn.Sequential(
        nn.ZeroPad2d((1, 0, 0, 0)),
        nn.Conv2d(2, 2, 2),
        nn.ELU(),
        Pad((1, 0, 0, 2), value=0.5),
        nn.Conv2d(2, 2, 2),
        Slicing((everything, everything, slice(0, 3, 2), 1)),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(4, 2, 4, 3), _classes(4, 3))


@problem
def branched(reduction: str) -> Any:
    from backpack.custom_module.branching import Parallel
    from backpack.custom_module.scale_module import ScaleModule

    bent = nn.Sequential(nn.Sigmoid(), nn.Linear(3, 3, bias=False))
    net = nn.Sequential(
        nn.Linear(4, 3),
        Parallel(nn.Linear(3, 3), bent, nn.Identity()),
        nn.Tanh(),
        ScaleModule(0.5),
        nn.Linear(3, 3),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(5, 4), _classes(5, 3))


@problem
def pools_1d(reduction: str) -> Any:
    net = nn.Sequential(
        nn.Conv1d(2, 2, 3, padding=1),
        nn.LeakyReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(2, 3, 2),
        nn.AvgPool1d(2, stride=1),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(6, 1),
    )
    loss = nn.BCEWithLogitsLoss(reduction=reduction)
    return net, loss, (torch.randn(4, 2, 12), torch.randint(2, (4, 1)).double())


@problem
def conv_3d(reduction: str) -> Any:
    net = nn.Sequential(
        nn.Conv3d(2, 2, 2, stride=(1, 2, 1)),
        nn.SELU(),
        nn.AvgPool3d(2, stride=1),
        nn.Conv3d(2, 2, 1, bias=False),
        nn.AdaptiveAvgPool3d((1, 1, 2)),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(3, 2, 3, 4, 4), _classes(3, 3))


def _fixed(norm: Any) -> Any:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    nn.init.normal_(norm.weight)
    return norm


@problem
def batch_norm_2d(reduction: str) -> Any:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2),
        _fixed(nn.BatchNorm2d(3)),
        nn.LogSigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(4, 2, 3, 3), _classes(4, 3))


@problem
def batch_norm_3d(reduction: str) -> Any:
    net = nn.Sequential(
        nn.ConvTranspose3d(1, 2, 2),
        _fixed(nn.BatchNorm3d(2)),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Flatten(),
        nn.Linear(2, 3),
    )
    loss = nn.CrossEntropyLoss(reduction=reduction)
    return net, loss, (torch.randn(4, 1, 2, 2, 2), _classes(4, 3))


ALL = list(PROBLEMS)
# Those of whose layers it has roots of the GGN.
ROOTS = ["mlp_ce", "bce", "cnn_ce", "batch_norm", "embedding", "padded_and_sliced"]
ROOTS += ["branched", "batch_norm_3d"]
# Those whose layers BackPACK's Kronecker approximations take.
KRONECKER = [
    "mlp_ce",
    "mlp_mse",
    "bce",
    "cnn_ce",
    "conv_1d",
    "transposed_1d",
    "transposed_2d",
    "transposed_3d",
]
# Those whose layers its layer recursion for the Hessian's diagonal takes.
HESSIAN = ["mlp_ce", "mlp_mse", "bce", "cnn_ce", "conv_1d"]
HESSIAN += ["padded_and_sliced", "pools_1d", "conv_3d"]
# Those whose layers its products with blocks take: 2d and without batch norm.
PRODUCTS = ["mlp_ce", "mlp_mse", "cnn_ce"]
