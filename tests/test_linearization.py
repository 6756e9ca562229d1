"""What a linearisation hands to the model's backward pass, and what it believes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import Lambda
from tests.comparing import jacobian
from tests.curvature_cases import close
from vivit_linop.net.linearization import Chunks

N, C = 6, 3


def _data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(N, 8, dtype=dtype), torch.randint(C, (N,))


# Contiguous -------------------------------------------------------------------------


def _raw(given: Tensor, like: Tensor) -> Tensor:
    """Walk through memory, as some kernels do, taking a tensor for contiguous."""
    return torch.as_strided(given, like.shape, torch.empty(like.shape).stride())


class _Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return _SineBackward.apply(g, w)


class _SineBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(g, w)
        return _raw(g, w) * w.cos()

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple[Tensor, Tensor]:
        g, w = ctx.saved_tensors
        return _raw(gg, w) * w.cos(), -_raw(gg, w) * _raw(g, w) * w.sin()


class _Kernel(torch.autograd.Function):
    """The identity, whose backward pass refuses what is not contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if not g.is_contiguous():
            raise RuntimeError("the gradient must be contiguous")
        return _Kernel.apply(g)


class _VmappedKernel(torch.autograd.Function):
    """The same, with a rule for batches, whose parts it also looks at."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        if not x.is_contiguous():
            raise RuntimeError("must be contiguous")
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _VmappedKernel.apply(g)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)
        return torch.stack([_VmappedKernel.apply(part) for part in x]), 0


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "of a weight": (
        lambda m, x: m.last(torch.tanh(x @ _Sine.apply(m.first.weight).T)),
        lambda m, x: m.last(torch.tanh(x @ m.first.weight.sin().T)),
    ),
    "last": (
        lambda m, x: _Kernel.apply(m.last(torch.tanh(m.first(x)))),
        lambda m, x: m.last(torch.tanh(m.first(x))),
    ),
    "first, of a weight": (
        lambda m, x: m.last(torch.tanh(x @ _Kernel.apply(m.first.weight).T)),
        lambda m, x: m.last(torch.tanh(x @ m.first.weight.T)),
    ),
    "batched": (
        lambda m, x: _VmappedKernel.apply(
            m.last(torch.tanh(x @ _VmappedKernel.apply(m.first.weight).T))
        ),
        lambda m, x: m.last(torch.tanh(x @ m.first.weight.T)),
    ),
}


def _nets(kind: str) -> tuple[vl.EmpiricalRisk, vl.EmpiricalRisk]:
    data = _data()
    parts = {"first": nn.Linear(8, 5), "last": nn.Linear(5, C)}
    with_kernel, plain = (Lambda(f, **parts).double() for f in KERNELS[kind])
    return tuple(
        vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), data)
        for net in (with_kernel, plain)
    )  # type: ignore[return-value]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "vector": lambda M: M[:, 0].clone(),
    "column of a matrix": lambda M: M[:, 1],
    "matrix": lambda M: M,
    "transposed": lambda M: M.T.contiguous().T,
    "every second row": lambda M: torch.stack([M, M], 1).reshape(-1, 4)[::2],
    "expanded": lambda M: M[:1].expand(len(M), 4),
    "one number": lambda M: M[0, 0].expand(len(M)),
    "reversed": lambda M: M.flip(1)[:, 2],
}
PRODUCTS: dict[str, Callable[[vl.EmpiricalRisk], Any]] = {
    "J": vl.Jacobian,
    "Jᵀ": lambda risk: vl.Jacobian(risk).T,
    "V": vl.GGNFactor,
    "Vᵀ": lambda risk: vl.GGNFactor(risk).T,
    "G": vl.GGN,
    "F": vl.EmpiricalFisher,
}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_vectors_arrive_contiguous(kind: str, name: str) -> None:
    with_kernel, plain = _nets(kind)
    op, expected = PRODUCTS[name](with_kernel), PRODUCTS[name](plain).to_dense()
    M = torch.randn(op.shape[1], 4).double()
    for layout in LAYOUTS.values():
        x = layout(M)
        assert close(op @ x, expected @ x)
        found = torch.from_numpy(op @ x.numpy())
        assert close(found, expected @ x)


@pytest.mark.parametrize("kind", KERNELS)
def test_columns_are_pulled_back_contiguous(kind: str) -> None:
    with_kernel, plain = _nets(kind)
    J, V = vl.Jacobian(plain).to_dense(), vl.GGNFactor(plain).to_dense()
    assert close(vl.Jacobian(with_kernel).to_dense(), J)
    assert close(vl.GGNFactor(with_kernel).to_dense(), V)
    assert close(vl.GGNFactor(with_kernel).gram.to_dense(), V.T @ V)
    assert close(vl.GGN(with_kernel).diagonal(), V.square().sum(1))
    assert close(with_kernel.gradient(), plain.gradient())


def test_contiguous_vectors_are_not_copied() -> None:
    seen: list[int] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            seen.append(g.untyped_storage().data_ptr())
            return g

    net = Lambda(lambda m, x: Watch.apply(m.first(x)), first=nn.Linear(8, C)).double()
    J = vl.Jacobian(vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), _data()))
    u = torch.randn(J.shape[0]).double()
    J.T @ u
    seen.clear()
    J.T @ u
    assert seen == [u.untyped_storage().data_ptr()]


# Believed ---------------------------------------------------------------------------


def _with_hook(once: bool) -> nn.Module:
    """A net whose backward pass doubles a gradient, by a hook that may go away."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(x))

        def double(g: Tensor) -> Tensor:
            if once:
                handle.remove()
            return 2 * g

        if h.requires_grad:
            handle = h.register_hook(double)
        return m.last(h)

    return Lambda(forward, first=nn.Linear(8, 5), last=nn.Linear(5, C)).double()


@pytest.mark.parametrize("name", PRODUCTS)
def test_hooks_that_remove_themselves_are_refused(name: str) -> None:
    net = _with_hook(once=True)
    op = PRODUCTS[name](vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), _data()))
    op.T  # noqa: B018  (an adjoint alone decides nothing)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"model: .*backward pass"):
            op @ torch.ones(op.shape[1]).double()


@pytest.mark.parametrize("name", PRODUCTS)
def test_hooks_that_stay(name: str) -> None:
    """The slope that a backward pass gives is what counts, as for implicit layers."""
    net, plain = _with_hook(once=False), _with_hook(once=False)
    plain.load_state_dict(net.state_dict())
    X, y = _data()
    out = plain(X).reshape(-1)
    J = jacobian(out, plain.parameters())
    op = PRODUCTS[name](vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), (X, y)))
    probabilities = out.detach().view(N, C).softmax(1)
    x = torch.randn(op.shape[1]).double()
    if name == "J":
        assert close(op @ x, J @ x)
    if name == "Jᵀ":
        assert close(op @ x, J.T @ x)
    if name == "G":
        image = (J @ x).view(N, C)
        image = probabilities * image - probabilities * (probabilities * image).sum(
            1, keepdim=True
        )
        assert close(op @ x, J.T @ image.reshape(-1) / N)
    if name == "F":
        error = probabilities - nn.functional.one_hot(y, C)
        U = torch.einsum("nc,ncd->dn", error, J.view(N, C, -1))
        assert close(op @ x, U @ (U.T @ x) / N)


class _WrongTogether(torch.autograd.Function):
    """The identity, with a rule for batches that is wrong."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _WrongTogether.apply(g)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return x.movedim(in_dims[0], 0).roll(1, 0), 0


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", PRODUCTS)
def test_wrong_rules_for_batches_are_seen(name: str, memory: int | None) -> None:
    parts = {"first": nn.Linear(8, 5), "last": nn.Linear(5, C)}
    X, y = _data()
    wrong, plain = (
        vl.EmpiricalRisk(
            Lambda(lambda m, x, f=f: m.last(f(m.first(x)).tanh()), **parts).double(),
            nn.CrossEntropyLoss(),
            (X, y),
            memory=memory,
        )
        for f in (_WrongTogether.apply, torch.clone)
    )
    op, expected = PRODUCTS[name](wrong), PRODUCTS[name](plain)
    M = torch.randn(op.shape[1], 4).double()
    assert close(op @ M, expected @ M)


SHOW_NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "one column again and again": lambda M: M[:, :1].expand_as(M),
    "zeros beside one column": lambda M: M * torch.tensor([0.0, 0.0, 1.0, 0.0]),
    "not finite": lambda M: torch.full_like(M, torch.nan),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("first", SHOW_NOTHING)
def test_wrong_rules_are_seen_where_the_first_product_shows_nothing(
    first: str, transposed: bool
) -> None:
    """What is multiplied first may be the same however a rule exchanges vectors."""
    parts = {"first": nn.Linear(8, 5), "last": nn.Linear(5, C)}
    op, expected = (
        vl.Jacobian(
            Lambda(lambda m, x, f=f: m.last(f(m.first(x)).tanh()), **parts).double(),
            nn.CrossEntropyLoss(),
            _data(),
        )
        for f in (_WrongTogether.apply, torch.clone)
    )
    op, expected = (op.T, expected.T) if transposed else (op, expected)
    M = torch.randn(op.shape[1], 4).double()
    op @ SHOW_NOTHING[first](M)
    assert close(op @ M, expected @ M)


def test_numbers_that_are_not_finite_say_nothing_of_rules() -> None:
    """Vectors are multiplied together after them as before."""
    parts, given = Chunks(torch.device("cpu")), list[torch.Size]()

    def product(rows: Tensor) -> Tensor:
        given.append(rows.shape)
        return 2 * rows

    X = torch.rand(5, 4)
    assert torch.equal(
        parts.apply(product, X.log() / 0.0, 5, 4, "twice"), X.log() / 0.0
    )
    given.clear()
    assert torch.equal(parts.apply(product, X, 5, 4, "twice"), 2 * X)
    assert given == [(4, 5)]


def test_numbers_that_are_not_finite_pass_through() -> None:
    net = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, C)).double()
    J = vl.Jacobian(vl.EmpiricalRisk(net, nn.CrossEntropyLoss(), _data()))
    u = torch.zeros(J.shape[0]).double()
    u[0] = torch.nan
    assert (J.T @ u).isnan().any()
    u[0] = 1.0
    assert close(J.T @ u, J.to_dense()[0])


class Cancels(nn.Module):
    """Outputs that no change of the parameters changes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.e = kind, nn.Embedding(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.e(x)
        if self.kind == "softmax of equal logits":
            return h.log_softmax(1).flatten(1)
        if self.kind == "sign":
            return (h / h.abs()).flatten(1)
        return (h.exp() / (h + 1.0).exp()).flatten(1)


@pytest.mark.parametrize("kind", ["softmax of equal logits", "sign", "quotient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_that_cancel_are_zero(kind: str, dtype: torch.dtype) -> None:
    """What is left of J is rounding, which J x and Jᵀ u need not have in common."""
    for seed in range(20):
        torch.manual_seed(seed)
        net, X = Cancels(kind).to(dtype), torch.tensor([[1, 1]])
        risk = vl.EmpiricalRisk(net, nn.MSELoss(), (X, torch.rand(1, 4, dtype=dtype)))
        J, x = vl.Jacobian(risk), torch.randn(6, dtype=dtype)
        assert (J @ x).norm() <= 1e3 * torch.finfo(dtype).eps * x.norm()
