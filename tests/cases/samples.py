"""Where the sample axis goes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .market import Lambda, Problem, case, classes, features, mlp, parameter


@case
def tokens() -> Problem:
    # A layer over the tokens of a sample, as many as there are samples.
    net = Lambda(
        lambda m, x: m.head(m.layer(x).tanh().sum(1)),
        layer=nn.Linear(2, 3),
        head=nn.Linear(3, 3),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 4, 2), classes(4, 3)))


@case
def sample_axis_second() -> Problem:
    # [tokens, samples, features], as many tokens as samples.
    net = Lambda(
        lambda m, x: m.head(m.layer(x.transpose(0, 1)).tanh().sum(0)),
        layer=nn.Linear(2, 3),
        head=nn.Linear(3, 3),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 4, 2), classes(4, 3)))


@case
def sample_axis_merged() -> Problem:
    # [samples · tokens, features], and [tokens · samples, features].
    def forward(m: Any, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        h = m.first(x.reshape(n * t, -1)).tanh().reshape(n, t, -1)
        h = m.second(h.transpose(0, 1).reshape(n * t, -1)).reshape(t, n, -1)
        return h.sum(0)

    net = Lambda(forward, first=nn.Linear(2, 3), second=nn.Linear(3, 2))
    return Problem(net, nn.MSELoss(), (features(4, 3, 2), features(4, 2)))


@case
def siamese() -> Problem:
    # One call with 2N rows, and convolutions with samples as channels.
    def forward(m: Any, a: Tensor, b: Tensor) -> Tensor:
        ha, hb = m.layer(torch.cat([a, b])).tanh().chunk(2)
        h = (ha * hb)[:, None]
        return m.conv(h).sum(1)

    net = Lambda(forward, layer=nn.Linear(3, 4), conv=nn.Conv1d(1, 2, 2))
    data = ((features(4, 3), features(4, 3)), features(4, 3))
    return Problem(net, nn.MSELoss(), data)


@case
def layers_without_samples() -> Problem:
    # Positions and a generated weight: calls whose first axis does not count samples,
    # though it is as long.
    def forward(m: Any, x: Tensor) -> Tensor:
        places = m.positions(torch.arange(4))
        h = x + m.mixer(m.norm(places))
        weight = m.generator(m.code)  # [3, 2]
        return F.linear(h.mean(1), weight)

    net = Lambda(
        forward,
        positions=nn.Embedding(4, 2),
        norm=nn.LayerNorm(2),
        mixer=nn.Linear(2, 2),
        generator=nn.Linear(2, 2),
        code=parameter(3, 2),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 4, 2), classes(4, 3)))


@case
def samples_as_vectors() -> Problem:
    # Layers called with one sample at a time, without a batch axis.
    net = Lambda(
        lambda m, x: torch.stack([m.layer(row) for row in x]), layer=mlp(3, 4, 2)
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 3), classes(4, 2)))


@case
def samples_as_features() -> Problem:
    # Samples stand in the columns: W Xᵀ.
    def forward(m: Any, x: Tensor) -> Tensor:
        return (m.w @ x.T).T.tanh() @ m.v

    net = Lambda(forward, w=parameter(4, 3), v=parameter(4, 2))
    return Problem(net, nn.MSELoss(), (features(4, 3), features(4, 2)))


@case
def samples_as_image_rows() -> Problem:
    # A convolution along the rows of one image, whose rows are the samples.
    def forward(m: Any, x: Tensor) -> Tensor:
        image = x.transpose(0, 1)[None]  # [1, channels, samples, length]
        return m.conv(image).tanh()[0].permute(1, 0, 2).flatten(1)

    net = Lambda(forward, conv=nn.Conv2d(2, 2, (1, 3)))
    return Problem(net, nn.MSELoss(), (features(4, 2, 4), features(4, 4)))


@case
def one_layer_with_samples_and_without() -> Problem:
    # Called with samples in front, in the middle and nowhere, always three long.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.layer(x).tanh()
        h = h + m.norm(m.layer(h.transpose(0, 1))).transpose(0, 1)
        h = h + m.layer(m.places).cos()
        # Not saturated: the reference's p − p² would lose digits.
        return (h + m.table(torch.arange(3))).mean(1)

    net = Lambda(
        forward,
        layer=nn.Linear(3, 3),
        norm=nn.LayerNorm(3),
        places=parameter(3, 3),
        table=nn.Embedding(3, 3),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(3, 3, 3), classes(3, 3)))


@case
def experts() -> Problem:
    # A batched product whose batch counts experts, as many as there are samples.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.baddbmm(m.b, x.expand(4, -1, -1), m.w).tanh()  # [experts, samples, o]
        gate = m.gate(x).softmax(1)
        return torch.einsum("eno,ne->no", h, gate)

    net = Lambda(
        forward, w=parameter(4, 3, 2), b=parameter(4, 1, 2), gate=nn.Linear(3, 4)
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 3), classes(4, 2)))
