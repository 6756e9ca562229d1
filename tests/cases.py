"""A market of problems, and their matrices computed densely by ``torch.func``.

``CASES`` maps names to functions that build a :class:`Problem` in float64. All numbers
in it are representable in float32, so that one reference serves both precisions.
``dense(name)`` computes J, H, G and the rest without the package under test.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

# All problems are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Problem:
    """The arguments of an EmpiricalRisk, and what is known about them."""

    model: Any
    loss: Any
    data: Any
    # From the model to the `params` argument, so that it survives a copy of the model.
    params: Callable[[Any], Any] = lambda model: None
    reduction: str | None = None  # only for a loss without this attribute
    convex: bool = True
    # False where gradients are cut, so that they are those of no risk, or where torch's
    # own second derivative is wrong.
    has_hessian: bool = True
    likelihood: bool = False  # whether mc_samples has a meaning
    # From the model to one of the same values that torch.func can differentiate twice.
    reference: Callable[[Any], Any] = lambda model: model
    # How a module is called, if not with its input.
    predict: Callable[[Any, Any], Tensor] | None = None
    # A loss of the same values whose derivatives torch knows.
    reference_loss: Any = None
    # What rounding of the outputs to float32 does to the loss Hessian.
    rtol32: float = 1e-5

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {"reduction": self.reduction, "predict": self.predict}
        keywords = {name: value for name, value in given.items() if value is not None}
        params = self.params(self.model)
        return (self.model, self.loss, self.data, params), keywords

    def batches(self) -> list[tuple[Any, Tensor]]:
        pair = isinstance(self.data, tuple) and isinstance(self.data[1], Tensor)
        return [self.data] if pair else [(X, y) for X, y in self.data]

    def chosen(self) -> dict[str, Tensor]:
        """The parameters of the operators, by name and in order."""
        params = self.params(self.model)
        if isinstance(params, Mapping):
            return dict(params)
        named = dict(self.model.named_parameters())
        if params is None:
            return {n: p for n, p in named.items() if p.requires_grad}
        names = {id(p): n for n, p in named.items()}
        return {names[id(p)]: p for p in params}

    def joined(self) -> "Problem":
        """The same samples in one batch."""
        batches = self.batches()
        by_sample = [
            [t.ndim > 0 and len(t) == len(y) for t in _leaves(X)] for X, y in batches
        ]
        flags = iter([all(of_leaf) for of_leaf in zip(*by_sample, strict=True)])
        parts = iter(list(zip(*(_leaves(X) for X, _ in batches), strict=True)))

        def join(_: Tensor) -> Tensor:
            part = next(parts)
            return torch.cat(part) if next(flags) else part[0]

        X = _map(join, batches[0][0])
        return replace(self, data=(X, torch.cat([y for _, y in batches])))

    def rebatched(self, *sizes: int) -> "Problem":
        """The same samples in a list of batches of these sizes."""
        ((X, y),) = self.batches()
        assert sum(sizes) == len(y)
        parts, start = [], 0
        for size in sizes:
            index = torch.arange(start, start + size)
            parts.append((_samples(X, index, len(y)), y[index]))
            start += size
        return replace(self, data=parts)


def to_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """A copy of a problem in another precision."""

    def cast(X: Any) -> Any:
        return _map(lambda t: t.to(dtype) if t.is_floating_point() else t, X)

    module = isinstance(problem.model, nn.Module)
    model = copy.deepcopy(problem.model).to(dtype) if module else problem.model
    loss = problem.loss
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).to(dtype)
    data = problem.data
    if isinstance(data, DataLoader):
        data = DataLoader(
            TensorDataset(*(cast(t) for t in data.dataset.tensors)),
            batch_size=data.batch_size,
        )
    elif isinstance(data, list):
        data = [(cast(X), cast(y)) for X, y in data]
    else:
        data = (cast(data[0]), cast(data[1]))
    spec = problem.params

    def params(m: Any) -> Any:
        given = spec(m)
        return cast(given) if isinstance(given, Mapping) else given

    reference_loss = problem.reference_loss
    if isinstance(reference_loss, nn.Module):
        reference_loss = copy.deepcopy(reference_loss).to(dtype)
    return replace(
        problem,
        model=model,
        loss=loss,
        data=data,
        params=params,
        reference_loss=reference_loss,
    )


def _map(function: Callable[[Tensor], Tensor], X: Any) -> Any:
    if isinstance(X, Tensor):
        return function(X)
    if isinstance(X, Mapping):
        return {k: _map(function, v) for k, v in X.items()}
    if isinstance(X, (tuple, list)):
        return tuple(_map(function, v) for v in X)
    return X


def _leaves(X: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(found.append, X)
    return found


def _samples(X: Any, index: Tensor, count: int) -> Any:
    return _map(lambda t: t[index] if t.ndim and len(t) == count else t, X)


# The reference ----------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """The matrices of a problem in float64."""

    outputs: Tensor  # [N, C…]
    J: Tensor  # [N C, D]
    H: Tensor  # [N C, N C]
    G: Tensor  # [D, D]
    U: Tensor  # [D, N]
    F: Tensor  # [D, D]
    hessian: Tensor  # [D, D]
    value: Tensor
    gradient: Tensor  # [D]
    r: float
    N: int
    C: int
    D: int

    def per_sample_ggn(self) -> Tensor:
        """G_n = J_nᵀ H_n J_n without r, [N, D, D]."""
        J = self.J.reshape(self.N, self.C, self.D)
        H = self.H.reshape(self.N, self.C, self.N, self.C)
        blocks = H.diagonal(dim1=0, dim2=2).permute(2, 0, 1) / self.r
        return J.mT @ blocks @ J


def dense_of(problem: Problem) -> Dense:
    """Compute everything of a float64 problem from its definition.

    Nothing is vectorised (``chunk_size=1``), so that any model can be a case. The
    risk is torch's own loss of all samples at once.
    """
    chosen = {n: p.detach().double() for n, p in problem.chosen().items()}
    model = problem.reference(problem.model)
    batches = problem.batches()
    targets = torch.cat([y for _, y in batches])
    reduction = problem.reduction or problem.loss.reduction
    loss = problem.reference_loss or problem.loss
    r = 1.0 / len(targets) if reduction == "mean" else 1.0
    sizes = [p.numel() for p in chosen.values()]

    def unflatten(theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split(sizes)
        return {
            n: part.reshape(p.shape)
            for part, (n, p) in zip(parts, chosen.items(), strict=True)
        }

    def outputs(theta: Tensor) -> Tensor:
        tensors = unflatten(theta)
        return torch.cat([call(model, tensors, X, problem.predict) for X, _ in batches])

    def risk(theta: Tensor) -> Tensor:
        return loss(outputs(theta), targets)

    theta = torch.cat([p.reshape(-1) for p in chosen.values()])
    with sdpa_kernel(SDPBackend.MATH), fast_path(False):
        f = outputs(theta).detach()
        N, C, D = len(f), f[0].numel(), len(theta)
        J = jacrev(outputs, chunk_size=1)(theta).reshape(N * C, D).detach()
        # By plain autograd: torch.func's second derivative of layer_norm is wrong
        # (not symmetric) in torch 2.13.
        leaf = theta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(risk(leaf), leaf, create_graph=True)
        rows = [
            torch.autograd.grad(entry, leaf, retain_graph=True, materialize_grads=True)
            for entry in (slope + 0.0 * leaf).unbind()
        ]
        full, gradient = torch.cat([row for (row,) in rows]).reshape(D, D), slope
    if problem.has_hessian:
        assert (full - full.T).norm() <= 1e-13 * full.norm()

    def of_outputs(flat: Tensor) -> Tensor:
        return loss(flat.reshape(f.shape), targets)

    H = hessian(of_outputs)(f.reshape(-1)).detach()
    slopes = grad(of_outputs)(f.reshape(-1)).reshape(N, C) / r
    U = torch.einsum("ncd,nc->dn", J.reshape(N, C, D), slopes)
    return Dense(
        outputs=f,
        J=J,
        H=H,
        G=J.T @ H @ J,
        U=U,
        F=r * U @ U.T,
        hessian=full.detach(),
        value=of_outputs(f.reshape(-1)),
        gradient=gradient.detach(),
        r=r,
        N=N,
        C=C,
        D=D,
    )


def call(
    model: Any,
    tensors: Mapping[str, Tensor],
    X: Any,
    predict: Callable[[Any, Any], Tensor] | None = None,
) -> Tensor:
    """Evaluate a model at parameters; X is copied, for models that write into it."""
    X = _map(torch.clone, X)
    if predict is not None:
        whole = Lambda(lambda m, x: predict(m.model, x), model=model)
        return functional_call(
            whole, {f"model.{n}": t for n, t in tensors.items()}, (X,)
        )
    if not isinstance(model, nn.Module):
        return model(dict(tensors), X)
    if isinstance(X, Mapping):
        return functional_call(model, dict(tensors), (), dict(X))
    return functional_call(model, dict(tensors), X if isinstance(X, tuple) else (X,))


class fast_path:
    """Attention without the fused kernels, which have no derivatives."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(self.enabled)

    def __exit__(self, *_: object) -> None:
        torch.backends.mha.set_fastpath_enabled(self.before)


def problem(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    """The problem of a name, with all its numbers representable in float32."""
    return _problem(name, dtype)


@functools.cache
def _problem(name: str, dtype: torch.dtype) -> Problem:
    with torch.random.fork_rng([]):
        torch.manual_seed(sum(map(ord, name)))
        built = CASES[name]()
    return to_dtype(to_dtype(built, torch.float32), dtype)


@functools.cache
def dense(name: str) -> Dense:
    """The matrices of a case, computed once in a session."""
    return dense_of(problem(name))


# Models -----------------------------------------------------------------------------


class Lambda(nn.Module):
    """A module with layers and a forward pass given as a function of it."""

    def __init__(self, forward: Callable[..., Tensor], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)
        self._function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._function(self, *args, **kwargs)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(shape))


def features(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape)


def classes(n: int, count: int, *shape: int) -> Tensor:
    return torch.randint(count, (n, *shape))


def binary(n: int, *shape: int) -> Tensor:
    return torch.randint(2, (n, *shape)).double()


CASES: dict[str, Callable[[], Problem]] = {}


def case(build: Callable[[], Problem]) -> Callable[[], Problem]:
    """Register a builder under its name."""
    CASES[build.__name__] = build
    return build


def variants(
    name: str, build: Callable[..., Problem], cases: Iterable[tuple[Any, ...]]
) -> None:
    """Register one builder with several arguments; the first says how it is called."""
    for suffix, *arguments in cases:
        CASES[f"{name}_{suffix}"] = functools.partial(build, *arguments)


# Losses and reductions --------------------------------------------------------------


def _mlp_with(
    loss: nn.Module, target: Callable[..., Tensor], *shape: int, **known: Any
) -> Problem:
    return Problem(mlp(4, 5, 3), loss, (features(6, 4), target(6, *shape)), **known)


variants(
    "mlp",
    lambda *a: _mlp_with(*a, likelihood=True),
    [
        ("mse_mean", nn.MSELoss(), features, 3),
        ("mse_sum", nn.MSELoss(reduction="sum"), features, 3),
        ("ce_mean", nn.CrossEntropyLoss(), classes, 3),
        ("ce_sum", nn.CrossEntropyLoss(reduction="sum"), classes, 3),
        ("bce_mean", nn.BCEWithLogitsLoss(), binary, 3),
        ("bce_sum", nn.BCEWithLogitsLoss(reduction="sum"), binary, 3),
        ("ce_smoothed", nn.CrossEntropyLoss(label_smoothing=0.25), classes, 3),
        (
            "bce_weighted",
            nn.BCEWithLogitsLoss(
                weight=torch.tensor([0.5, 2.0, 0.0]),
                pos_weight=torch.tensor([3.0, 1.0, 0.25]),
            ),
            binary,
            3,
        ),
    ],
)
variants(
    "linear",
    lambda loss, target, *shape: Problem(
        nn.Linear(4, 3), loss, (features(3, 4), target(3, *shape)), likelihood=True
    ),
    [
        ("mse", nn.MSELoss(), features, 3),
        ("ce", nn.CrossEntropyLoss(reduction="sum"), classes, 3),
        ("bce", nn.BCEWithLogitsLoss(), binary, 3),
    ],
)


@case
def ce_everything() -> Problem:
    # The divisor of the mean is the weight of all targets in all batches.
    loss = nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0]), ignore_index=1, label_smoothing=0.125
    )
    y = torch.tensor([0, 1, 2, 1, 1, 0])
    whole = Problem(mlp(4, 5, 3), loss, (features(6, 4), y), likelihood=True)
    return whole.rebatched(3, 2, 1)  # all of the second are ignored


@case
def ce_soft_targets() -> Problem:
    loss = nn.CrossEntropyLoss(
        weight=torch.tensor([0.5, 2.0, 1.0]), label_smoothing=0.25
    )
    y = torch.randn(6, 3).softmax(1)
    return Problem(mlp(4, 5, 3), loss, (features(6, 4), y), likelihood=True)


@case
def ce_unnormalised_soft_targets() -> Problem:
    loss = nn.CrossEntropyLoss(reduction="sum")
    return Problem(mlp(4, 3), loss, (features(4, 4), torch.rand(4, 3)))


@case
def ce_one_class() -> Problem:
    # p = 1 whatever the net says: G is exactly zero.
    data = (features(3, 2), classes(3, 1))
    return Problem(nn.Linear(2, 1), nn.CrossEntropyLoss(), data)


@case
def ce_two_classes() -> Problem:
    data = (features(5, 3), classes(5, 2))
    return Problem(mlp(3, 4, 2), nn.CrossEntropyLoss(), data, likelihood=True)


@case
def ce_sequence() -> Problem:
    # Outputs [N, C, d]: positions that the loss does not couple, some ignored.
    y = classes(4, 3, 5)
    y[0, :2] = y[2] = -100
    net = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 3, 1))
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 2, 5), y), likelihood=True)


@case
def ce_image_soft() -> Problem:
    # Soft targets [N, C, h, w].
    net = nn.Conv2d(1, 3, 2)
    data = (features(3, 1, 3, 3), torch.randn(3, 3, 2, 2).softmax(1))
    return Problem(net, nn.CrossEntropyLoss(), data, likelihood=True)


@case
def ce_saturated() -> Problem:
    # In some samples one class has p = 1 to rounding, in others two share all mass.
    X = features(6, 4)
    X[:2] *= 1e3
    X[2] *= 30.0
    net = mlp(4, 3)
    loss = nn.CrossEntropyLoss(reduction="sum")
    # Logits up to 1e3 are rounded by 1e-4 in float32, and so are small p, relatively.
    return Problem(net, loss, (X, classes(6, 3)), likelihood=True, rtol32=1e-4)


@case
def bce_saturated() -> Problem:
    X = features(5, 3)
    X[:2] *= 1e3
    loss = nn.BCEWithLogitsLoss(reduction="sum")
    data = (X, binary(5, 2))
    return Problem(nn.Linear(3, 2), loss, data, likelihood=True, rtol32=1e-4)


@case
def bce_image() -> Problem:
    # Outputs [N, 2, 2, 2], soft targets, weights that broadcast over them.
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([[[2.0]], [[0.5]]]))
    data = (features(3, 1, 3, 3), torch.rand(3, 2, 2, 2))
    return Problem(nn.Conv2d(1, 2, 2), loss, data, likelihood=True)


@case
def mse_image() -> Problem:
    data = (features(3, 1, 3, 3), features(3, 2, 2, 2))
    return Problem(nn.Conv2d(1, 2, 2), nn.MSELoss(), data, likelihood=True)


@case
def huber() -> Problem:
    loss = nn.HuberLoss(delta=50.0)  # quadratic at all residuals here
    return Problem(mlp(4, 3, 2), loss, (features(5, 4), features(5, 2)))


@case
def huber_kinked() -> Problem:
    # Zero curvature where residuals exceed delta: the rank of H is not known before.
    loss = nn.HuberLoss(delta=1.0, reduction="sum")
    y = features(5, 2)
    y[::2] += 10.0
    return Problem(mlp(4, 3, 2), loss, (features(5, 4), y))


@case
def smooth_l1() -> Problem:
    # Some residuals inside of beta, some beyond.
    return _mlp_with(nn.SmoothL1Loss(beta=0.5), features, 3)


@case
def poisson() -> Problem:
    data = (features(5, 4), classes(5, 4, 2).double())
    return Problem(mlp(4, 3, 2), nn.PoissonNLLLoss(full=True), data, likelihood=True)


@case
def poisson_rates() -> Problem:
    # The Hessian depends on the counts: some of them are zero.
    net = Lambda(lambda m, x: F.softplus(m.layer(x)), layer=mlp(4, 3))
    loss = nn.PoissonNLLLoss(log_input=False, eps=0.125, reduction="sum")
    return Problem(net, loss, (features(5, 4), classes(5, 3, 3).double()))


@case
def gaussian() -> Problem:
    # [N, T, C] regression; a variance for each target, one below eps.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        y, variance = target.unbind(-1)
        return F.gaussian_nll_loss(output, y, variance, full=True, eps=0.0625)

    variance = torch.rand(4, 2, 3) + 0.25
    variance[0, 0, 0] = 0.0
    y = torch.stack([features(4, 2, 3), variance], dim=-1)
    return Problem(
        mlp(2, 3),
        nn.GaussianNLLLoss(full=True, eps=0.0625),
        (features(4, 2, 2), y),
        likelihood=True,
        reference_loss=loss,
    ).rebatched(1, 3)


@case
def nll() -> Problem:
    # The reference is the cross-entropy: of log-probabilities they are the same.
    options: dict[str, Any] = {
        "weight": torch.tensor([0.5, 2.0, 1.0]),
        "ignore_index": 1,
    }
    net = Lambda(lambda m, x: m.layer(x).log_softmax(1), layer=mlp(4, 5, 3))
    return Problem(
        net,
        nn.NLLLoss(**options),
        (features(6, 4), torch.tensor([0, 1, 2, 1, 1, 0])),
        likelihood=True,
        reference_loss=nn.CrossEntropyLoss(**options),
    ).rebatched(3, 2, 1)


@case
def coupled_function_loss() -> Problem:
    # All six outputs of a sample are coupled, in batches.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        f, t = output.flatten(1), target.flatten(1)
        return (f.logsumexp(1) + 0.5 * (f.sum(1) - t.sum(1)) ** 2).mean()

    net = Lambda(
        lambda m, x: m.layer(x).reshape(-1, 2, 3).transpose(1, 2), layer=mlp(3, 6)
    )
    whole = Problem(net, loss, (features(5, 3), features(5, 3, 2)), reduction="mean")
    return whole.rebatched(2, 3)


@case
def function_cross_entropy() -> Problem:
    # The same as nn.CrossEntropyLoss, through autograd.
    loss = functools.partial(F.cross_entropy, label_smoothing=0.125)
    data = (features(5, 4), classes(5, 3))
    return Problem(mlp(4, 3), loss, data, reduction="mean")


@case
def linear_loss() -> Problem:
    # No curvature at all in output space.
    net = Lambda(lambda m, x: m.layer(x).log_softmax(1), layer=mlp(3, 2))
    data = (features(4, 3), classes(4, 2))
    return Problem(net, functools.partial(F.nll_loss), data, reduction="mean")


@case
def linear_loss_of_linear_net() -> Problem:
    # Neither G nor the Hessian has anything in it.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum()

    data = (features(4, 3), features(4, 2))
    return Problem(nn.Linear(3, 2), loss, data, reduction="sum")


@case
def nonconvex_loss() -> Problem:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).sin().sum()

    data = (features(4, 3), features(4, 2))
    return Problem(mlp(3, 2), loss, data, reduction="sum", convex=False)


# Shapes of outputs and data ---------------------------------------------------------


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


# Parameters -------------------------------------------------------------------------


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


# Architectures ----------------------------------------------------------------------


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


# Where the sample axis goes ---------------------------------------------------------


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


# Uses of parameters -----------------------------------------------------------------


@case
def weights_in_expressions() -> Problem:
    # A weight that is sliced, masked, chunked, normalised and regularises the output.
    def forward(m: Any, x: Tensor) -> Tensor:
        top, bottom = m.w.chunk(2)  # [2, 3] each
        h = F.linear(x, top * m.mask) + torch.einsum("nd,cd->nc", x, bottom)
        h = h + F.linear(x, m.w[1:3], m.b[:2]) + m.w.square().sum()
        return h * m.b[2] + torch.addmm(m.b[1:], x[:, :2], m.w.view(2, 6)[:, 2:4])

    net = Lambda(
        forward,
        w=parameter(4, 3),
        b=parameter(3),
        mask=torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(5, 3), classes(5, 2)))


@case
def parameters_as_inputs() -> Problem:
    # The data stand where a layer has its weight, and a weight multiplies itself.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.linear(m.w, x).T + F.linear(x, F.linear(m.w, m.w))  # [4, 4]
        kernels = x[:, None, :2]
        signal = F.conv1d(m.signal[None, None], kernels)[0]  # [4, 2]
        return (h.tanh() @ m.w)[:, :2] * m.gain + signal

    net = Lambda(forward, w=parameter(4, 4), signal=parameter(3), gain=parameter())
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 4), classes(4, 2)))


@case
def sparse_embedding() -> Problem:
    def dense_gradients(model: Any) -> Any:
        model = copy.deepcopy(model)
        model.tokens.sparse = False
        return model

    net = Lambda(
        lambda m, x: m.tokens(x).tanh().sum(1), tokens=nn.Embedding(5, 2, sparse=True)
    )
    X = torch.tensor([[1, 1], [4, 2], [0, 0], [3, 1]])
    data = (X, classes(4, 2))
    return Problem(net, nn.CrossEntropyLoss(), data, reference=dense_gradients)


@case
def derivatives_inside() -> Problem:
    # The output has a derivative of a net in its input, as for differential equations.
    def forward(m: Any, x: Tensor) -> Tensor:
        slope = vmap(grad(lambda row: m.net(row).sum()))(x)
        return m.net(x) + slope[:, :2]

    net = Lambda(forward, net=mlp(3, 3, 2))
    return Problem(net, nn.MSELoss(), (features(4, 3), features(4, 2)))


@case
def derivatives_by_autograd_inside() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            f = m.net(x)
            (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
        return f + slope[:, :2]

    def by_transforms(model: Any) -> Any:
        model = copy.deepcopy(model)
        model._function = lambda m, x: (
            m.net(x) + vmap(grad(lambda row: m.net(row).sum()))(x)[:, :2]
        )
        return model

    net = Lambda(forward, net=mlp(3, 3, 2))
    data = (features(4, 3), features(4, 2))
    return Problem(net, nn.MSELoss(), data, reference=by_transforms)


@case
def detached_uses() -> Problem:
    # Uses through which no derivative flows, beside one through which it does.
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = m.layer(x).sigmoid()
        return (
            m.layer(x) * gate + m.layer(x).detach() + F.linear(x, m.layer.weight.data)
        )

    net = Lambda(forward, layer=nn.Linear(3, 2))
    data = (features(4, 3), features(4, 2))
    return Problem(net, nn.MSELoss(), data, has_hessian=False)


@case
def parametrised_weight() -> Problem:
    def by_hand(params: dict[str, Tensor], x: Tensor) -> Tensor:
        g, v = (params[f"parametrizations.weight.original{i}"] for i in (0, 1))
        return F.linear(x, g * v / v.norm(dim=1, keepdim=True), params["bias"])

    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    data = (features(4, 3), classes(4, 2))
    return Problem(
        net,
        nn.CrossEntropyLoss(),
        data,
        reference=lambda _: by_hand,
        has_hessian=False,
    )


@case
def low_rank_adapter() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.base(x) + F.linear(F.linear(x, m.down), m.up) * 0.5

    net = Lambda(forward, base=mlp(4, 3), down=parameter(1, 4), up=parameter(3, 1))
    net.base.requires_grad_(False)
    return Problem(net, nn.CrossEntropyLoss(), (features(5, 4), classes(5, 3)))


# What transforms of torch.func cannot follow ----------------------------------------


@case
def in_place_relu() -> Problem:
    net = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.ReLU(inplace=True)
    )
    with torch.no_grad():
        net[2].bias.add_(1.0)
    return Problem(net, nn.MSELoss(), (features(5, 3), features(5, 2)))


@case
def in_place_writes() -> Problem:
    # Outputs and inputs of layers are overwritten, wholly and in part.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        h *= 2.0
        h[:, 0] = 1.0
        g = m.second(h.tanh())
        out = torch.zeros_like(g)
        out[:, 1:] = g[:, :-1]
        return out.add_(g)

    net = Lambda(forward, first=nn.Linear(3, 3), second=nn.Linear(3, 3))
    return Problem(net, nn.CrossEntropyLoss(), (features(5, 3), classes(5, 3)))


@case
def control_flow() -> Problem:
    # Each sample takes its own way, decided by values of its hidden layer.
    def forward(m: Any, x: Tensor) -> Tensor:
        rows = []
        for h in m.first(x).unbind():
            if h.sum().item() > 0.0:
                rows.append(m.second(h.tanh()))
            else:
                rows.append(m.third(h) * h.norm())
        return torch.stack(rows)

    net = Lambda(
        forward, first=nn.Linear(2, 2), second=nn.Linear(2, 2), third=nn.Linear(2, 2)
    )
    X = features(4, 2)
    X[2:] = -X[:2]
    return Problem(net, nn.CrossEntropyLoss(), (X, classes(4, 2)))


class Cube(torch.autograd.Function):
    """A function with no forward mode and no rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3.0 * x**2 * gradient


@case
def custom_function() -> Problem:
    net = Lambda(
        lambda m, x: m.second(Cube.apply(m.first(x))),
        first=nn.Linear(3, 3),
        second=nn.Linear(3, 2),
    )
    return Problem(net, nn.CrossEntropyLoss(), (features(4, 3), classes(4, 2)))


@case
def complex_intermediates() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        # Of negative lengths torch.polar has wrong derivatives.
        spectrum = torch.fft.rfft(m.layer(x)) * torch.polar(m.r.exp(), m.phi)
        return torch.fft.irfft(spectrum, n=4)

    net = Lambda(forward, layer=nn.Linear(3, 4), r=parameter(3), phi=parameter(3))
    return Problem(net, nn.MSELoss(), (features(4, 3), features(4, 4)))


@case
def checkpointed() -> Problem:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = checkpoint(m.first, x, use_reentrant=False) if m.forgets else m.first(x)
        return m.last(h)

    def remembering(model: Any) -> Any:
        model = copy.deepcopy(model)
        model.forgets = False
        return model

    net = Lambda(forward, first=mlp(3, 3, 3), last=nn.Linear(3, 2), forgets=True)
    data = (features(4, 3), classes(4, 2))
    return Problem(net, nn.CrossEntropyLoss(), data, reference=remembering)


@case
def wide_range_of_scales() -> Problem:
    # Eigenvalues over twelve orders of magnitude.
    X = features(6, 5) * torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-6])
    return Problem(nn.Linear(5, 2), nn.MSELoss(), (X, features(6, 2)), likelihood=True)


NAMES = list(CASES)
CONVEX = [name for name in NAMES if name != "nonconvex_loss"]
