"""A market of layers, each of which writes a line or more of a net's forward pass.

A layer is a function of the :class:`Writer` that it writes with. The current tensor is
called ``h``, its shape without the axis of samples stands in ``net.shape``. A layer
that cannot take that shape is not offered: the decorator says for which numbers of
axes it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

LAYERS: dict[str, Layer] = {}
AXES: dict[str, tuple[int, ...]] = {}

# So many numbers of one sample are enough to be wrong about.
LARGEST = 24


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

    def define(self, code: str) -> None:
        if code not in self.definitions:
            self.definitions.append(code)

    def member(self, code: str) -> str:
        """Make the module or parameter an attribute, and return how it is called."""
        name = code.split("(")[0].split(".")[-1].lower() + str(len(self.members))
        self.members.append(f"self.{name} = {code}")
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        """A parameter of this shape (of none: a number)."""
        return self.member(f"nn.Parameter(0.5 * torch.randn({list(shape)}))")

    def write(self, *lines: str) -> None:
        self.lines += lines

    def width(self, width: int | None = None) -> tuple[int, int]:
        """The length of the last axis before and after a layer that maps it."""
        before, width = self.shape[-1], width or self.below(4)
        if math.prod(self.shape[:-1]) * width > LARGEST:
            width = 1
        self.shape = (*self.shape[:-1], width)
        return before, width

    def cell(self) -> str:
        """A module that keeps the last axis."""
        d = self.shape[-1]
        inner = f"nn.Linear({d}, {d})"
        return self.member(
            self.some(
                inner,
                f"nn.Sequential({inner}, nn.Tanh())",
                f"nn.Sequential(nn.Linear({d}, 2), nn.SiLU(), nn.Linear(2, {d}))",
                f"nn.Sequential(nn.LayerNorm({d}), {inner})",
                f"nn.Sequential({inner}, nn.ReLU(inplace=True), nn.Linear({d}, {d}))",
            )
        )

    def unequal(self) -> None:
        """Break ties between entries, which have no one derivative of an order."""
        steps = f"torch.arange({math.prod(self.shape)}).to(h).reshape({self.shape})"
        self.write(f"h = h + 0.013 * {steps}")


Layer = Callable[[Writer], None]


def layer(*axes: int) -> Callable[[Layer], Layer]:
    """Register a layer for tensors of so many axes, beside that of samples."""

    def register(write: Layer) -> Layer:
        LAYERS[write.__name__] = write
        AXES[write.__name__] = axes or (1, 2, 3)
        return write

    return register


def offered(net: Writer) -> list[str]:
    return [name for name in LAYERS if len(net.shape) in AXES[name]]


# Linear maps and what stands between them --------------------------------------------


@layer()
def linear(net: Writer) -> None:
    i, o = net.width()
    bias = net.some("", ", bias=False")
    net.write(f"h = {net.member(f'nn.Linear({i}, {o}{bias})')}(h)")


@layer()
def activation(net: Writer) -> None:
    functions = ("torch.tanh", "F.relu", "F.gelu", "F.softplus", "torch.sigmoid")
    others = ("F.silu", "F.elu", "F.leaky_relu", "torch.sin", "F.hardtanh", "F.selu")
    net.write(f"h = {net.some(*functions, *others)}(h)")


@layer()
def prelu(net: Writer) -> None:
    count = net.random.choice([1, net.shape[0]])
    net.write(f"h = {net.member(f'nn.PReLU({count})')}(h)")


@layer()
def scale_and_shift(net: Writer) -> None:
    scale, shift = net.parameter(), net.parameter(net.shape[-1])
    net.write(f"h = h * {scale}.{net.some('exp', 'cos', 'sigmoid')}() + {shift}")


@layer()
def bilinear(net: Writer) -> None:
    i, o = net.width()
    net.write(f"h = {net.member(f'nn.Bilinear({i}, {i}, {o})')}(h, h.flip(-1))")


@layer()
def softmax(net: Writer) -> None:
    net.write(f"h = h.{net.some('softmax', 'log_softmax', 'logcumsumexp')}(-1)")


# Convolutions and pooling -------------------------------------------------------------


@layer(2, 3)
def convolution(net: Writer) -> None:
    channels, *places = net.shape
    groups = net.random.choice([g for g in (1, 2, 3) if channels % g == 0])
    out = groups * net.below(2)
    options = net.some("padding=1", "padding=1, bias=False", "padding='same'")
    options = net.some(options, "padding=1, padding_mode='circular'")
    if min(places) > 2:
        options = net.some(options, "stride=2, padding=1", "padding=2, dilation=2")
    if len(places) == 2 and "dilation" not in options and "same" not in options:
        options = options.replace("padding=1", "padding=(1, 1)")
    module = f"nn.Conv{len(places)}d({channels}, {out}, 3, groups={groups}, {options})"
    net.write(f"h = {net.member(module)}(h)")
    if "stride" in options:
        places = [(size + 1) // 2 for size in places]
    net.shape = (out, *places)


@layer(2, 3)
def transposed_convolution(net: Writer) -> None:
    channels, *places = net.shape
    if math.prod(places) * 4 > LARGEST:
        return linear(net)
    groups = net.random.choice([g for g in (1, 2) if channels % g == 0])
    out, stride = groups, net.below(2)
    module = f"nn.ConvTranspose{len(places)}d({channels}, {out}, 2, {stride}"
    net.write(f"h = {net.member(f'{module}, groups={groups})')}(h)")
    net.shape = (out, *((size - 1) * stride + 2 for size in places))


@layer(2, 3)
def pooling(net: Writer) -> None:
    channels, *places = net.shape
    d = len(places)
    kind = net.some("avg_pool", "max_pool", "lp_pool")
    if min(places) < 2:
        return linear(net)
    net.unequal()
    norm = ", 2" if kind == "lp_pool" else ""
    net.write(f"h = F.{kind}{d}d(h{norm}, 2)")
    net.shape = (channels, *(size // 2 for size in places))


@layer(2, 3)
def average(net: Writer) -> None:
    axis = net.random.randrange(len(net.shape))
    net.write(f"h = h.{net.some('mean', 'sum', 'logsumexp')}({axis + 1})")
    net.shape = net.shape[:axis] + net.shape[axis + 1 :]


# Norms --------------------------------------------------------------------------------


@layer()
def norm_of_features(net: Writer) -> None:
    kind = net.some("LayerNorm", "RMSNorm")
    shape = list(net.shape[-net.below(len(net.shape)) :])
    if kind == "LayerNorm" and math.prod(shape) < 3:
        return prelu(net)  # two numbers have the norms ±1, whatever they are
    net.write(f"h = {net.member(f'nn.{kind}({shape})')}(h)")


@layer(2, 3)
def norm_of_channels(net: Writer) -> None:
    channels, *places = net.shape
    if math.prod(places) < 3:
        return prelu(net)
    affine = net.member(
        net.some(
            f"nn.GroupNorm(1, {channels})",
            f"nn.GroupNorm({channels}, {channels})",
            f"nn.InstanceNorm{len(places)}d({channels}, affine=True)",
        )
    )
    net.write(f"h = {affine}(h)")


@layer(1, 2, 3)
def batch_norm(net: Writer) -> None:
    kind = max(1, len(net.shape) - 1)
    net.write(f"h = {net.member(f'nn.BatchNorm{kind}d({net.shape[0]})')}(h)")


# Sequences ----------------------------------------------------------------------------


@layer(2)
def attention(net: Writer) -> None:
    tokens, d = net.shape
    heads = net.random.choice([k for k in (1, 2) if d % k == 0])
    module = net.member(f"nn.MultiheadAttention({d}, {heads}, batch_first=True)")
    mask = f", attn_mask=torch.ones({tokens}, {tokens}).triu(1).bool()"
    net.write(f"h = {module}(h, h, h{net.some('', mask)})[0]")


@layer(2)
def transformer(net: Writer) -> None:
    d = net.shape[-1]
    if d < 3:
        return attention(net)  # a LayerNorm of two numbers is a sign
    options = net.some("", ", norm_first=True", ", activation='gelu'", ", bias=False")
    module = f"nn.TransformerEncoderLayer({d}, 1, 2, batch_first=True{options})"
    net.write(f"h = {net.member(module)}(h)")


@layer(2)
def recurrent(net: Writer) -> None:
    i, o = net.width(net.below(2))
    kind, options = net.some("RNN", "GRU", "LSTM"), "batch_first=True"
    if net.random.random() < 0.3:
        options += ", bidirectional=True"
        net.shape = (net.shape[0], 2 * o)
    module = net.member(f"nn.{kind}({i}, {o}, {net.below(2)}, {options})")
    net.write(f"h = {module}(h)[0]")
    if net.random.random() < 0.3:
        net.write("h = h[:, -1]")
        net.shape = net.shape[1:]


@layer(2)
def recurrent_cell(net: Writer) -> None:
    d = net.shape[-1]
    cell, start = net.member(f"nn.GRUCell({d}, {d})"), net.parameter(d)
    net.write(f"state = {start}.expand(len(h), -1)")
    net.write("for step in h.unbind(1):", f"    state = {cell}(step, state)")
    net.write("h = state")
    net.shape = (d,)


@layer(2)
def packed(net: Writer) -> None:
    """Sequences of as many lengths as samples, sorted and packed."""
    tokens, d = net.shape
    module = net.member(f"nn.GRU({d}, {d}, batch_first=True)")
    net.write(
        f"length = (h.detach()[:, 0].abs().sum(1) * 10).long() % {tokens} + 1",
        "p = nn.utils.rnn.pack_padded_sequence(h, length, True, False)",
        f"h = {module}(p)[1][0]",
    )
    net.shape = (d,)


# Weights that are functions of parameters ---------------------------------------------


@layer()
def weight_in_an_expression(net: Writer) -> None:
    i, o = net.width()
    w = net.parameter(o, i)
    expressions = (f"{w}.exp()", f"{w}.sin()", f"{w} / {w}.norm()", f"{w}.softmax(0)")
    whole = net.parameter(o + 1, i)
    others = (f"{net.parameter(i, o)}.T", f"{whole}[:{o}]", f"{whole}.roll(1, 0)[1:]")
    split = f"torch.cat({net.parameter(o, i)}.split(1), 0)"
    net.write(f"h = F.linear(h, {net.some(*expressions, *others, split)})")


@layer()
def autoencoder(net: Writer) -> None:
    w = net.parameter(2, net.shape[-1])
    net.write(f"h = F.linear(F.linear(h, {w}).tanh(), {w}.T)")


@layer()
def matmul(net: Writer) -> None:
    i, o = net.width()
    w = net.parameter(i, o)
    net.write(
        net.some(f"h = h @ {w}", f"h = torch.einsum('...i,io->...o', h, {w})")
        + net.some("", ".tanh()")
    )


@layer()
def shared(net: Writer) -> None:
    """A module called twice, or under two names."""
    cell = net.cell()
    other = net.member(net.some(cell, cell))
    net.write(f"h = {cell}({other}(h).tanh() + h)")


@layer()
def twins(net: Writer) -> None:
    d = net.shape[-1]
    one, two = (net.member(f"nn.Linear({d}, {d})") for _ in range(2))
    net.members.append(f"{one}.weight = {two}.weight")
    net.write(f"h = {one}(h) * {two}(h).sigmoid()")


@layer()
def parametrized(net: Writer) -> None:
    i, o = net.width()
    norm = net.some(
        "nn.utils.weight_norm",
        "nn.utils.parametrizations.weight_norm",
        "nn.utils.parametrizations.spectral_norm",
        "symmetric",
    )
    if norm == "symmetric":
        i = o = net.width(i)[1]
        net.define(
            "class Symmetric(nn.Module):\n"
            "    def forward(self, w):\n"
            "        return w.triu() + w.triu(1).mT"
        )
        norm = "nn.utils.parametrize.register_parametrization"
        module = net.member(f"nn.Linear({i}, {i})")
        net.members.append(f"{norm}({module}, 'weight', Symmetric())")
    else:
        module = net.member(f"{norm}(nn.Linear({i}, {o}))")
    net.write(f"h = {module}(h)")


@layer()
def positions(net: Writer) -> None:
    places = net.parameter(*net.shape)
    net.write(
        net.some(
            f"h = h + {places}", f"h = h * {places}.expand_as(h)", f"h += {places}"
        )
    )


@layer()
def unused(net: Writer) -> None:
    net.parameter(2)
    net.parameter(0, 3)


# Views, writes, ways through the graph ------------------------------------------------


@layer()
def residual(net: Writer) -> None:
    net.write(f"h = h + {net.cell()}(h)")


@layer()
def dense_connection(net: Writer) -> None:
    if 2 * math.prod(net.shape) > LARGEST:
        return residual(net)
    net.write(f"h = torch.cat([h, {net.cell()}(h)], -1)")
    net.shape = (*net.shape[:-1], 2 * net.shape[-1])


@layer()
def chunks(net: Writer) -> None:
    a, b = net.cell(), net.cell()
    d = net.shape[-1]
    net.write(
        f"top, rest = h.split([{d // 2}, {d - d // 2}], -1)",
        f"h = {a}(torch.cat([rest, top], -1)) * {b}(h)",
    )


@layer()
def in_place(net: Writer) -> None:
    net.write(f"h = {net.cell()}(h)")
    lines = ("h.relu_()", "h += 0.5", "h *= 2.0", "h[..., 0] = 0.25", "h.mul_(h + 1)")
    net.write(net.some(*lines[:4]))


@layer()
def write_by_parts(net: Writer) -> None:
    cell = net.cell()
    net.write("out = torch.zeros_like(h)", f"out[..., :1] = {cell}(h)[..., -1:]")
    net.write("h = out.add_(h)")


@layer(1)
def fold(net: Writer) -> None:
    """Features become tokens or channels, in one of two orders of axes."""
    (d,) = net.shape
    a = net.random.choice([k for k in (1, 2, 3, 4) if d % k == 0])
    if net.random.random() < 0.5:
        net.write(f"h = h.view(-1, {a}, {d // a})")
    else:
        net.write(f"h = h.reshape(-1, {d // a}, {a}).transpose(1, 2)")
    net.shape = (a, d // a)


@layer(2)
def swap(net: Writer) -> None:
    net.write(net.some("h = h.mT", "h = h.permute(0, 2, 1).contiguous()"))
    net.shape = net.shape[::-1]


@layer(2, 3)
def flatten(net: Writer) -> None:
    net.write("h = h.flatten(1)")
    net.shape = (math.prod(net.shape),)


@layer(2)
def image(net: Writer) -> None:
    """One channel; a convolution over tokens and features."""
    net.write("h = h[:, None]")
    net.shape = (1, *net.shape)


@layer()
def samples_last(net: Writer) -> None:
    """Layers between which samples are the second axis, or merged with the first."""
    if len(net.shape) == 1:
        w = net.parameter(net.shape[0], net.shape[0])
        return net.write(f"h = ({w} @ h.T).T.contiguous().sigmoid()")
    cell = net.cell()
    net.write(
        net.some(
            f"h = {cell}(h.transpose(0, 1)).transpose(0, 1)",
            f"h = {cell}(h.flatten(0, 1)).unflatten(0, h.shape[:2])",
        )
    )


# Samples that go their own ways -------------------------------------------------------


@layer()
def loop_over_samples(net: Writer) -> None:
    a, b = net.cell(), net.cell()
    net.write(f"h = torch.stack([{a}(s) if s.sum() > 0 else {b}(s) * 0.5 for s in h])")


@layer()
def routed(net: Writer) -> None:
    a, b = net.cell(), net.cell()
    net.write(
        "left = h.flatten(1).sum(1) > 0",
        "out = torch.empty_like(h)",
        f"out[left], out[~left] = {a}(h[left]), {b}(h[~left])",
        "h = out",
    )


@layer()
def sorted_samples(net: Writer) -> None:
    cell = net.cell()
    net.write(
        "order = h.detach().flatten(1).sum(1).argsort()",
        f"h = {cell}(h[order])[order.argsort()]",
    )


@layer()
def sorted_features(net: Writer) -> None:
    net.unequal()
    net.write(
        net.some(
            "h = h.sort(-1).values",
            "h = h.cummax(-1).values",
            "h = h.gather(-1, h.detach().argsort(-1))",
        )
    )


@layer()
def branch_on_shape(net: Writer) -> None:
    a, b = net.cell(), net.cell()
    net.write(f"h = {a}(h) if h.shape[-1] > 2 else {b}(h).sin()")


@layer()
def experts(net: Writer) -> None:
    d = net.shape[-1]
    w, gate = net.parameter(3, d, d), net.member(f"nn.Linear({d}, 3)")
    net.write(
        f"out = torch.einsum('...i,eio->...eo', h, {w})",
        f"h = ({gate}(h).softmax(-1)[..., None] * out.tanh()).sum(-2)",
    )


# Other ways to compute ----------------------------------------------------------------


@layer()
def checkpointed(net: Writer) -> None:
    # Without an input that requires grad, the older way cuts all derivatives.
    if net.random.random() < 0.5:
        net.write("h = h if h.requires_grad else h.detach().requires_grad_()")
        way = "use_reentrant=True"
    else:
        way = "use_reentrant=False"
    net.write(f"h = checkpoint.checkpoint({net.cell()}, h, {way})")


@layer()
def custom_function(net: Writer) -> None:
    """Right first and second derivatives, in the two ways to write them."""
    net.define(
        "class Cube(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x):\n"
        "        ctx.save_for_backward(x)\n"
        "        return x**3 / 3\n\n"
        "    @staticmethod\n"
        "    def backward(ctx, g):\n"
        "        return ctx.saved_tensors[0] ** 2 * g"
    )
    net.define(
        "class Softsign(torch.autograd.Function):\n"
        "    generate_vmap_rule = True\n\n"
        "    @staticmethod\n"
        "    def forward(x):\n"
        "        return x / (1 + x.abs())\n\n"
        "    @staticmethod\n"
        "    def setup_context(ctx, inputs, output):\n"
        "        ctx.save_for_backward(*inputs)\n\n"
        "    @staticmethod\n"
        "    def backward(ctx, g):\n"
        "        return g / (1 + ctx.saved_tensors[0].abs()) ** 2"
    )
    net.write(f"h = {net.some('Cube', 'Softsign')}.apply(h)")


@layer(1)
def linear_algebra(net: Writer) -> None:
    (d,) = net.shape
    w = net.parameter(d, d)
    A = f"({w} @ {w}.T + torch.eye({d}).to(h))"
    net.write(
        net.some(
            f"h = torch.linalg.solve({A}, h[..., None])[..., 0]",
            f"h = h * torch.linalg.slogdet({A}).logabsdet",
            f"h = torch.linalg.cholesky({A}).matmul(h[..., None])[..., 0]",
            f"h = h @ torch.linalg.matrix_exp({w})",
            f"h = torch.cdist(h[:, None], {w}[None])[:, 0]",
        )
    )


@layer()
def spectrum(net: Writer) -> None:
    net.write(f"h = torch.fft.rfft(h @ {net.parameter(*net.shape[-1:] * 2)}).abs()")
    net.shape = (*net.shape[:-1], net.shape[-1] // 2 + 1)


@layer()
def cumulative(net: Writer) -> None:
    net.write(net.some("h = h.cumsum(-1)", "h = (1 + h.square()).cumprod(-1).log()"))
