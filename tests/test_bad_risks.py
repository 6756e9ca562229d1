"""Data, parameters and models that are none are refused, by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl
from tests.bad_cases import CE, CLASSES, MSE, TARGETS, X, net, refused, risk_of
from tests.cases import Lambda, mlp

# Data ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        [],
        (),
        DataLoader(TensorDataset(X[:0], CLASSES[:0])),
        (X[:0], CLASSES[:0]),
        [(X, CLASSES), (X[:0], CLASSES[:0])],
    ],
    ids=["list", "tuple", "loader", "pair", "batch"],
)
def test_empty_data(data: Any) -> None:
    refused("data", risk_of(data=data))


@pytest.mark.parametrize(
    "data",
    [
        (X, CLASSES[:5]),
        (X[:5], CLASSES),
        [(X, CLASSES), (X[:2], CLASSES[:3])],
        (X, torch.tensor(1)),
        ((X, X[:3]), CLASSES[:5]),
        ({"input": X}, CLASSES[:5]),
        (X[0], CLASSES),
    ],
)
def test_sample_counts_differ(data: Any) -> None:
    refused("data", risk_of(data=data))


@pytest.mark.parametrize(
    "data",
    [
        None,
        X,
        3,
        {"x": X, "y": CLASSES},
        (X, CLASSES, CLASSES),
        (X.numpy(), CLASSES.numpy()),
        [(X, CLASSES), 3],
        "data",
    ],
)
def test_no_data(data: Any) -> None:
    refused("data", risk_of(data=data))


def test_one_shot_iterators() -> None:
    batches = [(X, CLASSES)]
    refused("data", risk_of(data=iter(batches)), ValueError, "only once")
    refused("data", risk_of(data=(batch for batch in batches)), ValueError, "only once")
    refused("data", risk_of(data=zip([X], [CLASSES], strict=True)), ValueError)


def test_data_of_another_dtype() -> None:
    with pytest.raises(
        (ValueError, TypeError, RuntimeError), match=r"dtype|Float|float"
    ):
        vl.EmpiricalRisk(net(), CE, (X.float(), CLASSES))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad: float) -> None:
    spoilt = X.clone()
    spoilt[4, 1] = bad
    linear = mlp(4, 3)
    refused("model", risk_of(linear, CE, (spoilt, CLASSES)), ValueError, "4")
    batches = [(X, CLASSES), (spoilt[3:], CLASSES[3:])]
    refused("model", risk_of(linear, CE, batches), ValueError)
    targets = TARGETS.clone()
    targets[1, 1] = bad
    refused("(loss|data)", risk_of(loss=MSE, data=(X, targets)), ValueError)
    refused("(loss|data)", risk_of(loss=nn.HuberLoss(), data=(X, targets)), ValueError)
    soft = targets.abs()
    refused("(loss|data)", risk_of(data=(X, soft)), ValueError)
    refused(
        "(loss|data)", risk_of(loss=nn.BCEWithLogitsLoss(), data=(X, soft)), ValueError
    )
    model = net()
    with torch.no_grad():
        model[2].bias[1] = bad
    refused("params", risk_of(model), ValueError, "2.bias")
    refused("params", risk_of(None, CE, (X, CLASSES), {"0.bias": bad * torch.ones(5)}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_parameters_that_are_not_chosen_may_spoil_outputs(bad: float) -> None:
    model = net()
    with torch.no_grad():
        model[0].bias[1] = bad
    # tanh(Inf) = 1 is a number; NaN is seen in the outputs.
    if bad != bad:
        refused("model", risk_of(model, CE, (X, CLASSES), [model[2].weight]))


def test_loss_that_is_no_number() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.sum() * float("inf")

    refused("loss", risk_of(loss=loss, reduction="sum"), ValueError)


@pytest.mark.parametrize("value", [3, -1, 100])
def test_class_index_out_of_range(value: int) -> None:
    y = CLASSES.clone()
    y[2] = value
    refused("data", risk_of(data=(X, y)), ValueError, "0..2")
    if value > 0:
        refused("data", risk_of(loss=nn.CrossEntropyLoss(ignore_index=7), data=(X, y)))


def test_targets_of_another_shape() -> None:
    # Each of these torch would broadcast.
    one = mlp(4, 1)
    y = torch.ones(6).double()
    refused("data", risk_of(one, MSE, (X, y)), ValueError, "[6, 1]")
    refused(
        "data", risk_of(Lambda(lambda m, x: m.f(x)[:, 0], f=one), MSE, (X, y[:, None]))
    )
    refused("data", risk_of(loss=MSE, data=(X, TARGETS[:, :1])))
    refused("data", risk_of(one, nn.BCEWithLogitsLoss(), (X, y)))
    refused("data", risk_of(data=(X, CLASSES[:, None])))
    refused("data", risk_of(data=(X, CLASSES[:, None].expand(6, 3))))
    refused("data", risk_of(data=(X, TARGETS[:, :2].abs())))


def test_generic_loss_that_broadcasts() -> None:
    # [N] against [N, 1] couples all samples: HuberLoss only warns.
    data = X, torch.randn(6).double()
    refused("data", risk_of(mlp(4, 1), F.huber_loss, data), ValueError)

    def robust(output: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(output, target)

    with pytest.warns(UserWarning, match="size"):
        build = risk_of(mlp(4, 1), robust, data, reduction="mean")
        refused("loss", build, ValueError)


@pytest.mark.parametrize("y", [CLASSES.double(), CLASSES.to(torch.complex128)])
def test_targets_of_another_dtype(y: Tensor) -> None:
    refused("data", risk_of(data=(X, y)))


def test_probabilities_out_of_range() -> None:
    refused("data", risk_of(loss=nn.BCEWithLogitsLoss(), data=(X, 2.0 * TARGETS)))
    refused("data", risk_of(data=(X, TARGETS)), ValueError, "negative")


def test_all_targets_ignored() -> None:
    refused("data", risk_of(data=(X, torch.full((6,), -100))), ValueError)


def test_labels_of_weight_zero_have_no_mean() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0]).double())
    refused("data", risk_of(loss=loss, data=(X, torch.zeros(6).long())), ValueError)


# Parameters ---------------------------------------------------------------------------


def test_parameters() -> None:
    model, other = net(), net()
    data = (X, CLASSES)
    W, b = model[0].weight, model[0].bias

    def given(params: Any) -> Callable[[], Any]:
        return risk_of(model, CE, data, params)

    refused("params", given([other[0].weight]), ValueError, "0")
    refused("params", given([W, W.detach()]), ValueError, "1")
    refused("params", given([W, b, W]), ValueError, "0.weight")
    refused("params", given([]), ValueError)
    refused("params", given({}), ValueError)
    refused("params", given(W), TypeError)
    refused("params", given(3), TypeError)
    refused("params", given("0.weight"))
    refused("params", given(["0.weight"]))
    refused("params", given(model.named_parameters()))
    refused("params", given({"weight": W}), ValueError, "weight")
    refused("params", given({"0.weight": W.T}), ValueError, "0.weight")
    refused("params", given({"0.weight": 3.0}))
    refused("params", given({"0.weight": W.detach().numpy()}))
    b.requires_grad_(False)
    refused("params", given([W, b]), ValueError, "0.bias")
    model.requires_grad_(False)
    refused("params", given(None), ValueError)


def test_model_without_parameters() -> None:
    refused("params", risk_of(nn.Tanh(), MSE, (X, X)), ValueError)


def test_tied_parameters_by_both_names() -> None:
    # One tensor with two names: giving both would count it twice.
    first, second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    refused("params", risk_of(model, MSE, (X, X), [first.weight, second.weight]))
    both = {"0.weight": first.weight, "2.weight": second.weight}
    refused("params", risk_of(model, MSE, (X, X), both))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tie", ["data", "set_", "a view"])
def test_parameters_that_share_memory(tie: str, frozen: bool) -> None:
    """They are two for autograd, and one for whoever moves them."""
    first, second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    if tie == "data":
        second.weight.data = first.weight.data
    elif tie == "set_":
        with torch.no_grad():
            second.weight.set_(first.weight)
    else:
        second.weight = nn.Parameter(first.weight.detach()[:4].view(4, 4))
    second.weight.requires_grad_(not frozen)
    model = nn.Sequential(first, nn.Tanh(), second)
    refused("params", risk_of(model, MSE, (X, X)), says="share their memory")
    risk = vl.EmpiricalRisk(model, MSE, (X, X), [first.bias])
    assert risk.num_params == 4
    second.weight = nn.Parameter(first.weight.detach().clone())
    assert vl.EmpiricalRisk(model, MSE, (X, X)).num_params == 40


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_parameters_in_one_flat_memory(kind: type[nn.RNNBase]) -> None:
    """As cuDNN wants them; they do not overlap."""
    model = kind(4, 3, batch_first=True).double()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]
    for p, part in zip(model.parameters(), flat.split(sizes), strict=True):
        p.data = part.view_as(p)
    risk = vl.EmpiricalRisk(
        model, MSE, (X[:, None], TARGETS), predict=lambda m, x: m(x)[0][:, 0]
    )
    assert risk.num_params == len(flat)


def test_parameters_of_a_function() -> None:
    def model(params: Any, x: Tensor) -> Tensor:
        return x @ params["w"]

    w = torch.ones(4, 3).double()
    refused("params", risk_of(model), TypeError)
    refused("params", risk_of(model, CE, (X, CLASSES), [w]), TypeError)
    refused("params", risk_of(model, CE, (X, CLASSES), {"w": 3.0}), TypeError)
    refused("params", risk_of(model, CE, (X, CLASSES), {}), ValueError)
    refused("params", risk_of(model, CE, (X, CLASSES), {"w": w.long()}), TypeError)
    many = {"w": w, "v": w.float()}
    refused("params", risk_of(model, CE, (X, CLASSES), many), ValueError, "dtype")


def test_mixed_precision() -> None:
    model = net()
    model[2].float()
    refused("params", risk_of(model), ValueError, "dtype")
    # A module that casts gives outputs of another precision than its parameters.
    lower = Lambda(lambda m, x: m.f(x).float(), f=net())
    refused("model", risk_of(lower), ValueError)
    frozen = Lambda(lambda m, x: m.f(x), f=net(), g=mlp(2, 2).bfloat16())
    frozen.g.requires_grad_(False)
    refused("model", risk_of(frozen), TypeError, "dtype=torch.float32")


def test_autocast_of_the_caller_does_not_matter() -> None:
    expected = risk_of(net().float(), CE, (X.float(), CLASSES))()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        risk = risk_of(net().float(), CE, (X.float(), CLASSES))()
        x = torch.ones(risk.num_params)
        product = vl.GGN(risk) @ x
    assert torch.equal(risk.outputs[0], expected.outputs[0])
    torch.testing.assert_close(product, vl.GGN(expected) @ x)


# Models -------------------------------------------------------------------------------


def test_model_of_the_wrong_output() -> None:
    f = net()
    for forward in (
        lambda m, x: (m.f(x), m.f(x)),
        lambda m, x: None,
        lambda m, x: m.f(x).sum(),
        lambda m, x: m.f(x).mean(0),
        lambda m, x: m.f(x)[:4],
        lambda m, x: m.f(x).T,
        lambda m, x: m.f(x) + 0j,
        lambda m, x: m.f(x).argmax(1),
        lambda m, x: m.f(x).tolist(),
    ):
        refused("model", risk_of(Lambda(forward, f=f)))


def test_model_without_outputs() -> None:
    # C = 0: an operator without rows.
    empty = Lambda(lambda m, x: m.f(x)[:, :0], f=net())
    refused("(model|data)", risk_of(empty, MSE, (X, TARGETS[:, :0])))


def test_output_not_differentiable() -> None:
    f = net()
    for forward in (
        lambda m, x: m.f(x).detach(),
        lambda m, x: x[:, :3],
        lambda m, x: m.f(x).round().long().double(),
        lambda m, x: torch.from_numpy(m.f(x).detach().numpy()),
    ):
        refused("model", risk_of(Lambda(forward, f=f)), ValueError, "differentiable")

    def without_grad(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return m.f(x)

    refused("model", risk_of(Lambda(without_grad, f=f)), ValueError, "differentiable")
    unused = Lambda(lambda m, x: m.f(x), f=f, g=nn.Linear(2, 2).double())
    refused("model", risk_of(unused, CE, (X, CLASSES), [unused.g.weight]), ValueError)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.5),
        nn.Dropout1d(0.1),
        nn.AlphaDropout(0.1),
        nn.FeatureAlphaDropout(0.1),
        nn.RReLU(),
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.LazyBatchNorm1d(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_training_mode(layer: nn.Module) -> None:
    model = nn.Sequential(layer, net()).double()
    model(X)  # makes a lazy module one of known shape
    refused("model", risk_of(model), ValueError)
    model.eval()
    if isinstance(layer, nn.BatchNorm1d) and layer.running_mean is None:
        refused("model", risk_of(model), ValueError)
    else:
        vl.EmpiricalRisk(model, CE, (X, CLASSES))


def test_training_mode_that_does_not_matter() -> None:
    model = nn.Sequential(nn.Dropout(0.0), net()).train()
    vl.EmpiricalRisk(model, CE, (X, CLASSES))


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True),
        nn.TransformerEncoderLayer(4, 2, 3, dropout=0.1, batch_first=True),
        nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_training_mode_of_larger_modules(layer: nn.Module) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x[:, None, :].expand(-1, 2, -1)
        out = m.f(h, h, h) if isinstance(m.f, nn.MultiheadAttention) else m.f(h)
        return (out if isinstance(out, Tensor) else out[0])[:, 0, :3]

    refused("model", risk_of(Lambda(forward, f=layer).double().train()), ValueError)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ((X[:, :3], CLASSES), "a tensor [6, 3]"),
        ((X.numpy(), CLASSES), "ndarray"),
        ({"x": X, "labels": CLASSES}, "{x: a tensor [6, 4]}"),
    ],
    ids=["features", "array", "mapping"],
)
def test_a_model_that_fails_says_on_what(data: Any, found: str) -> None:
    """The error is that of the model; a note says what it was given."""
    with pytest.raises((RuntimeError, TypeError)) as caught:
        vl.EmpiricalRisk(net(), CE, data)
    (note,) = caught.value.__notes__
    assert note.startswith("data: ") and f"batch 0, {found}." in note
    assert "predict=" in note


@pytest.mark.parametrize("y", [CLASSES.numpy(), CLASSES.tolist(), ["a"] * 6, None])
def test_targets_that_are_no_tensors(y: Any) -> None:
    """X is no batch whose targets are missing."""
    for data in ((X, y), [X, y], (X.numpy(), y)):
        refused("data", risk_of(data=data), TypeError, "torch.as_tensor(y)")


def test_long_lists_are_not_named_part_by_part() -> None:
    with pytest.raises(TypeError, match=r"^data: .* torch\.as_tensor") as caught:
        vl.EmpiricalRisk(net(), CE, (X, [0] * 60_000))
    assert len(str(caught.value)) < 300


def test_names_of_parameters() -> None:
    for params in (["0.weight"], net().named_parameters()):
        refused("params", risk_of(params=params), TypeError, "risk.over(names)")


class Root(nn.Module):
    """|W x| as a root, which has no derivative at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5, bias=False).double()
        self.last = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).square().sqrt())


def _below_where(model: Any, x: Tensor) -> Tensor:
    hidden = model.first(x)
    return model.last(torch.where(hidden != 0.0, hidden.abs().sqrt(), hidden))


def _infinite(model: Any, x: Tensor) -> Tensor:
    return model.last(model.first(x.where(x != 0.0, torch.inf)).nan_to_num().tanh())


@pytest.mark.parametrize("predict", [None, _below_where, _infinite])
def test_derivatives_that_are_none_of_finite_outputs(predict: Any) -> None:
    """Nothing is wrong with second derivatives, dampings or sums over samples."""
    data = torch.cat([X, torch.zeros(1, 4).double()]), CLASSES[[*range(6), 0]]
    risk = vl.EmpiricalRisk(Root(), CE, data, predict=predict)
    names = "model: its derivatives in 'first.weight' are NaN or Inf"
    x = torch.ones(risk.num_params).double()
    for compute in (
        lambda: vl.Jacobian(risk) @ x,
        lambda: vl.GGN(risk) @ x,
        lambda: vl.trust_region_step(risk, vl.Identity(risk.num_params), 0.1),
    ):
        refused("model", compute, ValueError, names)
    rest = risk.subset(range(6))
    assert rest.gradient().isfinite().all()
