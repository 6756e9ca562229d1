"""Each kind of layer gives its parameters exact columns, in its structure."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import vivit_linop as vl
from tests.capture_cases import (
    FACTORED,
    LAYERS,
    OPAQUE,
    N,
    Spec,
    check,
    drawn,
    one_layer,
    title,
)
from tests.cases import Lambda, features

# Layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=title)
def test_layer(layer: Spec) -> None:
    kind, build, shape = layer
    net, X = one_layer(drawn(build()), *shape)
    uses = {name: f"dense: {kind}" for name, _ in net.named_parameters()}
    if kind in FACTORED:
        uses["layer.weight"] = kind
    check(net, X, uses)


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


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv1d(1, 1, 3),
        lambda: nn.Conv2d(1, 1, 2),
        lambda: nn.ConvTranspose2d(1, 1, 2),
        lambda: nn.Conv3d(1, 1, (1, 2, 1)),
        lambda: nn.Conv2d(1, 3, 2),
    ],
    ids=["1d", "2d", "transposed", "3d", "channels"],
)
def test_images_without_an_axis_of_samples(
    conv: Callable[[], nn.Module], N: int
) -> None:
    """One channel is no sample: what the layer does to an image has no structure."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.last = conv(), nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            images = [self.conv(image).tanh().flatten() for image in x]
            return self.last(torch.stack(images))  # type: ignore[no-any-return]

    net = Net()
    axes = net.conv.weight.ndim - 2
    X, y = torch.rand(N, 1, *(3, 4, 2)[:axes]), torch.arange(N) % 3
    net(X)
    net, X = net.double(), X.double()
    params = {name: p.detach() for name, p in net.named_parameters()}
    jacobian = jacrev(lambda given: functional_call(net, given, X))(params)
    J = torch.cat([part.reshape(3 * N, -1) for part in jacobian.values()], dim=1)
    p = net(X).detach().softmax(1)
    H = torch.block_diag(*(row.diag() - row.outer(row) for row in p)) / N
    G = J.T @ H @ J
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y))
    V = vl.GGNFactor(risk).to_dense()
    torch.testing.assert_close(V @ V.T, G)
    size = net.conv.weight.numel()
    for kind in (vl.KFAC, vl.EKFAC):
        found = kind(risk, variant="exact").to_dense()
        torch.testing.assert_close(found[:size, :size], G[:size, :size])


# Matrices in other calls --------------------------------------------------------------

EINSUMS = {
    "nd,de->ne": (5, 2),
    "nd, ed -> ne": (2, 5),
    "de,nd->ne": (5, 2),
    "...d,de->...e": (5, 2),
    "nd,dab->nab": (5, 2, 3),
    "nd,abd->nab": (2, 3, 5),
    "ntd,de->nte": (5, 2),
    "nt d,e d->nte": (2, 5),
    "ntab,abe->nte": (2, 3, 4),
    "ntab,eab->nte": (4, 2, 3),
    "tnd,de->tne": (5, 2),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_is_linear(equation: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        data = equation.replace(" ", "").split("->")[0].split(",")
        at = int("n" not in data[0] and "." not in data[0])
        x = x if "t" in data[at] else x[:, 0]
        x = x.reshape(*x.shape[:-1], 2, 3) if "ab" in data[at] else x[..., :5]
        second = data[at].startswith("t")
        operands = x.transpose(0, 1) if second else x, m.w
        h = torch.einsum(equation, *(operands[::-1] if at else operands))
        h = (h.transpose(0, 1) if second else h).tanh()
        return h.reshape(len(x), -1, 2).sum(1)

    net = Lambda(forward, w=nn.Parameter(torch.randn(EINSUMS[equation])))
    check(net, features(N, 4, 6).double(), {"w": "linear"})


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("nta,ab->nb", (6, 2)),  # summed over positions
        ("nta,tb->nab", (4, 2)),
        ("nta,ta->na", (4, 6)),  # no matrix for all positions
        ("nta,tab->ntb", (4, 6, 2)),
        ("nta,aa->nt", (6, 6)),
        ("nta,ab->nbt", (6, 2)),
        ("nta,ab->tnb", (6, 2)),
        ("nta,az", (6, 2)),
        ("nta,ab->ntb", (1, 2)),  # a row that is repeated
        ("nta,a->nt", (6,)),
    ],
)
def test_other_einsums_are_right(equation: str, shape: tuple[int, ...]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.einsum(equation, x, m.w)
        h = h.transpose(0, 1) if "->tn" in equation else h
        return h.tanh().reshape(len(x), -1, 2).sum(1)

    net = Lambda(forward, w=nn.Parameter(torch.randn(shape)))
    check(net, features(N, 4, 6).double(), {"w": OPAQUE})


def test_einsums_of_other_operands() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.einsum("nd,de,ef->nf", x, m.a, m.b)
        h = h + torch.einsum(x, [0, 1], m.e, [1, 2], [0, 2])
        h = h + x @ torch.einsum("ab->ba", m.f) + torch.einsum("nd,de->ne", [x, m.g])
        return h + x[:, :2] @ torch.einsum("ab,bc->ac", m.c, m.d)

    sizes = {"a": (3, 4), "b": (4, 2), "c": (2, 2), "d": (2, 2), "e": (3, 2)}
    sizes |= {"f": (2, 3), "g": (3, 2)}
    net = Lambda(
        forward, **{name: nn.Parameter(torch.randn(s)) for name, s in sizes.items()}
    )
    # Torch itself makes an equation of numbered axes.
    uses = dict.fromkeys(sizes, OPAQUE) | {"e": "linear"}
    check(net, features(N, 3).double(), uses)


@pytest.mark.parametrize("positions", [(), (3,), (4,)])
@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(positions: tuple[int, ...], bias: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(m.first(x[..., :2]), x[..., 2:]).tanh()
        return h.sum(1) if positions else h

    net = Lambda(forward, first=nn.Linear(2, 2), layer=nn.Bilinear(2, 3, 2, bias=bias))
    uses = {"first.weight": "linear", "first.bias": "dense: linear"}
    uses |= {"layer.weight": "bilinear", "layer.bias": "dense: bilinear"}
    uses = {name: uses[name] for name, _ in net.named_parameters()}
    check(net, features(N, *positions, 5).double(), uses)


def test_bilinear_of_a_parameter() -> None:
    net = Lambda(
        lambda m, x: m.layer(x, m.w.expand(len(x), 2)),
        w=nn.Parameter(torch.randn(2)),
        layer=nn.Bilinear(3, 2, 2, bias=False),
    )
    uses = {"w": "dense: expand", "layer.weight": "bilinear"}
    check(net, features(N, 3).double(), uses)


def test_prelu_where_samples_are_elsewhere_and_of_parameters() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.prelu(x.transpose(0, 1), m.a).transpose(0, 1)
        h = h + F.prelu(x.reshape(-1, 5), m.a).view_as(x)
        h = h + F.prelu(m.w, m.b) + F.prelu(x, m.c.square())
        return h.sum(1)[:, :2].tanh()

    sizes = {"a": (1,), "b": (1,), "c": (1,), "w": (5,)}
    net = Lambda(
        forward, **{name: nn.Parameter(torch.randn(s)) for name, s in sizes.items()}
    )
    uses = dict.fromkeys(sizes, OPAQUE) | {"a": "dense: prelu + prelu"}
    check(net, features(N, 4, 5).double(), uses)


@pytest.mark.parametrize(
    "options", [{"mode": "max"}, {"max_norm": 1.0}], ids=["max", "norm"]
)
def test_bags_that_are_no_sums(options: dict[str, Any]) -> None:
    net = Lambda(lambda m, x: m.e(x).tanh(), e=nn.EmbeddingBag(4, 2, **options))
    X = torch.tensor([[0, 1, 1], [2, 3, 1], [0, 0, 0]])
    V = vl.GGNFactor(net.double(), nn.CrossEntropyLoss(), (X, torch.arange(3) % 2))
    assert [cost.use for cost in V.explain()] == ["no structure"]
