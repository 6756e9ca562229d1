"""The matrices of a problem, dense, by ``torch.func``."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import placing

from .market import CASES, Lambda, Problem, converted, map_tensors


@dataclass(frozen=True)
class Dense:
    """The matrices of a problem in float64."""

    outputs: Tensor  # [N, C…]
    J: Tensor  # [N C, D]
    H: Tensor  # [N C, N C]
    G: Tensor  # [D, D]
    U: Tensor  # [D, N]
    F: Tensor  # [D, D]
    find_hessian: Callable[[], Tensor]
    value: Tensor
    gradient: Tensor  # [D]
    r: float
    N: int
    C: int
    D: int

    @functools.cached_property
    def hessian(self) -> Tensor:
        """``[D, D]``; its D rows take longer than all else, and few tests ask."""
        return self.find_hessian()

    def per_sample_ggn(self) -> Tensor:
        """G_n = J_nᵀ H_n J_n without r, [N, D, D]."""
        J = self.J.reshape(self.N, self.C, self.D)
        H = self.H.reshape(self.N, self.C, self.N, self.C)
        blocks = H.diagonal(dim1=0, dim2=2).permute(2, 0, 1) / self.r
        return J.mT @ blocks @ J


def dense_of(problem: Problem) -> Dense:
    """Compute everything of a float64 problem from its definition.

    Nothing is vectorised (``chunk_size=1``), so that any model can be a case. The
    risk is torch's own loss of all samples at once. Computed on the CPU, wherever the
    tests run.
    """
    there = placing.device()
    if there == placing.HOST:
        return _dense_of(problem)
    with placing.made_on(placing.HOST):
        found = _dense_of(converted(problem, device=placing.HOST))
    tensors = {k: v.to(there) for k, v in vars(found).items() if isinstance(v, Tensor)}

    def find_hessian() -> Tensor:
        with placing.made_on(placing.HOST):
            hessian = found.hessian
        return hessian.to(there)

    return replace(found, **tensors, find_hessian=find_hessian)


def _dense_of(problem: Problem) -> Dense:
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
        leaf = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(risk(leaf), leaf)

    def full_hessian() -> Tensor:
        # By plain autograd: torch.func's second derivative of layer_norm is wrong
        # (not symmetric) in torch 2.13.
        leaf = theta.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH), fast_path(False):
            (slope,) = torch.autograd.grad(risk(leaf), leaf, create_graph=True)
            rows = [
                torch.autograd.grad(
                    entry, leaf, retain_graph=True, materialize_grads=True
                )
                for entry in (slope + 0.0 * leaf).unbind()
            ]
        full = torch.cat([row for (row,) in rows]).reshape(D, D)
        assert (full - full.T).norm() <= 1e-13 * full.norm() or not problem.has_hessian
        return full.detach()

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
        find_hessian=full_hessian,
        value=of_outputs(f.reshape(-1)),
        gradient=gradient,
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
    X = map_tensors(torch.clone, X)
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
    return converted(converted(built, torch.float32), dtype)


@functools.cache
def dense(name: str) -> Dense:
    """The matrices of a case, computed once in a session."""
    return dense_of(problem(name))
