"""What the library says about a case, beside its truth.

A check is a generator of ``(what, found, expected, size)``: where the difference of the
two is beyond rounding, relative to ``size``, there is a finding. Checks share one risk
and run in an order of the seed, because what one of them keeps, another one uses.
"""

from __future__ import annotations

import copy
import pickle
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import vivit_linop as vl
from tests.cases import Dense, tensors_of

from .truth import Case, Curvature, Undecided, rounding, truth_of

RTOL = 1e-9
Row = tuple[str, Any, Tensor, Any]
Check = Callable[["Library", Dense], Iterator[Row]]

CHECKS: dict[str, Check] = {}
CURVED: set[str] = set()


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or was refused."""

    check: str
    what: str
    refused: bool = False

    def alike(self, other: Finding) -> bool:
        """Whether both say the same, but for numbers."""
        words = [re.sub(r"\d\S*|\[.*\]", "", f.what)[:60] for f in (self, other)]
        same = self.check == other.check and self.refused == other.refused
        return same and words[0] == words[1]

    def __str__(self) -> str:
        return f"{'refused' if self.refused else 'wrong'}: {self.check}: {self.what}"


# Refusals that are right: what the error says, and the reason why it may.
ALLOWED: dict[str, Callable[[Dense, Callable[[], Case]], bool]] = {
    r"^model: .*not differentiable in the parameters": lambda t, _: not t.J.any(),
    r"^model: its second derivatives by torch are wrong": (
        lambda _, build: not _are_slopes(build)
    ),
    r"^data: the loss divides by zero": lambda *_: True,
    r"^mc_samples: ": lambda *_: True,  # not every loss has a likelihood
}


def check(function: Check) -> Check:
    """Put a check on the table."""
    CHECKS[function.__name__] = function
    return function


def second_derivatives(function: Check) -> Check:
    """The same, for what must be refused where torch has no second derivatives."""
    CURVED.add(function.__name__)
    return check(function)


class Library:
    """The operators of a case, each made once, and vectors to multiply them by."""

    def __init__(self, case: Case, seed: int, layered: bool) -> None:
        self.case, self.layered = case, layered
        self.random = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    @cached_property
    def risk(self) -> vl.EmpiricalRisk:
        case = self.case
        return vl.EmpiricalRisk(
            case.model,
            case.loss,
            case.data,
            case.params,
            reduction=case.reduction,
            memory=case.memory,
        )

    @cached_property
    def J(self) -> vl.Jacobian:
        return vl.Jacobian(self.risk)

    @cached_property
    def G(self) -> vl.GGN:
        return vl.GGN(self.risk)

    @cached_property
    def U(self) -> vl.PerSampleGradients:
        return vl.PerSampleGradients(self.risk)

    @cached_property
    def H(self) -> vl.Hessian:
        return vl.Hessian(self.risk)


# First derivatives --------------------------------------------------------------------


@check
def risk(lib: Library, t: Dense) -> Iterator[Row]:
    yield "value", lib.risk.value(), t.value, t.value.abs() + 1
    yield "gradient", lib.risk.gradient(), t.gradient, t.J.norm() + t.gradient.norm()


@check
def jacobian(lib: Library, t: Dense) -> Iterator[Row]:
    x, u = lib.noise(t.D), lib.noise(t.N * t.C)
    yield "J @ x", lib.J @ x, t.J @ x, t.J.norm() * x.norm()
    yield "J.T @ u", lib.J.T @ u, t.J.T @ u, t.J.norm() * u.norm()
    yield "J again", lib.J @ x, t.J @ x, t.J.norm() * x.norm()


@check
def kernel(lib: Library, t: Dense) -> Iterator[Row]:
    kernel = t.J @ t.J.T
    yield "(J @ J.T).to_dense()", (lib.J @ lib.J.T).to_dense(), kernel, kernel.norm()
    yield "J.to_dense()", lib.J.to_dense(), t.J, t.J.norm()


@check
def gradients_of_samples(lib: Library, t: Dense) -> Iterator[Row]:
    x, size = lib.noise(t.N), t.U.norm()
    squares = t.U.square()
    yield "U @ x", lib.U @ x, t.U @ x, size * x.norm()
    yield "U", lib.U.to_dense(), t.U, size
    yield "squared norms", lib.U.squared_norms(), squares.sum(0), size**2
    centred = t.U.var(1, correction=0)
    yield "variance", lib.U.variance(), centred, squares.mean(1).norm()


@check
def fisher(lib: Library, t: Dense) -> Iterator[Row]:
    F, x = vl.EmpiricalFisher(lib.risk), lib.noise(t.D)
    yield "F @ x", F @ x, t.F @ x, t.F.norm() * x.norm()
    yield "F.diagonal()", F.diagonal(), t.F.diagonal(), t.F.norm()
    largest = torch.linalg.eigvalsh(t.F)[-1:]
    yield "F.eigvalsh()", F.eigvalsh()[-1:], largest, t.F.norm()


@check
def loss_hessian(lib: Library, t: Dense) -> Iterator[Row]:
    H = vl.LossHessian(lib.risk)
    yield "H", H.to_dense(), t.H, t.H.norm()
    S = H.sqrt().to_dense()
    yield "S @ S.T", S @ S.T, t.H, t.H.norm()


# The GGN ------------------------------------------------------------------------------


@check
def products(lib: Library, t: Dense) -> Iterator[Row]:
    x, X, size = lib.noise(t.D), lib.noise(t.D, 3), t.G.norm()
    yield "G @ x", lib.G @ x, t.G @ x, size * x.norm()
    yield "G @ X", lib.G @ X, t.G @ X, size * X.norm()
    yield "x @ G", x @ lib.G, x @ t.G, size * x.norm()
    yield "G @ x again", lib.G @ x, t.G @ x, size * x.norm()
    yield "G @ array", torch.as_tensor(lib.G @ x.numpy()), t.G @ x, size * x.norm()


@check
def factor(lib: Library, t: Dense) -> Iterator[Row]:
    V, size = lib.G.factor, t.G.norm()
    x, z = lib.noise(t.D), lib.noise(V.shape[1])
    matrix = V.to_dense()
    yield "V @ V.T", matrix @ matrix.T, t.G, size
    yield "V @ (V.T @ x)", V @ (V.T @ x), t.G @ x, size * x.norm()
    yield "V @ z", V @ z, matrix @ z, matrix.norm() * z.norm()
    cross = (lib.U.T @ V).to_dense()
    sandwich = t.U.T @ t.G @ t.U
    yield "(Uᵀ V)(Vᵀ U)", cross @ cross.T, sandwich, size * t.U.norm() ** 2


@check
def spectrum(lib: Library, t: Dense) -> Iterator[Row]:
    known = torch.linalg.eigvalsh(t.G)
    evals = lib.G.eigvalsh()
    yield "G.eigvalsh()", evals, known[len(known) - len(evals) :], t.G.norm()
    evals, evecs = lib.G.eigh()
    yield "G.eigh()", evecs * evals @ evecs.T, t.G, t.G.norm()
    unit = torch.eye(len(evals), dtype=torch.float64)
    yield "orthonormal eigenvectors", evecs.T @ evecs, unit, 1.0


@check
def diagonals(lib: Library, t: Dense) -> Iterator[Row]:
    size = t.G.norm()
    yield "G.diagonal()", lib.G.diagonal(), t.G.diagonal(), size
    yield "G.trace()", lib.G.trace(), t.G.trace(), size
    samples = t.per_sample_ggn()
    by_sample = samples.diagonal(dim1=1, dim2=2)
    found = lib.G.sample_diagonals()
    yield "G.sample_diagonals()", found, by_sample, samples.norm()


@check
def blocks(lib: Library, t: Dense) -> Iterator[Row]:
    X, blocks = lib.noise(t.D, 2), lib.G.block_diagonal("parameter")
    expected = _blocks(t.G, lib.risk.sizes)
    yield "blocks @ X", blocks @ X, expected @ X, t.G.norm() * X.norm()
    diagonal = expected.diagonal()
    yield "their diagonal", blocks.diagonal(), diagonal, t.G.norm()


@check
def damped(lib: Library, t: Dense) -> Iterator[Row]:
    delta = damping_of(t)
    A = t.G + delta * torch.eye(t.D, dtype=torch.float64)
    damped, x = lib.G + delta * vl.Identity(t.D), lib.noise(t.D)
    expected = torch.linalg.solve(A, x)
    yield "(G + δI).inv() @ x", damped.inv() @ x, expected, expected.norm()
    yield (
        "logdet",
        damped.logdet(),
        torch.logdet(A),
        t.D * abs(torch.tensor(delta).log()),
    )
    root = damped.sqrt()
    yield "sqrt", root @ (root.T @ x), A @ x, A.norm() * x.norm()


@check
def directions(lib: Library, t: Dense) -> Iterator[Row]:
    directions = torch.linalg.qr(lib.noise(t.D, min(2, t.D))).Q
    slopes, curvatures = vl.directional_derivatives(lib.risk, directions)
    expected = torch.einsum("dk,nde,ek->nk", directions, t.per_sample_ggn(), directions)
    yield "slopes", slopes, t.U.T @ directions, t.U.norm()
    yield "curvatures", curvatures, expected, t.per_sample_ggn().norm()
    if t.G.norm() > 1e-6:
        pairs, size = lib.G.eigh(k=1), float(t.G.norm())
        step = vl.damped_newton_step(lib.risk, pairs, size)
        e, evals = pairs.eigenvectors, pairs.eigenvalues
        expected = -e @ (e.T @ t.gradient / (evals + size))
        yield "Newton step", step, expected, t.gradient.norm() / size


@check
def subset(lib: Library, t: Dense) -> Iterator[Row]:
    chosen = sorted(lib.random.sample(range(t.N), lib.random.randint(1, t.N)))
    try:
        part = lib.risk.subset(chosen)
    except ValueError as error:
        if re.search("divides by zero", str(error)):
            return
        raise
    # What the loss divides by differs between the two (weights of classes).
    x, G = lib.noise(t.D), t.per_sample_ggn()[chosen].sum(0)
    product = vl.GGN(part) @ x
    G = G * (part.scale / lib.risk.scale * t.r)
    yield "subset", product, G @ x, G.norm() * x.norm()


@check
def copies(lib: Library, t: Dense) -> Iterator[Row]:
    x = lib.noise(t.D)
    size = t.G.norm() * x.norm()
    yield "deepcopy", copy.deepcopy(lib.G) @ x, t.G @ x, size
    try:
        pickle.dumps((lib.case.model, lib.case.loss, lib.case.data))
    # A model that pickle does not know raises what it likes; without it there is
    # nothing of ours to compare.
    except Exception:
        return
    yield "pickle", pickle.loads(pickle.dumps(lib.G)) @ x, t.G @ x, size


@check
def monte_carlo(lib: Library, t: Dense) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(lib.random.randrange(99))
    G, x = vl.GGN(lib.risk, mc_samples=2, generator=generator), lib.noise(t.D)
    V = G.factor.to_dense()
    size = V.norm() ** 2
    yield "G @ x", G @ x, V @ (V.T @ x), size * x.norm()
    yield "diagonal", G.diagonal(), V.square().sum(1), size


@check
def kfac(lib: Library, t: Dense) -> Iterator[Row]:
    """One semi-definite matrix; exact for one sample of vectors, each layer used once.

    G's block of a weight is B ⊗ a aᵀ then.
    """
    for kind in (vl.KFAC, vl.EKFAC):
        K, x = kind(lib.risk, variant="exact"), lib.noise(t.D)
        matrix = K.to_dense()
        yield "K @ x", K @ x, matrix @ x, matrix.norm() * x.norm()
        negative = torch.linalg.eigvalsh((matrix + matrix.T) / 2).clamp(max=0.0)
        yield "semi-definite", negative, torch.zeros(t.D), matrix.norm()
        if t.N == 1 and lib.layered:
            exact = _blocks(t.G, lib.risk.sizes)
            yield "on one sample", _blocks(matrix, lib.risk.sizes), exact, t.G.norm()


# Second derivatives -------------------------------------------------------------------


@second_derivatives
def hessian(lib: Library, t: Dense) -> Iterator[Row]:
    x, X = lib.noise(t.D), lib.noise(t.D, 3)
    # Terms of about 1 that cancel leave rounding for each unit of a vector.
    size = t.hessian.norm() + 1e-6 * t.G.norm() + 1e-14 / RTOL
    yield "H @ x", lib.H @ x, t.hessian @ x, size * x.norm()
    yield "H @ X", lib.H @ X, t.hessian @ X, size * X.norm()
    yield "H @ x again", lib.H @ x, t.hessian @ x, size * x.norm()


@second_derivatives
def hessian_diagonal(lib: Library, t: Dense) -> Iterator[Row]:
    size = t.hessian.norm() + 1e-6 * t.G.norm()
    yield "H.diagonal()", lib.H.diagonal(), t.hessian.diagonal(), size
    by_sample = t.r * lib.H.sample_diagonals().sum(0)
    yield "H.sample_diagonals()", by_sample, t.hessian.diagonal(), size
    X, blocks = lib.noise(t.D, 2), lib.H.block_diagonal("parameter")
    expected = _blocks(t.hessian, lib.risk.sizes) @ X
    yield "blocks @ X", blocks @ X, expected, size * X.norm()


# --------------------------------------------------------------------------------------


def damping_of(t: Dense) -> float:
    """A number beside which what rounding leaves of the GGN is little."""
    # A Jacobian that is zero but for rounding, or whose rows cancel in the dense G,
    # leaves noise: eps of the terms, beside δ.
    norm, terms = float(t.G.norm()), float(t.J.norm() ** 2 * t.H.norm())
    return 0.1 * norm if norm > max(1e-20, 1e-5 * terms) else 0.1


def _is_module(case: Case) -> bool:
    return isinstance(case.model, nn.Module)


def _blocks(matrix: Tensor, sizes: list[int]) -> Tensor:
    result, start = torch.zeros_like(matrix), 0
    for size in sizes:
        end = start + size
        result[start:end, start:end] = matrix[start:end, start:end]
        start = end
    return result


def _layered(case: Case) -> bool:
    """Whether all parameters are of linear layers that are given one vector a run."""
    if not _is_module(case):
        return False
    calls: list[nn.Module] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Linear):
            calls.extend([module] * inputs[0].shape[:-1].numel())

    with nn.modules.module.register_module_forward_hook(count):
        replace(case, data=tuple(case.batches()[0])).outputs()
    once = {p for m in calls if calls.count(m) == 1 for p in m.parameters()}
    return once == set(case.model.parameters())


def _state(case: Case) -> dict[str, Any]:
    """All of the user's that must stay as it is."""
    keys: dict[str, Any] = {"generator": torch.random.get_rng_state().tolist()}
    with torch.random.fork_rng():  # a loader draws a seed when it is read
        leaves = tensors_of(case.batches())
    for i, t in enumerate(leaves):
        keys[f"data {i}"] = t.grad, t.requires_grad, t.tolist()
    tensors: dict[str, Tensor] = {}
    if isinstance(case.params, dict):
        tensors |= {f"params {name}": p for name, p in case.params.items()}
    for i, module in enumerate(case.model.modules() if _is_module(case) else ()):
        slots = {**module._parameters, **module._buffers}
        tensors |= {f"{i} {n}": t for n, t in slots.items() if t is not None}
        attributes = {
            name: len(value) if isinstance(value, (dict, list)) else type(value)
            for name, value in vars(module).items()
        }
        keys[f"{i}"] = type(module), module.training, attributes
    for name, t in tensors.items():
        keys[name] = id(t), t.grad, t.requires_grad, t.detach().tolist()
    return keys


def findings(
    build: Callable[[], Case], seed: int = 0, only: str | None = None
) -> list[Finding]:
    """What is wrong with a case, checks in an order of the seed.

    Raises:
        Undecided: If the case has no truth.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            truth, curved = truth_of(build())
        except RuntimeError as error:  # torch refuses: written to, or for one batch
            raise Undecided(str(error)) from error
        if (error := rounding(build, truth)) > 1e-13:
            raise Undecided(f"rounding errors of {error:.0e}")
        layered, case = _layered(build()), build()
        before = _state(case)
        found = []
        lib = Library(case, seed, layered)
        names = [name for name in CHECKS if only in (None, name)]
        for name in Random(seed).sample(names, len(names)):
            problem = problem_in(name, lambda n=name: CHECKS[n](lib, truth))
            if name in CURVED and not curved:
                refused = problem and "is off" not in problem.what
                problem = None if refused else Finding(name, "torch has none")
            if problem and not _allowed(problem, truth, build):
                found.append(problem)
        after = _state(case)
    changed = [key for key in before if before[key] != after.get(key)]
    if changed or len(before) != len(after):
        found.append(Finding("guest", f"changed: {changed}"))
    return found


def problem_in(
    name: str, rows: Callable[[], Iterator[Row]], rtol: float = RTOL
) -> Finding | None:
    """The first row that is wrong, or the error on the way to it."""
    try:
        for what, got, expected, size in rows():
            if got.shape != expected.shape:
                shapes = f"{list(got.shape)}, expected {list(expected.shape)}"
                return Finding(name, f"{what} has shape {shapes}")
            error = float((got.double() - expected.double()).norm())
            if not error <= rtol * float(size) + 1e-14:
                relative = error / (float(size) or 1.0)
                return Finding(name, f"{what} is off by {relative:.1e}")
    except Exception as error:  # what it is, is for the reader to judge
        ours = isinstance(error, (TypeError, ValueError, MemoryError))
        said = str(error).split("\n")[0]
        if ours and re.match(r"[\w.\[\]]+: |\w+ of an? ", said):
            return Finding(name, said, refused=True)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename.split('/')[-1]}:{frame.lineno}"
        return Finding(name, f"{type(error).__name__} at {where}: {said}")
    return None


def _are_slopes(build: Callable[[], Case]) -> bool:
    """Whether torch's second derivatives of the net are right."""
    with torch.random.fork_rng():  # seeded by a program
        return Curvature(build()).is_right()


def _allowed(finding: Finding, truth: Dense, build: Callable[[], Case]) -> bool:
    return finding.refused and any(
        re.match(reason, finding.what) and holds(truth, build)
        for reason, holds in ALLOWED.items()
    )
