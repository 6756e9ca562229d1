"""Nets of published sizes with data.

Times and memory hardly depend on values, so all inputs but the digits are drawn from
N(0, 1) and the classes uniformly. The nets and their first parameters are those of the
DeepOBS test problems (Schneider, Balles & Hennig 2019) that ViViT was measured on
(Dangel, Tatzel & Hennig 2022), but for the MLP and the pretrained net.
"""

from __future__ import annotations

import copy
import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

Data = tuple[Tensor, Tensor]


class Unavailable(Exception):
    """A net or a case that cannot be run here, and why."""


@dataclass(frozen=True)
class Problem:
    """A net in eval mode, a loss and one batch of data, all on one device."""

    name: str
    model: nn.Module
    loss: nn.Module
    data: Data
    inputs: str = "random inputs"

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def num_samples(self) -> int:
        return len(self.data[1])

    @property
    def num_classes(self) -> int:
        with torch.no_grad():
            return self.model(self.data[0][:1]).shape[1]

    @property
    def device(self) -> torch.device:
        return self.data[0].device

    def columns(self, count: int) -> Tensor:
        """Return the same random ``[D, count]`` for all cases."""
        generator = torch.Generator().manual_seed(1)
        X = torch.randn(self.num_params, count, generator=generator)
        return X.to(self.device)

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem in another precision; the net is a copy."""
        X, y = self.data
        model = copy.deepcopy(self.model).to(dtype)
        return Problem(self.name, model, self.loss, (X.to(dtype), y), self.inputs)


# Nets --------------------------------------------------------------------------------


def mlp(num_classes: int, widths: tuple[int, int] = (1024, 512)) -> nn.Module:
    """The MLP 784-1024-512-C, or one of other widths."""
    first, second = widths
    return nn.Sequential(
        nn.Linear(784, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, num_classes),
    )


def net_2c2d(num_classes: int) -> nn.Module:
    """DeepOBS's fmnist_2c2d."""
    net = nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 1024),
        nn.ReLU(),
        nn.Linear(1024, num_classes),
    )
    for layer in layers(net):
        nn.init.trunc_normal_(layer.weight, std=0.05, a=-0.1, b=0.1)
        nn.init.constant_(layer.bias, 0.05)
    return net


def net_3c3d(num_classes: int) -> nn.Module:
    """DeepOBS's cifar10_3c3d."""
    # The pools are "same" with stride 2. After a ReLU, padding with zeros at the end
    # and windows that are cut off there (ceil_mode) give the same.
    net = nn.Sequential(
        nn.Conv2d(3, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Conv2d(64, 96, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Conv2d(96, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(1152, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, num_classes),
    )
    for layer in layers(net):
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_normal_(layer.weight)
        else:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


def allcnnc(num_classes: int) -> nn.Module:
    """DeepOBS's cifar100_allcnnc (Springenberg et al. 2015)."""

    def block(into: int, out: int) -> list[nn.Module]:
        # "Same" padding with stride 2 on an even side is one zero at its end.
        return [
            nn.Conv2d(into, out, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1),
            nn.ReLU(),
            nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(out, out, 3, stride=2),
            nn.ReLU(),
            nn.Dropout(0.5),
        ]

    net = nn.Sequential(
        nn.Dropout(0.2),
        *block(3, 96),
        *block(96, 192),
        nn.Conv2d(192, 192, 3),
        nn.ReLU(),
        nn.Conv2d(192, 192, 1),
        nn.ReLU(),
        nn.Conv2d(192, num_classes, 1),
        nn.ReLU(),
        nn.AvgPool2d(6),
        nn.Flatten(),
    )
    for layer in layers(net):
        nn.init.xavier_normal_(layer.weight)
        nn.init.constant_(layer.bias, 0.1)
    return net


class Residual(nn.Module):
    """relu(main(x) + shortcut(x)); the shortcut has no parameters.

    Where the main branch halves the sides, the shortcut takes every second pixel and
    pads the channels with zeros (He et al. 2016, option A).
    """

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.stride, self.extra = out // into, (out - into) // 2
        self.main = nn.Sequential(
            nn.Conv2d(into, out, 3, stride=self.stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1:
            kept = x[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(kept, (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(self.main(x) + shortcut)


def resnet32(num_classes: int) -> nn.Module:
    """He et al.'s ResNet-32 for CIFAR: three stages of five blocks.

    The running statistics are means over five forward passes of random inputs. With
    others the logits are large, and the probability of one class rounds to 1: then a
    loss Hessian p (1 - p) has no digits left, nor has a GGN that differentiates twice.
    """
    blocks = []
    for into, out in ((16, 16), (16, 32), (32, 64)):
        blocks += [Residual(into, out), *(Residual(out, out) for _ in range(4))]
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *blocks,
        nn.AvgPool2d(8),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
    for layer in layers(net):
        nn.init.kaiming_normal_(layer.weight)
    update_bn([torch.randn(32, 3, 32, 32) for _ in range(5)], net)
    return net


def digits_net(num_classes: int) -> nn.Module:
    """The pretrained net of the package digit-recognizer-py, trained on MNIST."""
    net = nn.Sequential(
        OrderedDict(
            conv_layers=nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(64, 128, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ),
            flatten=nn.Flatten(),
            fc_layers=nn.Sequential(
                nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, num_classes)
            ),
        )
    )
    # Found, not imported: the package imports torchvision.
    spec = importlib.util.find_spec("digit_recognizer")
    if spec is None or spec.origin is None:
        raise Unavailable("digit-recognizer-py is not installed (see the Makefile)")
    weights = Path(spec.origin).parent / "models" / "handwriting_model.pth"
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net


def softmax_regression(num_classes: int) -> nn.Module:
    """One linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))


def small_mlp(num_classes: int) -> nn.Module:
    """The MLP 784-32-32-C, for images."""
    return nn.Sequential(nn.Flatten(), mlp(num_classes, (32, 32)))


def square_mlp(width: int) -> Callable[[int], nn.Module]:
    """The MLPs with two hidden layers of a width, for images."""
    return lambda num_classes: nn.Sequential(
        nn.Flatten(), mlp(num_classes, (width, width))
    )


def digits_mlp(num_classes: int) -> nn.Module:
    """The MLP 784-256-128-C, for images."""
    return nn.Sequential(nn.Flatten(), mlp(num_classes, (256, 128)))


class MeanOverTokens(nn.Module):
    """The mean over the tokens of ``[N, tokens, width]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def transformer(num_classes: int) -> nn.Module:
    """Two encoder layers of width 128 over tokens that are given as vectors."""
    layers = [
        nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        for _ in range(2)
    ]
    return nn.Sequential(*layers, MeanOverTokens(), nn.Linear(128, num_classes))


def tiny(num_classes: int) -> nn.Module:
    """A net for tests."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, num_classes),
    )


def layers(net: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


# Data --------------------------------------------------------------------------------


def digits(num_samples: int | None = None) -> Data:
    """Scikit-learn's handwritten digits, 8 × 8, as the pretrained net wants them."""
    if importlib.util.find_spec("sklearn") is None:
        raise Unavailable("scikit-learn is not installed")
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    X = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    X = F.interpolate(X, size=(20, 20), mode="bilinear", align_corners=False)
    X = (F.pad(X, (4, 4, 4, 4)) - 0.1307) / 0.3081  # MNIST's frame, mean and deviation
    chosen = order[:num_samples]
    return X[chosen], torch.tensor(targets)[chosen]


@dataclass(frozen=True)
class Net:
    """A net and the sizes it is measured with.

    Attributes:
        build: A function of the number of classes.
        shape: Of one input.
        num_params: D with the default number of classes.
        num_samples: N unless said.
        num_classes: C unless said.
        data: A function of N, or None for random inputs.
    """

    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    num_params: int
    num_samples: int = 128
    num_classes: int = 10
    data: Callable[[int], Data] | None = None


NETS: dict[str, Net] = {
    "mlp": Net(mlp, (784,), 1_333_770),
    "3c3d": Net(net_3c3d, (3, 32, 32), 895_210),
    "2c2d": Net(net_2c2d, (1, 28, 28), 3_274_634),
    "digits": Net(digits_net, (1, 28, 28), 390_410, data=digits),
    "resnet32": Net(resnet32, (3, 32, 32), 464_154),
    "allcnnc": Net(allcnnc, (3, 32, 32), 1_387_108, num_samples=32, num_classes=100),
    "softmax": Net(softmax_regression, (1, 28, 28), 7_850, 512, data=digits),
    "small": Net(small_mlp, (1, 28, 28), 26_506, 512, data=digits),
    "mlp-13k": Net(square_mlp(16), (1, 28, 28), 13_002, 200),
    "mlp-51k": Net(square_mlp(60), (1, 28, 28), 51_370, 400),
    "mlp-100k": Net(square_mlp(113), (1, 28, 28), 102_727, 200),
    "mlp-1m": Net(square_mlp(682), (1, 28, 28), 1_005_274, 200, 6),
    "digits-mlp": Net(digits_mlp, (1, 28, 28), 235_146, 300, data=digits),
    "transformer": Net(transformer, (32, 128), 397_834),
    "tiny": Net(tiny, (1, 6, 6), 69, num_samples=6, num_classes=3),
}


def make_problem(
    name: str,
    device: str = "cpu",
    num_samples: int | None = None,
    num_classes: int | None = None,
) -> Problem:
    """Return the problem of this name, in float32; the same for each call.

    Raises:
        Unavailable: If its data or weights are not installed.
    """
    torch.manual_seed(0)
    net = NETS[name]
    num_samples = num_samples or net.num_samples
    classes = num_classes or net.num_classes
    model = net.build(classes).eval().to(device)
    if net.data is None:
        X = torch.randn(num_samples, *net.shape)
        y = torch.randint(classes, (num_samples,))
        inputs = "random inputs"
    else:
        (X, y), inputs = net.data(num_samples), "real digits"
    data = X.to(device), y.to(device)
    problem = Problem(name, model, nn.CrossEntropyLoss(), data, inputs)
    if classes == net.num_classes and problem.num_params != net.num_params:
        raise AssertionError(f"{name}: D is {problem.num_params}, not {net.num_params}")
    return problem
