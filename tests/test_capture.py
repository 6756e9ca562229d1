"""What a net does with its parameters is seen as what it is, and its factors are right.

Each test compares with J, H and JᵀHJ by ``torch.func`` in float64, and asks
``explain()`` whether a parameter got the structure that its use has, so that a silent
fallback to dense columns fails as well.
"""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    Lambda,
    Problem,
    call,
    classes,
    dense_of,
    fast_path,
    features,
    parameter,
    problem,
)
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Snapshot

import vivit_linop as vl
from vivit_linop.net.capture import Capture
from vivit_linop.net.certified import find_structure
from vivit_linop.net.columns.khatri_rao import KhatriRaoColumns

N = 3
# The layers whose weights have Khatri–Rao factors.
FACTORED = {"linear", "conv", "conv_transpose", "embedding"}
OPAQUE = "dense: no structure"
# The ways to the Gram matrix of such factors.
WAYS = ("pairs", "blocks", "inputs")


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng([]), warnings.catch_warnings():
        # What torch and vmap cost with some layers is not our concern.
        warnings.filterwarnings("ignore", message="Using padding='same' with even")
        warnings.filterwarnings("ignore", message="There is a performance drop")
        torch.manual_seed(0)
        yield


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
    factor = J.T @ V.blocks.to_dense()
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


# Layers -------------------------------------------------------------------------------

Spec = tuple[str, "functools.partial[nn.Module]", tuple[int, ...]]


class Rows(nn.Embedding):
    """An embedding of indices that features tell."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x > 0).long() + (x > 1).long())


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


@pytest.mark.parametrize("layer", LAYERS, ids=title)
def test_layer(layer: Spec) -> None:
    kind, build, shape = layer
    net, X = one_layer(drawn(build()), *shape)
    uses = {name: f"dense: {kind}" for name, _ in net.named_parameters()}
    if kind in FACTORED:
        uses["layer.weight"] = kind
    check(net, X, uses)


def drawn(layer: nn.Module) -> nn.Module:
    """Give weights and statistics of norms other values than the initial ones."""
    for tensor in itertools.chain(layer.parameters(), layer.buffers()):
        if tensor.is_floating_point() and tensor.ndim == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return layer


# Attention ----------------------------------------------------------------------------

ATTENTION = {
    "in_proj_weight": "linear",
    "in_proj_bias": "dense: linear",
    "out_proj.weight": "linear",
    "out_proj.bias": "dense: linear",
}


def attend(how: str) -> Callable[..., Tensor]:
    """Attention of tokens ``x``, ``[n, 3, 4]``, to others or themselves."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = x.cos(), x[:, :2].sin()
        arguments = {
            "self": (x, x, x),
            "cross": (x, z, z),
            "separate": (x, y, x),
        }[how]
        if not m.attention.batch_first:
            # By identity, attention knows which of them are the same.
            swapped = {id(t): t.transpose(0, 1) for t in arguments}
            arguments = tuple(swapped[id(t)] for t in arguments)
        h, _ = m.attention(*arguments, need_weights=m.weights)
        h = h if m.attention.batch_first else h.transpose(0, 1)
        return h.sum(1).sin()[:, :3]

    return forward


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("how", ["self", "cross", "separate"])
def test_attention(how: str, batch_first: bool, weights: bool) -> None:
    net = Lambda(
        attend(how),
        attention=nn.MultiheadAttention(4, 2, batch_first=batch_first),
        weights=weights,
    )
    nn.init.normal_(net.attention.in_proj_bias)
    uses = {f"attention.{name}": use for name, use in ATTENTION.items()}
    # The rows of the weight that queries, keys and values have are used separately.
    calls = {"self": 1, "cross": 2, "separate": 3}[how]
    uses["attention.in_proj_weight"] = " + ".join(["linear"] * calls)
    uses["attention.in_proj_bias"] = "dense: " + " + ".join(["linear"] * calls)
    check(net, features(N, 3, 4).double(), uses)


def test_attention_with_other_dimensions_and_learned_tokens() -> None:
    # Three weights instead of one, which leaves three parts of one bias.
    def forward(m: Any, x: Tensor) -> Tensor:
        h, _ = m.attention(x, x[:, :2, :2], x[:, :2, :3])
        return h.sum(1).sin()[:, :3]

    attention = nn.MultiheadAttention(
        4, 2, kdim=2, vdim=3, add_bias_kv=True, add_zero_attn=True, batch_first=True
    )
    nn.init.normal_(attention.in_proj_bias)
    uses = dict.fromkeys(["q_proj_weight", "k_proj_weight", "v_proj_weight"], "linear")
    uses["in_proj_bias"] = "dense: linear + linear + linear"
    uses |= {"bias_k": OPAQUE, "bias_v": OPAQUE}
    uses |= {"out_proj.weight": "linear", "out_proj.bias": "dense: linear"}
    check(
        Lambda(forward, attention=attention),
        features(N, 3, 4).double(),
        {f"attention.{name}": uses[name] for name, _ in attention.named_parameters()},
    )


def test_transformer_with_padding() -> None:
    # A decoder layer attends to itself under a causal mask, and to padded samples.
    def forward(m: Any, x: Tensor, padding: Tensor, causal: Tensor) -> Tensor:
        h = m.encoder(x, src_key_padding_mask=padding)
        h = m.decoder(
            x, h, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding
        )
        return h.sum(1).sin()[:, :3]

    options: dict[str, Any] = {"dim_feedforward": 2, "batch_first": True}
    net = Lambda(
        forward,
        encoder=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, **options), 1),
        decoder=nn.TransformerDecoderLayer(4, 2, **options),
    )
    padding = torch.tensor([[False] * 3, [False, False, True], [False] * 3])
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    uses = {}
    for name, p in net.named_parameters():
        norm = ".norm" in name
        use = "layer_norm" if norm else "linear"
        if "multihead_attn.in_proj" in name:
            use = "linear + linear"
        uses[name] = use if p.ndim > 1 else f"dense: {use}"
    check(net, (features(N, 3, 4).double(), padding, causal), uses)


@pytest.mark.parametrize("frozen", ["encoder", "weights", "biases"])
def test_frozen_attention(frozen: str) -> None:
    # A fused path for frozen attention sets what is padded to zero; watched or not,
    # outputs are those of the other path.
    def forward(m: Any, x: Tensor, padding: Tensor) -> Tensor:
        return m.head(m.encoder(x, src_key_padding_mask=padding).sum(1))

    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=2, batch_first=True)
    net = Lambda(forward, encoder=nn.TransformerEncoder(layer, 1), head=nn.Linear(4, 3))
    for p in net.encoder.parameters():
        kept = {"encoder": False, "weights": p.ndim == 1, "biases": p.ndim > 1}
        p.requires_grad_(kept[frozen])
    uses = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            use = "layer_norm" if ".norm" in name else "linear"
            uses[name] = use if p.ndim > 1 else f"dense: {use}"
    padding = torch.tensor([[False] * 3, [False, False, True], [False] * 3])
    check(net, (features(N, 3, 4).double(), padding), uses)


# Bare weights and biases, and views of them -------------------------------------------

W, B = {"w": "linear"}, {"b": "dense: add"}
Expression = tuple[str, Callable[..., Tensor], dict[str, tuple[int, ...]], Any, Any]
# Forward pass, shapes of the parameters and of one sample, what is expected.
EXPRESSIONS: list[Expression] = [
    ("x @ w", lambda m, x: x @ m.w, {"w": (4, 3)}, (4,), W),
    ("x @ w of tokens", lambda m, x: (x @ m.w).sum(1), {"w": (4, 3)}, (3, 4), W),
    ("x @ w.T", lambda m, x: x @ m.w.T, {"w": (3, 4)}, (4,), W),
    ("x @ w.mT", lambda m, x: x.matmul(m.w.mT), {"w": (3, 4)}, (4,), W),
    ("x @ w.T.T", lambda m, x: x @ m.w.T.T, {"w": (4, 3)}, (4,), W),
    ("mm of t", lambda m, x: torch.mm(x, m.w.t()), {"w": (3, 4)}, (4,), W),
    (
        "matmul of transpose",
        lambda m, x: torch.matmul(x, m.w.transpose(0, 1)).sum(1),
        {"w": (3, 4)},
        (2, 4),
        W,
    ),
    (
        "linear with a transposed weight",
        lambda m, x: F.linear(x, m.w.T),
        {"w": (4, 3)},
        (4,),
        W,
    ),
    (
        "a vector",
        lambda m, x: torch.stack([x @ m.w, (x * x).mv(m.w)], 1),
        {"w": (4,)},
        (4,),
        {"w": "matvec + matvec"},
    ),
    (
        "a vector for each token",
        lambda m, x: torch.matmul(x, m.w).sin(),
        {"w": (4,)},
        (3, 4),
        {"w": "matvec"},
    ),
    (
        "addmm",
        lambda m, x: torch.addmm(m.b, x, m.w),
        {"w": (4, 3), "b": (3,)},
        (4,),
        {"w": "linear", "b": "dense: linear"},
    ),
    (
        "addmm of tokens with samples first and a transposed weight",
        lambda m, x: torch.addmm(m.b, x.view(-1, 4), m.w.T).view(len(x), -1, 3).sum(1),
        {"w": (3, 4), "b": (1, 3)},
        (2, 4),
        {"w": "linear", "b": "dense: linear"},
    ),
    (
        "addmm with factors",
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0),
        {"w": (4, 3), "b": (3,)},
        (4,),
        {"w": OPAQUE, "b": OPAQUE},
    ),
    (
        "arguments by name, in another order",
        lambda m, x: (
            torch.addmm(mat2=m.w, mat1=x, input=m.b).sin()
            + torch.matmul(other=m.w, input=x)
            + torch.sub(other=m.b, input=torch.mul(other=m.b, input=x[:, :3]))
        ),
        {"w": (4, 3), "b": (3,)},
        (4,),
        {"w": "linear + linear", "b": "dense: linear + mul + add"},
    ),
    ("x + b", lambda m, x: (x + m.b).sin(), {"b": (3,)}, (3,), B),
    ("b + x", lambda m, x: (m.b + x).sin(), {"b": (3,)}, (3,), B),
    ("x - b", lambda m, x: (x - m.b).sin(), {"b": (3,)}, (3,), B),
    ("b - x", lambda m, x: (m.b - x).sin(), {"b": (3,)}, (3,), B),
    ("a scalar", lambda m, x: (x + m.b).sin(), {"b": ()}, (3,), B),
    ("one entry", lambda m, x: (x + m.b).sin(), {"b": (1, 1)}, (3,), B),
    (
        "outputs without an axis",
        lambda m, x: (x.sum(1) * m.g + m.b).sin()[:, None].expand(-1, 2),
        {"g": (), "b": (1,)},
        (3,),
        {"g": "dense: mul", "b": "dense: add"},
    ),
    (
        "add with a factor",
        lambda m, x: torch.add(x, m.b, alpha=-2.0).sin() * m.b.add(x, alpha=3.0),
        {"b": (3,)},
        (3,),
        {"b": "dense: add + add"},
    ),
    (
        "sub with a factor",
        lambda m, x: torch.sub(x, m.b, alpha=-2.0).sin() * m.b.sub(x, alpha=3.0),
        {"b": (3,)},
        (3,),
        {"b": "dense: add + add"},
    ),
    (
        "in place",
        lambda m, x: x.sin().add_(m.b).sub_(m.b, alpha=0.5).sin(),
        {"b": (3,)},
        (3,),
        {"b": "dense: add + add"},
    ),
    (
        "scaled in place",
        lambda m, x: x.sin().mul_(m.b).sin(),
        {"b": (3,)},
        (3,),
        {"b": OPAQUE},
    ),
    (
        "a bias that repeats the data",
        lambda m, x: (x + m.b).sum(1).sin(),
        {"b": (4, 3)},
        (1, 3),
        B,
    ),
    (
        "x * g",
        lambda m, x: (x * m.g).sin() + (m.g * x.cos()).sin() + torch.mul(x, m.g),
        {"g": (3,)},
        (3,),
        {"g": "dense: mul + mul + mul"},
    ),
    (
        "a product that repeats the data",
        lambda m, x: (x * m.g).sin().sum(2),
        {"g": (2, 3)},
        (2, 1),
        {"g": "dense: mul"},
    ),
    (
        "channels of images",
        lambda m, x: ((x * m.g + m.b).sin()).sum((2, 3)),
        {"g": (3, 1, 1), "b": (1, 3, 1, 2)},
        (3, 2, 2),
        {"g": "dense: mul", "b": "dense: add"},
    ),
    (
        "samples second",
        lambda m, x: (x.transpose(0, 1) * m.g + m.b).sin().sum(0),
        {"g": (3, 1, 3), "b": (3,)},
        (3, 3),
        {"g": "dense: mul", "b": "dense: add"},
    ),
    (
        "samples and tokens in one axis",
        lambda m, x: (x.reshape(-1, 3) * m.g + m.b).sin().view(len(x), -1, 3).sum(1),
        {"g": (3,), "b": (1, 3)},
        (2, 3),
        {"g": "dense: mul", "b": "dense: add"},
    ),
    (
        "tokens and samples in one axis",
        lambda m, x: (
            (x.transpose(0, 1).reshape(-1, 3) * m.g).sin().view(-1, len(x), 3).sum(0)
        ),
        {"g": (3,)},
        (2, 3),
        {"g": "dense: mul"},
    ),
    (
        "of a parameter alone",
        lambda m, x: F.linear(x, m.w * m.g) + (m.b * 2.0 + 1.0),
        {"w": (3, 4), "g": (3, 1), "b": (3,)},
        (4,),
        {"w": OPAQUE, "g": OPAQUE, "b": OPAQUE},
    ),
    (
        "complex",
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.g, n=4)[:, :3],
        {"g": (3,)},
        (4,),
        {"g": OPAQUE},
    ),
    (
        "the first positions",
        lambda m, x: (x + m.b[: x.shape[1]]).sin().sum(1),
        {"b": (5, 3)},
        (2, 3),
        B,
    ),
    (
        "positions with an axis for samples",
        lambda m, x: (x + m.b[:, 1:3, :]).sin().sum(1),
        {"b": (1, 5, 3)},
        (2, 3),
        B,
    ),
    (
        "each row for itself",
        lambda m, x: sum(F.linear(x, m.w[i, None]).sin() * m.b[i] for i in range(3)),
        {"w": (3, 4), "b": (3, 2)},
        (4,),
        {"w": " + ".join(["linear"] * 3), "b": "dense: " + " + ".join(["mul"] * 3)},
    ),
    (
        "rows twice and not at all",
        lambda m, x: F.linear(x, m.w[:2], m.b[1:]).sin() + F.linear(x.sin(), m.w[:2]),
        {"w": (4, 3), "b": (3,)},
        (3,),
        {"w": "linear + linear", "b": "dense: linear"},
    ),
    (
        "rows that overlap",
        lambda m, x: F.linear(x, m.w[:3]).sin() * F.linear(x, m.w[1:]),
        {"w": (4, 3)},
        (3,),
        {"w": "dense: linear + linear"},
    ),
    (
        "all parameters in one vector",
        lambda m, x: (
            F.linear(x, m.w[:6].view(2, 3), m.w[6:8]).sin() @ m.w[8:].view(2, 3)
        ),
        {"w": (14,)},
        (3,),
        {"w": "linear + linear + linear"},
    ),
    (
        "columns",
        lambda m, x: x[:, :2] @ m.w[:2] + x[:, 2:] @ m.w.narrow(0, 2, 2),
        {"w": (4, 3)},
        (4,),
        {"w": "linear + linear"},
    ),
    (
        "a slice of columns",
        lambda m, x: F.linear(x, m.w[:, 1:]),
        {"w": (3, 5)},
        (4,),
        {"w": OPAQUE},
    ),
    (
        "a chosen row",
        lambda m, x: F.linear(x, m.w[[2, 0]]) + m.w[m.w[:, 0] > 0].sum(),
        {"w": (3, 4)},
        (4,),
        {"w": OPAQUE},
    ),
    (
        "a convolution with a view",
        lambda m, x: F.conv1d(x, m.w.view(2, 2, 3)[1:], m.b[:1]).flatten(1),
        {"w": (2, 6), "b": (2,)},
        (2, 4),
        {"w": "conv", "b": "dense: conv"},
    ),
    (
        "a kernel with its axes exchanged",
        lambda m, x: F.conv1d(x, m.w.transpose(0, 1)).flatten(1),
        {"w": (3, 2, 2)},
        (3, 2),
        {"w": OPAQUE},
    ),
    (
        "an embedding of a transposed table",
        lambda m, x: F.embedding((x > 0).long(), m.w.T).sum(1).sin(),
        {"w": (3, 2)},
        (4,),
        {"w": "embedding"},
    ),
    (
        "a transposed product",
        lambda m, x: (x * m.w.T).sin().sum(1),
        {"w": (3, 2)},
        (2, 3),
        {"w": "dense: mul"},
    ),
    (
        "a view for a shape only",
        lambda m, x: (
            F.linear(x, m.w).view(-1, *m.w.T.shape[1:]) + x.new_ones(m.w[0].shape).sum()
        ),
        {"w": (3, 4)},
        (4,),
        W,
    ),
    (
        "a view without derivative",
        lambda m, x: F.linear(x, m.w) * (x @ m.w.detach().T) + x @ m.w.data.T,
        {"w": (3, 4)},
        (4,),
        W,
    ),
]


@pytest.mark.parametrize("row", EXPRESSIONS, ids=lambda row: row[0])
def test_expression(row: Expression) -> None:
    _, forward, shapes, shape, uses = row
    net = Lambda(forward, **{name: parameter(*s) for name, s in shapes.items()})
    check(net, features(N, *shape).double(), uses)


def test_views_of_parameters_with_other_strides() -> None:
    # In memory, channels come last: what is a view of that is none of ordinary strides,
    # and what is none may have a known order of entries.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x @ m.w.permute(0, 2, 3, 1).view(8, 3) + F.linear(x, m.v.reshape(3, 8))
        return h + F.linear(x, m.u[:3].mT.mT, m.u[3:, 0].sin())

    v, w = (parameter(*s).data for s in [(3, 2, 2, 2), (2, 3, 2, 2)])
    net = Lambda(
        forward,
        v=nn.Parameter(v.to(memory_format=torch.channels_last)),
        w=nn.Parameter(w.to(memory_format=torch.channels_last)),
        u=nn.Parameter(parameter(8, 6).data.T),
    )
    check(net, features(N, 8).double(), {"v": "linear", "w": OPAQUE, "u": OPAQUE})


# Several uses, some uses, none --------------------------------------------------------


def test_tied_and_reused_weights_in_branches() -> None:
    # One layer three times, on a branch and after itself, with cross terms between the
    # uses; a weight that two layers share; one that is also used transposed.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.encoder(x).sin()
        h = m.shared(m.shared(h).tanh()) + m.shared(h - 1.0)
        return m.twin(h) + F.linear(h.sin(), m.encoder.weight.T)

    encoder, shared, twin = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 3)
    twin.weight = nn.Parameter(torch.randn(3, 2))
    net = Lambda(forward, encoder=encoder, shared=shared, twin=twin)
    uses = {
        # Factors of a matrix and of its transpose do not add up to factors.
        "encoder.weight": "dense: linear + linear",
        "encoder.bias": "dense: linear",
        "shared.weight": "linear + linear + linear",
        "shared.bias": "dense: linear + linear + linear",
        "twin.weight": "linear",
        "twin.bias": "dense: linear",
    }
    check(net, features(N, 3).double(), uses)


def test_tied_convolutions_and_embeddings() -> None:
    # Layers of different kinds and positions share what they have.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.linear(m.table((x[:, 0] > 0).long()), m.table.weight).sum(1)
        y = m.conv(x).sin()
        y = F.conv1d(y, m.conv.weight, m.conv.bias, padding=1, stride=2)
        return (h + y.sum(2) + F.conv_transpose1d(y, m.conv.weight).sum(2)).sin()

    net = Lambda(forward, conv=nn.Conv1d(2, 2, 2), table=nn.Embedding(2, 3))
    net.table.weight.data.normal_()
    uses = {
        "conv.weight": "dense: conv + conv + conv_transpose",
        "conv.bias": "dense: conv + conv",
        "table.weight": "dense: embedding + linear",
    }
    check(net, features(N, 2, 3).double(), uses)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "layer",
    [
        spec("linear", 2, 3)(nn.Linear, 3, 2),
        convolutions(1, kernel_size=2),
        transposed(1, kernel_size=2),
        spec("layer_norm", 3)(nn.LayerNorm, 3),
        spec("group_norm", 4, 2)(nn.GroupNorm, 2, 4),
    ],
    ids=title,
)
def test_frozen_part_of_a_layer(layer: Spec, frozen: str) -> None:
    kind, build, shape = layer
    net, X = one_layer(drawn(build()), *shape)
    getattr(net.layer, frozen).requires_grad_(False)
    if frozen == "bias" and kind in FACTORED:
        check(net, X, {"layer.weight": kind})
    else:
        kept = "bias" if frozen == "weight" else "weight"
        check(net, X, {f"layer.{kept}": f"dense: {kind}"})


def test_one_unknown_use_makes_a_parameter_opaque() -> None:
    # But not its neighbours.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x).sin() + torch.einsum("ni,oi->no", x, m.layer.weight)
        return m.last(h) * m.scale.exp()

    net = Lambda(
        forward, layer=nn.Linear(4, 3), last=nn.Linear(3, 3), scale=parameter(3)
    )
    uses = {
        "scale": OPAQUE,
        "layer.weight": OPAQUE,
        "layer.bias": "dense: linear",
        "last.weight": "linear",
        "last.bias": "dense: linear",
    }
    check(net, features(N, 4).double(), uses)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_are_opaque(kind: type[nn.Module]) -> None:
    net = Lambda(
        lambda m, x: m.head(m.cell(x)[0][:, -1]),
        cell=kind(2, 2, batch_first=True),
        head=nn.Linear(2, 3),
    )
    uses = dict.fromkeys([f"cell.{n}" for n, _ in net.cell.named_parameters()], OPAQUE)
    uses |= {"head.weight": "linear", "head.bias": "dense: linear"}
    check(net, features(N, 3, 2).double(), uses)


def test_views_inside_transformations() -> None:
    # What torch.func does inside a net cannot be followed, but is right.
    def forward(m: Any, x: Tensor) -> Tensor:
        slope = vmap(torch.func.grad(lambda row: (row @ m.w.T).sin().sum()))(x)
        return (slope[:, :3] + x[:, :3] * m.b[:3]).sin()

    net = Lambda(forward, w=parameter(2, 4), b=parameter(4))
    check(net, features(N, 4).double(), {"w": OPAQUE, "b": "dense: mul"})


# All ways to the same numbers ---------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["cnn", "convolutions", "reused_and_tied", "embedding", "transformer"]
)
def test_each_contraction(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def flops(*_: Any) -> dict[str, float]:
        return {other: float(other != way) for other in WAYS}

    monkeypatch.setattr(KhatriRaoColumns, "gram_flops", flops)
    # Small columns are formed, whatever the cost of their products.
    monkeypatch.setattr(KhatriRaoColumns, "formed_entries", lambda *_: 10**9)
    arguments, _ = problem(name).arguments()
    V = vl.GGNFactor(*arguments)
    assert way in {cost.contraction for cost in V.explain()}
    dense = V.to_dense()
    assert close((V.T @ V).to_dense(), dense.T @ dense)
    U = vl.PerSampleGradients(V.risk)
    cross = (U.T @ V).to_dense()
    assert (cross - U.to_dense().T @ dense).norm() <= 1e-10 * dense.norm() ** 2


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1)])
@pytest.mark.parametrize("memory", [None, 0])
def test_a_batch_of_one_sample_has_more_structure(
    sizes: tuple[int, int], memory: int | None
) -> None:
    # Of one sample, all rows of a matrix product that has samples as columns are its
    # own; of several, the product has no structure.
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x.T.reshape(4, -1).T.reshape(-1, 4).flip(0), m.w).flip(0).sin()

    net = Lambda(forward, w=parameter(3, 4))
    net, loss, (X, y) = problem_of(net, features(4, 4).double())
    whole = vl.EmpiricalRisk(net, loss, (X, y))
    data = list(zip(X.split(list(sizes)), y.split(list(sizes)), strict=True))
    parts = vl.EmpiricalRisk(net, loss, data, memory=memory)
    assert [c.use for c in vl.GGNFactor(whole).explain()] == ["no structure"]
    V = vl.GGNFactor(parts)
    J, G = truth(whole, net, loss, (X, y))
    dense = J.T @ V.blocks.to_dense()
    assert close((V.T @ V).to_dense(), dense.T @ dense)
    assert close((V @ V.T).diagonal(), G.diagonal())


@pytest.mark.parametrize("memory", [None, 0])
def test_parts_of_parameters_in_pieces(memory: int | None) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, _ = m.attention(x, x.sin(), x.sin())
        return F.linear(h[:, 0], m.w[:3], m.w[4:, 0])

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    net = Lambda(forward, attention=attention, w=parameter(7, 4))
    net, loss, data = problem_of(net, features(N, 3, 4).double())
    risk = vl.EmpiricalRisk(net, loss, data, memory=memory)
    V, U = vl.GGNFactor(risk), vl.PerSampleGradients(risk)
    J, G = truth(risk, net, loss, data)
    dense = J.T @ V.blocks.to_dense()
    assert close((V.T @ V).to_dense(), dense.T @ dense)
    assert close((U.T @ V).to_dense(), U.to_dense().T @ dense)
    sizes = [p.numel() for p in risk.params.values()]
    for block, start, size in zip(
        vl.GGN(risk).block_diagonal("parameter").blocks,
        itertools.accumulate([0, *sizes]),
        sizes,
        strict=False,
    ):
        part = slice(start, start + size)
        assert close(block.to_dense(), G[part, part])


# A guest ------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("moment", range(6))
def test_nothing_is_left_after_an_error(
    moment: int, error: type[BaseException]
) -> None:
    # In whatever pass, also between the layers of attention, which run as a function
    # of their own.
    calls = itertools.count()

    def forward(m: Any, x: Tensor) -> Tensor:
        h, _ = m.attention(x, x, x, need_weights=False)
        if m.raises and next(calls) >= moment:
            torch.rand(3)
            raise error
        return m.head(h.sum(1))

    net = Lambda(
        forward,
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
        raises=False,
    )
    net, loss, data = problem_of(net, features(N, 3, 4).double())
    net.attention.out_proj.bias.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    risk = vl.EmpiricalRisk(net, loss, data)
    V = vl.GGNFactor(risk)
    expected = (vl.GGNFactor(net, loss, data).T @ V).to_dense()
    before = Snapshot(net, data)
    net.raises = True
    with pytest.raises(error):
        for _ in range(6):
            vl.GGNFactor(net, loss, data).explain()
    before.check()
    assert not has_torch_function((torch.zeros(1),))
    net.raises = False
    assert torch.equal((vl.GGNFactor(net, loss, data).T @ V).to_dense(), expected)


def test_an_error_in_a_torch_function_is_that_of_the_user() -> None:
    # Attention itself raises, in the run that is recorded.
    wrong = {"now": False}

    def forward(m: Any, x: Tensor) -> Tensor:
        queries = x[..., :3] if wrong["now"] else x
        return m.head(m.attention(queries, x, x)[0].sum(1))

    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    net = Lambda(forward, attention=attention, head=nn.Linear(4, 3))
    net, loss, data = problem_of(net, features(N, 3, 4).double())
    V = vl.GGNFactor(net, loss, data)
    wrong["now"] = True
    with pytest.raises(AssertionError, match="embedding dimension"):
        V.explain()
    assert not has_torch_function((torch.zeros(1),))
    wrong["now"] = False
    dense = V.to_dense()
    assert close((V.T @ V).to_dense(), dense.T @ dense)


# Memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if layer[0] in FACTORED], ids=title
)
def test_memory_of_a_layer(layer: Spec) -> None:
    # What is said before is what the columns take, and what it takes to get them.
    _, build, shape = layer
    net, loss, data = problem_of(*one_layer(drawn(build()), *shape))
    risk = vl.EmpiricalRisk(net, loss, data)
    capture, structure = Capture(risk, data[0], N), find_structure(risk)
    R = 4
    cotangents = torch.randn(*capture.output.shape, R, dtype=torch.float64)
    names = set(risk.params)
    columns = capture.columns(cotangents, structure.variants[0], names, compact=False)
    taken = columns["layer.weight"].nbytes
    formed = {name: risk.params[name].numel() for name in structure.opaque}
    said = N * capture.keep_sizes(data[0]).entries(R, formed) * 8  # float64
    assert taken <= said <= 3 * taken


# Samples that take other ways -------------------------------------------------------


def _by_sample(m: Any, x: Tensor) -> Tensor:
    ways = [(m.second if h.sum() > 0.0 else m.third)(h) for h in m.first(x).unbind()]
    return torch.stack(ways)


def _by_batch(m: Any, x: Tensor) -> Tensor:
    # Each parameter has a known structure on one way, and none on the other.
    v, w = (m.v, m.w) if x.sum() > 0.0 else (m.w, m.v)
    return F.linear(x, v).tanh() + torch.einsum("nd,cd->nc", x, w)


def _gated(m: Any, x: Tensor) -> Tensor:
    # No cotangent of the first samples reaches a layer that has the samples twice.
    left, right = m.layer(torch.cat([x, 2.0 * x])).tanh().chunk(2)
    return m.head(x) + (x[:, :1] < 0.0) * left * right


@pytest.mark.parametrize(
    ("forward", "sizes"),
    [
        *itertools.product([_by_sample, _gated], [(8,), (4, 4), (5, 3)]),
        (_by_batch, (4, 4)),
    ],
)
def test_samples_after_the_first_take_another_way(
    forward: Any, sizes: tuple[int, ...]
) -> None:
    members: dict[Any, dict[str, Any]] = {
        _by_sample: {n: nn.Linear(2, 2) for n in ("first", "second", "third")},
        _by_batch: {"v": parameter(2, 2), "w": parameter(2, 2)},
        _gated: {"layer": nn.Linear(2, 2), "head": nn.Linear(2, 2)},
    }
    net = Lambda(forward, **members[forward]).double()
    if forward is _by_sample:
        with torch.no_grad():
            net.first.weight.copy_(torch.eye(2))
            net.first.bias.zero_()
    first = torch.rand(4, 2, dtype=torch.float64) + 0.1
    X, y = torch.cat([first, -first]), torch.randn(8, 2, dtype=torch.float64)
    cut = Problem(net, nn.MSELoss(), (X, y)).rebatched(*sizes)
    truth = dense_of(cut)
    risk = vl.EmpiricalRisk(net, nn.MSELoss(), cut.data)
    assert close(vl.PerSampleGradients(risk).to_dense(), truth.U)
    V = vl.GGNFactor(risk).to_dense()
    assert close(V @ V.T, truth.G)
    assert close(vl.GGN(risk).diagonal(), truth.G.diagonal())
    assert close(
        (vl.Jacobian(risk) @ vl.Jacobian(risk).T).to_dense(), truth.J @ truth.J.T
    )


class Largest(TorchDispatchMode):
    """Sees the number of entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // 8)
        return result


def test_memory_of_a_large_table() -> None:
    # Neither the check of the structure nor a Gram matrix forms columns or one-hot
    # inputs, which have the length of the table for each sample or position.
    V, E, N, T = 20_000, 4, 8, 5
    net = Lambda(lambda m, x: m.f(m.e(x).sin().mean(1)), e=nn.Embedding(V, E))
    net.f = nn.Linear(E, 3)
    X = torch.randint(V, (N, T))
    X[:, 0], X[:, 1] = 7, X[:, 2]
    net, loss, data = problem_of(net, X)
    risk = vl.EmpiricalRisk(net, loss, data)
    root = vl.GGNFactor(risk).to_dense()
    risk = vl.EmpiricalRisk(net, loss, data)
    with Largest() as largest:
        G = vl.GGN(risk)
        assert next(c.use for c in G.factor.explain()) == "embedding"
        evals = G.eigvalsh()
        diagonal, trace = G.diagonal(), G.trace()
        product = G.factor @ (G.factor.T @ diagonal)
    assert largest.entries <= 1.1 * risk.num_params
    assert close(evals, torch.linalg.svdvals(root).square().flip(0))
    assert close(diagonal, root.square().sum(1))
    assert close(trace, root.square().sum())
    assert close(product, root @ (root.T @ diagonal))
    samples = vl.PerSampleGradients(risk)
    assert close((samples.T @ samples).to_dense(), samples.T @ samples.to_dense())
    assert close((samples.T @ G.factor).to_dense(), samples.T @ G.factor.to_dense())
