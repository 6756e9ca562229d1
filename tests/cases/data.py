"""Shapes of outputs and data; which parameters there are."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .market import Lambda, Problem, binary, case, classes, features, mlp, parameter

# Shapes of outputs and data -----------------------------------------------------------


@case
def one_output() -> Problem:
    data = (features(5, 3), features(5, 1))
    return Problem(mlp(3, 4, 1), nn.MSELoss(), data, likelihood=True)


@case
def outputs_without_channel() -> Problem:
    # Outputs [N] and targets [N].
    net = Lambda(lambda m, x: m.layer(x).squeeze(1), layer=mlp(3, 4, 1))
    loss = nn.BCEWithLogitsLoss()
    return Problem(net, loss, (features(5, 3), binary(5)), likelihood=True)


@case
def one_sample() -> Problem:
    data = (features(1, 3), classes(1, 3))
    return Problem(mlp(3, 4, 3), nn.CrossEntropyLoss(), data, likelihood=True)


@case
def uneven_batches() -> Problem:
    data = (features(8, 4), classes(8, 3))
    whole = Problem(mlp(4, 3, 3), nn.CrossEntropyLoss(), data, likelihood=True)
    return whole.rebatched(3, 4, 1)


@case
def data_loader() -> Problem:
    dataset = TensorDataset(features(7, 4), features(7, 2))
    loader = DataLoader(dataset, batch_size=3)  # 3, 3, 1
    return Problem(mlp(4, 3, 2), nn.MSELoss(), loader, likelihood=True)


@case
def repeated_samples() -> Problem:
    X, y = features(3, 6), classes(3, 3)
    data = (X.repeat(3, 1), y.repeat(3))
    return Problem(mlp(6, 4, 3), nn.CrossEntropyLoss(), data, likelihood=True)


@case
def more_columns_than_parameters() -> Problem:
    data = (features(12, 2), classes(12, 3))  # N R = 24 > 9 = D
    return Problem(nn.Linear(2, 3), nn.CrossEntropyLoss(), data, likelihood=True)


@case
def overdetermined_and_singular() -> Problem:
    # N R = 24 > D = 18 > rank = 4: the second feature repeats the first.
    X = features(12, 1).repeat(1, 2)
    data = (X, features(12, 2))
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 2))
    return Problem(net, nn.MSELoss(), data, likelihood=True)


@case
def mapping_input() -> Problem:
    # Out of order, with a leaf that counts samples only and one without sample axis.
    def forward(m: Any, mask: Tensor, x: Tensor, shift: Tensor) -> Tensor:
        return m.layer(x + shift) * mask[:, None]

    X = {
        "x": features(5, 3),
        "shift": features(1, 3)[0],
        "mask": torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0]),
    }
    loss = nn.CrossEntropyLoss()
    return Problem(Lambda(forward, layer=mlp(3, 3)), loss, (X, classes(5, 3)))


@case
def tuple_input() -> Problem:
    def forward(m: Any, pair: tuple[Tensor, Tensor], temperature: Tensor) -> Tensor:
        return m.layer(*pair) / temperature

    X = ((features(5, 2), features(5, 3)), torch.tensor(2.0))
    net = Lambda(forward, layer=nn.Bilinear(2, 3, 2))
    return Problem(net, nn.MSELoss(), (X, features(5, 2)))


@case
def tuple_input_in_batches() -> Problem:
    whole = Problem(
        nn.Bilinear(2, 3, 2),
        nn.MSELoss(),
        ((features(5, 2), features(5, 3)), features(5, 2)),
    )
    return whole.rebatched(1, 4)


# Parameters ---------------------------------------------------------------------------


@case
def frozen_parameters() -> Problem:
    net = mlp(4, 3, 3)
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return Problem(net, nn.CrossEntropyLoss(), (features(5, 4), classes(5, 3)))


@case
def chosen_parameters() -> Problem:
    # In another order than the model's, some not chosen though they require grad.
    return Problem(
        mlp(4, 3, 3),
        nn.CrossEntropyLoss(),
        (features(5, 4), classes(5, 3)),
        params=lambda m: (p for p in (m[2].bias, m[0].weight)),
    )


@case
def parameters_of_other_values() -> Problem:
    values = {"2.weight": torch.randn(3, 3), "0.bias": torch.randn(3)}
    data = (features(5, 4), classes(5, 3))
    return Problem(
        mlp(4, 3, 3), nn.CrossEntropyLoss(), data, params=lambda m: dict(values)
    )


@case
def callable_model() -> Problem:
    # A scalar parameter, one used twice, one that is never used.
    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = (params["scale"] * x @ params["w"]).tanh()
        return hidden @ params["w"].T

    values = {
        "unused": torch.randn(2),
        "w": torch.randn(3, 2),
        "scale": torch.tensor(1.5),
    }
    return Problem(
        model, nn.MSELoss(), (features(4, 3), features(4, 3)), lambda m: dict(values)
    )


@case
def unused_parameters() -> Problem:
    net = Lambda(
        lambda m, x: m.used(x), first=nn.Linear(2, 2), used=mlp(3, 2), last=parameter(3)
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 3), classes(4, 2)))


@case
def noncontiguous_parameters() -> Problem:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.randn(4, 3).T)
    conv = nn.Conv2d(2, 2, 2).to(memory_format=torch.channels_last)
    net = Lambda(
        lambda m, x: m.layer(m.conv(x).flatten(1)[:, :4]), layer=layer, conv=conv
    )
    return Problem(net, nn.MSELoss(), (features(4, 2, 3, 3), features(4, 3)))


@case
def parameter_as_output() -> Problem:
    # The output of every sample is the parameter itself, expanded.
    net = Lambda(lambda m, x: m.mean.expand(len(x), -1), mean=parameter(3))
    return Problem(net, nn.MSELoss(), (features(4, 2), features(4, 3)))


@case
def zero_size_parameter() -> Problem:
    net = Lambda(lambda m, x: m.layer(x), empty=parameter(0, 3), layer=mlp(3, 2))
    return Problem(net, nn.MSELoss(), (features(4, 3), features(4, 2)))
