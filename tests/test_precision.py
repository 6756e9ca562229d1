"""Models in half precision run in copies; complex parameters are pairs of real ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vivit_linop as vl
from tests.comparing import jacobian


def inputs(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


class Scaled(nn.Module):
    """Parameters, a frozen one, a buffer, and a tensor that is neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("shift", torch.randn(4))
        self.plain = torch.randn(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (self.layer(x) + self.shift).tanh() * self.frozen
        return self.head(hidden @ self.plain.to(self.frozen.device))


class Tokens(nn.Module):
    """Integers among the inputs, which stay integers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.rnn = nn.GRU(4, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        embedded = self.norm(self.table(tokens)) * weights.unsqueeze(-1)
        return self.head(self.rnn(embedded)[0][:, -1])


def scaled(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    model = Scaled().to(dtype)
    model.plain = model.plain.to(dtype)
    return model, inputs(6, 3).to(dtype)


def tokens(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    ids = torch.arange(18).reshape(6, 3) % 5
    return Tokens().to(dtype).eval(), (ids, inputs(6, 3).to(dtype))


def convolutions(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(*layers).to(dtype).eval(), inputs(6, 1, 3, 3).to(dtype)


MODELS = {"scaled": scaled, "tokens": tokens, "convolutions": convolutions}


def converted(X: Any, dtype: torch.dtype) -> Any:
    if isinstance(X, tuple):
        return tuple(converted(x, dtype) for x in X)
    return X.to(dtype) if X.is_floating_point() else X


def in_double(model: nn.Module, X: Any) -> tuple[nn.Module, Any]:
    """What was rounded to half precision, in float64."""
    model = copy.deepcopy(model).double()
    if isinstance(model, Scaled):
        model.plain = model.plain.double()
    return model, converted(X, torch.float64)


def ggn(model: nn.Module, X: Any, y: Tensor) -> Tensor:
    """The GGN of the squared error, 2/(N C) JᵀJ, by plain autograd."""
    outputs = model(*(X if isinstance(X, tuple) else (X,)))
    J = jacobian(outputs, [p for p in model.parameters() if p.requires_grad])
    return 2 / y.numel() * J.T @ J


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("half", "dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_half_precision(name: str, half: torch.dtype, dtype: torch.dtype) -> None:
    model, X = MODELS[name](half)
    y = inputs(6, 2).to(half)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X, y), dtype=dtype)
    assert risk.dtype is risk.outputs[0].dtype is risk.targets()[0].dtype is dtype
    truth = ggn(*in_double(model, X), y.double())
    tolerance = 1e-4 if dtype is torch.float32 else 1e-10
    size = truth.abs().max()

    def close(found: Tensor, expected: Tensor) -> None:
        assert found.dtype is dtype
        error = (found.double() - expected).abs().max()
        assert error <= tolerance * expected.abs().max()

    G = vl.GGN(risk)
    close(G.to_dense(), truth)
    x = torch.linspace(-1, 1, len(truth), dtype=dtype)
    for _ in range(3):
        close(G @ x, truth @ x.double())
    close(G.eigvalsh()[-2:], torch.linalg.eigvalsh(truth)[-2:])
    double, X64 = in_double(model, X)
    loss = F.mse_loss(double(*(X64 if isinstance(X64, tuple) else (X64,))), y.double())
    leaves = [p for p in double.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss, leaves)
    close(risk.gradient(), torch.cat([g.reshape(-1) for g in gradient]))
    # The user's module is as it was, and at() sees how it goes on.
    for n, tensor in model.state_dict().items():
        assert tensor.dtype is before[n].dtype and torch.equal(tensor, before[n])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    moved = ggn(*in_double(model, X), y.double())
    assert (moved - truth).abs().max() > 1e-3 * size
    close(vl.GGN(risk.at()).to_dense(), moved)


def test_half_precision_is_refused_with_the_word_that_helps() -> None:
    model, X = scaled(torch.bfloat16)
    y = inputs(6, 2).bfloat16()
    with pytest.raises(TypeError, match=r"params: .*dtype=torch.float32"):
        vl.EmpiricalRisk(model, nn.MSELoss(), (X, y))
    mixed, X = scaled(torch.float32)
    mixed.head.bfloat16()
    with pytest.raises(ValueError, match=r"params: have several dtypes.*dtype="):
        vl.EmpiricalRisk(mixed, nn.MSELoss(), (X, y))
    mixed.head.float()
    mixed.shift = mixed.shift.bfloat16()
    with pytest.raises(TypeError, match=r"model: 'shift' .*dtype=torch.float32"):
        vl.EmpiricalRisk(mixed, nn.MSELoss(), (X, y))
    for wrong in (torch.bfloat16, torch.complex64, "float32"):
        with pytest.raises(ValueError, match=r"dtype: torch.float32 or torch.float64"):
            vl.EmpiricalRisk(model, nn.MSELoss(), (X, y), dtype=wrong)  # type: ignore[arg-type]


class Casting(nn.Module):
    """Keeps what it computes in, as language models do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dtype = nn.Linear(3, 2, dtype=dtype), dtype
        self.inner = nn.Identity()
        self.inner.compute_dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.dtype)).tanh().to(self.inner.compute_dtype)


def test_models_that_keep_a_precision() -> None:
    model, X, y = Casting(torch.bfloat16), inputs(6, 3).bfloat16(), inputs(6, 2)
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X, y), dtype=torch.float64)
    exact = Casting(torch.float64)
    exact.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    truth = ggn(exact, X.double(), y.double())
    torch.testing.assert_close(vl.GGN(risk).to_dense(), truth, rtol=1e-10, atol=1e-12)
    assert model.dtype is model.inner.compute_dtype is torch.bfloat16
    halved = vl.EmpiricalRisk(
        model,
        nn.MSELoss(),
        (X, y),
        dtype=torch.float64,
        predict=lambda model, x: model.layer(x.half()).tanh(),
    )
    assert torch.equal(halved.outputs[0], risk.outputs[0])
    with pytest.raises(
        ValueError, match=r"model: does not run in dtype=torch\.float64"
    ):
        vl.EmpiricalRisk(
            model,
            nn.MSELoss(),
            (X, y),
            dtype=torch.float64,
            predict=lambda model, x: model.layer(torch.tensor(x.tolist())),
        )


def test_mixed_precision() -> None:
    """Parameters of several precisions become of one."""
    model, X = scaled(torch.float32)
    model.head.bfloat16()
    model.frozen.data = model.frozen.data.half()
    y = inputs(6, 2).double()
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X.double(), y), dtype=torch.float64)
    truth = ggn(*in_double(model, X), y)
    torch.testing.assert_close(vl.GGN(risk).to_dense(), truth, rtol=1e-10, atol=1e-12)


def test_a_function_model_with_constants() -> None:
    constant = inputs(4, 2).bfloat16()

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["w"]).tanh() @ constant

    w, X, y = inputs(3, 4).bfloat16(), inputs(6, 3).bfloat16(), inputs(6, 2)
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X, y), {"w": w}, dtype=torch.float32)
    J = torch.func.jacrev(lambda w: (X.double() @ w).tanh() @ constant.double())
    J = J(w.double()).reshape(12, 12)
    found = vl.GGN(risk).to_dense().double()
    torch.testing.assert_close(found, J.T @ J / 6, rtol=1e-4, atol=1e-6)


def test_operators_take_the_options_of_a_risk() -> None:
    model, X = scaled(torch.bfloat16)
    y = inputs(6, 2).bfloat16()
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X, y), dtype=torch.float64)
    loss: Callable[..., Tensor] = F.mse_loss
    options: dict[str, Any] = {"dtype": torch.float64, "reduction": "mean"}
    x = torch.linspace(-1, 1, risk.num_params, dtype=torch.float64)
    for kind in (vl.GGN, vl.Hessian, vl.EmpiricalFisher):
        found = kind(model, loss, (X, y), **options)
        torch.testing.assert_close(found @ x, kind(risk) @ x)
    for other in (vl.Jacobian, vl.GGNFactor, vl.PerSampleGradients, vl.LossHessian):
        assert other(model, loss, (X, y), **options).torch_dtype is torch.float64
    exact = vl.KFAC(model, loss, (X, y), variant="exact", **options)
    torch.testing.assert_close(exact.trace(), vl.KFAC(risk, variant="exact").trace())
    with pytest.raises(TypeError, match="dtype: is an option of the EmpiricalRisk"):
        vl.GGN(risk, dtype=torch.float64)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mc_sample'"):
        vl.GGN(model, nn.MSELoss(), (X, y), mc_sample=1)
    with pytest.raises(TypeError, match=r"^seed: no argument of this operator"):
        vl.GGN(risk, mc_samples=1, seed=0)


# Complex parameters -------------------------------------------------------------------


class Spectral(nn.Module):
    """Weights of frequencies, as in Fourier operators."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.gain = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=4).tanh() * self.gain


class ComplexLayers(nn.Module):
    """Complex layers, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 3, dtype=torch.complex128)
        self.second = nn.Linear(3, 2, dtype=torch.complex128)
        self.frozen = nn.Parameter(
            torch.randn(3, dtype=torch.complex128), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.to(self.frozen)).tanh() * self.frozen.conj()
        return self.second(hidden).abs()


class Phases(nn.Module):
    """Complex inputs, real outputs, a real parameter between complex ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(4, 2, dtype=torch.complex128))
        self.b = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.c = nn.Parameter(torch.randn((), dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        z = (x @ self.a) * self.c
        return z.real.sin() * self.b + z.imag.square()


COMPLEX: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "spectral": (Spectral, inputs(6, 4).double()),
    "layers": (ComplexLayers, inputs(5, 4).double()),
    "phases": (Phases, torch.complex(inputs(6, 4), inputs(7, 4)[1:]).to(torch.cdouble)),
}


def real_jacobian(model: nn.Module, X: Tensor) -> tuple[Tensor, Tensor]:
    """θ in real numbers and J, by differentiating a function of pairs."""
    owners = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    pairs = {
        n: torch.view_as_real(p) if p.is_complex() else p for n, p in owners.items()
    }
    sizes = [p.numel() for p in pairs.values()]

    def outputs(theta: Tensor) -> Tensor:
        state = {}
        for part, (name, p) in zip(theta.split(sizes), pairs.items(), strict=True):
            value = part.reshape(p.shape)
            complexes = owners[name].is_complex()
            state[name] = torch.view_as_complex(value) if complexes else value
        return torch.func.functional_call(model, state, (X,)).reshape(-1)

    theta = torch.cat([p.reshape(-1) for p in pairs.values()])
    return theta, torch.autograd.functional.jacobian(outputs, theta)


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_parameters(name: str) -> None:
    kind, X = COMPLEX[name]
    model = kind()
    theta, J = real_jacobian(model, X)
    y = inputs(len(X), len(J) // len(X)).double()
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X, y))
    assert risk.num_params == len(theta) and risk.dtype is torch.float64

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    truth = 2 / len(J) * J.T @ J
    close(vl.Jacobian(risk).to_dense(), J)
    G, x = vl.GGN(risk), torch.linspace(-1, 1, len(theta)).double()
    for _ in range(3):
        close(G @ x, truth @ x)
    close(G.to_dense(), truth)
    close(G.diagonal(), truth.diagonal())
    close(G.eigvalsh()[-3:], torch.linalg.eigvalsh(truth)[-3:])
    inverse = torch.linalg.inv(truth + 0.1 * torch.eye(len(theta)).double())
    close((G + 0.1 * vl.Identity(len(theta))).inv() @ x, inverse @ x)
    # torch's gradients of complex parameters are ∂L/∂Re + i ∂L/∂Im.
    F.mse_loss(model(X), y).backward()
    leaves = [p for p in model.parameters() if p.requires_grad]
    close(risk.flatten([p.grad for p in leaves]), risk.gradient())
    close(risk.flatten([p.detach() for p in leaves]), theta)
    for part, p in zip(risk.unflatten(theta), leaves, strict=True):
        assert part.dtype is p.dtype
        close(part, p.detach())
    columns = torch.stack([theta, x], dim=1)
    parts = risk.unflatten(columns)
    assert [part.shape[1:] for part in parts] == [p.shape for p in leaves]
    close(risk.flatten(parts), columns)


@pytest.mark.parametrize(
    "travel", [copy.deepcopy, lambda op: pickle.loads(pickle.dumps(op))]
)
@pytest.mark.parametrize("name", COMPLEX)
def test_operators_of_complex_parameters_travel(name: str, travel: Any) -> None:
    kind, X = COMPLEX[name]
    model = kind()
    _, J = real_jacobian(model, X)
    y = inputs(len(X), len(J) // len(X)).double()
    op = vl.Jacobian(model, nn.MSELoss(), (X, y))
    for _ in range(2):  # not used before, and used
        torch.testing.assert_close(travel(op).to_dense(), J)
        op @ J[0]


@pytest.mark.parametrize("name", COMPLEX)
def test_second_derivatives_in_complex_parameters(name: str) -> None:
    kind, X = COMPLEX[name]
    model = kind()
    theta, J = real_jacobian(model, X)
    y = inputs(len(X), len(J) // len(X)).double()
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), [(X[:2], y[:2]), (X[2:], y[2:])])
    H, step = vl.Hessian(risk), 1e-5
    x = torch.linspace(-1, 1, len(theta)).double()
    ahead, behind = (risk.at(theta + s * x).gradient() for s in (step, -step))
    torch.testing.assert_close(
        H @ x, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(H.diagonal(), H.to_dense().diagonal())
    matrix = H.to_dense()
    torch.testing.assert_close(matrix, matrix.T)


def test_steps_of_complex_parameters() -> None:
    kind, X = COMPLEX["phases"]
    model = kind()
    y = inputs(6, 2).double()
    risk = vl.EmpiricalRisk(model, nn.MSELoss(), (X, y))
    x = torch.linspace(-1, 1, risk.num_params).double()
    with torch.no_grad():
        parts = dict(zip(risk.params, risk.unflatten(x), strict=True))
        expected = {n: p + parts[n] for n, p in model.named_parameters()}
    risk.add_to_(model, x)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n])
    torch.testing.assert_close(risk.at().value(), F.mse_loss(model(X), y).detach())


def test_complex_parameters_in_another_precision() -> None:
    kind, X = COMPLEX["layers"]
    model = kind()
    y = inputs(5, 2).double()
    single = copy.deepcopy(model).to(torch.complex64)
    risk = vl.EmpiricalRisk(single, nn.MSELoss(), (X, y), dtype=torch.float64)
    rounded = copy.deepcopy(single).to(torch.complex128)
    expected = vl.EmpiricalRisk(rounded, nn.MSELoss(), (X, y))
    torch.testing.assert_close(risk.outputs[0], expected.outputs[0])
    torch.testing.assert_close(vl.GGN(risk).to_dense(), vl.GGN(expected).to_dense())


def test_complex_outputs_are_refused() -> None:
    layer = nn.Linear(4, 2, dtype=torch.complex64)
    X = torch.complex(inputs(5, 4), inputs(5, 4))
    with pytest.raises(ValueError, match=r"model: .*complex numbers.*view_as_real"):
        vl.EmpiricalRisk(layer, nn.MSELoss(), (X, inputs(5, 2)))
    risk = vl.EmpiricalRisk(
        layer,
        nn.MSELoss(),
        (X, inputs(5, 2, 2)),
        predict=lambda model, x: torch.view_as_real(model(x)),
    )
    assert risk.num_outputs == 4 and risk.num_params == 20
