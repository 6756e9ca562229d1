"""Random expressions of the algebra, each evaluated twice: by the library, and densely.

An expression is a list of lines such as ``a0 @ a1.T``, the next of which may use
``a2``. Leaves are operators of the tests' market, with random numbers. Every node of it
goes through every verb; a refusal must give a reason that is true.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

import vivit_linop as vl
from tests.operator_market import MARKET, Draw
from vivit_linop.operators import LowRank

from .checks import Finding, Row, problem_in
from .truth import Undecided

LARGEST = 40  # rows and columns
# How far, in units of its bound, rounding may bring a result from the truth.
FACTOR = 1000.0

BINARY = (
    "{0} + {1}",
    "{0} - 0.5 * {1}",
    "{0} @ {1}",
    "{0}.T @ {1}",
    "{0} @ {1}.T",
    "{0} @ {1} @ {0}.T",
    "Kronecker({0}, {1})",
    "BlockDiagonal([{0}, {1}])",
)
UNARY = ("{0}.T", "-2.0 * {0}", "{0} / 3", "{0} @ {0}.T", "{0}.T @ {0}", "{0} + {0}")
SQUARE = (
    "{0} + 0.5 * Identity({0}.shape[0])",
    "Identity({0}.shape[0]) - {0}",
    "{0} ** 2",
    "{0}.inv()",
    "{0} + {0}.T",
)


class Rounded:
    """A matrix, and a bound on what rounding makes of it, in units of eps."""

    def __init__(self, matrix: Tensor, slack: float | None = None) -> None:
        self.matrix, self.size = matrix, float(matrix.norm())
        self.slack = self.size if slack is None else slack + self.size
        self.shape = matrix.shape

    @property
    def T(self) -> Rounded:
        return Rounded(self.matrix.T, self.slack)

    def __add__(self, other: Rounded) -> Rounded:
        if self.shape != other.shape:
            raise ValueError("nothing is broadcast")
        return Rounded(self.matrix + other.matrix, self.slack + other.slack)

    def __sub__(self, other: Rounded) -> Rounded:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> Rounded:
        return Rounded(factor * self.matrix, abs(factor) * self.slack)

    def __truediv__(self, divisor: float) -> Rounded:
        return (1 / divisor) * self

    def __matmul__(self, other: Rounded) -> Rounded:
        slack = self.slack * other.size + self.size * other.slack
        return Rounded(self.matrix @ other.matrix, slack)

    def __pow__(self, exponent: int) -> Rounded:
        return self @ self

    def inv(self) -> Rounded:
        inverse = torch.linalg.inv(self.matrix)
        return Rounded(inverse, float(inverse.norm()) ** 2 * self.slack)


def _kronecker(a: Rounded, b: Rounded) -> Rounded:
    product = torch.kron(a.matrix.contiguous(), b.matrix.contiguous())
    return Rounded(product, a.slack * b.size + a.size * b.slack)


def _block_diagonal(blocks: list[Rounded]) -> Rounded:
    matrix = torch.block_diag(*(block.matrix for block in blocks))
    return Rounded(matrix, sum(block.slack for block in blocks))


def _identity(n: int) -> Rounded:
    return Rounded(torch.eye(n, dtype=torch.float64))


DENSE = {
    "Kronecker": _kronecker,
    "BlockDiagonal": _block_diagonal,
    "Identity": _identity,
}
LIBRARY = {name: getattr(vl, name) for name in DENSE}


@dataclass(frozen=True)
class Expression:
    """Leaves (a name on the market, and a seed), and lines that combine them."""

    seed: int
    dtype: torch.dtype
    leaves: tuple[tuple[str, int], ...]
    lines: tuple[str, ...] = ()

    @classmethod
    def draw(cls, seed: int) -> Expression:
        random = Random(seed)
        names = random.choices(list(MARKET), k=3)
        dtype = random.choice([torch.float32, torch.float64])
        drawn = cls(seed, dtype, tuple((n, random.randrange(99)) for n in names))
        for _ in range(random.randint(1, 4)):
            tries = (drawn._longer(random) for _ in range(20))
            drawn = next((longer for longer in tries if longer), drawn)
        return drawn

    def _longer(self, random: Random) -> Expression | None:
        """One line more, or None where it makes no sense."""
        names = [f"a{i}" for i in range(len(self.leaves) + len(self.lines))]
        form = random.choice(random.choice([BINARY, BINARY, UNARY, SQUARE]))
        line = form.format(random.choice(names), random.choice(names[-2:]))
        longer = replace(self, lines=(*self.lines, line))
        try:
            last = longer.dense()[-1]
        except (RuntimeError, ValueError):  # shapes, or a singular matrix
            return None
        tame = last.size > 0 and last.slack < 1e4 * last.size < 1e7
        return longer if tame and max(last.shape) <= LARGEST else None

    def smaller(self) -> Iterator[Expression]:
        for count in range(len(self.lines)):
            yield replace(self, lines=self.lines[:count])
        for index, _ in enumerate(self.lines):
            yield replace(self, lines=self.lines[:index] + self.lines[index + 1 :])
        for index in range(len(self.leaves)):
            leaves = (*self.leaves[:index], ("dense", 0), *self.leaves[index + 1 :])
            if leaves != self.leaves:
                yield replace(self, leaves=leaves)

    def code(self) -> str:
        arguments = f"{self.seed}, {self.dtype}, {self.leaves}, {self.lines}"
        return (
            "import torch\n\nfrom tests.fuzz.expressions import Expression\n\n"
            f"case = Expression({arguments})\n"
            "print(*case.findings(), sep='\\n')\n"
        )

    def _built(self) -> list[tuple[Any, Tensor]]:
        return [MARKET[n](Draw(self.dtype, "cpu", seed)) for n, seed in self.leaves]

    def dense(self) -> list[Rounded]:
        return self._evaluated([Rounded(A) for _, A in self._built()], DENSE)

    def operators(self) -> list[vl.TorchLinearOperator]:
        return self._evaluated([op for op, _ in self._built()], LIBRARY)

    def _evaluated(self, nodes: list[Any], functions: dict[str, Any]) -> list[Any]:
        for line in self.lines:
            names = {f"a{i}": node for i, node in enumerate(nodes)}
            nodes.append(eval(line, {**functions, **names}))
        return nodes

    def findings(self, only: str | None = None) -> list[Finding]:
        """What is wrong with the nodes, each verb on each of them.

        Raises:
            Undecided: If the expression makes no sense in dense arithmetic.
        """
        try:
            dense = self.dense()
        except (RuntimeError, ValueError, IndexError, NameError) as error:
            raise Undecided(str(error)) from error
        built = problem_in("construction", lambda: self._construction(dense))
        if built:
            return [] if built.refused and _LIMITS.search(built.what) else [built]
        found = []
        for (op, known), verb in itertools.product(
            zip(self.operators(), dense, strict=True), VERBS
        ):
            node = Node(op, known, self.dtype, Random(self.seed))
            problem = problem_in(verb, lambda n=node, v=verb: VERBS[v](n), rtol=1.0)
            if problem and not (problem.refused and _true(problem.what, node)):
                found.append(problem)
        return found

    def _construction(self, dense: list[Rounded]) -> Iterator[Row]:
        for op, known in zip(self.operators(), dense, strict=True):
            yield "shape", torch.tensor(op.shape), torch.tensor(known.shape), 1.0


class Node:
    """An operator and its truth."""

    def __init__(self, op: Any, known: Rounded, dtype: torch.dtype, random: Random):
        self.op, self.known, self.dtype = op, known, dtype
        self.A, self.eps = known.matrix, torch.finfo(dtype).eps
        self.slack = FACTOR * self.eps * known.slack
        self.generator = torch.Generator().manual_seed(random.randrange(999))
        self.square = self.A.shape[0] == self.A.shape[1]
        self.symmetric = self.square and torch.equal(self.A, self.A.T)

    def noise(self, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return noise.to(self.dtype)

    @property
    def asymmetry(self) -> float:
        return float((self.A - self.A.T).norm()) if self.square else float("inf")

    @property
    def inverse(self) -> Rounded | None:
        """None where rounding leaves none."""
        if not self.square or float(torch.linalg.cond(self.A)) * self.eps > 1e-3:
            return None
        inverse = self.known.inv()
        return inverse if FACTOR * self.eps * inverse.slack < inverse.size else None


VERBS: dict[str, Callable[[Node], Iterator[Row]]] = {}


def verb(check: Callable[[Node], Iterator[Row]]) -> Callable[[Node], Iterator[Row]]:
    VERBS[check.__name__] = check
    return check


@verb
def products(n: Node) -> Iterator[Row]:
    rows, columns = n.A.shape
    for x in (n.noise(columns), n.noise(columns, 3)):
        yield "A @ x", n.op @ x, n.A @ x.double(), n.slack * x.norm()
        found = torch.as_tensor(n.op @ x.numpy())
        yield "A @ array", found, n.A @ x.double(), n.slack * x.norm()
    y = n.noise(rows)
    yield "y @ A", y @ n.op, y.double() @ n.A, n.slack * y.norm()
    yield "dtype", torch.tensor(n.op.torch_dtype == n.dtype), torch.tensor(True), 0.0


@verb
def to_dense(n: Node) -> Iterator[Row]:
    yield "A", n.op.to_dense(), n.A, n.slack
    yield "A.T", n.op.T.to_dense(), n.A.T, n.slack
    norms = vl.linalg.row_norms_squared(n.op)
    yield "row norms", norms, n.A.square().sum(1), 2 * n.slack * n.known.size


@verb
def diagonal(n: Node) -> Iterator[Row]:
    if n.square:
        yield "diagonal", n.op.diagonal(), n.A.diagonal(), n.slack
        yield "trace", n.op.trace(), n.A.trace(), n.slack * len(n.A)


@verb
def self_adjoint(n: Node) -> Iterator[Row]:
    if n.op.self_adjoint:
        yield "A.T = A", n.A.T, n.A, n.slack


@verb
def inv(n: Node) -> Iterator[Row]:
    if n.square:
        inverse, known = n.op.inv(), n.inverse
        if known is not None:
            slack, b = FACTOR * n.eps * known.slack, n.noise(len(n.A))
            yield "inv", inverse.to_dense(), known.matrix, slack
            yield "inv @ b", inverse @ b, known.matrix @ b.double(), slack * b.norm()
            yield "solve", n.op.solve(b), known.matrix @ b.double(), slack * b.norm()


@verb
def logdet(n: Node) -> Iterator[Row]:
    if n.square:
        value, known = n.op.logdet(), n.inverse
        if known is not None:
            slack = len(n.A) * n.slack * known.size + n.eps * FACTOR
            yield "logdet", value, torch.linalg.slogdet(n.A).logabsdet, slack


@verb
def eigenvalues(n: Node) -> Iterator[Row]:
    if n.square:
        evals = n.op.eigvalsh()
        yield "symmetry", n.A, n.A.T, n.slack
        zeros = evals.new_zeros(len(n.A) - len(evals))  # of low-rank nodes
        known = torch.linalg.eigvalsh((n.A + n.A.T) / 2)
        yield "eigvalsh", torch.cat([evals, zeros]).sort().values, known, n.slack


@verb
def eigenvectors(n: Node) -> Iterator[Row]:
    if n.square:
        evals, evecs = (part.double() for part in n.op.eigh())
        unit = torch.eye(len(evals), dtype=torch.float64)
        yield "orthonormal", evecs.T @ evecs, unit, FACTOR * n.eps
        yield "eigh", n.A @ evecs, evecs * evals, n.slack
        if isinstance(n.op, LowRank):  # what is left out is zero
            yield "all pairs", evecs * evals @ evecs.T, n.A, n.slack


@verb
def sqrt(n: Node) -> Iterator[Row]:
    if n.square:
        R = n.op.sqrt()
        x = n.noise(len(n.A))
        # Eigenvalues below rounding are cut or kept.
        yield "R @ R.T", R @ (R.T @ x), n.A @ x.double(), n.slack * x.norm()


@verb
def pinv(n: Node) -> Iterator[Row]:
    values = torch.linalg.svdvals(n.A)
    zero = values <= 1e-10 * values[0]
    # Values that are neither zero nor apart from rounding are anything.
    if not zero.all() and bool((zero | (values > 1e-2 * values[0])).all()):
        slack = 10.0 * n.slack / float(values[~zero].min()) ** 2
        expected = torch.linalg.pinv(n.A, rtol=1e-10)
        if slack < float(expected.norm()):
            yield "pinv", n.op.pinv(rcond=3e-3).to_dense(), expected, slack


@verb
def restricted(n: Node) -> Iterator[Row]:
    if n.square:
        index = [len(n.A) - 1, 0][: len(n.A)]
        part = n.op.restrict(index)
        yield "restricted", part.to_dense(), n.A[index][:, index], n.slack
        yield "its diagonal", part.diagonal(), n.A.diagonal()[index], n.slack


@verb
def ends(n: Node) -> Iterator[Row]:
    if n.square and n.op.self_adjoint:
        known = torch.linalg.eigvalsh((n.A + n.A.T) / 2)
        for which, place in (("LA", -1), ("SA", 0)):
            evals, evecs = (part.double() for part in n.op.eigh(k=1, which=which))
            yield which, evals, known[place].reshape(1), n.slack
            yield f"{which}, vector", n.A @ evecs, evecs * evals, 2 * n.slack


@verb
def slopes(n: Node) -> Iterator[Row]:
    """Derivatives in δ of A + δ I, far from singular."""
    if not n.square:
        return
    shift = n.known.size + 1.0
    delta = torch.tensor(shift, dtype=torch.float64, requires_grad=True)
    op = n.op + delta * vl.Identity(len(n.A))
    inverse = torch.linalg.inv(n.A + shift * torch.eye(len(n.A), dtype=torch.float64))
    rows, size = len(n.A), float(inverse.norm())
    x = n.noise(rows)
    slack = (n.slack + FACTOR * n.eps * rows * shift) * size
    for what, ask, expected in (
        ("trace", lambda: op.trace(), torch.tensor(float(rows), dtype=torch.float64)),
        ("logdet", lambda: op.logdet(), inverse.trace()),
        ("of the inverse", lambda: op.inv().trace(), -(inverse @ inverse).trace()),
    ):
        (slope,) = torch.autograd.grad(ask(), delta)
        yield f"slope of {what}", slope, expected, 10 * rows * slack * (1 + size) ** 2
    (slope,) = torch.autograd.grad((x * (op.inv() @ x)).sum(), delta)
    solved = inverse @ x.double()
    expected = -(x.double() @ inverse @ solved)
    slack *= 10 * (1 + size) ** 2 * float(x.norm()) ** 2
    yield "slope of xᵀA⁻¹x", slope, expected, slack


# What the algebra says it does not do.
_LIMITS = re.compile(
    "closed form|one by one|rectangular|scipy|no vectors for"
    "|needs (damping|entries p) > 0"
)


def _true(reason: str, n: Node) -> bool:
    """Whether what a refusal says is so."""
    if not n.square:
        return True
    if _LIMITS.search(reason):
        return True
    if re.search("self-adjoint|symmetric", reason):
        return not n.op.self_adjoint
    if "square operator" in reason:  # of a block, or a factor
        return n.inverse is None or n.asymmetry > n.slack
    if re.search("singular|no inverse|scaled by 0", reason):
        return n.inverse is None
    if re.search("positive|definite|below 0|Cholesky|negative", reason):
        return n.asymmetry > n.slack or float(torch.linalg.eigvalsh(n.A)[0]) < n.slack
    return False
