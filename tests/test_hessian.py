"""Second derivatives certify themselves: right, or refused, naming the operation."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import vivit_linop as vl
from tests.comparing import jacobian
from tests.pairs import in_turn, pairwise

CE = nn.CrossEntropyLoss()


def hessian(net: nn.Module, loss: Any, X: Any, y: Tensor) -> Tensor:
    """By plain autograd, row by row."""
    params = [p for p in net.parameters() if p.requires_grad]
    slope = torch.autograd.grad(
        loss(net(X), y), params, create_graph=True, materialize_grads=True
    )
    flat = torch.cat([g.flatten() for g in slope])
    unused = torch.cat([p.flatten() for p in params])
    return jacobian(flat + 0.0 * unused, params).detach()


def products(net: nn.Module, X: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """All that rests on second derivatives."""

    def H() -> vl.Hessian:
        return vl.Hessian(net, CE, (X, y))

    x = torch.ones(H().shape[0], dtype=H().torch_dtype)
    return {
        "product": lambda: H() @ x,
        "columns": lambda: H().to_dense(),
        "diagonal": lambda: H().diagonal(),
        "sample_diagonals": lambda: H().sample_diagonals(),
        "blocks": lambda: H().block_diagonal("parameter").to_dense(),
    }


# Hand-written operations ------------------------------------------------------------


class Once(torch.autograd.Function):
    """A backward pass that torch knows to be not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class Kernel(Once):
    """A backward pass that is not of torch's operations."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = (t.detach() for t in ctx.saved_tensors)
        g = g.detach()
        return g @ w, g.T @ x


class Numpy(Once):
    """A kernel that takes tensors apart in its forward pass too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.kept = x.detach(), w.detach()
        return torch.from_numpy(ctx.kept[0].numpy() @ ctx.kept[1].numpy().T)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.kept
        return g @ w, g.T @ x


class Half(Once):
    """A backward pass that is differentiable in one of its arguments only."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x.detach()


class Fine(Once):
    """A backward pass that is differentiable."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


class Plain:
    """The operation itself."""

    @staticmethod
    def apply(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T


class Last(nn.Module):
    """The operation gives the outputs."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.op, self.a = op, nn.Linear(3, 4)
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.op.apply(self.a(x).tanh(), self.w)
        return out


class Inside(Last):
    """The operation lies within the net."""

    def __init__(self, op: Any) -> None:
        super().__init__(op)
        self.b = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(super().forward(x).tanh())
        return out


class Routed(Inside):
    """Some samples go through the operation, the others not."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        routed = x[:, 0] > 1.0
        out = h @ self.w.T
        if routed.any():
            out = out.index_put((routed,), self.op.apply(h[routed], self.w))
        return self.b(out.tanh())  # type: ignore[no-any-return]


def some_data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    X = torch.randn(9, 3, dtype=dtype).clamp(-0.9, 0.9)
    X[7, 0] = 1.1
    return X, torch.randint(3, (9,))


WAYS = ["product", "columns", "diagonal", "sample_diagonals", "blocks", "again"]


@pytest.mark.parametrize(
    ("way", "op", "kind", "dtype"),
    pairwise(
        WAYS,
        [Once, Kernel, Numpy, Half],
        [Last, Inside, Routed],
        [torch.float32, torch.float64],
    ),
)
def test_wrong_second_derivatives_are_refused(
    way: str, op: Any, kind: Any, dtype: torch.dtype
) -> None:
    # Few samples, of which one is routed: each refusal looks for the one at fault.
    net, (X, y) = kind(op).to(dtype), (part[5:] for part in some_data(dtype))
    H = vl.Hessian(net, CE, (X, y))
    again = [lambda: H @ torch.ones(H.shape[0])] * 2  # each time
    for of in again if way == "again" else [products(net, X, y)[way]]:
        with pytest.raises(ValueError, match=f"Function {op.__name__}, .* GGN"):
            of()


def test_all_ways_are_there() -> None:
    assert [*products(nn.Linear(3, 3).double(), *some_data()), "again"] == WAYS


@pytest.mark.parametrize("kind", [Last, Inside, Routed])
def test_right_second_derivatives_of_hand_written_operations(kind: Any) -> None:
    net, (X, y) = kind(Fine).double(), some_data()
    exact = hessian(kind(Plain).double(), CE, X, y)
    found = {name: of() for name, of in products(net, X, y).items()}
    torch.testing.assert_close(found["columns"], exact)
    torch.testing.assert_close(found["product"], exact.sum(1))
    torch.testing.assert_close(found["diagonal"], exact.diagonal())
    torch.testing.assert_close(found["sample_diagonals"].mean(0), exact.diagonal())


def test_any_batch_may_be_wrong() -> None:
    net, (X, y) = Routed(Kernel).double(), some_data()
    batches = [(X[:4], y[:4]), (X[4:], y[4:])]
    with pytest.raises(ValueError, match=r"a sample of batch 1.*Function Kernel"):
        vl.Hessian(net, CE, batches).to_dense()
    whole, same = Routed(Plain).double(), Routed(Kernel).double()
    found = vl.Hessian(same, CE, batches[:1]).to_dense()
    torch.testing.assert_close(found, hessian(whole, CE, X[:4], y[:4]))


def test_a_batch_may_be_computed_otherwise_than_its_samples() -> None:
    class Together(Inside):
        def forward(self, x: Tensor) -> Tensor:
            op = self.op if len(x) > 1 else Plain
            return self.b(op.apply(self.a(x).tanh(), self.w).tanh())  # type: ignore[no-any-return]

    X, y = some_data()
    with pytest.raises(ValueError, match=r"samples of batch 0 together.*Kernel"):
        vl.Hessian(Together(Kernel).double(), CE, (X, y)).diagonal()


def test_the_operation_of_torch_is_named() -> None:
    norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)).double()
    X, y = some_data()
    # The double backward of torch 2.13's fused weight_norm is wrong. It is written
    # otherwise where that helps, but not where something else is wrong too.
    net = nn.Sequential(norm, Inside(Kernel).double())
    with pytest.raises(ValueError, match=r"_weight_norm|Kernel"):
        vl.Hessian(net, CE, (X, y)).to_dense()


class Once2(torch.autograd.Function):
    """A squared error whose second derivative is missing."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(f, y)
        return (f - y).pow(4).mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        f, y = ctx.saved_tensors
        return g * 4 * (f - y) * (f - y).square().detach() / f.numel(), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_second_derivatives_of_losses_are_refused(dtype: torch.dtype) -> None:
    net, X = nn.Linear(3, 2).to(dtype), torch.randn(5, 3, dtype=dtype)
    risk = vl.EmpiricalRisk(net, Once2.apply, (X, X[:, :2]), reduction="mean")
    for operator in (vl.Hessian, vl.GGN, vl.LossHessian):
        with pytest.raises(ValueError, match="loss: torch's second derivative"):
            operator(risk)
    vl.EmpiricalFisher(risk).trace()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: F.cross_entropy(f, y.argmax(1)),
        lambda f, y: (f - y).abs().mean(1).mean(),
        lambda f, y: (1 - f * y).relu().mean(1).mean(),
        lambda f, y: F.huber_loss(f, y, delta=0.1),
        lambda f, y: (f.exp() - y * f).mean(1).mean(),
    ],
)
def test_right_losses_are_not_refused(
    loss: Any, scale: float, dtype: torch.dtype
) -> None:
    net, X = nn.Linear(3, 2).to(dtype), torch.randn(30, 3, dtype=dtype)
    y = net(X).detach() * scale  # some are on a kink
    with torch.no_grad():
        net.weight *= scale
        net.bias *= scale
    vl.LossHessian(vl.EmpiricalRisk(net, loss, (X, y), reduction="mean"))


# No false alarm ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "dtype"),
    in_turn([0.0, 5.0, 16.0, 30.0, 60.0, 60.0], [torch.float32, torch.float64]),
)
def test_saturated_softmax(margin: float, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    with torch.no_grad():
        net[2].bias[0] += margin
    X, y = torch.randn(8, 6, dtype=dtype), torch.zeros(8, dtype=torch.long)
    exact = hessian(copy.deepcopy(net).double(), CE, X.double(), y)
    found = vl.Hessian(net, CE, (X, y)).to_dense().double()
    # Of the probabilities that torch gives.
    floor = 100 * torch.finfo(dtype).eps * (1 + exact.norm())
    assert (found - exact).norm() <= floor
    H = vl.Hessian(net, CE, (X, y))
    for route in ("products", None):
        assert (H.diagonal(route) - exact.diagonal()).norm() <= floor
        found = H.sample_diagonals(route).double().mean(0)
        assert (found - exact.diagonal()).norm() <= floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_units(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid())
    net = nn.Sequential(*net, nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        net[0].weight *= 60
        net[2].weight *= 60
    X, y = some_data(dtype)
    exact = hessian(copy.deepcopy(net).double(), CE, X.double(), y)
    found = vl.Hessian(net, CE, (X, y)).to_dense().double()
    assert (found - exact).norm() <= 1e4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_that_cancel(dtype: torch.dtype) -> None:
    """The outputs are equal whatever the parameters are: all is rounding."""

    class Equal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 1), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.rms_norm(self.a(x).sigmoid(), (1,))
            out: Tensor = self.b(h).expand(-1, 3).log_softmax(1)
            return out

    torch.manual_seed(0)
    net, (X, y) = Equal().to(dtype), some_data(dtype)
    H = vl.Hessian(net, CE, (X, y))
    for found in (H.to_dense(), H.diagonal(), H.sample_diagonals()):
        assert found.norm() <= 100 * torch.finfo(dtype).eps


KINKED = [nn.ReLU(), nn.LeakyReLU(), nn.ELU(), nn.SELU(), nn.ReLU6(), nn.Hardtanh()]


@pytest.mark.parametrize(
    ("act", "dtype"), in_turn(KINKED, [torch.float32, torch.float64]), ids=str
)
def test_piecewise_linear_nets(act: nn.Module, dtype: torch.dtype) -> None:
    """Also on their kinks: zero inputs meet zero biases."""
    act = copy.deepcopy(act)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), act, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    ).to(dtype)
    nn.init.zeros_(net[0].bias)
    X, y = torch.rand(20, 1, 8, 8, dtype=dtype), torch.randint(4, (20,))
    X[:, :, :4] = 0.0
    exact = hessian(copy.deepcopy(net).double(), CE, X.double(), y)
    found = vl.Hessian(net, CE, (X, y)).to_dense().double()
    assert (found - exact).norm() <= 1e3 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kink_where_torch_has_no_symmetric_hessian(dtype: torch.dtype) -> None:
    """Of a PReLU's input at zero: the two mixed derivatives count it differently."""
    net = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 3)).to(dtype)
    X, y = some_data(dtype)
    exact = hessian(copy.deepcopy(net).double(), CE, X.double(), y)
    found = vl.Hessian(net, CE, (X, y)).to_dense().double()
    assert (found - exact).norm() <= 1e3 * torch.finfo(dtype).eps * exact.norm()
    nn.init.zeros_(net[0].bias)
    X[2] = 0.0
    asymmetry = hessian(net, CE, X, y)
    if not torch.allclose(asymmetry, asymmetry.T, atol=1e-4):
        with pytest.raises(ValueError, match="kink"):
            vl.Hessian(net, CE, (X, y)).to_dense()


class Detaching(nn.Module):
    """What is detached, and computed without gradients, is a constant."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a, self.b = how, nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.how == "straight through":
            h = h + (torch.round(4 * h) / 4 - h).detach()
        elif self.how == "data":
            h = h * self.a.weight.data.norm()
        elif self.how == "numbers":
            with torch.inference_mode():
                sizes = self.a(x).exp().sum(1, keepdim=True).tolist()
            h = h / torch.tensor(sizes).to(h)
        else:
            constant = torch.no_grad if self.how == "no_grad" else torch.inference_mode
            with constant():
                size = self.a(x).tanh().norm(dim=1, keepdim=True)
            h = h / size.clone()
        out: Tensor = self.b(h)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "how", ["straight through", "data", "no_grad", "inference", "numbers"]
)
def test_detached_values_are_constants(how: str, dtype: torch.dtype) -> None:
    net, (X, y) = Detaching(how).to(dtype), some_data(dtype)
    exact = hessian(net, CE, X, y)
    torch.testing.assert_close(vl.Hessian(net, CE, (X, y)).to_dense(), exact)


def test_rows_for_padding() -> None:
    net = nn.Sequential(
        nn.Embedding(5, 3, padding_idx=0), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)
    ).double()
    with torch.no_grad():
        net[0].weight[0] = 0.3
    X, y = torch.tensor([[0, 1], [2, 0], [3, 3]]), torch.tensor([0, 2, 1])
    exact = hessian(net, CE, X, y)
    torch.testing.assert_close(vl.Hessian(net, CE, (X, y)).to_dense(), exact)


# One way fails ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (2, 2), (3,)])
def test_batched_passes_are_checked(shape: tuple[int, ...]) -> None:
    """For some of these shapes torch's batching of GroupNorm is wrong."""
    n = 2 * torch.Size(shape).numel()
    net = nn.Sequential(
        nn.Linear(3, n),
        nn.Unflatten(1, (2, *shape)),
        nn.GroupNorm(1, 2),
        nn.Flatten(),
        nn.Tanh(),
        nn.Linear(n, 3),
    ).double()
    X, y = some_data()
    for N in (1, 2):
        H, exact = vl.Hessian(net, CE, (X[:N], y[:N])), hessian(net, CE, X[:N], y[:N])
        torch.testing.assert_close(H.to_dense(), exact)
        torch.testing.assert_close(H.diagonal(), exact.diagonal())
        torch.testing.assert_close(H.sample_diagonals().mean(0), exact.diagonal())


@pytest.mark.parametrize("kind", ["bag", "pdist", "segments"])
def test_no_second_derivative_in_torch(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.a = nn.EmbeddingBag(11, 4, mode="max"), nn.Linear(3, 4)
            self.o = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "bag":
                return self.o(self.bag(x).tanh())  # type: ignore[no-any-return]
            h = self.a(x)
            if kind == "pdist":
                h = torch.stack([F.pdist(row[:, None])[:4] for row in h])
            else:
                lengths = torch.full((len(h), 4), 1, device=h.device)
                h = torch.segment_reduce(h, "sum", lengths=lengths, axis=1)
            return self.o(h)  # type: ignore[no-any-return]

    X, y = some_data()
    inputs = torch.randint(11, (9, 5)) if kind == "bag" else X
    for of in products(Net().double(), inputs, y).values():
        with pytest.raises(ValueError, match=r"model: has no second derivative.*GGN"):
            of()


def small() -> vl.Hessian:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return vl.Hessian(net, CE, some_data())


@pytest.mark.parametrize("used", [False, True])
def test_hessians_travel(used: bool) -> None:
    H, D = small(), 31
    if used:
        H.to_dense()
    expected = small() @ torch.ones(D, dtype=torch.float64)
    for other in (pickle.loads(pickle.dumps(H)), copy.deepcopy(H)):
        assert torch.equal(other @ torch.ones(D, dtype=torch.float64), expected)
    block = pickle.loads(pickle.dumps(H.block_diagonal("parameter")))
    torch.testing.assert_close(
        block.to_dense(), H.block_diagonal("parameter").to_dense()
    )


@pytest.mark.parametrize("evaluation", range(1, 6))
def test_interrupts_leave_nothing_half_done(
    evaluation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    H, x = small(), torch.ones(31, dtype=torch.float64)
    expected = small() @ x
    calls = []
    model = type(H.risk.model).__call__

    def interrupted(self: Any, params: Any, X: Any) -> Tensor:
        calls.append(1)
        if len(calls) == evaluation:
            raise KeyboardInterrupt
        return model(self, params, X)

    with monkeypatch.context() as m:
        m.setattr(type(H.risk.model), "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            H @ x
    assert torch.equal(H @ x, expected)


def test_vectors_reach_the_model_contiguous() -> None:
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(w)
            return w.sin()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return SineBackward.apply(g, *ctx.saved_tensors)

    class SineBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, g: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(g, w)
            return g * w.cos()

        @staticmethod
        def backward(ctx: Any, gg: Tensor) -> tuple[Tensor, Tensor]:
            g, w = ctx.saved_tensors
            raw = torch.as_strided(gg, w.shape, w.stride())  # without a look at gg
            return raw * w.cos(), -raw * g * w.sin()

    class Net(nn.Module):
        def __init__(self, sine: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w, self.sine = nn.Parameter(torch.randn(4, 3)), sine

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = (x @ self.sine(self.w).T).tanh()[:, :3]
            return out

    X, y = some_data()
    exact = hessian(Net(torch.sin).double(), CE, X, y)
    H, M = vl.Hessian(Net(Sine.apply).double(), CE, (X, y)), torch.rand(12, 3).double()
    torch.testing.assert_close(H @ M, exact @ M)
    torch.testing.assert_close(H @ M[:, 1], exact @ M[:, 1])
    torch.testing.assert_close(H @ M.T.contiguous().T, exact @ M)
    torch.testing.assert_close(H.sample_diagonals().mean(0), exact.diagonal())


class Padded(nn.Module):
    """A norm of one feature leaves little of a row of padding, which is a constant."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.e, self.out = nn.Embedding(4, 1, padding_idx=0), nn.Linear(1, 1)
        self.norm = nn.RMSNorm(1, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.e(x))).flatten(1)


@pytest.mark.parametrize("eps", [1e-8, 1e-5])
def test_rows_of_padding_are_constants_of_sample_diagonals(eps: float) -> None:
    """Forward mode differentiates them: by 3e-7 for the smaller eps."""
    net = Padded(eps).double()
    nn.init.normal_(net.e.weight)
    data = torch.tensor([[0, 1], [2, 0], [3, 1]]), torch.randn(3, 2).double()
    H = vl.Hessian(net, nn.MSELoss(), data)
    total = H.sample_diagonals().mean(0)
    assert total[0] == 0.0
    assert (total - H.diagonal()).abs().max() <= 1e-12
