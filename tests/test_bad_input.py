"""Wrong input is refused where it is given, with a message that names the argument."""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Lambda, mlp, problem
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vivit_linop as vl

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=GENERATOR).double()
CLASSES = torch.randint(3, (6,), generator=GENERATOR)
TARGETS = torch.randn(6, 3, generator=GENERATOR).double()
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def net() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return mlp(4, 5, 3)


def toy() -> vl.EmpiricalRisk:
    return vl.EmpiricalRisk(net(), CE, (X, CLASSES))


def refused(
    argument: str,
    build: Callable[[], Any],
    errors: Any = (ValueError, TypeError),
    says: str = "",
) -> None:
    """Raises an error that begins with the argument's name and says what to do."""
    with pytest.raises(errors) as caught:
        build()
    message = str(caught.value)
    assert type(caught.value) in (ValueError, TypeError), caught.type
    assert re.match(rf"{argument}\b", message), message
    assert says in message, message


def risk_of(
    model: Any = None, loss: Any = CE, data: Any = (X, CLASSES), *rest: Any, **more: Any
) -> Callable[[], vl.EmpiricalRisk]:
    return lambda: vl.EmpiricalRisk(
        net() if model is None else model, loss, data, *rest, **more
    )


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


def test_outputs_of_another_width() -> None:
    # A fully convolutional net on two sizes of input.
    conv = nn.Conv1d(1, 2, 2).double()
    batches = [
        (torch.ones(2, 1, n).double(), torch.zeros(2, n - 1).long()) for n in (3, 4)
    ]
    refused("model", risk_of(conv, CE, batches))


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
    with pytest.warns(UserWarning, match="size"):
        refused(
            "(loss|data)",
            risk_of(
                mlp(4, 1),
                F.huber_loss,
                (X, torch.randn(6).double()),
                reduction="mean",
            ),
            ValueError,
        )


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


def test_parameters_of_a_function() -> None:
    def model(params: Any, x: Tensor) -> Tensor:
        return x @ params["w"]

    w = torch.ones(4, 3).double()
    refused("params", risk_of(model), TypeError)
    refused("params", risk_of(model, CE, (X, CLASSES), [w]), TypeError)
    refused("params", risk_of(model, CE, (X, CLASSES), {"w": 3.0}), TypeError)
    refused("params", risk_of(model, CE, (X, CLASSES), {}), ValueError)
    refused("params", risk_of(model, CE, (X, CLASSES), {"w": w.long()}), TypeError)
    refused("params", risk_of(model, CE, (X, CLASSES), {"w": w + 0j}), TypeError)
    many = {"w": w, "v": w.float()}
    refused("params", risk_of(model, CE, (X, CLASSES), many), ValueError, "dtype")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    refused("params", risk_of(net().to(dtype), CE, (X.to(dtype), CLASSES)), TypeError)


def test_mixed_precision() -> None:
    model = net()
    model[2].float()
    refused("params", risk_of(model), ValueError, "dtype")
    # A module that casts gives outputs of another precision than its parameters.
    lower = Lambda(lambda m, x: m.f(x).float(), f=net())
    refused("model", risk_of(lower), ValueError)
    frozen = Lambda(lambda m, x: m.f(x), f=net(), g=mlp(2, 2).bfloat16())
    frozen.g.requires_grad_(False)
    refused("model", risk_of(frozen), TypeError, "float()")


def test_autocast_of_the_caller_does_not_matter() -> None:
    expected = risk_of(net().float(), CE, (X.float(), CLASSES))()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        risk = risk_of(net().float(), CE, (X.float(), CLASSES))()
        x = torch.ones(risk.num_params)
        product = vl.GGN(risk) @ x
    assert torch.equal(risk.outputs[0], expected.outputs[0])
    torch.testing.assert_close(product, vl.GGN(expected) @ x)


# Models -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, 3, "net", torch.ones(3)])
def test_no_model(model: Any) -> None:
    refused("model", lambda: vl.EmpiricalRisk(model, CE, (X, CLASSES)), TypeError)
    refused("(risk|model)", lambda: vl.GGN(model, CE, (X, CLASSES)), TypeError)


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


def test_functional_randomness() -> None:
    f = net()
    for forward in (
        lambda m, x: F.dropout(m.f(x), 0.5),
        lambda m, x: m.f(x) + 1e-3 * torch.randn(len(x), 3),
        lambda m, x: m.f(x + torch.rand_like(x)),
        lambda m, x: m.f(x)[torch.randperm(len(x))],
    ):
        refused("model", risk_of(Lambda(forward, f=f)), ValueError)
    batches = [(X, CLASSES), (X[:2], CLASSES[:2])]

    def only_small(m: Any, x: Tensor) -> Tensor:
        return m.f(x) if len(x) > 2 else F.dropout(m.f(x), 0.5)

    refused("model", risk_of(Lambda(only_small, f=f), CE, batches), ValueError)


@pytest.mark.parametrize("source", ["numpy", "own generator"])
def test_randomness_that_torch_does_not_see(source: str) -> None:
    """Refused at construction or when it shows, never averaged over silently."""
    own = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        if source == "numpy":
            noise = torch.from_numpy(rng.standard_normal((len(x), 3)))
        else:
            noise = torch.randn(len(x), 3, generator=own, dtype=torch.float64)
        return m.f(x) * (1.0 + noise)

    for use in (
        lambda r: vl.GGN(r) @ torch.ones(43).double(),
        lambda r: vl.GGN(r).eigvalsh(),
        lambda r: vl.GGN(r).diagonal(),
        lambda r: r.gradient(),
        lambda r: vl.Hessian(r) @ torch.ones(43).double(),
    ):
        with pytest.raises(ValueError):
            use(vl.EmpiricalRisk(Lambda(forward, f=net()), CE, (X, CLASSES)))


def test_functional_batch_norm() -> None:
    f = net()
    mixing = Lambda(lambda m, x: F.batch_norm(m.f(x), None, None, training=True), f=f)
    refused("model", risk_of(mixing), ValueError)


# Losses -------------------------------------------------------------------------------


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def test_reduction() -> None:
    data = (X, TARGETS)
    refused("reduction", risk_of(loss=squares, data=data), ValueError)
    refused("reduction", risk_of(loss=nn.MSELoss(reduction="none"), data=data))
    refused("reduction", risk_of(loss=squares, data=data, reduction="none"))
    refused("reduction", risk_of(loss=squares, data=data, reduction="average"))
    refused("reduction", risk_of(loss=squares, data=data, reduction=3))
    refused("reduction", risk_of(loss=MSE, data=data, reduction="sum"))
    refused("loss", risk_of(loss=squares, data=data, reduction="sum"), ValueError)
    refused("reduction", lambda: vl.GGN(net(), squares, data), ValueError)
    # Elementwise, though it is said to be a mean.
    refused(
        "loss",
        risk_of(loss=F.mse_loss_none if False else _each, data=data, reduction="mean"),
    )


def _each(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square()


@pytest.mark.parametrize("loss", [None, 3, "mse", (squares, squares)])
def test_no_loss(loss: Any) -> None:
    refused("loss", risk_of(loss=loss), TypeError)


def test_loss_that_returns_no_tensor() -> None:
    refused("loss", risk_of(loss=lambda f, y: 1.0, reduction="mean"))
    refused("loss", risk_of(loss=lambda f, y: None, reduction="mean"))


@pytest.mark.parametrize("N", [2, 3, 6])
def test_losses_that_mix_samples(N: int) -> None:
    def contrastive(output: Tensor, target: Tensor) -> Tensor:
        return -(output @ output.T).log_softmax(1).diagonal().mean()

    def centred(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.mean(0)).square().sum()

    def root(output: Tensor, target: Tensor) -> Tensor:
        return squares(output, target).sqrt()

    def pairwise(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.flip(0)).square().sum()

    data = (X[:N], TARGETS[:N])
    for loss, reduction in (
        (contrastive, "mean"),
        (centred, "sum"),
        (root, "mean"),
        (pairwise, "sum"),
    ):
        refused("loss", risk_of(loss=loss, data=data, reduction=reduction), ValueError)
    # Divided by the weights of the batch's classes: a mean of another kind.
    weights = torch.tensor([1.0, 2.0, 7.0]).double()
    weighted = functools.partial(F.cross_entropy, weight=weights)
    y = torch.tensor([0, 2, 1, 0, 0, 2])
    for data in ((X, y), [(x[None], k[None]) for x, k in zip(X, y, strict=True)]):
        refused("loss", risk_of(net(), weighted, data, reduction="mean"), ValueError)


def test_checks_can_be_turned_off() -> None:
    def mixed(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        return h - h.mean(0)

    def centred(output: Tensor, target: Tensor) -> Tensor:
        return (output - output.mean(0)).square().sum()

    for model, loss in ((Lambda(mixed, f=net()), nn.MSELoss()), (net(), centred)):
        reduction = getattr(loss, "reduction", "sum")
        build = risk_of(model, loss, (X, TARGETS), reduction=reduction)
        refused("(model|loss)", build, ValueError)
        risk = risk_of(model, loss, (X, TARGETS), reduction=reduction, check=False)()
        value = risk.subset(range(6)).value()
        torch.testing.assert_close(value, loss(model(X), TARGETS).detach())
    refused("check", risk_of(check="no"), TypeError)


def test_mixing_in_a_model_of_one_batch_size() -> None:
    def mixed(m: Any, x: Tensor) -> Tensor:
        h = m.f(x.view(6, 4))
        return h - h.mean(0)

    refused("model", risk_of(Lambda(mixed, f=net())), ValueError)
    fixed = Lambda(lambda m, x: m.f(x.view(6, 4)), f=net())
    assert risk_of(fixed)().num_samples == 6


def test_predict() -> None:
    refused("predict", risk_of(predict=3), TypeError)
    refused(
        "predict",
        risk_of(
            lambda p, x: x @ p["w"],
            CE,
            (X, CLASSES),
            {"w": torch.ones(4, 3)},
            predict=lambda m, x: m(x),
        ),
        TypeError,
    )
    nested = Lambda(lambda m, x: (m.f(x), x), f=net())
    refused("model", risk_of(nested), TypeError, "predict=")
    assert risk_of(nested, predict=lambda m, x: m(x)[0])().num_outputs == 3


def test_targets_of_the_likelihoods() -> None:
    logs = Lambda(lambda m, x: m.f(x).log_softmax(1), f=net())
    refused("loss", risk_of(loss=nn.NLLLoss()), ValueError, "log_softmax")
    refused("data", risk_of(logs, nn.NLLLoss(), (X, TARGETS)), ValueError, "indices")
    gauss, poisson = nn.GaussianNLLLoss(), nn.PoissonNLLLoss()
    refused("data", risk_of(loss=gauss, data=(X, TARGETS)), ValueError, "stack")
    pairs = torch.stack([TARGETS, -TARGETS.abs() - 1.0], dim=-1)
    refused("data", risk_of(loss=gauss, data=(X, pairs)), ValueError, "negative")
    counts = TARGETS.abs().round()
    refused("data", risk_of(loss=poisson, data=(X, -1.0 - counts)), ValueError)
    rates = nn.PoissonNLLLoss(log_input=False)
    refused("loss", risk_of(loss=rates, data=(X, counts)), ValueError, "log_input")
    positive = Lambda(lambda m, x: m.f(x).exp(), f=net())
    risk = risk_of(positive, rates, (X, counts))()
    refused("mc_samples", lambda: vl.GGN(risk, mc_samples=1), ValueError, "biased")
    tokens = Lambda(lambda m, x: m.f(x)[:, None].expand(-1, 2, -1), f=net())
    refused(
        "data",
        risk_of(tokens, CE, (X, CLASSES[:, None].expand(-1, 2))),
        ValueError,
        "transpose",
    )


def test_exact_factors_of_wide_outputs() -> None:
    """Refused with their size and what fits; products need none of it."""
    V = 300_000  # a block of the exact root has 9e10 entries
    net = Lambda(lambda m, x: m.f(x), f=nn.Linear(1, V, bias=False))
    risk = vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (torch.ones(2, 1), CLASSES[:2]))
    G, x = vl.GGN(risk), torch.linspace(-1.0, 1.0, V)
    p = net(torch.ones(1, 1)).softmax(1)[0].detach()
    torch.testing.assert_close(G @ x, p * (x - p @ x))
    for use in (
        lambda: vl.GGNFactor(risk),
        lambda: vl.LossHessian(risk).sqrt(),
        lambda: G.factor.T @ x,
        G.eigvalsh,
        G.trace,
        vl.LossHessian(risk).sqrt,
    ):
        with pytest.raises(MemoryError, match=r"GB(.|\n)*mc_samples="):
            use()
    sampled = vl.GGN(risk, mc_samples=1, generator=torch.Generator().manual_seed(0))
    assert sampled.eigvalsh().shape == (2,)
    H = vl.LossHessian(risk)
    torch.testing.assert_close(H.diagonal(), (p * (1 - p) / 2).repeat(2))
    for op in (H, vl.Jacobian(risk)):
        with pytest.raises(MemoryError, match=r"GB"):
            op.to_dense()


def test_loss_that_mixes_only_in_its_curvature() -> None:
    # The value of the coupling is zero for all outputs, its second derivative is not.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        shift = output - output.detach()
        return (output - target).square().sum() + shift.sum() ** 2

    def use() -> Any:
        risk = vl.EmpiricalRisk(net(), loss, (X, TARGETS), reduction="sum")
        return vl.GGN(risk) @ torch.ones(43).double()

    refused("loss", use, ValueError)


@pytest.mark.parametrize(
    "loss", [lambda f, y: y.sum(), lambda f, y: (f - y).square().sum().detach()]
)
def test_loss_that_is_not_differentiable_in_the_output(loss: Any) -> None:
    def use() -> Any:
        risk = vl.EmpiricalRisk(net(), loss, (X, TARGETS), reduction="sum")
        return vl.GGN(risk) @ torch.ones(43).double()

    refused("loss", use, ValueError)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_of_losses(name: str) -> None:
    y = (TARGETS > 0).double()
    for value in (-torch.ones(3), torch.full((3,), float("nan"))):
        refused(
            "(loss|data)",
            risk_of(loss=nn.BCEWithLogitsLoss(**{name: value}), data=(X, y)),
            ValueError,
        )
    # Of samples: has no meaning for other samples.
    of_samples = nn.BCEWithLogitsLoss(**{name: torch.rand(6, 3).double()})
    refused("loss", risk_of(loss=of_samples, data=(X, y)), ValueError)
    if name == "weight":
        for value in (-torch.ones(3), torch.ones(2), torch.full((3,), float("nan"))):
            refused(
                "(loss|data)",
                risk_of(loss=nn.CrossEntropyLoss(weight=value.double())),
                ValueError,
            )


def test_nonconvex_loss() -> None:
    case = problem("nonconvex_loss")
    arguments, keywords = case.arguments()
    risk = vl.EmpiricalRisk(*arguments, **keywords)
    H = vl.LossHessian(risk)
    refused("loss", H.sqrt, ValueError, "not convex")
    refused("loss", lambda: vl.GGNFactor(risk), ValueError, "not convex")
    G, x = vl.GGN(risk), torch.ones(risk.num_params).double()
    assert (G @ x).isfinite().all()
    J = vl.Jacobian(risk)
    torch.testing.assert_close(J.T @ H @ J @ x, G @ x)
    for use in (
        G.eigvalsh,
        G.eigh,
        G.trace,
        (G + 0.1 * vl.Identity(len(x))).inv,
        lambda: vl.directional_derivatives(risk, x[:, None]),
        lambda: vl.damped_newton_step(risk, x[:, None], 1.0),
    ):
        refused("loss", use, ValueError, "not convex")


# Monte-Carlo --------------------------------------------------------------------------


def test_mc_samples() -> None:
    risk = toy()
    H = vl.LossHessian(risk)
    for value, error in ((-1, ValueError), (1.5, TypeError), ("1", TypeError)):
        for build in (
            lambda v=value: H.sqrt(v),
            lambda v=value: vl.GGN(risk, mc_samples=v),
            lambda v=value: vl.GGNFactor(risk, mc_samples=v),
        ):
            refused("mc_samples", build, error)
    refused("mc_samples", lambda: H.sqrt(True), TypeError)
    refused("mc_samples", lambda: H.sqrt(None), TypeError)
    huber = vl.EmpiricalRisk(net(), nn.HuberLoss(), (X, TARGETS))
    refused("mc_samples", lambda: vl.GGN(huber, mc_samples=1), ValueError, "likelihood")
    refused("mc_samples", lambda: vl.GGNFactor(huber, mc_samples=1), ValueError)
    with pytest.raises(TypeError, match="generator"):
        H.sqrt(1, 42)


# Vectors ------------------------------------------------------------------------------

CONSTRUCTORS = [
    vl.Jacobian,
    vl.LossHessian,
    vl.GGN,
    vl.GGNFactor,
    vl.PerSampleGradients,
    vl.EmpiricalFisher,
    vl.Hessian,
]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_vectors(constructor: Any) -> None:
    operator = constructor(toy())
    for op in (operator, operator.T):
        n = op.shape[1]
        for bad in (torch.ones(n + 1), torch.ones(n - 1, 2), torch.ones(n, 1, 1)):
            refused("x", lambda A=op, x=bad: A @ x, ValueError)


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_arguments_of_constructors(constructor: Any) -> None:
    risk = toy()
    refused("risk", lambda: constructor(net()), TypeError)
    refused("risk", lambda: constructor(net(), CE), TypeError)
    refused("risk", lambda: constructor(risk, CE), TypeError)
    refused("risk", lambda: constructor(risk, data=(X, CLASSES)), TypeError)
    refused("risk", lambda: constructor(risk, params=[]), TypeError)
    refused("(risk|model)", lambda: constructor(None, CE, (X, CLASSES)), TypeError)


@pytest.mark.parametrize("memory", [-1, "all", float("nan")])
def test_memory(memory: Any) -> None:
    refused("memory", risk_of(memory=memory))


# Dampings, eigenpairs, blocks -------------------------------------------------------


@pytest.mark.parametrize("delta", [0.0, -1e-3, -1.0])
def test_damping_of_inverses(delta: float) -> None:
    G = vl.GGN(toy())
    unit = vl.Identity(43)
    refused("(damping|inv)", lambda: (G + delta * unit).inv(), ValueError)
    refused(
        "(damping|inv)", lambda: (G + delta * unit).solve(torch.ones(43)), ValueError
    )
    refused("(damping|inv)", G.inv, ValueError)
    F_ = vl.EmpiricalFisher(toy())
    refused("(damping|inv)", lambda: (F_ + delta * unit).inv(), ValueError)
    blocks = G.block_diagonal("parameter")
    refused("(damping|inv)", lambda: (blocks + delta * unit).inv(), ValueError)
    if delta < 0:
        refused("(damping|logdet)", (G + delta * unit).logdet, ValueError)


def test_damping_that_is_no_number() -> None:
    G, unit = vl.GGN(toy()), vl.Identity(43)
    for bad in (float("nan"), float("inf"), 1j):
        with pytest.raises((ValueError, TypeError)):
            (G + bad * unit).inv()


@pytest.mark.parametrize("k", [0, -1, 13, 43, 1000])
def test_k_out_of_range(k: int) -> None:
    refused("k", lambda: vl.GGN(toy()).eigh(k=k), ValueError)


@pytest.mark.parametrize("k", [1.0, "2", True, torch.tensor(2.0)])
def test_k_that_is_no_integer(k: Any) -> None:
    refused("k", lambda: vl.GGN(toy()).eigh(k=k), TypeError)


@pytest.mark.parametrize(
    "indices",
    [
        [12],
        [-13],
        [0, 0],
        [0, -12],
        [1.0],
        [[0, 1]],
        None,
        torch.tensor([0.5]),
        torch.ones(11, dtype=torch.bool),
        "all",
        3,
    ],
)
def test_criteria_that_return_bad_indices(indices: Any) -> None:
    refused("select", lambda: vl.GGN(toy()).eigh(select=lambda evals: indices))


def test_arguments_of_eigh() -> None:
    G = vl.GGN(toy())
    refused("(k|select)", lambda: G.eigh(k=1, select=lambda e: [0]))
    refused("select", lambda: G.eigh(select=[0]), TypeError)
    for rcond in (-1.0, float("nan")):
        refused("rcond", lambda r=rcond: G.eigh(rcond=r), ValueError)


def test_criterion_cannot_change_the_eigenvalues() -> None:
    G = vl.GGN(toy())
    before = G.eigvalsh().clone()

    def criterion(evals: Tensor) -> list[int]:
        evals.zero_()
        return [-1]

    torch.testing.assert_close(G.eigh(select=criterion).eigenvalues, before[-1:])
    assert torch.equal(G.eigvalsh(), before)


def test_blocks() -> None:
    model = net()
    G = vl.GGN(model, CE, (X, CLASSES))
    p = list(model.parameters())
    foreign = nn.Parameter(torch.zeros(3))
    for bad in (
        "layer",
        "parameters",
        [],
        [p[:2]],
        [p, p[:1]],
        [p[:2], p[1:]],
        [p[:2], [*p[2:], foreign]],
        [p[:2], [], p[2:]],
        [{"lr": 0.1}],
        [{"params": p[:3]}],
        [[0, 1, 2, 3]],
        3,
        None,
    ):
        refused("blocks", lambda b=bad: G.block_diagonal(b))


# Subsets, vectors of parameters -----------------------------------------------------


@pytest.mark.parametrize(
    "indices",
    [
        [-1, 3],
        [],
        [0, 0],
        [6],
        [0, 100],
        [-7],
        [0.0, 1.0],
        [[0, 1]],
        3,
        [True] * 6,
    ],
)
def test_subsets(indices: Any) -> None:
    refused("indices", lambda: toy().subset(indices))
    if isinstance(indices, list):
        refused("indices", lambda: toy().subset(torch.tensor(indices)))


def test_flatten_and_unflatten() -> None:
    risk = toy()
    tensors = [torch.zeros_like(p) for p in risk.params.values()]
    refused("tensors", lambda: risk.flatten(tensors[:-1]), ValueError)
    refused("tensors", lambda: risk.flatten([*tensors, tensors[0]]), ValueError)
    refused("tensors", lambda: risk.flatten(tensors[::-1]), ValueError)
    refused("tensors", lambda: risk.flatten({"0.weight": tensors[0]}), ValueError)
    mixed = [tensors[0].expand(2, 5, 4), *tensors[1:]]
    refused("tensors", lambda: risk.flatten(mixed), ValueError)
    refused("vec", lambda: risk.unflatten(torch.zeros(42)), ValueError)
    refused("vec", lambda: risk.unflatten(torch.zeros(2, 43)), ValueError)
    refused("vec", lambda: risk.unflatten(torch.zeros(43, 2, 1)), ValueError)


# Analyses -----------------------------------------------------------------------------


def test_directions() -> None:
    risk = toy()
    E = torch.eye(43).double()[:, :2]
    pairs = vl.GGN(risk).eigh(k=2)
    small = vl.EmpiricalRisk(mlp(4, 3), CE, (X, CLASSES))
    for function in (
        vl.directional_derivatives,
        lambda r, d: vl.damped_newton_step(r, d, 1.0),
    ):
        refused("directions", lambda f=function: f(risk, E[:, 0]), ValueError)
        refused("directions", lambda f=function: f(risk, E.T), ValueError)
        refused("directions", lambda f=function: f(risk, E[:42]), ValueError)
        refused("directions", lambda f=function: f(risk, E[None]), ValueError)
        refused("directions", lambda f=function: f(risk, E.long()), TypeError)
        refused("directions", lambda f=function: f(risk, E + 0j), TypeError)
        refused("directions", lambda f=function: f(risk, E.numpy()), TypeError)
        refused("directions", lambda f=function: f(risk, vl.GGN(risk)), TypeError)
        refused("directions", lambda f=function: f(risk, None), TypeError)
        refused("directions", lambda f=function: f(small, pairs), ValueError)
        for wrong in (net(), None):
            refused("risk", lambda f=function, w=wrong: f(w, pairs), TypeError)


def test_curvature_risk_of_other_parameters() -> None:
    risk = toy()
    other = vl.EmpiricalRisk(mlp(4, 3), CE, (X, CLASSES))
    E = torch.eye(43).double()[:, :2]
    for directions in (E, vl.GGN(risk).eigh(k=2)):
        refused(
            "curvature_risk",
            lambda d=directions: vl.directional_derivatives(risk, d, other),
            ValueError,
        )
        refused(
            "curvature_risk",
            lambda d=directions: vl.damped_newton_step(risk, d, 1.0, other),
            ValueError,
        )


def test_pairs_of_other_parameters_of_as_many_entries() -> None:
    # D is the same, the parameters are not: their vectors mean nothing here.
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first = vl.EmpiricalRisk(mlp(4, 3), CE, (X, CLASSES))
        second = vl.EmpiricalRisk(
            Lambda(
                lambda m, x: x @ m.w[:4, :3], w=nn.Parameter(torch.ones(5, 3))
            ).double(),
            CE,
            (X, CLASSES),
        )
    assert first.num_params == second.num_params
    pairs = vl.GGN(first).eigh(k=2)
    with pytest.raises(ValueError):
        vl.directional_derivatives(second, pairs)


def test_dampings() -> None:
    risk = toy()
    pairs = vl.GGN(risk).eigh(k=2)

    def step(damping: Any, directions: Any = pairs) -> Callable[[], Tensor]:
        return lambda: vl.damped_newton_step(risk, directions, damping)

    for bad in ("1", None, [1.0, 2.0], True, 1j):
        refused("damping", step(bad), TypeError)
    for bad in (float("nan"), -10.0):
        refused("damping", step(bad), ValueError)
    refused("damping", step(lambda *_: torch.tensor([-10.0, 1.0])), ValueError)
    refused("damping", step(lambda *_: torch.tensor([float("nan"), 1.0])), ValueError)
    refused("damping", step(lambda *_: torch.ones(3)), ValueError)
    refused("damping", step(lambda *_: torch.ones(2, 1)), ValueError)
    refused("damping", step(lambda *_: torch.ones(6, 2)), ValueError)
    refused("damping", step(lambda *_: torch.ones(2) + 0j))
    E = torch.eye(43).double()[:, :2]
    refused("damping", step(lambda *_: torch.ones(2), E), TypeError)
    # A direction without curvature needs damping.
    flat = torch.zeros(43, 1).double()
    flat[0] = 1.0
    model = Lambda(lambda m, x: m.f(x), a=nn.Parameter(torch.zeros(3)), f=mlp(4, 3))
    unused = vl.EmpiricalRisk(model.double(), CE, (X, CLASSES))
    direction = torch.eye(unused.num_params).double()[:, :1]
    refused(
        "damping", lambda: vl.damped_newton_step(unused, direction, 0.0), ValueError
    )


# Combining operators ----------------------------------------------------------------


def test_factors_of_other_parameters() -> None:
    U = vl.PerSampleGradients(toy())
    V = vl.GGNFactor(vl.EmpiricalRisk(mlp(4, 3), CE, (X, CLASSES)))
    with pytest.raises(ValueError):
        U.T @ V


def test_gram_matrix_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    net, X, y = nn.Linear(3, 4), torch.rand(10, 3), torch.randint(4, (10,))
    G = vl.GGN(net, nn.CrossEntropyLoss(), (X, y))
    G.eigvalsh()  # 3 columns a sample, 4 bytes an entry
    for factor in (vl.GGN(G.risk).factor, vl.PerSampleGradients(G.risk)):
        budget = 4 * factor.shape[1] ** 2 - 1
        monkeypatch.setattr(
            "vivit_linop.net.sums.free_memory", lambda _, free=budget: free
        )
        with pytest.raises(MemoryError, match=r"up to 9 samples.*eigh"):
            (factor.T @ factor).to_dense()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (nn.CosineEmbeddingLoss(), "two embeddings"),
        (nn.TripletMarginLoss(), "an anchor"),
        (nn.MarginRankingLoss(), "two scores"),
        (nn.CTCLoss(), "no second derivative"),
        (nn.BCEWithLogitsLoss(torch.rand(6, 1)), "sample axis"),
    ],
    ids=str,
)
def test_losses_that_are_none_of_one_output(loss: Any, says: str) -> None:
    refused("loss", risk_of(loss=loss, data=(X, TARGETS.sigmoid())), says=says)


def test_weights_that_number_samples() -> None:
    model = nn.Sequential(net(), nn.Sigmoid())
    loss, data = nn.BCELoss(torch.rand(6, 1).double()), (X, TARGETS.sigmoid())
    refused("loss", risk_of(model, loss, data), says="sample axis")


def test_losses_without_second_derivatives() -> None:
    """Refused where a Hessian is asked for; gradients of samples need none."""
    y = torch.tensor([[0, 1, -1], [2, -1, 0], [1, 0, -1]]).repeat(2, 1)
    risk = vl.EmpiricalRisk(net(), nn.MultiLabelMarginLoss(), (X, y))
    for operator in (vl.GGN, vl.LossHessian, vl.Hessian):
        refused("loss", lambda op=operator: op(risk), says="second derivative")
    torch.testing.assert_close(
        vl.PerSampleGradients(risk).to_dense().mean(1), risk.gradient()
    )


def test_divergences_of_what_are_no_log_probabilities() -> None:
    data = (X, TARGETS.softmax(1))
    refused("loss", risk_of(loss=nn.KLDivLoss(), data=data), says="log_softmax")
    refused("data", risk_of(loss=nn.KLDivLoss(), data=(X, TARGETS)))
    refused("data", risk_of(loss=nn.KLDivLoss(), data=(X, CLASSES)), says="NLLLoss")


@pytest.mark.parametrize(
    "norm",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm],
    ids=["hook", "parametrisation"],
)
def test_power_iterations(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 3)), nn.Tanh()).double()
    refused("model", risk_of(model), says="model.eval()")
    G = vl.GGN(model.eval(), CE, (X, CLASSES))
    J = vl.Jacobian(G.risk)
    torch.testing.assert_close(
        G.to_dense(), J.to_dense().T @ (vl.LossHessian(G.risk) @ J.to_dense())
    )
