"""Do samples have the same outputs whatever others stand in their batch?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.cases import Lambda, mlp
from vivit_linop.risk import independence

X, Y = torch.rand(12, 4).double(), torch.randint(3, (12,))
CE = nn.CrossEntropyLoss()


def net() -> nn.Sequential:
    return mlp(4, 5, 3)


def build(forward: Any, data: Any = (X, Y), **keywords: Any) -> vl.EmpiricalRisk:
    return vl.EmpiricalRisk(Lambda(forward, f=net()), CE, data, **keywords)


def paired(h: Tensor) -> Tensor:
    return h + 0.1 * h.reshape(-1, 2, h.shape[1]).flip(1).reshape(h.shape)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "softmax": lambda h: h.softmax(0),
    "largest": lambda h: h / h.detach().abs().amax(0),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "attention": lambda h: h + (h @ h.T).softmax(1) @ h,
    "first": lambda h: h - h[:1],
    "last": lambda h: h + h[-1:],
    "sum so far": lambda h: h.cumsum(0),
    "pairs": lambda h: paired(h) if len(h) % 2 == 0 else h,
    "mirrored": lambda h: h + 0.1 * h.flip(0),
    "halves": lambda h: h + 0.1 * h.roll(len(h) // 2, 0),
    "large batches": lambda h: h - h.mean(0) if len(h) > 8 else h,
    "a little": lambda h: h + 1e-5 * h.mean(0),
}


@pytest.mark.parametrize("n", [2, 3, 4, 6, 12])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", MIXING)
def test_mixing(name: str, fixed: bool, n: int) -> None:
    """Refused, also in models that run on batches of one size only."""
    if (name == "large batches" and n <= 8) or (name == "pairs" and n % 2):
        pytest.skip("nothing is mixed")

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(x.view(n, 4) if fixed else x)
        return MIXING[name](h)

    with pytest.raises(ValueError, match="depend on the other samples"):
        build(forward, (X[:n], Y[:n]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("by_sample", [False, True])
def test_mixing_beside_masked_logits(
    by_sample: bool, fill: float, dtype: torch.dtype
) -> None:
    """What is filled in says nothing of how large the other logits are."""
    X, y = torch.rand(12, 4, dtype=dtype), torch.arange(12) % 2
    last = torch.arange(3) == 2
    for mix, refused in ((MIXING["mean"], True), (lambda h: h, False)):

        def forward(m: Any, x: Tensor, mix: Any = mix) -> Tensor:
            mask = last & (x[:, :1] > 0.5) if by_sample else last
            return mix(m.f(x)).masked_fill(mask, fill)

        model = Lambda(forward, f=net()).to(dtype)
        if not refused:
            assert vl.EmpiricalRisk(model, CE, (X, y)).value().isfinite()
            continue
        with pytest.raises(ValueError, match="depend on the other samples"):
            vl.EmpiricalRisk(model, CE, (X, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", [-1e4, -1e7, -1e9, -1e12])
@pytest.mark.parametrize("share", [0.0, 1e-3, 1.0])
def test_mixing_beside_logits_with_a_mask_added(
    share: float, mask: float, dtype: torch.dtype
) -> None:
    """Sums with a large number differ in their last digits only."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        return h - share * h.mean(0) + mask * (torch.arange(3) == 2).to(dtype)

    model, data = (
        Lambda(forward, f=net()).to(dtype),
        (X.to(dtype), torch.arange(12) % 2),
    )
    if not share:
        assert vl.EmpiricalRisk(model, CE, data).value().isfinite()
        return
    with pytest.raises(ValueError, match="depend on the other samples"):
        vl.EmpiricalRisk(model, CE, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fill", [-1e9, -1e30])
@pytest.mark.parametrize(
    ("noise", "says"),
    [(lambda m: torch.rand(3), "drew random"), (lambda m: m.b.add_(1.0), "'b'")],
)
def test_no_function_beside_masked_logits(
    noise: Callable[[Any], Tensor], says: str, fill: float, dtype: torch.dtype
) -> None:
    """Of what is drawn, and of buffers that a pass changes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return (m.f(x) + noise(m)).masked_fill(torch.arange(3) == 2, fill)

    model = Lambda(forward, f=net())
    model.register_buffer("b", torch.zeros(3))
    with pytest.raises(ValueError, match=says):
        vl.EmpiricalRisk(model.to(dtype), CE, (X.to(dtype), torch.arange(12) % 2))


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float32, 1e5), (torch.float64, 1e10)]
)
def test_rounding_beside_large_outputs_is_no_mixing(
    dtype: torch.dtype, large: float
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        ulps = 4 * torch.finfo(h.dtype).eps if len(x) == 96 else 0.0
        rounded = h * (1.0 + ulps)
        off = large * (rounded - h)
        return torch.cat([large * rounded[:, :1], (h + off)[:, 1:]], 1)

    data = X.repeat(8, 1).to(dtype), X.repeat(8, 1)[:, :3].to(dtype)
    model = Lambda(forward, f=net()).to(dtype)
    assert vl.EmpiricalRisk(model, nn.MSELoss(), data).num_samples == 96


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_mixing_in_single_precision(scale: float) -> None:
    """Also where outputs are small."""
    data = (X.float(), X[:, :3].float())
    plain = Lambda(lambda m, x: scale * m.f(x), f=net().float())
    assert vl.EmpiricalRisk(plain, nn.MSELoss(), data).num_samples == 12
    mixing = Lambda(lambda m, x: scale * (m.f(x) - m.f(x).mean(0)), f=net().float())
    with pytest.raises(ValueError, match="depend on the other"):
        vl.EmpiricalRisk(mixing, nn.MSELoss(), data)


@pytest.mark.parametrize("share", [1e-2, 1e-3])
@pytest.mark.parametrize("n", [2, 12])
def test_mixing_a_little_in_single_precision(share: float, n: int) -> None:
    """Told from rounding in float64."""
    model = Lambda(lambda m, x: m.f(x) + share * m.f(x).mean(0), f=net()).float()
    with pytest.raises(ValueError, match="depend on the other"):
        vl.EmpiricalRisk(model, CE, (X[:n].float(), Y[:n]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_mixing(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order, for a batch of another size, in what cancels."""
    large = 1e3 if dtype is torch.float32 else 1e8

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        return h + large * (3.0 * h / 3.0 - h) if len(x) == 96 else h

    asked = []
    in_double = independence._in_double
    monkeypatch.setattr(
        independence, "_in_double", lambda *a: asked.append(a) or in_double(*a)
    )
    model = Lambda(forward, f=net()).to(dtype)
    risk = vl.EmpiricalRisk(model, CE, (X.repeat(8, 1).to(dtype), Y.repeat(8)))
    assert risk.num_samples == 96 and asked


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-7)]
)
def test_iterations_that_end_together(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples decide when the others are done, which no derivative shows."""

    def forward(m: Any, x: Tensor) -> Tensor:
        given, z = m.f(x), x.new_zeros(len(x), 3)
        for _ in range(1000):
            last, z = z, 0.9 * x[:, :1] * z + given
            if (z - last).norm() <= tolerance * z.norm():
                break
        return z

    asked = []
    are_alone = independence._are_alone
    monkeypatch.setattr(
        independence, "_are_alone", lambda *a: asked.append(a) or are_alone(*a)
    )
    model = Lambda(forward, f=net()).to(dtype)
    assert vl.EmpiricalRisk(model, CE, (X.to(dtype), Y)).num_samples == 12
    assert asked


@pytest.mark.parametrize("where", ["tokens", "detached"])
def test_mixing_a_little_without_derivatives_in_inputs(where: str) -> None:
    tokens = where == "tokens"

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(x if tokens else x.detach())
        return h + 1e-3 * h.mean(0)

    first = nn.Embedding(12, 4) if tokens else nn.Linear(4, 4)
    model = Lambda(forward, f=nn.Sequential(first, net())).float()
    inputs = torch.arange(12) if tokens else X.float()
    with pytest.raises(ValueError, match="depend on the other samples"):
        vl.EmpiricalRisk(model, CE, (inputs, Y))


def _writing(x: Tensor) -> Tensor:
    x *= 1
    return x


# What a net of one precision does with its inputs and outputs.
LOW: dict[str, tuple[Any, Callable[[Tensor], Tensor], bool]] = {
    "mixing": (X, lambda h: h + 1e-3 * h.mean(0), False),
    "neighbours": (X, lambda h: h + 1e-3 * h.roll(1, 0), False),
    "other kernels": (X, lambda h: h * (1.0 + 1e-4 * len(h)), True),
    "tokens": (torch.arange(12), lambda h: h + 1e-3 * h.mean(0), True),
}


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("name", LOW)
def test_nets_of_one_precision_are_told_by_derivatives(name: str, writes: bool) -> None:
    """Kernels of low precision may be as far apart, and are believed."""
    inputs, change, believed = LOW[name]
    first = nn.Embedding(12, 4) if name == "tokens" else nn.Linear(4, 4)

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(_writing(x) if writes else x)
        if h.dtype is torch.float64:
            raise RuntimeError("there is no kernel for float64")
        return change(h)

    model = Lambda(forward, f=nn.Sequential(first, net())).float()
    data = inputs.float() if name != "tokens" else inputs, Y
    if believed or writes:  # of inputs that it writes into nobody can tell
        assert vl.EmpiricalRisk(model, CE, data).num_samples == 12
    else:
        with pytest.raises(ValueError, match="depend on the other samples"):
            vl.EmpiricalRisk(model, CE, data)


@pytest.mark.parametrize("name", ["mixing", "neighbours", "tokens"])
def test_nets_that_cast_to_one_precision_are_told_in_float64(name: str) -> None:
    """Casts follow the precision of a run, so that nothing is left to believe."""
    inputs, change, _ = LOW[name]
    first = nn.Embedding(12, 4) if name == "tokens" else nn.Linear(4, 4)
    model = Lambda(lambda m, x: change(m.f(x).float()), f=nn.Sequential(first, net()))
    data = inputs.float() if name != "tokens" else inputs, Y
    with pytest.raises(ValueError, match="depend on the other samples"):
        vl.EmpiricalRisk(model.float(), CE, data)


def test_mixing_in_the_largest_batch_only() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        return h - h.mean(0) if len(h) > 4 else h

    build(forward, [(X[:3], Y[:3]), (X[3:7], Y[3:7])])
    with pytest.raises(ValueError, match="depend on the other samples"):
        build(forward, [(X[:3], Y[:3]), (X[3:9], Y[3:9]), (X[9:], Y[9:])])


class State(nn.Module):
    """Recurrent, with a state for each sequence of the batch."""

    def __init__(self, n: int, zero: bool = True) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)
        state = torch.zeros(1, n, 5) if zero else torch.rand(1, n, 5)
        self.register_buffer("state", state)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.rnn(x.unsqueeze(1), self.state)[0][:, -1])
        return out


# Built by the tests: torch.export is not imported sooner.
FIXED: dict[str, Callable[[], nn.Module]] = {
    "state": lambda: State(12),
    "states of their own": lambda: State(12, zero=False),
    "view": lambda: Lambda(lambda m, x: m.f(x.view(12, 4)), f=net()),
    "padded": lambda: Lambda(
        lambda m, x: m.f(torch.cat([x, x.new_zeros(12 - len(x), 4)])), f=net()
    ),
    "exported": lambda: torch.export.export(net(), (X,)).module(),
}


@pytest.mark.parametrize("name", FIXED)
def test_models_of_one_batch_size(name: str) -> None:
    model = FIXED[name]().double()
    risk = vl.EmpiricalRisk(model, CE, (X, Y))
    expected = torch.autograd.grad(CE(model(X), Y), list(model.parameters()))
    torch.testing.assert_close(risk.gradient(), risk.flatten(expected))
    assert risk.num_samples == 12
    with pytest.raises(ValueError, match=r"(indices|model): .*samples"):
        risk.subset([0, 3, 5])
    message = risk.does_not_fit(X, 12)
    assert "a batch of 12 samples does not fit" in message


def test_a_model_that_cannot_be_asked() -> None:
    """Said, with a way out, instead of believed in silence."""

    def forward(m: Any, x: Tensor) -> Tensor:
        if not torch.equal(x, X):
            raise KeyError("unknown samples")
        return m.f(x)

    with pytest.raises(ValueError, match=r"unknown samples.*check=False"):
        build(forward)
    assert build(forward, check=False).num_samples == 12


def test_sorted_batches_stay_sorted() -> None:
    """Packed sequences must come in order of their lengths."""
    lengths = torch.arange(12, 0, -1)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths.cpu(), batch_first=True
            )
            out: Tensor = self.out(self.rnn(packed)[1][0])
            return out

    x = torch.rand(12, 12, 4).double()
    model = Packed().double()
    risk = vl.EmpiricalRisk(model, CE, ((x, lengths), Y))
    expected = torch.autograd.grad(CE(model(x, lengths), Y), list(model.parameters()))
    torch.testing.assert_close(risk.gradient(), risk.flatten(expected))


@pytest.mark.parametrize("n", [*range(2, 20), 100, 1000])
def test_groups_of_samples(n: int) -> None:
    first, second = (index.tolist() for index, _ in independence._alone(n))
    assert 0 in first and n - 1 in second and not set(first) & set(second)
    assert len(first) + len(second) <= max(4, n // 4)
    for group in (first, second):
        assert group == sorted(set(group)) and len(group) < n
    seen: list[int] = []
    for index, places in independence._in_company(n):
        assert len(index) == n and (index.diff() >= 0).all()
        assert torch.equal(index[places], places)
        assert set(index.tolist()) == set(places.tolist()) != set(range(n))
        seen += places.tolist()
    assert sorted(seen) == list(range(n))


# Derivatives that mix samples, and outputs that do not --------------------------------


class Averaging(torch.autograd.Function):
    """Its backward pass divides by the number of samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g / len(g)


class Halving(torch.autograd.Function):
    """Reverses and halves gradients, of each sample its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return -0.5 * g


def with_hook(h: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    if h.requires_grad:
        h.register_hook(hook)
    return h


def stepped(m: Any, h: Tensor, entries: int) -> Tensor:
    """Activations in steps, as in LSQ: the gradient of the step has a scale."""
    share = entries**-0.5
    step = m.step * share + (m.step - m.step * share).detach()
    scaled = h / step
    return step * (scaled + (scaled.round() - scaled).detach())


def scaled_off_the_graph(h: Tensor) -> Tensor:
    with torch.no_grad():
        left = h * (1.0 - 1.0 / len(h))
    return h / len(h) + left


BY_DERIVATIVES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a function": lambda m, h: Averaging.apply(h),
    "a hook": lambda m, h: with_hook(h, lambda g: g - g.mean(0)),
    "a mean": lambda m, h: h + (h.mean(0) - h.mean(0).detach()),
    "a step": lambda m, h: stepped(m, h, h.numel()),
    "gradients off": lambda m, h: scaled_off_the_graph(h),
}
APART: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a function": lambda m, h: Halving.apply(h),
    "a hook": lambda m, h: with_hook(h, lambda g: 0.3 * g),
    "a mean": lambda m, h: h + (h.mean(1) - h.mean(1).detach())[:, None],
    "a step": lambda m, h: stepped(m, h, h[0].numel()),
    "gradients off": lambda m, h: h / 3.0 + 2.0 / 3.0 * h.detach(),
}


def of_derivatives(between: Callable[[Any, Tensor], Tensor], dtype: Any) -> nn.Module:
    step = nn.Parameter(torch.tensor(0.3))
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: m.b(torch.tanh(between(m, m.a(x)))),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 3),
        step=step,
    )
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 12])
@pytest.mark.parametrize("name", BY_DERIVATIVES)
def test_derivatives_that_mix(name: str, n: int, dtype: torch.dtype) -> None:
    """Refused: products would depend on how the data are cut into batches."""
    model = of_derivatives(BY_DERIVATIVES[name], dtype)
    with pytest.raises(ValueError, match="its derivatives are not"):
        vl.EmpiricalRisk(model, CE, (X[:n].to(dtype), Y[:n]))


@pytest.mark.parametrize("name", APART)
def test_derivatives_of_each_sample(name: str) -> None:
    """Taken, and products are those of autograd's Jacobian of each sample."""
    model = of_derivatives(APART[name], torch.float64)
    params, rows = [*model.parameters()], []
    for x in X:
        for output in model(x[None])[0]:
            found = torch.autograd.grad(
                output, params, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([g.reshape(-1) for g in found]))
    J = torch.stack(rows)
    risk = vl.EmpiricalRisk(model, CE, (X, Y))
    cut = vl.EmpiricalRisk(model, CE, [(X[:5], Y[:5]), (X[5:], Y[5:])])
    u = torch.linspace(-1.0, 1.0, len(J), dtype=torch.float64)
    for of in (risk, cut):
        torch.testing.assert_close(vl.Jacobian(of).T @ u, J.T @ u)
        torch.testing.assert_close(vl.Jacobian(of).to_dense(), J)


class Normalised(torch.autograd.Function):
    """Its backward pass gives gradients of size 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g / g.norm(dim=1, keepdim=True).clamp(min=1e-12)


def hooked_module() -> nn.Module:
    model = net()
    model[2].register_full_backward_hook(lambda _, given, __: (given[0] / 7.0**2,))
    model[2].register_full_backward_pre_hook(lambda _, g: (g[0] / g[0].norm(),))
    return model


def hooked_weight() -> nn.Module:
    class Clipped(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return with_hook(1.0 * w, lambda g: g.clamp(-1e-2, 1e-2))

    model = net()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Clipped())
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 12])
@pytest.mark.parametrize(
    "build",
    [
        hooked_module,
        hooked_weight,
        lambda: of_derivatives(lambda m, h: Normalised.apply(h), None),
        lambda: of_derivatives(lambda m, h: with_hook(h, torch.sign), None),
    ],
)
def test_backward_passes_that_are_not_linear(
    build: Callable[[], nn.Module], n: int, dtype: torch.dtype
) -> None:
    """There is no matrix that they multiply by."""
    with pytest.raises(ValueError, match="its backward pass is not linear"):
        vl.EmpiricalRisk(build().to(dtype), CE, (X[:n].to(dtype), Y[:n]))


def test_clipping_that_has_no_effect() -> None:
    """Gradients that are clipped are larger than those of the check."""
    model = of_derivatives(
        lambda m, h: with_hook(h, lambda g: g.clamp(-100.0, 100.0)), torch.float64
    )
    plain = of_derivatives(lambda m, h: h, torch.float64)
    for matrix in (vl.GGN, vl.EmpiricalFisher):
        found, truth = (matrix(m, CE, (X, Y)).to_dense() for m in (model, plain))
        torch.testing.assert_close(found, truth)


def zero(layer: Any) -> Any:
    nn.init.zeros_(layer.weight)
    return layer


def behind_a_head(m: Any, X: Tensor, mix: Any) -> Tensor:
    out: Tensor = m.head(mix(m.f(X)))
    return out


def behind_a_gate(m: Any, X: Tensor, mix: Any) -> Tensor:
    out: Tensor = m.f(X) + m.gate * mix(m.f(X))
    return out


def behind_an_adapter(m: Any, X: Tensor, mix: Any) -> Tensor:
    out: Tensor = m.f(X) + mix(X @ m.a) @ m.head.weight
    return out


def behind_a_scale(m: Any, X: Tensor, mix: Any) -> Tensor:
    out: Tensor = m.f(X) + m.norm(mix(m.f(X)))
    return out


@pytest.mark.parametrize(
    "forward", [behind_a_head, behind_a_gate, behind_an_adapter, behind_a_scale]
)
def test_mixing_behind_what_is_zero_at_the_start(forward: Any) -> None:
    """Outputs are the same whatever others there are, and elsewhere they are not."""

    def of(mix: Any) -> nn.Module:
        members = {
            "f": net(),
            "head": zero(nn.Linear(3, 3)),
            "a": nn.Parameter(torch.randn(4, 3)),
            "gate": nn.Parameter(torch.zeros(())),
            "norm": zero(nn.LayerNorm(3)),
        }
        return Lambda(lambda m, X: forward(m, X, mix), **members).double()

    for mix in (MIXING["mean"], MIXING["attention"]):
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ValueError, match=r"others? .*where '.*' is not zero"):
                vl.EmpiricalRisk(of(mix).to(dtype), CE, (X.to(dtype), Y))
    for dtype in (torch.float32, torch.float64):
        model = of(torch.tanh).to(dtype)
        assert vl.EmpiricalRisk(model, CE, (X.to(dtype), Y)).gradient().any()


def test_mixing_behind_a_net_that_is_zero() -> None:
    """There is nothing as large as which its parameters could be."""
    model = Lambda(lambda m, X: m.f(X - X.mean(0)), f=zero(nn.Linear(4, 3, False)))
    with pytest.raises(ValueError, match=r"where '.*' is not zero"):
        vl.EmpiricalRisk(model.double(), CE, (X, Y))
