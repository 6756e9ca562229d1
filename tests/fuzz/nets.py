"""Random nets, losses, data and parameters, written as a program.

A :class:`Plan` is a list of layers and of choices, each with a seed of its own: what is
left of it after one is taken away is a plan too, which is how cases are shrunk.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from .checks import Finding
from .compositions import findings
from .layers import LAYERS, Writer, offered
from .truth import Undecided

Choice = tuple[str, int]  # a name on a market, and a seed


@dataclass(frozen=True)
class Plan:
    """What is in a case."""

    seed: int
    start: Choice
    layers: tuple[Choice, ...]
    loss: Choice
    split: Choice
    parameters: Choice
    samples: int
    memory: int | None = None

    @classmethod
    def draw(cls, seed: int) -> Plan:
        random = Random(seed)

        def choice(market: dict[str, Callable[..., object]]) -> Choice:
            return random.choice(list(market)), random.randrange(1000)

        start, net = choice(STARTS), Writer(Random(0))
        STARTS[start[0]](net)
        layers: list[Choice] = []
        for _ in range(random.randint(1, 5)):
            name = random.choice(offered(net))
            layers.append((name, random.randrange(1000)))
            net.random = Random(layers[-1][1])
            LAYERS[name](net)
        return cls(
            seed,
            start,
            tuple(layers),
            choice(LOSSES),
            choice(SPLITS) if random.random() < 0.6 else ("one_batch", 0),
            choice(PARAMETERS) if random.random() < 0.5 else ("all_of_them", 0),
            random.choice([1, 2, 3, 4, 5]),
            random.choice([None, None, None, 0, 3000]),
        )

    def smaller(self) -> Iterator[Plan]:
        """Plans with less in them, the greatest steps first."""
        for index in range(len(self.layers)):
            layers = self.layers[:index] + self.layers[index + 1 :]
            yield replace(self, layers=layers)
        for name, plain in (
            ("loss", ("square", 0)),
            ("split", ("one_batch", 0)),
            ("parameters", ("all_of_them", 0)),
            ("start", ("features", 0)),
            ("memory", None),
        ):
            if getattr(self, name) != plain:
                yield replace(self, **{name: plain})
        for samples in range(1, self.samples):
            yield replace(self, samples=samples)

    def findings(self, only: str | None = None) -> list[Finding]:
        """What is wrong with the case.

        Raises:
            Undecided: If the program does not run in plain torch.
        """
        names = dict(self.layers)
        if "held_by_an_object" in names and "checkpointed" in names:
            raise Undecided("what is held is not told from what is computed again")
        module = types.ModuleType("fuzzed")
        sys.modules["fuzzed"] = module  # pickle finds a class by its module's name
        try:
            exec(compile(self.program(), "<fuzzed>", "exec"), module.__dict__)
            module.build()
        except Exception as error:  # layers do not fit together
            raise Undecided(f"{type(error).__name__}: {error}") from error
        return findings(module.build, self.seed, only)

    def code(self) -> str:
        """A script that says what is wrong."""
        return (
            f"{self.program()}\n\nif __name__ == '__main__':\n"
            "    from tests.fuzz.compositions import findings\n\n"
            f"    print(*findings(build, {self.seed}), sep='\\n')\n"
        )

    def program(self) -> str:
        """The program: a function ``build()`` that returns the case."""
        net = Writer(Random(self.start[1]))
        STARTS[self.start[0]](net)
        for name, seed in self.layers:
            if name in offered(net):
                net.random = Random(seed)
                LAYERS[name](net)
        net.random = Random(self.loss[1])
        loss, target, reduction = LOSSES[self.loss[0]](net)
        split = SPLITS[self.split[0]](Random(self.split[1]), self.samples)
        parameters = PARAMETERS[self.parameters[0]](Random(self.parameters[1]))
        if not net.members:
            net.parameter()
        lines = "\n        ".join(
            line for line in net.lines if not line.startswith("#")
        )
        return PROGRAM.format(
            definitions="".join(f"{code}\n\n" for code in net.definitions),
            members="\n        ".join(net.members),
            arguments=net.arguments,
            lines=lines,
            seed=self.seed,
            N=self.samples,
            inputs=net.inputs,
            loss=loss,
            target=target,
            split=split,
            parameters="\n    ".join(parameters),
            reduction=reduction,
            memory=self.memory,
        )


PROGRAM = """import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

from tests.fuzz.truth import Case, cut


{definitions}class Net(nn.Module):
    def __init__(self):
        super().__init__()
        {members}

    def forward(self, {arguments}):
        {lines}
        return h


def build():
    torch.manual_seed({seed})
    net = Net().double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
        for b in net.buffers():
            if b.is_floating_point():
                b.uniform_(0.5, 1.5)
    f64, N = torch.float64, {N}
    X = {inputs}
    model, params = net, None
    f = Case(net, None, (X, None)).outputs().detach()
    loss, reduction = {loss}, {reduction}
    y = {target}
    data = {split}
    {parameters}
    return Case(model, loss, data, params, reduction, memory={memory})
"""

# Where nets start ---------------------------------------------------------------------

STARTS: dict[str, Callable[[Writer], None]] = {}


def start(write: Callable[[Writer], None]) -> Callable[[Writer], None]:
    STARTS[write.__name__] = write
    return write


def _noise(*shape: int) -> str:
    return f"torch.randn(N, {', '.join(map(str, shape))}, dtype=f64)"


@start
def features(net: Writer) -> None:
    net.shape = (net.below(5),)
    net.inputs = _noise(*net.shape)
    net.write("h = x")


@start
def sequence(net: Writer) -> None:
    net.shape = (net.below(4), net.below(4))
    net.inputs = _noise(*net.shape)
    net.write("h = x")


@start
def image(net: Writer) -> None:
    net.shape = (net.below(2), net.below(3), net.below(4))
    net.inputs = _noise(*net.shape)
    net.write("h = x")


@start
def tokens(net: Writer) -> None:
    length, d = net.below(4), net.below(3)
    padding = net.some("", ", padding_idx=0", ", padding_idx=2")
    table = net.member(f"nn.Embedding(4, {d}{padding})")
    net.inputs = f"torch.randint(4, (N, {length}))"
    net.write(f"h = {table}(x)")
    net.shape = (length, d)


@start
def bags(net: Writer) -> None:
    d, mode = net.below(3), net.some("mean", "sum", "max")
    net.inputs = "torch.stack([torch.randperm(5)[:3] for _ in range(N)])"
    net.write(f"h = {net.member(f'nn.EmbeddingBag(5, {d}, mode={mode!r})')}(x)")
    net.shape = (d,)


@start
def pair(net: Writer) -> None:
    a, b, o = net.below(3), net.below(3), net.below(4)
    net.arguments = "a, b"
    net.inputs = f"({_noise(a)}, {_noise(b)})"
    net.write(f"h = {net.member(f'nn.Bilinear({a}, {b}, {o})')}(a, b)")
    net.shape = (o,)


@start
def mapping(net: Writer) -> None:
    net.shape = (net.below(4), net.below(3))
    net.arguments = "mask, x"
    net.inputs = f"{{'x': {_noise(*net.shape)}, 'mask': torch.rand(N, dtype=f64)}}"
    net.write("h = x * mask[:, None, None]")


# Losses, with the heads that they need ------------------------------------------------

LossCode = tuple[str, str, str]  # loss, target, reduction (None where the loss has it)
LOSSES: dict[str, Callable[[Writer], LossCode]] = {}


def loss(write: Callable[[Writer], LossCode]) -> Callable[[Writer], LossCode]:
    LOSSES[write.__name__] = write
    return write


def _outputs(net: Writer, *, classes: bool = False) -> int:
    """Write a head and return the number of classes, or of outputs."""
    size = math.prod(net.shape)
    kind = net.random.random()
    if not classes and kind < 0.2:
        net.write(f"h = {net.member(f'nn.Linear({size}, 1)')}(h.flatten(1)).squeeze(1)")
        net.shape = ()
        return 1
    if len(net.shape) == 2 and size <= 8 and kind < 0.5 and net.shape[0] > 1:
        return net.shape[0]  # as they are: [N, C, P]
    if len(net.shape) == 1 and 1 < size < 5 and kind < 0.5:
        return size
    C = net.random.randint(1, 4) if kind < 0.7 else 3
    P = 2 if kind > 0.85 else 1
    net.write(f"h = {net.member(f'nn.Linear({size}, {C * P})')}(h.flatten(1))")
    net.shape = (C,)
    if P > 1:
        net.write(f"h = h.reshape(-1, {C}, {P})")
        net.shape = (C, P)
    return C


def _reduction(net: Writer) -> str:
    return net.some("", ", reduction='sum'")


@loss
def square(net: Writer) -> LossCode:
    _outputs(net)
    return f"nn.MSELoss({_reduction(net)[2:]})", "torch.randn_like(f)", "None"


@loss
def cross_entropy(net: Writer) -> LossCode:
    C = _outputs(net, classes=True)
    options = net.some("", f"weight=torch.rand({C}, dtype=f64) + 0.5")
    options += net.some("", ", label_smoothing=0.25") + _reduction(net)
    indices, soft = (
        f"torch.randint({C}, f[:, 0].shape)",
        "torch.rand_like(f).softmax(1)",
    )
    if net.random.random() < 0.3:
        return f"nn.CrossEntropyLoss({options.strip(', ')})", soft, "None"
    if net.random.random() < 0.3:
        options += ", ignore_index=-1"
        indices = f"{indices}.index_fill(0, torch.arange(N - 1), -1)"
    return f"nn.CrossEntropyLoss({options.strip(', ')})", indices, "None"


@loss
def log_likelihood(net: Writer) -> LossCode:
    C = _outputs(net, classes=True)
    net.write("h = h.log_softmax(1)")
    options = net.some("", f"weight=torch.rand({C}, dtype=f64) + 0.5") + _reduction(net)
    targets = f"torch.randint({C}, f[:, 0].shape)"
    return f"nn.NLLLoss({options.strip(', ')})", targets, "None"


@loss
def divergence(net: Writer) -> LossCode:
    _outputs(net, classes=True)
    net.write("h = h.log_softmax(1)")
    options = net.some("", "reduction='batchmean'", "reduction='sum'")
    return f"nn.KLDivLoss({options})", "torch.rand_like(f).softmax(1)", "None"


@loss
def binary(net: Writer) -> LossCode:
    _outputs(net)
    weight = "pos_weight=torch.rand(f.shape[1:], dtype=f64) + 0.5"
    options = net.some("", weight) + _reduction(net)
    targets = net.some("torch.rand_like(f)", "torch.rand_like(f).round()")
    return f"nn.BCEWithLogitsLoss({options.strip(', ')})", targets, "None"


@loss
def gaussian(net: Writer) -> LossCode:
    _outputs(net)
    targets = "torch.stack([torch.randn_like(f), torch.rand_like(f) + 0.5], -1)"
    return f"nn.GaussianNLLLoss({_reduction(net)[2:]})", targets, "None"


@loss
def counts(net: Writer) -> LossCode:
    _outputs(net)
    net.write("h = h.clamp(max=2.0)")
    options = net.some("", "full=True") + _reduction(net)
    targets = "torch.randint(4, f.shape).to(f)"
    return f"nn.PoissonNLLLoss({options.strip(', ')})", targets, "None"


@loss
def robust(net: Writer) -> LossCode:
    _outputs(net)
    kind = net.some("nn.HuberLoss(delta=0.7", "nn.SmoothL1Loss(beta=0.4")
    return f"{kind}{_reduction(net)})", "torch.randn_like(f)", "None"


@loss
def hooked(net: Writer) -> LossCode:
    """A loss of torch that computes something else than its type says."""
    _outputs(net)
    net.definitions.append(
        "def tripled(module, arguments, value):\n    return 3 * value\n\n\n"
        "def hooked_loss(**options):\n    loss = nn.MSELoss(**options)\n"
        "    loss.register_forward_hook(tripled)\n    return loss\n"
    )
    return f"hooked_loss({_reduction(net)[2:]})", "torch.randn_like(f)", "None"


@loss
def of_ones_own(net: Writer) -> LossCode:
    """Convex functions; of some, the outputs of a sample are coupled."""
    _outputs(net)
    each = net.some(
        "(f - y).pow(4).sum(1)",
        "(f - y).cosh().log().sum(1)",
        "f.logsumexp(1) + (f.sum(1) - y.sum(1)) ** 2",
    )
    how = net.some("mean", "sum")
    net.definitions.append(
        "def own_loss(f, y):\n"
        "    f, y = f.reshape(len(f), -1), y.reshape(len(y), -1)\n"
        f"    return ({each}).{how}()\n"
    )
    return "own_loss", "torch.randn_like(f)", repr(how)


# Splits of the data -------------------------------------------------------------------

SPLITS: dict[str, Callable[[Random, int], str]] = {
    "one_batch": lambda random, N: "(X, y)",
    "single_samples": lambda random, N: f"cut(X, y, {[1] * N})",
    "uneven": lambda random, N: f"cut(X, y, {_sizes(random, N)})",
    "loader": lambda random, N: f"cut(X, y, {random.randint(1, N)}, loader=True)",
}


def _sizes(random: Random, N: int) -> list[int]:
    sizes = []
    while sum(sizes) < N:
        sizes.append(random.randint(1, N - sum(sizes)))
    return sizes


# Which parameters ---------------------------------------------------------------------

PARAMETERS: dict[str, Callable[[Random], list[str]]] = {
    "all_of_them": lambda random: [],
    "frozen": lambda random: [
        f"for p in list(net.parameters())[::{random.randint(2, 3)}]:",
        "    p.requires_grad_(False)",
    ],
    "some_backwards": lambda random: [
        f"params = list(net.parameters())[::-{random.randint(1, 2)}]"
    ],
    "other_values": lambda random: [
        f"chosen = list(net.named_parameters())[::{random.choice([-2, -1, 1])}]",
        "params = {n: p.detach() + 0.1 * torch.randn_like(p) for n, p in chosen}",
    ],
    "function": lambda random: [
        "params = {n: p.detach().clone() for n, p in net.named_parameters()}",
        "",
        "def model(params, x):",
        "    positional = tuple(x) if isinstance(x, (tuple, list)) else (x,)",
        "    if isinstance(x, dict):",
        "        return torch.func.functional_call(net, params, (), x)",
        "    return torch.func.functional_call(net, params, positional)",
        "",
    ],
}
