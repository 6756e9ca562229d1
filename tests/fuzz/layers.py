"""A market of layers, each of which writes a line or more of a net's forward pass.

The current tensor is called ``h``; its shape without the axis of samples is
``net.shape``. Layers that keep the shape stand in the table ``KEEPING``, as the code
that they write; the others are functions of the :class:`Writer`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from random import Random

# So many numbers of one sample are enough to be wrong about.
LARGEST = 24

# Of each layer one of the choices is taken. d is the last axis, c the first, n counts
# all entries; {nn.…} is a module, {cell} and {other} are some that keep the last axis;
# {number}, {vector} [d], {square} [d, d], {wide} [2, d], {like} [c, …, d] parameters.
KEEPING: dict[str, list[str]] = {
    # Between layers
    "activation": [
        f"h = {function}(h)"
        for function in "torch.tanh F.relu F.gelu F.softplus F.silu F.elu F.leaky_relu "
        "torch.sin F.hardtanh F.selu torch.sigmoid F.logsigmoid".split()
    ],
    "prelu": ["h = {nn.PReLU()}(h)", "h = {nn.PReLU(c)}(h)"],
    "softmax": ["h = h.softmax(-1)", "h = h.log_softmax(-1)", "h = h.logcumsumexp(-1)"],
    "cumulative": ["h = h.cumsum(-1)", "h = (1 + h.square()).cumprod(-1).log()"],
    "positions": ["h = h + {like}", "h = h * {like}.expand_as(h)", "h = h * {like}"],
    "scale_and_shift": [
        "h = h * {number}.exp() + {vector}",
        "h = {number} * h.sin() + {vector}.cos()",
    ],
    "unused": ["# {vector} {nn.Linear(2, 2)}"],
    "empty": ["# {nn.Parameter(torch.zeros(0, 3))}"],
    # Weights that are functions of parameters, or have several uses
    "weights": [
        f"h = F.linear(h, {w})"
        for w in (
            "{square}.exp()",
            "{square}.T",
            "{square} / {number}.exp()",
            "{square}.softmax(0)",
            "torch.cat([{wide}, {square}])[:d]",
            "{square}.roll(1, 0)",
            "torch.block_diag(*[{number}] * d)",
            "torch.stack({square}.unbind(1))",
            "torch.outer({vector}, {vector})",
        )
    ],
    "matmul": [
        "h = (h @ {square}).tanh()",
        "h = torch.einsum('...i,io->...o', h, {square})",
    ],
    "autoencoder": ["w = {wide}\nh = F.linear(F.linear(h, w).tanh(), w.T)"],
    "weight_twice": [
        "w = {square}\nh = F.linear(h, w) + h @ w",
        "w = {square}\nh = h @ w @ w",
    ],
    "shared": ["m = {cell}\nh = m(m(h).tanh() + h)", "h = {twice}"],
    "experts": [
        "out = torch.einsum('...i,eio->...eo', h, torch.stack([{square}, {square}]))\n"
        "h = ({nn.Linear(d, 2)}(h).softmax(-1)[..., None] * out.tanh()).sum(-2)"
    ],
    "parametrized": [
        "h = {nn.utils.weight_norm(nn.Linear(d, d))}(h)",
        "h = {nn.utils.parametrizations.weight_norm(nn.Linear(d, d))}(h)",
        "h = {nn.utils.parametrizations.spectral_norm(nn.Linear(d, d))}(h)",
        "h = {symmetric(nn.Linear(d, d))}(h)",
    ],
    # Views, writes, ways through the graph
    "residual": ["h = h + {cell}(h)"],
    "chunks": [
        "top, rest = h.split([d // 2, d - d // 2], -1)\n"
        "h = {cell}(torch.cat([rest, top], -1)) * {other}(h)"
    ],
    "in_place": [
        "h = {cell}(h)\n" + write
        for write in ("h.relu_()", "h += 0.5", "h *= 2.0", "h[..., 0] = 0.25")
    ],
    "written_by_parts": [
        "out = torch.zeros_like(h)\nout[..., :1] = {cell}(h)[..., -1:]\nh = out.add_(h)"
    ],
    "samples_in_another_place": [
        "h = {cell}(h.transpose(0, 1)).transpose(0, 1) if h.ndim > 2 else {other}(h)",
        "h = {cell}(h.flatten(0, -2)).unflatten(0, h.shape[:-1])",
        "h = ({square} @ h.mT).mT.contiguous().sigmoid()",
    ],
    # Samples that go their own ways
    "loop_over_samples": [
        "h = torch.stack([{cell}(s) if s.sum() > 0 else {other}(s) * 0.5 for s in h])"
    ],
    "routed": [
        "left, out = h.flatten(1).sum(1) > 0, torch.empty_like(h)\n"
        "out[left], out[~left] = {cell}(h[left]), {other}(h[~left])\n"
        "h = out"
    ],
    "sorted_samples": [
        "order = h.detach().flatten(1).sum(1).argsort()\n"
        "h = {cell}(h[order])[order.argsort()]"
    ],
    "sorted_features": [
        # Ties have no one derivative.
        "h = h + 0.013 * torch.arange(n).to(h).reshape(h.shape[1:])\n" + order
        for order in (
            "h = h.sort(-1).values",
            "h = h.cummax(-1).values",
            "h = h.gather(-1, h.detach().argsort(-1))",
        )
    ],
    "branch_on_shape": ["h = {cell}(h) if h.shape[-1] > 2 else {other}(h).sin()"],
    # Other ways to compute
    "checkpointed": [
        "h = checkpoint.checkpoint({cell}, h, use_reentrant=False)",
        # Without an input that requires grad, the older way cuts all derivatives.
        "h = h if h.requires_grad else h.detach().requires_grad_()\n"
        "h = checkpoint.checkpoint({cell}, h, use_reentrant=True)",
    ],
    "vectorised": ["h = torch.func.vmap({cell})(h)"],
    "hooked": ["h = {hooked(nn.Linear(d, d))}(h)"],
    "held_by_an_object": ["h = F.linear(h, {Held})", "h = h * {Held}.exp().sum(0)"],
    "writes_into_buffers": ["h = {Counting()}(h)"],
    "derivative_of_a_layer": [
        "h = h + torch.func.vmap(torch.func.grad(lambda z: {cell}(z).tanh().sum()))(h)",
        "z = h if h.requires_grad else h.detach().requires_grad_()\n"
        "with torch.enable_grad():\n"
        "    slope, = torch.autograd.grad({cell}(z).tanh().sum(), z, create_graph=True)"
        "\nh = h + slope",
        "h = h + torch.func.jvp({cell}, (h,), (h.detach(),))[1]",
    ],
    "constants": [
        "with torch.inference_mode():\n    size = h.square().mean(-1, keepdim=True)\n"
        "h = h / (1 + size.clone())",
        "h = h / (1 + h.detach().abs().amax(-1, keepdim=True))",
    ],
    "complex": [
        "h = torch.view_as_real(torch.complex(h, h.sin()) * "
        "torch.polar({vector}.exp(), {vector})).sum(-1)"
    ],
    "asked_for_its_kind": [
        "w = {square}\nh = F.linear(h, w if w.requires_grad or w.is_leaf else 2 * w)"
    ],
    "custom_function": ["h = Cube.apply(h)", "h = Softsign.apply(h)"],
    "linear_algebra": [
        "A = {square}.cosh() + d * torch.eye(d).to(h)\n" + use
        for use in (
            "h = torch.linalg.solve(A, h[..., None])[..., 0]",
            "h = h * torch.linalg.slogdet(A).logabsdet",
            "h = h @ torch.linalg.cholesky(A @ A.T)",
            "h = h @ torch.linalg.inv(A)",
            "h = h + torch.cdist(h.flatten(1)[None, :, :d], A[None])[0].mean(1)"
            ".reshape(-1, *[1] * (h.ndim - 1))",
        )
    ],
}

DEFINITIONS = {
    "Held": """class Held:
    __slots__ = ("w",)

    def __init__(self, w):
        self.w = w
""",
    "Counting": """class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean())
        return x
""",
    "Cube": '''class Cube(torch.autograd.Function):
    """x³/3, in the older way to write it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0] ** 2 * g
''',
    "Softsign": """class Softsign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x / (1 + x.abs())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g / (1 + ctx.saved_tensors[0].abs()) ** 2
""",
    "hooked": """def doubled(module, arguments, output):
    return 2 * output


def shifted(module, arguments):
    return (arguments[0] + 0.5,)


def hooked(layer):
    layer.register_forward_hook(doubled)
    layer.register_forward_pre_hook(shifted)
    return layer
""",
    "symmetric": """class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


def symmetric(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer
""",
}

CELLS = (
    "nn.Linear(d, d)",
    "nn.Sequential(nn.Linear(d, d), nn.Tanh())",
    "nn.Sequential(nn.Linear(d, 2), nn.SiLU(), nn.Linear(2, d))",
    "nn.Sequential(nn.RMSNorm(d), nn.Linear(d, d))",
    "nn.Sequential(nn.Linear(d, d), nn.ReLU(inplace=True), nn.Linear(d, d))",
)


class Writer:
    """Writes the code of a net."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.definitions: list[str] = []
        self.members: list[str] = []
        self.lines: list[str] = []
        self.shape: tuple[int, ...] = ()
        self.arguments = "x"
        self.inputs = ""

    def below(self, largest: int) -> int:
        """A size, 1 to ``largest``."""
        return self.random.randint(1, largest)

    def some(self, *choices: str) -> str:
        return self.random.choice(choices)

    def member(self, code: str) -> str:
        """Make the module or parameter an attribute, and return how it is called."""
        name = code.split("(")[0].split(".")[-1].lower() + str(len(self.members))
        self.members.append(f"self.{name} = {code}")
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        """A parameter of this shape (of none: a number)."""
        return self.member(f"nn.Parameter(0.5 * torch.randn({list(shape)}))")

    def write(self, code: str) -> None:
        """Write lines, in which names stand for sizes and {…} for members."""
        for name, definition in DEFINITIONS.items():
            if name in code and definition not in self.definitions:
                self.definitions.append(definition)
        code = re.sub(r"\{(.*?)\}", lambda found: self._filled(found[1]), code)
        self.lines += self._sized(code).split("\n")

    def _sized(self, code: str) -> str:
        sizes = {"n": math.prod(self.shape)}
        if self.shape:
            sizes |= {"c": self.shape[0], "d": self.shape[-1]}
        return re.sub(r"\b([cdn])\b(?!['=.])", lambda m: str(sizes[m[1]]), code)

    def _filled(self, what: str) -> str:
        d = self.shape[-1]
        shapes = {"number": (), "vector": (d,), "square": (d, d), "wide": (2, d)}
        if what == "like":
            return self.parameter(*self.shape)
        if what in shapes:
            return self.parameter(*shapes[what])
        if what == "Held":
            return f"{self.member(f'Held({self.parameter(d, d)})')}.w"
        if what == "twice":  # under two names
            first = self._filled("cell")
            return f"{first}({self.member(first)}(h).sigmoid() - h)"
        return self.member(self._sized(what if "(" in what else self.some(*CELLS)))

    def width(self) -> tuple[int, int]:
        """The length of the last axis before and after a layer that maps it."""
        before, after = self.shape[-1], self.below(4)
        if math.prod(self.shape[:-1]) * after > LARGEST:
            after = 1
        self.shape = (*self.shape[:-1], after)
        return before, after


Layer = Callable[[Writer], None]
LAYERS: dict[str, Layer] = {
    name: lambda net, choices=choices: net.write(net.random.choice(choices))
    for name, choices in KEEPING.items()
}
AXES: dict[str, tuple[int, ...]] = {}


def layer(*axes: int) -> Callable[[Layer], Layer]:
    """Register a layer for tensors of so many axes, beside that of samples."""

    def register(write: Layer) -> Layer:
        LAYERS[write.__name__], AXES[write.__name__] = write, axes
        return write

    return register


def offered(net: Writer) -> list[str]:
    """The layers that take the current shape."""
    return [name for name in LAYERS if len(net.shape) in AXES.get(name, (1, 2, 3))]


@layer(1, 2, 3)
def linear(net: Writer) -> None:
    i, o = net.width()
    kind = net.some("nn.Linear(I, O)", "nn.Linear(I, O, bias=False)", "bilinear")
    if kind == "bilinear":
        return net.write(f"h = {{nn.Bilinear({i}, {i}, {o})}}(h, h.flip(-1))")
    net.write(f"h = {{{kind.replace('I', str(i)).replace('O', str(o))}}}(h)")


@layer(2, 3)
def convolution(net: Writer) -> None:
    channels, *places = net.shape
    groups = net.random.choice([g for g in (1, 2, 3) if channels % g == 0])
    out = groups * net.below(2)
    options = net.some("padding=1", "padding=1, bias=False", "padding='same'")
    options = net.some(options, "padding=1, padding_mode='circular'")
    if min(places) > 2:
        options = net.some(options, "stride=2, padding=1", "padding=2, dilation=2")
    module = f"nn.Conv{len(places)}d({channels}, {out}, 3, groups={groups}, {options})"
    net.write(f"h = {{{module}}}(h)")
    if "stride" in options:
        places = [(size + 1) // 2 for size in places]
    net.shape = (out, *places)


@layer(2, 3)
def transposed_convolution(net: Writer) -> None:
    channels, *places = net.shape
    if math.prod(places) * 4 > LARGEST:
        return linear(net)
    groups = net.random.choice([g for g in (1, 2) if channels % g == 0])
    stride = net.below(2)
    module = f"nn.ConvTranspose{len(places)}d({channels}, {groups}, 2, {stride}"
    net.write(f"h = {{{module}, groups={groups})}}(h)")
    net.shape = (groups, *((size - 1) * stride + 2 for size in places))


@layer(2, 3)
def pooling(net: Writer) -> None:
    channels, *places = net.shape
    if min(places) < 2:
        return average(net)
    net.write("h = h + 0.013 * torch.arange(n).to(h).reshape(h.shape[1:])")
    pool = net.some("avg_poolKd(h, 2)", "max_poolKd(h, 2)", "lp_poolKd(h, 2, 2)")
    net.write(f"h = F.{pool.replace('K', str(len(places)))}")
    net.shape = (channels, *(size // 2 for size in places))


@layer(2, 3)
def average(net: Writer) -> None:
    axis = net.random.randrange(len(net.shape))
    net.write(f"h = h.{net.some('mean', 'sum', 'logsumexp')}({axis + 1})")
    net.shape = net.shape[:axis] + net.shape[axis + 1 :]


@layer(1, 2, 3)
def norm(net: Writer) -> None:
    _, *places = net.shape
    rank = max(1, len(places))
    kinds = [f"nn.BatchNorm{rank}d(c)", "nn.RMSNorm(d)", f"nn.RMSNorm({[*net.shape]})"]
    # What norms make of two numbers is ±1.
    if net.shape[-1] > 2:
        kinds += ["nn.LayerNorm(d)", f"nn.LayerNorm({[*net.shape]})"]
    if math.prod(places) > 2:
        instance = f"nn.InstanceNorm{rank}d(c, affine=True)"
        kinds += ["nn.GroupNorm(1, c)", "nn.GroupNorm(c, c)", instance]
    net.write(f"h = {{{net.some(*kinds)}}}(h)")


@layer(2)
def attention(net: Writer) -> None:
    tokens, d = net.shape
    if d > 2 and net.random.random() < 0.5:
        options = net.some("", ", norm_first=True", ", activation='gelu'")
        module = f"nn.TransformerEncoderLayer(d, 1, 2, batch_first=True{options})"
        return net.write(f"h = {{{module}}}(h)")
    heads = net.random.choice([k for k in (1, 2) if d % k == 0])
    mask = f", attn_mask=torch.ones({tokens}, {tokens}).triu(1).bool()"
    module = f"nn.MultiheadAttention(d, {heads}, batch_first=True)"
    net.write(f"h = {{{module}}}(h, h, h{net.some('', mask)})[0]")


@layer(2)
def recurrent(net: Writer) -> None:
    _, d = net.shape
    code = net.some(
        f"h = {{nn.{net.some('RNN', 'GRU', 'LSTM')}(d, d, {net.below(2)}, "
        "batch_first=True)}(h)[0][:, -1]",
        "h = {nn.LSTM(d, d, batch_first=True, bidirectional=True)}(h)[1][0][0]",
        # A cell in a loop
        "state = {vector}.expand(len(h), -1)\n"
        "for step in h.unbind(1):\n"
        "    state = {nn.GRUCell(d, d)}(step, state)\n"
        "h = state",
        # Sequences of several lengths, sorted and packed
        "length = (h.detach()[:, 0].abs().sum(1) * 10).long() % c + 1\n"
        "p = nn.utils.rnn.pack_padded_sequence(h, length, True, False)\n"
        "h = {nn.GRU(d, d, batch_first=True)}(p)[1][0]",
    )
    net.write(code)
    net.shape = (d,)


@layer(1, 2, 3)
def dense_connection(net: Writer) -> None:
    if 2 * math.prod(net.shape) <= LARGEST:
        net.write("h = torch.cat([h, {cell}(h)], -1)")
        net.shape = (*net.shape[:-1], 2 * net.shape[-1])


@layer(1, 2, 3)
def spectrum(net: Writer) -> None:
    net.write("h = torch.fft.rfft(h @ {square}).abs()")
    net.shape = (*net.shape[:-1], net.shape[-1] // 2 + 1)


@layer(1)
def fold(net: Writer) -> None:
    """Features become tokens or channels, in one of two orders of axes."""
    (d,) = net.shape
    a = net.random.choice([k for k in (1, 2, 3, 4) if d % k == 0])
    other = f"h = h.reshape(-1, {d // a}, {a}).transpose(1, 2)"
    net.write(net.some(f"h = h.view(-1, {a}, {d // a})", other))
    net.shape = (a, d // a)


@layer(2, 3)
def refold(net: Writer) -> None:
    first, *rest = net.shape
    if len(rest) == 2 or net.random.random() < 0.4:
        net.write("h = h.flatten(1)")
        net.shape = (math.prod(net.shape),)
    elif net.random.random() < 0.5:
        net.write(net.some("h = h.mT", "h = h.permute(0, 2, 1).contiguous()"))
        net.shape = (*rest, first)
    else:
        net.write("h = h[:, None]")
        net.shape = (1, first, *rest)
