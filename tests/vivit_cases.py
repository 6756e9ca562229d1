"""ViViT's test problems, written anew, and dense references for its computations.

The kinds of net, loss and data are those of ViViT's own tests: dense and convolutional
nets, linear layers with further axes, batch norms in eval mode, a net with branches;
cross-entropy and square loss, mean and sum.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from backpack import backpack, extend
from backpack.custom_module.branching import Parallel
from backpack.custom_module.pad import Pad
from backpack.custom_module.slicing import Slicing
from torch import Tensor, nn

from tests.cases import Dense, Problem, dense_of
from vivit_linop.vivit import (
    DirectionalDampedNewtonComputation,
    DirectionalDerivativesComputation,
    EighComputation,
    EigvalshComputation,
)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5))


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 5), nn.Sigmoid()
    )


def _sigmoids() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Sigmoid())


def _norm(norm: nn.Module, *after: nn.Module) -> nn.Module:
    """A batch norm in eval mode, with statistics and weights of its own."""
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return nn.Sequential(norm, *after).eval()


def _branches() -> nn.Module:
    skip = Parallel(
        nn.Identity(), nn.Sequential(nn.Linear(6, 4), nn.Sigmoid(), Pad((1, 1)))
    )
    return nn.Sequential(
        nn.Linear(5, 7), Slicing((slice(None), slice(0, 6))), skip, nn.Linear(6, 3)
    )


def _problem(
    net: Callable[[], nn.Module], loss: nn.Module, *shape: int, classes: int = 0
) -> Callable[[], Problem]:
    def build() -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = net().double()
            X = torch.rand(*shape, dtype=torch.float64)
            if classes:
                y = torch.randint(classes, (len(X),))
            else:
                with torch.no_grad():
                    y = torch.rand_like(model(X))
            return Problem(model, loss, (X, y))

    return build


_MEAN, _SUM, _SQUARE = (
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.MSELoss(),
)
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": _problem(_mlp, _MEAN, 3, 7, classes=5),
    "mlp, sum": _problem(_mlp, _SUM, 3, 7, classes=5),
    "convolution": _problem(_convolutional, _MEAN, 4, 3, 6, 6, classes=5),
    "sigmoids": _problem(_sigmoids, _SQUARE, 5, 6),
    **{
        f"linear, {len(axes)} more axes": _problem(
            lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten()), _SQUARE, 3, *axes, 4
        )
        for axes in [(2,), (2, 3), (2, 1, 2)]
    },
    "batch norm 1d": _problem(
        lambda: _norm(nn.BatchNorm1d(6), nn.Linear(6, 4)), _SQUARE, 4, 6
    ),
    "batch norm 2d": _problem(
        lambda: _norm(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)),
        _MEAN,
        4,
        3,
        2,
        2,
        classes=4,
    ),
    "batch norm 3d": _problem(
        lambda: _norm(nn.BatchNorm3d(2), nn.Flatten(), nn.Linear(16, 3)),
        _MEAN,
        3,
        2,
        2,
        2,
        2,
        classes=3,
    ),
    "batch norm alone": _problem(lambda: _norm(nn.BatchNorm1d(5)), _SQUARE, 4, 5),
    "branches": _problem(_branches, _MEAN, 3, 5, classes=3),
}


@functools.cache
def problem(name: str) -> Problem:
    return PROBLEMS[name]()


@functools.cache
def dense(name: str) -> Dense:
    return dense_of(problem(name))


GROUPINGS = ("all", "weights and biases", "each")


@dataclass
class Setting:
    """A problem made ready for BackPACK, its groups and their places in θ."""

    model: nn.Module
    loss: nn.Module
    data: tuple[Tensor, Tensor]
    groups: list[dict]
    places: list[Tensor]

    def run(self, computation, groups=None):
        """Do a backward pass with a computation; return the results of all groups."""
        groups = self.groups if groups is None else groups
        many = hasattr(computation, "get_extensions")
        extensions = (
            computation.get_extensions() if many else [computation.get_extension()]
        )
        self.backward(extensions, computation.get_extension_hook(groups))
        return [computation.get_result(group) for group in groups]

    def backward(self, extensions, hook) -> None:
        X, y = self.data
        loss = self.loss(self.model(X), y)
        with backpack(*extensions, extension_hook=hook):
            loss.backward()


def setting_of(problem: Problem, grouping: str = "all", **keys) -> Setting:
    """Extend copies of model and loss, and group the parameters."""
    model = extend(copy.deepcopy(problem.model))
    params = list(model.parameters())
    if grouping == "all":
        parts = [params]
    elif grouping == "each":
        parts = [[p] for p in params]
    else:
        named = dict(model.named_parameters())
        parts = [
            [p for name, p in named.items() if name.endswith(role)]
            for role in ("bias", "weight")
        ]
    everywhere = torch.arange(sum(p.numel() for p in params))
    of_params = dict(
        zip(params, everywhere.split([p.numel() for p in params]), strict=True)
    )
    return Setting(
        model,
        extend(copy.deepcopy(problem.loss)),
        problem.data,
        [{"params": part, **keys} for part in parts],
        [torch.cat([of_params[p] for p in part]) for part in parts],
    )


def setting(name: str, grouping: str = "all", **keys) -> Setting:
    return setting_of(problem(name), grouping, **keys)


# References ---------------------------------------------------------------------------


def weight(d: Dense) -> float:
    """What the loss is times the mean over the samples: 1, or N for a sum."""
    return d.r * d.N


def ggn(d: Dense, place: Tensor, subsampling: Sequence[int] | None) -> Tensor:
    """A block of the GGN of the loss over some samples."""
    by_sample = d.per_sample_ggn()[:, place][:, :, place]
    chosen = by_sample if subsampling is None else by_sample[list(subsampling)]
    return weight(d) * chosen.mean(0)


def keep_all(evals: Tensor) -> list[int]:
    return list(range(evals.numel()))


def keep_nonzero(evals: Tensor) -> list[int]:
    return [i for i, value in enumerate(evals) if value > 1e-4]


def top(k: int) -> Callable[[Tensor], list[int]]:
    """The k largest of those above 1e-5, and all that equal the last one of them."""

    def criterion(evals: Tensor) -> list[int]:
        chosen = [i for i, value in enumerate(evals) if value > 1e-5][-k:]
        if not chosen:
            return []
        low = (1 - 1e-6) * evals[chosen[0]]
        return [i for i, value in enumerate(evals) if value >= low]

    return criterion


@dataclass
class Cluster:
    """Equal eigenvalues and the projector onto their eigenvectors."""

    value: Tensor
    members: slice  # among the chosen eigenpairs, which are ascending
    projector: Tensor


def clusters(G: Tensor, criterion: Callable[[Tensor], list[int]]) -> list[Cluster]:
    """What does not depend on the choice of eigenvectors for equal eigenvalues."""
    evals, evecs = torch.linalg.eigh(G)
    keep = criterion(evals)
    evals, evecs = evals[keep], evecs[:, keep]
    found: list[Cluster] = []
    start = 0
    for stop in range(1, len(evals) + 1):
        if stop == len(evals) or evals[stop] - evals[stop - 1] > 1e-7 * evals[-1]:
            E = evecs[:, start:stop]
            value = evals[start:stop].mean()
            found.append(Cluster(value, slice(start, stop), E @ E.T))
            start = stop
    return found


COMPUTATIONS = (
    EigvalshComputation,
    EighComputation,
    DirectionalDerivativesComputation,
    DirectionalDampedNewtonComputation,
)


def one(evals: Tensor, *_: Tensor) -> Tensor:
    return torch.ones_like(evals)


def close(value: Tensor, reference: Tensor, tolerance: float = 1e-9) -> None:
    """Compare in the norm."""
    assert value.shape == reference.shape
    scale = reference.norm().clamp(min=1e-3)
    assert (value - reference).norm() <= tolerance * scale


def flat(vectors: list[Tensor]) -> Tensor:
    """Vectors in parameter format as rows, ``[K, d]``."""
    return torch.cat([part.flatten(1) for part in vectors], dim=1)
