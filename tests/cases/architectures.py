"""Architectures."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .market import Lambda, Problem, case, classes, features, mlp, parameter, variants


@case
def cnn() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    data = (features(4, 2, 5, 5), classes(4, 3))
    return Problem(net, nn.CrossEntropyLoss(), data, likelihood=True)


@case
def convolutions() -> Problem:
    # Groups, dilation, asymmetric strides and padding, other padding modes, transposed.
    net = nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), padding=(2, 0), dilation=(2, 1), groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 1, 2, padding=1, padding_mode="circular", bias=False),
        nn.ConvTranspose2d(1, 2, 3, stride=2, padding=1, output_padding=1),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(),
    )
    return Problem(net, nn.MSELoss(), (features(3, 2, 4, 4), features(3, 4)))


@case
def convolutions_1d_and_3d() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.one(x).tanh()  # [n, 2, 4]
        return m.three(h.reshape(-1, 1, 2, 2, 2)).flatten(1)

    net = Lambda(
        forward,
        one=nn.Conv1d(1, 2, 3, padding="same", groups=1),
        three=nn.Conv3d(1, 3, (2, 1, 2), stride=(1, 2, 1)),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 1, 4), classes(4, 3)))


@case
def residual() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.last(h + m.inner(h).relu())

    net = Lambda(
        forward, first=nn.Linear(3, 4), inner=nn.Linear(4, 4), last=nn.Linear(4, 3)
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(5, 3), classes(5, 3)))


@case
def reused_and_tied() -> Problem:
    # A layer called three times, on a branch and after itself; a decoder whose weight
    # is the encoder's transposed, and a layer that shares its weight.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.encoder(x).tanh()
        h = m.shared(m.shared(h).tanh()) + m.shared(h - 1.0)
        return m.twin(F.linear(h, m.encoder.weight.T))

    shared, twin = nn.Linear(2, 2), nn.Linear(3, 2)
    encoder = nn.Linear(3, 2)
    twin.weight = encoder.weight
    net = Lambda(forward, encoder=encoder, shared=shared, twin=twin)
    return Problem(net, nn.MSELoss(), (features(5, 3), features(5, 2)))


@case
def batch_norm() -> Problem:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )
    net[1].running_mean.uniform_()
    net[1].running_var.uniform_(0.5, 2.0)
    net.eval()
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 1, 3, 3), classes(4, 2)))


@case
def normalisations() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x)
        h = m.group(m.norm(h)).tanh()
        return m.instance(h.reshape(-1, 2, 2)).flatten(1) * m.rms(h)

    net = Lambda(
        forward,
        layer=nn.Linear(3, 4),
        norm=nn.LayerNorm(4),
        group=nn.GroupNorm(2, 4),
        instance=nn.InstanceNorm1d(2, affine=True),
        rms=nn.RMSNorm(4),
    )
    for norm in (net.norm, net.group, net.instance):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias)
    return Problem(net, nn.MSELoss(), (features(4, 3), features(4, 4)))


@case
def embedding() -> Problem:
    # Indices that repeat within a sample, and a padding index.
    net = Lambda(
        lambda m, x: m.layer(m.tokens(x).tanh().mean(1)),
        tokens=nn.Embedding(5, 3, padding_idx=0),
        layer=nn.Linear(3, 2),
    )
    X = torch.tensor([[1, 1, 0], [4, 2, 4], [0, 0, 0], [3, 1, 2]])
    return Problem(net, nn.CrossEntropyLoss(), (X, classes(4, 2)))


class _Means(nn.Embedding):
    """Bags of functions that torch differentiates twice."""

    def forward(self, x: Tensor) -> Tensor:
        there = (x != 0).to(self.weight).unsqueeze(2)
        return (super().forward(x) * there).sum(1) / there.sum(1).clamp(min=1.0)


def _looked_up(model: Any) -> Any:
    model = copy.deepcopy(model)
    model.bags = _Means(5, 3, _weight=model.bags.weight.detach())
    return model


@case
def bags_and_products() -> Problem:
    # Means of rows but padding, a matrix for each head, their slopes and products.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.act(torch.einsum("nd,dhk->nhk", m.bags(x), m.w))
        return m.last(h[:, 0], h[:, 1])

    net = Lambda(
        forward,
        bags=nn.EmbeddingBag(5, 3, padding_idx=0),
        w=parameter(3, 2, 2),
        act=nn.PReLU(2),
        last=nn.Bilinear(2, 2, 2),
    )
    X = torch.tensor([[1, 1, 0], [4, 2, 4], [0, 0, 0], [3, 1, 2]])
    return Problem(net, nn.CrossEntropyLoss(), (X, classes(4, 2)), reference=_looked_up)


@case
def attention() -> Problem:
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        h, _ = m.attention(x, x, x, attn_mask=mask)
        return m.head(h.mean(1))

    net = Lambda(
        forward,
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 2),
    ).eval()
    causal = torch.ones(3, 3).triu(1).bool()
    data = ((features(4, 3, 4), causal), classes(4, 2))
    return Problem(net, nn.CrossEntropyLoss(), data)


@case
def transformer() -> Problem:
    layer = nn.TransformerEncoderLayer(
        4, 2, dim_feedforward=3, dropout=0.1, batch_first=True
    )
    net = Lambda(lambda m, x: m.head(m.encoder(x)[:, 0]), encoder=layer, head=mlp(4, 2))
    return Problem(
        net.eval(), nn.CrossEntropyLoss(), (features(3, 3, 4), classes(3, 2))
    )


@case
def transformer_head_only() -> Problem:
    # Frozen attention may take the fused path, which rounds otherwise.
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, batch_first=True)
    net = Lambda(lambda m, x: m.head(m.encoder(x)[:, 0]), encoder=layer, head=mlp(4, 2))
    net.encoder.requires_grad_(False)
    return Problem(
        net.eval(), nn.CrossEntropyLoss(), (features(3, 3, 4), classes(3, 2))
    )


def _recurrent(kind: type[nn.Module]) -> Problem:
    net = Lambda(
        lambda m, x: m.head(m.cell(x)[0][:, -1]),
        cell=kind(2, 2, batch_first=True),
        head=nn.Linear(2, 2),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 3, 2), classes(4, 2)))


variants("recurrent", _recurrent, [("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn", nn.RNN)])


@case
def recurrent_cell_by_hand() -> Problem:
    # One layer called once for each token.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = m.cell(torch.cat([x[:, t], h], dim=1)).tanh()
        return m.head(h)

    net = Lambda(forward, cell=nn.Linear(5, 3), head=nn.Linear(3, 2))
    return Problem(net, nn.MSELoss(), (features(4, 3, 2), features(4, 2)))


@case
def language_model() -> Problem:
    # Tied embedding and head, causal attention, outputs [N, T, V], some ignored.
    def forward(m: Any, tokens: Tensor) -> dict[str, Tensor]:
        h = m.tokens(tokens) + m.places[: tokens.shape[1]]
        q, k, v = m.attention(h).chunk(3, dim=-1)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return {"logits": F.linear(m.norm(h), m.tokens.weight)}

    net = Lambda(
        forward,
        tokens=nn.Embedding(5, 3),
        places=parameter(4, 3),
        attention=nn.Linear(3, 9),
        norm=nn.LayerNorm(3),
    )
    nn.init.constant_(net.norm.weight, 0.5)  # no class is unlikely
    tokens = classes(4, 5, 3)
    y = tokens.roll(-1, 1)
    y[:, -1] = y[1, 0] = -100
    return Problem(
        net,
        nn.CrossEntropyLoss(),
        ({"tokens": tokens}, y),
        likelihood=True,
        predict=lambda model, X: model(**X)["logits"].transpose(1, 2),
    ).rebatched(1, 3)


@case
def vision_transformer() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        patches = m.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([m.token.expand(len(x), -1, -1), patches], dim=1) + m.places
        return m.head(m.encoder(h)[:, 0])

    layer = nn.TransformerEncoderLayer(
        3, 1, dim_feedforward=2, batch_first=True, norm_first=True, activation="gelu"
    )
    net = Lambda(
        forward,
        patches=nn.Conv2d(1, 3, 2, stride=2),
        token=parameter(1, 1, 3),
        places=parameter(1, 5, 3),
        encoder=layer,
        head=nn.Linear(3, 3),
    ).eval()
    return Problem(net, nn.CrossEntropyLoss(), (features(3, 1, 4, 4), classes(3, 3)))


@case
def u_net() -> Problem:
    # A class for each pixel.
    def forward(m: Any, x: Tensor) -> Tensor:
        top = m.first(x).relu()
        bottom = m.middle(F.max_pool2d(top, 2)).relu()
        return m.last(torch.cat([top, m.up(bottom)], dim=1))

    net = Lambda(
        forward,
        first=nn.Conv2d(1, 2, 3, padding=1),
        middle=nn.Conv2d(2, 2, 1),
        up=nn.ConvTranspose2d(2, 1, 2, stride=2),
        last=nn.Conv2d(3, 3, 1),
    )
    return Problem(
        net, nn.CrossEntropyLoss(), (features(3, 1, 2, 4), classes(3, 3, 2, 4))
    )


def _messages(m: Any, h: Tensor, edges: Tensor) -> Tensor:
    """Each node adds up what its neighbours say; edges [2, E]."""
    source, end = edges
    said = m.message(torch.cat([h[source], h[end]], dim=1)).tanh()
    return m.update(h + torch.zeros_like(h).index_add(0, end, said))


@case
def message_passing() -> Problem:
    # One graph is one sample: outputs [1, C, nodes].
    def forward(m: Any, nodes: Tensor, edges: Tensor) -> Tensor:
        return _messages(m, nodes[0], edges[0]).T[None]

    net = Lambda(forward, message=nn.Linear(4, 2), update=nn.Linear(2, 3))
    edges = torch.tensor([[[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 4]]])
    y = classes(1, 3, 5)
    y[0, 3] = -100
    data = ((features(1, 5, 2), edges), y)
    return Problem(net, nn.CrossEntropyLoss(), data, likelihood=True)


@case
def message_passing_on_several_graphs() -> Problem:
    # Graphs of one size in one call, as a union without edges between them.
    def forward(m: Any, nodes: Tensor, edges: Tensor) -> Tensor:
        n, size, _ = nodes.shape
        offsets = size * torch.arange(n)[:, None, None]
        joined = (edges + offsets).transpose(0, 1).reshape(2, -1)
        return _messages(m, nodes.flatten(0, 1), joined).reshape(n, size, -1).mean(1)

    net = Lambda(forward, message=nn.Linear(4, 2), update=nn.Linear(2, 3))
    data = ((features(4, 3, 2), classes(4, 3, 2, 4)), classes(4, 3))
    return Problem(net, nn.CrossEntropyLoss(), data).rebatched(3, 1)
