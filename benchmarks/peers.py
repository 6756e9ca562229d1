"""The libraries that this one is compared with, as functions of a problem."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import curvlinops
import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor, nn

from benchmarks.measure import free_memory
from benchmarks.problems import Problem, Residual, Unavailable


def require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


# curvlinops --------------------------------------------------------------------------


def curvlinops_ggn(problem: Problem) -> curvlinops.GGNLinearOperator:
    """Return curvlinops' GGN, without the passes that check determinism."""
    kind, params = curvlinops.GGNLinearOperator, problem.params
    # The branch after 3.0.1 takes parameters by name.
    if "dict" in str(inspect.signature(kind).parameters["params"].annotation):
        params = dict(problem.model.named_parameters())
    return kind(
        problem.model,
        problem.loss,
        params,
        [problem.data],
        check_deterministic=False,
    )


def damped(operator: LinearOperator, damping: float) -> LinearOperator:
    """Return A + δ I."""
    return LinearOperator(
        operator.shape,
        dtype=operator.dtype,
        matvec=lambda x: operator.matvec(x).ravel() + damping * x.ravel(),
    )


def start_vector(size: int) -> np.ndarray:
    """Return a start vector for ARPACK, so that each run does the same."""
    return np.random.default_rng(0).standard_normal(size)


# BackPACK and ViViT ------------------------------------------------------------------


def extended(problem: Problem) -> tuple[nn.Module, nn.Module]:
    """Return copies of the net and the loss that BackPACK follows."""
    from backpack import extend

    model = with_backpack_branches(copy.deepcopy(problem.model))
    return extend(model.eval()), extend(copy.deepcopy(problem.loss))


def with_backpack_branches(model: nn.Module) -> nn.Module:
    """Put BackPACK's modules for branches in the place of residual blocks."""
    from backpack.custom_module.branching import Parallel
    from backpack.custom_module.pad import Pad
    from backpack.custom_module.slicing import Slicing

    for name, child in model.named_children():
        if not isinstance(child, Residual):
            continue
        shortcut: nn.Module = nn.Identity()
        if child.stride > 1:
            every, step = slice(None), slice(None, None, child.stride)
            # The pad comes first: BackPACK knows tensors by their addresses, and a
            # slice of the block's input would have that of the input.
            shortcut = nn.Sequential(
                Pad((0, 0, 0, 0, child.extra, child.extra)),
                Slicing((every, every, step, step)),
            )
        branches = Parallel(shortcut, child.main)
        setattr(model, name, nn.Sequential(branches, nn.ReLU()))
    return model


def backward(
    model: nn.Module,
    loss: nn.Module,
    problem: Problem,
    extensions: list[Any],
    hook: Callable[[nn.Module], None] | None = None,
) -> None:
    """Run a backward pass with BackPACK's extensions; no gradients are left."""
    from backpack import backpack

    X, y = problem.data
    with warnings.catch_warnings(), backpack(*extensions, extension_hook=hook):
        # Inputs are data, so none of them needs a gradient.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss(model(X), y).backward()
    model.zero_grad()


def backpack_run(
    problem: Problem,
    extension: Any,
    read: Callable[[list[nn.Parameter]], Any],
) -> Callable[[], Any]:
    """Return a function that runs a backward pass with BackPACK's extension.

    Args:
        problem: The problem.
        extension: One of BackPACK's.
        read: A function of the parameters that returns what they were given.
    """
    model, loss = extended(problem)
    params = list(model.parameters())

    def run() -> Any:
        backward(model, loss, problem, [extension])
        result = read(params)
        for param in params:
            del param.__dict__[extension.savefield]
        return result

    return run


def vivit_run(problem: Problem, computation: str, **group: Any) -> Callable[[], Any]:
    """Return a function that runs one of ViViT's computations.

    Extending the net for BackPACK, which is done once for a net, is not part of it.

    Args:
        problem: The problem.
        computation: The name of the class.
        group: What the group of all parameters needs beside ``params``.
    """
    require("vivit", "vivit-for-pytorch")
    import vivit

    check_memory(problem, computation)
    run = computation_run(getattr(vivit, computation), problem, **group)
    return symeig_put_back()(run)


def computation_run(kind: type, problem: Problem, **group: Any) -> Callable[[], Any]:
    """Return a function that runs one of ViViT's computations, or of the drop-in's.

    Args:
        kind: The class.
        problem: The problem.
        group: What the group of all parameters needs beside ``params``.
    """
    model, loss = extended(problem)
    params = list(model.parameters())

    def run() -> Any:
        computed = kind()
        groups = [{"params": params, **group}]
        if hasattr(computed, "get_extensions"):
            extensions = computed.get_extensions()
        else:
            extensions = [computed.get_extension()]
        hook = computed.get_extension_hook(groups)
        backward(model, loss, problem, extensions, hook)
        return computed.get_result(groups[0])

    return run


def check_memory(problem: Problem, computation: str) -> None:
    """Do not start what would run out of memory.

    ViViT forms the columns of V, all of them at once for eigenvectors and for Newton
    steps of nets of convolutions; about as much again goes to temporaries. For
    eigenvalues, peaks of about ten times the columns of the largest convolution were
    measured.
    """
    convolutions = [p.numel() for p in problem.params if p.ndim > 2]
    itemsize = problem.params[0].element_size()
    columns = problem.num_samples * problem.num_classes * itemsize
    needed = 10 * columns * max(convolutions, default=0)
    if computation.startswith("Eigh"):
        needed = max(needed, 2 * columns * sum(convolutions))
    elif computation.startswith("Directional"):
        largest = max(p.numel() for p in problem.params)
        total = largest if "Derivatives" in computation else problem.num_params
        needed = max(needed, 2 * columns * total)
    free = free_memory(problem.device)
    if needed > free:
        raise Unavailable(
            f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
        )


@contextmanager
def symeig_put_back() -> Iterator[None]:
    """Give tensors the method ``symeig``, which ViViT 1.0.0 calls.

    PyTorch 2 has a stub in its place that raises an error.
    """
    stub = torch.Tensor.symeig

    def symeig(
        self: Tensor, eigenvectors: bool = False, upper: bool = True
    ) -> tuple[Tensor, Tensor]:
        triangle = "U" if upper else "L"
        if eigenvectors:
            evals, evecs = torch.linalg.eigh(self, UPLO=triangle)
            return evals, evecs
        return torch.linalg.eigvalsh(self, UPLO=triangle), self.new_empty(0)

    torch.Tensor.symeig = symeig  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.symeig = stub  # type: ignore[method-assign]


# hessian-eigenthings -----------------------------------------------------------------


def eigenthings_ggn(problem: Problem) -> Any:
    """Return hessian-eigenthings' GGN.

    Its products keep the graphs that they were made with, and Lanczos keeps the
    products: that took seven times the memory and four times as long. It is measured
    without.
    """
    require("hessian_eigenthings", "hessian-eigenthings")
    import hessian_eigenthings

    G = hessian_eigenthings.GGNOperator(
        problem.model,
        [problem.data],
        lambda model, batch: model(batch[0]),
        lambda output, batch: problem.loss(output, batch[1]),
    )
    return hessian_eigenthings.LambdaOperator(
        lambda x: G.matvec(x).detach(), G.size, G.device, G.dtype
    )
