"""Iterative eigensolvers for operators: one contract, two places to be.

ARPACK keeps its vectors on the host. Of an operator on a GPU each product's go there
and come back, so there it is thick-restart Lanczos on the device, the method of Wu &
Simon (*SIAM J. Matrix Anal. Appl.* 22, 2000, 602–616), in the form of Stewart's
Krylov–Schur decomposition (ibid. 23, 2001, 601–614). A basis Q of M orthonormal rows
grows by one product each, and T = Q A Qᵀ is known. Then Q is replaced by the Ritz
vectors that are nearest to what is wanted, and grows again from there.

No library has it for torch. ``torch.lobpcg`` takes a matrix and not products; it takes
three to six times as many of them as ARPACK, and ends at residuals of 1e-5 in float32.
``linear_operator`` knows neither restarts nor residuals. Here nothing waits for the
device but the small eigenproblem at each restart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.linalg import get_blas_funcs
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh
from torch import Tensor
from tqdm.auto import tqdm

from vivit_linop.bars import bar
from vivit_linop.linalg.decompositions import PROBE
from vivit_linop.noise import Noise
from vivit_linop.operators.base import Op, TorchLinearOperator
from vivit_linop.operators.eigenpairs import outwards
from vivit_linop.operators.elementary import Dense, Scaled
from vivit_linop.operators.symmetric import threads_for

Product = Callable[[Tensor], Tensor]
# Rows of the basis beside twice the pairs that are wanted.
MORE_ROWS = 20
# Entries of each row that are replaced at a time, where nothing else holds a basis.
_PART = 2**20
# A remainder of rounding errors only, in units of eps and of the largest product: then
# the rows span an invariant subspace.
_NOTHING = 10


@dataclass(frozen=True)
class Wanted:
    """Which pairs a solver is to find, at an end of a spectrum.

    Attributes:
        k: How many.
        start: The vector that it begins with, ``[n]``, on any device.
        which: ``"LA"``, ``"SA"`` or ``"LM"``.
        tol: The relative accuracy; 0 for machine epsilon.
        restarts: After so many it gives up; None for its own number.
    """

    k: int
    start: Tensor
    which: str = "LA"
    tol: float = 0.0
    restarts: int | None = None


Solver = Callable[[Op, Wanted], tuple[Tensor, Tensor]]
"""What finds eigenvalues ``[k]``, ascending, and orthonormal columns ``[n, k]``.

In the dtype of the operator, which is self-adjoint; raises NotConverged if it gives up.
"""


def by_arpack(A: Op | np.ndarray, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """By SciPy's ARPACK; the pairs are on the host."""
    if isinstance(A, Op):
        return _with_all_copies(A, _arpack, wanted)
    with threads_for(len(A)):
        return _with_all_copies(_OnHost(A), _arpack, wanted)


class _OnHost(Dense):
    """A symmetric matrix whose products with arrays read one triangle, unchecked.

    Of few hundred rows that takes half as long as SciPy's checks and a product.
    """

    self_adjoint = True

    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__(matrix)
        (self._symv,) = get_blas_funcs(("symv",), (matrix,))
        # In the order of Fortran, as which BLAS takes it without a copy.
        self._columns = np.asfortranarray(matrix.T)

    def matvec(self, x: Any) -> Any:
        """Multiply a vector of the matrix's dtype."""
        return self._symv(1.0, self._columns, x)


def _arpack(A: Op, wanted: Wanted) -> tuple[Tensor, Tensor]:
    v0 = wanted.start.cpu().numpy().astype(A.dtype)
    k, which, tol, restarts = wanted.k, wanted.which, wanted.tol, wanted.restarts
    try:
        evals, evecs = eigsh(A, k, which=which, tol=tol, v0=v0, maxiter=restarts)
    except ArpackNoConvergence as error:
        raise NotConverged(len(error.eigenvalues)) from error
    except ArpackError:
        if A.matvec(v0).any():
            raise
        # Of a vector without an image ARPACK knows no way on, as of the operator 0.
        return _lanczos(A, wanted)
    # ARPACK takes eigenvalues to be at least that large, and is content too soon.
    least = np.finfo(A.dtype).eps ** (2 / 3)
    if abs(evals).max() < least:
        size = float(abs(A.matvec(v0)).max() / abs(v0).max())
        if 0.0 < size < least:
            values, found = _arpack(Scaled(1.0 / size, A), wanted)
            return size * values, found
    order = np.argsort(evals)
    vectors = np.ascontiguousarray(evecs[:, order])
    return torch.from_numpy(evals[order]), torch.from_numpy(vectors)


def by_lanczos(
    A: Op, wanted: Wanted, hidden: float | None = None
) -> tuple[Tensor, Tensor]:
    """By thick-restart Lanczos; nothing leaves the device but what a restart needs."""
    return _with_all_copies(A, partial(_lanczos, hidden=hidden), wanted)


def _lanczos(
    A: Op, wanted: Wanted, hidden: float | None = None
) -> tuple[Tensor, Tensor]:
    v0 = wanted.start.to(A.device, A.torch_dtype)
    most = wanted.restarts or 10 * len(v0)
    own = wanted.k, wanted.which, wanted.tol
    return lanczos(_product_with(A), v0, *own, most, hidden)


def _product_with(A: Op) -> Product:
    return lambda x: A.apply(x.unsqueeze(1)).squeeze(1)


SOLVERS: dict[str, Solver] = {"ARPACK": by_arpack, "Lanczos": by_lanczos}


def solver_on(device: torch.device) -> str:
    """Return which solver fits a device, where nothing else decides."""
    return "ARPACK" if device.type == "cpu" else "Lanczos"


def failed(
    error: NotConverged | ArpackError, k: int, op: Op, solver: str
) -> RuntimeError:
    """Return what to say where a solver gives up."""
    name = type(op).__name__
    if isinstance(error, ArpackError):
        return RuntimeError(
            f"eigh: {solver} has failed on this {name}: {error} Give another start "
            "vector v0=, or take Dense(op.to_dense()).eigh()."
        )
    return RuntimeError(
        f"eigh: {solver} has found {error} of {k} pairs of this {name}. "
        "Eigenvalues that lie close need more vectors: ask for a larger k, or give a "
        "larger tol=, or take the dense way."
    )


def start_of(op: Op) -> Tensor:
    """Return the vector that a solver begins with, the same at each call."""
    start = np.random.default_rng(0).standard_normal(op.shape[0])
    return torch.from_numpy(start).to(op.torch_dtype)


@contextlib.contextmanager
def watched(op: Op, k: int, total: int) -> Iterator[Op]:
    """Count products on a bar on stderr while k eigenpairs are computed from them.

    Args:
        op: A, square.
        k: How many pairs are looked for.
        total: How many products that takes in the mean; it may be more or less.
    """
    with bar(desc=f"eigh(k={k})", unit=" products", total=total) as shown:
        yield Counted(op, shown)
        shown.total = shown.n  # that many it were
        shown.refresh()


class Counted(TorchLinearOperator):
    """An operator that tells a bar how many columns it has multiplied."""

    def __init__(self, op: Op, shown: tqdm) -> None:
        super().__init__(op.shape, op.torch_dtype, op.device)
        self.self_adjoint = op.self_adjoint
        self._op, self._bar = op, shown

    def _made_of(self) -> tuple[Op]:
        return (self._op,)

    def _multiply(self, X: Tensor) -> Tensor:
        self._count(X)
        return self._op.apply(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        self._count(X)
        return self._op.T.apply(X)

    def _count(self, X: Tensor) -> None:
        self._bar.total = max(self._bar.total, self._bar.n + X.shape[1])
        self._bar.update(X.shape[1])


# Copies of eigenvalues ----------------------------------------------------------------


class _Deflated(TorchLinearOperator):
    """P A P + c E Eᵀ with P = I − E Eᵀ: eigenvectors E have the eigenvalue c."""

    self_adjoint = True

    def __init__(self, A: Op, vectors: Tensor, value: float) -> None:
        super().__init__(A.shape, A.torch_dtype, A.device)
        self._inner, self._value = A, value
        self._vectors = vectors.to(A.device, A.torch_dtype)

    def _multiply(self, X: Tensor) -> Tensor:
        E = self._vectors
        along = E.T @ X
        Y = self._inner.apply(X - E @ along)
        return Y - E @ (E.T @ Y - self._value * along)


def _with_all_copies(A: Op, solve: Solver, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """Return what is wanted, also where a solver has passed over some.

    A Krylov space of one vector has one eigenvector to an eigenvalue. The others to it
    come by rounding, which may take longer than the k pairs do. Orthogonal to what was
    found some steps show what lies further out; there ``solve`` finds as many.
    """
    (values, vectors), noise, which = solve(A, wanted), Noise(5), wanted.which
    found = values.cpu().double()
    steps = min(PROBE, len(vectors) - len(found))
    accuracy = max(wanted.tol, torch.finfo(A.torch_dtype).eps ** (2 / 3))
    for _ in range(len(found) if steps else 0):
        size = float(found.abs().max())
        ritz = _ritz_values_outside(A, vectors, size, steps, noise)
        size = max(size, float(ritz.abs().max()))
        least = outwards(found, which).min() + accuracy * size
        if outwards(ritz, which).max() <= least:
            break
        # What is found is at the other end then.
        rest = _Deflated(A, vectors, {"LA": -size, "SA": size, "LM": 0.0}[which])
        more, others = solve(rest, wanted)
        both = torch.cat([found, more.cpu().double()])
        outmost = outwards(both, which).argsort(descending=True, stable=True)
        chosen = outmost[: len(found)]
        chosen = chosen[both[chosen].argsort()]
        found = both[chosen]
        values = found.to(values)
        vectors = torch.cat([vectors, others.to(vectors)], 1)[:, chosen]
    return values, vectors


def _ritz_values_outside(
    A: Op, vectors: Tensor, size: float, steps: int, noise: Noise
) -> Tensor:
    """Ritz values of Lanczos steps orthogonal to eigenvectors ``[n, k]`` of a size.

    On the host, in float64; nothing waits for the device before.
    """
    (n, k), info = vectors.shape, torch.finfo(A.torch_dtype)
    rows = torch.empty(k + steps, n, dtype=A.torch_dtype, device=A.device)
    rows[:k] = vectors.T
    projected = rows.new_zeros(steps, steps)
    # Arrays are calculated with as tensors are.
    Q: Any = rows
    T: Any = projected
    directions: Any = noise(n + steps, like=rows)
    product: Callable[[Any], Any] = _product_with(A)
    if isinstance(A, _OnHost):  # calls of NumPy take half the time
        Q, T, directions = Q.numpy(), T.numpy(), directions.numpy()
        product = A.matvec
    x: Any = directions[:n]
    scale: Any = None
    for j in range(steps):
        for _ in range(2):
            x = x - (Q[: k + j] @ x) @ Q[: k + j]
        Q[k + j] = x / (x @ x) ** 0.5
        x = product(Q[k + j])
        if scale is None:
            scale = size + abs(x).max() + info.tiny
        x = x / scale
        T[j, : j + 1] = Q[k : k + j + 1] @ x
        # Where nothing is left, another direction comes next.
        x = x + info.eps * directions[j + 1 : j + 1 + n]
    return torch.linalg.eigvalsh((projected.double() * scale).cpu())


# Thick-restart Lanczos ---------------------------------------------------------------


class NotConverged(Exception):
    """Only some pairs are as accurate as they should be: so many."""


def lanczos(
    product: Product,
    start: Tensor,
    k: int,
    which: str = "LA",
    tol: float = 0.0,
    restarts: int = 300,
    hidden: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return k eigenpairs of a symmetric matrix, by products with it.

    An eigenvalue θ is found when the residual ‖A e − θ e‖ is at most ``tol`` |θ|, or so
    small beside ‖A‖ that rounding hides it. It takes about as many products as ARPACK.

    Args:
        product: x ↦ A x, ``[n] -> [n]``, without derivatives.
        start: Where it begins, ``[n]``, not zero; dtype and device are those of all.
        k: How many pairs, up to n.
        which: ``"LA"``, ``"SA"`` or ``"LM"``.
        tol: The relative accuracy; 0 for machine epsilon.
        restarts: After so many it gives up.
        hidden: Which residuals are small beside ‖A‖; machine epsilon by default.

    Returns:
        Eigenvalues ``[k]``, ascending, and orthonormal columns ``[n, k]``.

    Raises:
        NotConverged: If there are too many restarts.
    """
    basis = _Basis(product, start, min(len(start), 2 * k + MORE_ROWS))
    eps = torch.finfo(start.dtype).eps
    kept = found = 0
    for _ in range(restarts):
        basis.grow(kept)
        values, vectors, residuals = basis.ritz()
        order = outwards(values, which).argsort(descending=True, stable=True)
        sizes = values.abs()
        accuracy = (max(tol, eps) * sizes).clamp(min=(hidden or eps) * sizes.max())
        good = (residuals <= accuracy)[order]
        found = int(good[:k].sum())
        if found == k:
            chosen = order[:k].sort().values
            basis.replace(vectors[:, chosen])
            return values[chosen].to(start), basis.rows[:k].T
        # Those that are found stay, and half of the room is for products.
        kept = min(len(values) - 1, k + max(found, (len(values) - k) // 2))
        basis.restart(values, vectors, order[:kept].sort().values)
    raise NotConverged(found)


class _Basis:
    """Orthonormal rows Q, the matrix T = Q A Qᵀ, and the row that comes next."""

    def __init__(self, product: Product, start: Tensor, size: int) -> None:
        self._product, self._size = product, size
        self.rows = start.new_empty(size + 1, len(start))
        self.rows[0] = start / _norm(start)
        self._projected = start.new_zeros(size, size)  # T, above the diagonal
        self._next = start.new_zeros(())  # the norm of what is left of the last product
        self._largest = start.new_zeros(())  # product
        self._noise = Noise(0).like(start)

    def grow(self, kept: int) -> None:
        """Add rows until there are all; nothing waits for the device."""
        eps = torch.finfo(self.rows.dtype).eps
        for j in range(kept, self._size):
            basis = self.rows[: j + 1]
            image = self._product(self.rows[j])
            size = _norm(image)
            self._largest = torch.maximum(self._largest, size)
            within = basis @ image
            rest = image - within @ basis
            left = _norm(rest)
            # Nothing is left: go on with another direction. A times it has no part
            # along the rows that are there.
            ended = left <= _NOTHING * eps * self._largest
            rest = torch.where(ended, self._noise.roll(j), rest)
            for again in range(2):
                more = basis @ rest
                rest = rest - more @ basis
                if again == 0:
                    within = torch.where(ended, within, within + more)
            self._projected[: j + 1, j] = within
            norm = _norm(rest)
            self.rows[j + 1] = rest / norm
            self._next = torch.where(ended, 0.0, norm)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ``[M]``, their vectors in rows ``[M, M]``, and residuals.

        On the host, in float64.
        """
        numbers = torch.cat([self._projected.flatten(), self._next.reshape(1)])
        *matrix, last = numbers.double().cpu().split(self._size**2)
        values, vectors = torch.linalg.eigh(
            matrix[0].view(self._size, self._size), UPLO="U"
        )
        if self._size == self.rows.shape[1]:
            last = torch.zeros_like(last)  # there are no other directions
        return values, vectors, (last * vectors[-1]).abs()

    def replace(self, vectors: Tensor) -> None:
        """Put the combinations ``[M, K]`` of the rows in their place."""
        count, S = vectors.shape[1], vectors.T.to(self.rows)
        for part in self.rows[: self._size].split(_PART, dim=1):
            part[:count] = S @ part

    def restart(self, values: Tensor, vectors: Tensor, kept: Tensor) -> None:
        """Keep some Ritz vectors, and what comes next."""
        count = len(kept)
        self.replace(vectors[:, kept])
        self.rows[count] = self.rows[self._size]
        self._projected.zero_()
        self._projected[:count, :count] = values[kept].to(self.rows).diag()


def _norm(x: Tensor) -> Tensor:
    """‖x‖ in float64, which has the squares of all numbers in float32."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)
