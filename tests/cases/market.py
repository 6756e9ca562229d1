"""Problems: the arguments of a risk and what is known of them, and parts of nets."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


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
            [t.ndim > 0 and len(t) == len(y) for t in tensors_of(X)] for X, y in batches
        ]
        flags = iter([all(of_leaf) for of_leaf in zip(*by_sample, strict=True)])
        parts = iter(list(zip(*(tensors_of(X) for X, _ in batches), strict=True)))

        def join(_: Tensor) -> Tensor:
            part = next(parts)
            return torch.cat(part) if next(flags) else part[0]

        X = map_tensors(join, batches[0][0])
        return replace(self, data=(X, torch.cat([y for _, y in batches])))

    def rebatched(self, *sizes: int) -> "Problem":
        """The same samples in a list of batches of these sizes."""
        ((X, y),) = self.batches()
        assert sum(sizes) == len(y)
        parts, start = [], 0
        for size in sizes:
            index = torch.arange(start, start + size)
            parts.append((samples_of(X, index, len(y)), y[index]))
            start += size
        return replace(self, data=parts)


def converted(
    problem: Problem,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Problem:
    """A copy of a problem in another precision, or on another device."""

    def cast(X: Any) -> Any:
        def convert(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else None)

        return map_tensors(convert, X)

    module = isinstance(problem.model, nn.Module)
    model = problem.model
    if module:
        model = copy.deepcopy(model).to(device=device, dtype=dtype)
    loss = problem.loss
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).to(device=device, dtype=dtype)
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
        reference_loss = copy.deepcopy(reference_loss).to(device=device, dtype=dtype)
    return replace(
        problem,
        model=model,
        loss=loss,
        data=data,
        params=params,
        reference_loss=reference_loss,
    )


def map_tensors(function: Callable[[Tensor], Tensor], X: Any) -> Any:
    if isinstance(X, Tensor):
        return function(X)
    if isinstance(X, Mapping):
        return {k: map_tensors(function, v) for k, v in X.items()}
    if isinstance(X, (tuple, list)):
        return tuple(map_tensors(function, v) for v in X)
    return X


def tensors_of(X: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, X)
    return found


def samples_of(X: Any, index: Tensor, count: int) -> Any:
    return map_tensors(lambda t: t[index] if t.ndim and len(t) == count else t, X)


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
