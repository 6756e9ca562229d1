"""Cases, and their matrices by plain autograd: one backward pass an entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from tests.cases import Dense, fast_path, map_tensors, samples_of


@dataclass
class Case:
    """The arguments of a risk."""

    model: Any
    loss: Any
    data: Any
    params: Any = None
    reduction: str | None = None
    memory: int | None = None

    def batches(self) -> list[tuple[Any, Tensor]]:
        return [self.data] if isinstance(self.data, tuple) else list(self.data)

    def chosen(self) -> list[Tensor]:
        """The parameters of the risk as leaves, at the risk's values."""
        if isinstance(self.params, Mapping):
            if isinstance(self.model, nn.Module):
                own = dict(self.model.named_parameters())
                for name, value in self.params.items():
                    own[name].data.copy_(value)
                self.params = [own[name] for name in self.params]
            else:
                self.params = {n: p.requires_grad_() for n, p in self.params.items()}
                return list(self.params.values())
        own_params = self.model.parameters()
        chosen = [p for p in own_params if p.requires_grad]
        return chosen if self.params is None else list(self.params)

    def outputs(self) -> Tensor:
        return torch.cat(
            [self._call(map_tensors(torch.clone, X)) for X, _ in self.batches()]
        )

    def _call(self, X: Any) -> Tensor:
        if not isinstance(self.model, nn.Module):
            return self.model(self.params, X)
        if isinstance(X, Mapping):
            return self.model(**X)
        return self.model(*X) if isinstance(X, tuple) else self.model(X)


class _Samples(Dataset[Any]):
    def __init__(self, batches: list[tuple[Any, Tensor]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        X, y = self.batches[index]
        return map_tensors(lambda t: t[0], X), y[0]


def cut(X: Any, y: Tensor, sizes: Sequence[int] | int, loader: bool = False) -> Any:
    """The samples in batches of these sizes, or a loader of batches of one size."""
    if loader:
        return DataLoader(_Samples(cut(X, y, [1] * len(y))), batch_size=sizes)
    parts = torch.arange(len(y)).split(list(sizes))
    return [(samples_of(X, part, len(y)), y[part]) for part in parts]


@contextmanager
def differentiable():
    """Kernels with all derivatives, and nothing computed again in backward passes."""
    again = patch("torch.utils.checkpoint.checkpoint", lambda f, *x, **_: f(*x))
    with sdpa_kernel(SDPBackend.MATH), fast_path(False), again:
        yield


@contextmanager
def plain():
    """The same, without an operation whose second derivative torch has wrong."""

    def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        return v * (g / torch.norm_except_dim(v, 2, dim))

    names = "torch._weight_norm", "torch.nn.utils.weight_norm._weight_norm"
    with differentiable(), patch(names[0], weight_norm), patch(names[1], weight_norm):
        yield


class Undecided(Exception):
    """The case has no truth that rounding leaves unharmed."""


def truth_of(case: Case) -> tuple[Dense, bool]:
    """All matrices, and whether torch has second derivatives (else they are zeros)."""
    with plain():
        leaves = case.chosen()
        if not leaves:
            raise Undecided("all parameters are frozen")
        f, y = case.outputs(), torch.cat([y for _, y in case.batches()])
        loss, curved = _torch_loss(case.loss), _curved_loss(case.loss)
        N, D = len(f), sum(p.numel() for p in leaves)
        C = f[0].numel()
        mean = (case.reduction or case.loss.reduction) != "sum"
        r = 1.0 / N if mean else 1.0

        def gradient(value: Tensor, at: Any, graph: bool = False) -> Tensor:
            if not value.requires_grad:
                return torch.zeros(D, dtype=torch.float64)
            parts = torch.autograd.grad(
                value, at, create_graph=graph, retain_graph=True, materialize_grads=True
            )
            return torch.cat([part.reshape(-1) for part in parts])

        J = torch.stack([gradient(entry, leaves) for entry in f.reshape(-1)])
        slope = gradient(loss(f, y), leaves, graph=True)
        try:
            rows = torch.stack([gradient(entry, leaves) for entry in slope])
        except RuntimeError:  # torch has no second derivative of something in it
            rows = torch.zeros(0, D, dtype=torch.float64)
        z = f.detach()
        hessian = torch.autograd.functional.hessian
        H = hessian(lambda z: curved(z, y), z).reshape(N * C, N * C)
        z.requires_grad_()
        slopes = gradient(loss(z, y), [z]).reshape(N, C) / r
        U = torch.einsum("ncd,nc->dn", J.reshape(N, C, D), slopes)
        dense = Dense(
            outputs=f.detach(),
            J=J,
            H=H,
            G=J.T @ H @ J,
            U=U,
            F=r * U @ U.T,
            find_hessian=lambda: rows,
            value=loss(f, y).detach(),
            gradient=slope.detach(),
            r=r,
            N=N,
            C=C,
            D=D,
        )
    curved_net = len(rows) == D
    for entry in (dense.J, dense.H, dense.hessian, dense.value):
        if not entry.isfinite().all():
            raise Undecided("not finite")
    return dense, curved_net


@dataclass
class Curvature:
    """Whether torch's second derivatives of a net are the slopes of its gradients.

    Those of ⟨u, f(θ)⟩ for a random u, so that no loss hides any.
    """

    case: Case

    def __post_init__(self) -> None:
        self.leaves = self.case.chosen()
        self.theta = [p.detach().clone() for p in self.leaves]
        self.random = torch.Generator().manual_seed(0)
        self.u = self._noise_like(self.case.outputs())

    def is_right(self) -> bool:
        """Whether they are, at θ or beside it: θ itself may lie on a kink."""
        with differentiable():
            alive = self._alive()
            try:
                return any(
                    self._is_right_beside(shift, alive) for shift in (0.0, 1e-3, 1e-3)
                )
            except RuntimeError:  # torch has none
                return False

    def _alive(self) -> list[Tensor]:
        """Which entries have a gradient: those of padding are constants to torch."""
        alive = [torch.zeros_like(p, dtype=torch.bool) for p in self.theta]
        for _ in range(8):  # one may be zero by chance
            self.u = self._noise_like(self.u)
            for flags, g in zip(alive, self._gradient(self._beside(1e-3)), strict=True):
                flags |= g != 0.0
        return alive

    def _beside(self, shift: float) -> list[Tensor]:
        return self._moved(self.theta, shift, [self._noise_like(p) for p in self.theta])

    def _is_right_beside(self, shift: float, alive: list[Tensor]) -> bool:
        here = self._beside(shift)
        slope = self._gradient(here, graph=True)
        x = [self._noise_like(p) * moves for p, moves in zip(here, alive, strict=True)]
        along = sum((g * part).sum() for g, part in zip(slope, x, strict=True))
        found = [torch.zeros_like(p) for p in here]
        if along.requires_grad:
            found = torch.autograd.grad(along, self.leaves, materialize_grads=True)
        size = sum(float(t.detach().norm()) for t in (*found, *slope))

        def agrees(step: float) -> bool:
            a, b = (self._gradient(self._moved(here, h, x)) for h in (step, -step))
            slopes = [(p - q) / (2 * step) for p, q in zip(a, b, strict=True)]
            return all(
                (f - s).norm() <= 1e-5 * f.norm() + 1e-8 * size
                for f, s in zip(found, slopes, strict=True)
            )

        return any(map(agrees, (1e-5, 1e-4, 1e-6)))

    def _noise_like(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=self.random, dtype=t.dtype)

    @staticmethod
    def _moved(at: list[Tensor], step: float, along: list[Tensor]) -> list[Tensor]:
        return [p + step * direction for p, direction in zip(at, along, strict=True)]

    def _gradient(self, at: list[Tensor], graph: bool = False) -> tuple[Tensor, ...]:
        for p, value in zip(self.leaves, at, strict=True):
            p.data.copy_(value)
        total = (self.u * self.case.outputs()).sum()
        if not total.requires_grad:
            return tuple(map(torch.zeros_like, self.leaves))
        keywords = {"create_graph": graph, "materialize_grads": True}
        return torch.autograd.grad(total, self.leaves, **keywords)


def rounding(build: Any, dense: Dense) -> float:
    """How far rounding errors may bring the gradient and the Hessian, relatively."""
    case = build()
    with plain():
        leaves = case.chosen()
        for p in leaves:
            p.data *= 1.0 + 1e-11 * torch.rand(p.shape, dtype=p.dtype)
        y = torch.cat([y for _, y in case.batches()])
        f = case.outputs()
        loss = _torch_loss(case.loss)(f, y)
        if not loss.requires_grad:
            return 0.0
        keywords = {"create_graph": True, "materialize_grads": True}
        parts = torch.autograd.grad(loss, leaves, **keywords)
        slope = torch.cat([part.reshape(-1) for part in parts])
        x = torch.linspace(-1.0, 1.0, len(slope), dtype=torch.float64)
        error = (slope - dense.gradient).norm() / (dense.gradient.norm() + 1e-3)
        along = slope @ x
        if along.requires_grad and len(dense.hessian) == dense.D:
            parts = torch.autograd.grad(along, leaves, materialize_grads=True)
            product = torch.cat([part.reshape(-1) for part in parts])
            size = dense.hessian.norm() * x.norm() + 1e-3
            error = error + (product - dense.hessian @ x).norm() / size
    return float(error) / 1e-11 * 1e-16


def _torch_loss(loss: Any) -> Any:
    """The loss as torch defines it, of one tensor of targets."""
    if isinstance(loss, nn.GaussianNLLLoss):
        return lambda f, y: loss(f, *y.unbind(-1))
    return loss


def _curved_loss(loss: Any) -> Any:
    """The same, with the Hessian that log-probabilities stand for."""
    if isinstance(loss, nn.NLLLoss):
        return nn.CrossEntropyLoss(loss.weight, reduction=loss.reduction)
    if isinstance(loss, nn.KLDivLoss):

        def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
            count = {"mean": f.numel(), "batchmean": len(f), "sum": 1}[loss.reduction]
            return F.cross_entropy(f, y, reduction="sum") / count

        return cross_entropy
    return _torch_loss(loss)
