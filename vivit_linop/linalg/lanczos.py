"""Thick-restart Lanczos: eigenpairs at an end of a spectrum, where the operator is.

The method of Wu & Simon (*SIAM J. Matrix Anal. Appl.* 22, 2000, 602–616), in the form
of Stewart's Krylov–Schur decomposition (ibid. 23, 2001, 601–614). A basis Q of M
orthonormal rows grows by one product each, and T = Q A Qᵀ is known. Then Q is replaced
by the Ritz vectors that are nearest to what is wanted, and grows again from there.

No library has it for torch. ``torch.lobpcg`` takes a matrix and not products; it takes
three to six times as many of them as ARPACK, and ends at residuals of 1e-5 in float32.
``linear_operator`` knows neither restarts nor residuals. ARPACK's vectors live on the
host. Here nothing waits for the device but the small eigenproblem at each restart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vivit_linop.noise import Noise

Product = Callable[[Tensor], Tensor]

# Rows of the basis beside twice the pairs that are wanted.
MORE_ROWS = 20
# Entries of each row that are replaced at a time, where nothing else holds a basis.
_PART = 2**20
# A remainder of rounding errors only, in units of eps and of the largest product: then
# the rows span an invariant subspace.
_NOTHING = 10


class NotConverged(Exception):
    """Only some pairs are as accurate as they should be: so many."""


def basis_rows(n: int, k: int) -> int:
    """How many vectors of n entries are held for k pairs."""
    return min(n, 2 * k + MORE_ROWS)


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
        which: ``"LA"`` for the largest, ``"SA"`` for the smallest, ``"LM"`` for those
            of largest magnitude.
        tol: The relative accuracy; 0 for machine epsilon.
        restarts: After so many it gives up.
        hidden: Which residuals are small beside ‖A‖; machine epsilon by default.

    Returns:
        Eigenvalues ``[k]``, ascending, and orthonormal columns ``[n, k]``.

    Raises:
        NotConverged: If there are too many restarts.

    Example:
        >>> import torch
        >>> d = torch.arange(1.0, 101.0)
        >>> evals, evecs = lanczos(lambda x: d * x, torch.ones(100), k=2)
        >>> [round(x) for x in evals.tolist()], tuple(evecs.shape)
        ([99, 100], (100, 2))
    """
    basis = _Basis(product, start, basis_rows(len(start), k))
    eps = torch.finfo(start.dtype).eps
    kept = found = 0
    for _ in range(restarts):
        basis.grow(kept)
        values, vectors, residuals = basis.ritz()
        order = _wanted_first(values, which)
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
    """Orthonormal rows Q, the matrix T = Q A Qᵀ, and the row that comes next.

    Args:
        product: x ↦ A x.
        start: The first row, up to its norm.
        size: How many rows it grows to.
    """

    def __init__(self, product: Product, start: Tensor, size: int) -> None:
        self._product, self._size = product, size
        self.rows = start.new_empty(size + 1, len(start))
        self.rows[0] = start / start.norm()
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
            size = image.norm()
            self._largest = torch.maximum(self._largest, size)
            within = basis @ image
            rest = image - within @ basis
            left = rest.norm()
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
            norm = rest.norm()
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


def _wanted_first(values: Tensor, which: str) -> Tensor:
    """The order of ascending Ritz values in which they are wanted."""
    if which == "LM":
        return values.abs().argsort(descending=True)
    order = torch.arange(len(values), device=values.device)
    return order.flip(0) if which == "LA" else order
