"""Solutions for damped symmetric matrices, on the smaller side of a low-rank node.

By what is known of the matrix. A single inverse takes less than eigenpairs: a Cholesky
factor, one triangle in the precision of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vivit_linop.devices import free_memory
from vivit_linop.operators.symmetric import Pairs


class DampedSolver:
    """Solutions of (c A + δ I) y = b for a symmetric A ≥ 0.

    By the eigenpairs of A where these are known. Else by a Cholesky factor, in the
    precision of A and in place, and one step of refinement; where rounding makes that
    impossible, in float64. So an inverse takes at most 1 and 2 times the memory of A.

    Args:
        matrix: A.
        scale: c.
        damping: δ, positive.
        pairs: The eigenpairs of A, if they are known.

    Attributes:
        norm: The norm of c A.

    Raises:
        ValueError: If δ is so small that the damped matrix is numerically singular.
        MemoryError: If the factor does not fit into free memory.
    """

    def __init__(
        self, matrix: Tensor, scale: float, damping: float, pairs: Pairs | None = None
    ) -> None:
        self._matrix, self._scale, self._damping = matrix, scale, damping
        norm = torch.linalg.vector_norm(matrix, dtype=torch.float64)
        self.norm = scale * norm.item()
        self._pairs = pairs
        if pairs is None:
            self._cholesky = self._factorised()
        else:
            self._values = scale * pairs[0].double() + damping
            if self._values[0] <= 0.0:
                raise self._below_rounding()
        self.refines = needs_refinement(self.norm / damping, matrix.dtype)

    def solve(self, columns: Tensor) -> Tensor:
        """Return (c A + δ I)⁻¹ times columns ``[n, K]``."""
        solution = self._once(columns)
        if self.refines and self._matrix.dtype != torch.float64:
            image = self._matrix @ (self._scale * solution)
            residual = columns - image - self._damping * solution
            solution = solution + self._once(residual)
        return solution

    @property
    def logdet(self) -> Tensor:
        """Log det(c A + δ I)."""
        if self._pairs is not None:
            found = self._values.log().sum()
        else:
            found = 2.0 * self._cholesky.diagonal().double().log().sum()
        return found.to(self._matrix)

    def root_columns(self, start: int, stop: int) -> Tensor:
        """Return some columns of an R with (c A + δ I)⁻¹ = R Rᵀ, ``[n, k]``."""
        if self._pairs is not None:
            columns = self._pairs[1][:, start:stop].to(self._matrix)
            return columns * self._values[start:stop].rsqrt().to(columns)
        # Of the upper triangular L⁻ᵀ, what is below the diagonal is zero. A part of L
        # is copied: not a large one.
        n = len(self._matrix)
        rows = stop if 4 * stop <= n else n
        unit = self._cholesky.new_zeros(rows, stop - start)
        unit[start:].fill_diagonal_(1.0)
        upper = self._cholesky[:rows, :rows].T
        columns = self._cholesky.new_zeros(n, stop - start)
        columns[:rows] = torch.linalg.solve_triangular(upper, unit, upper=True)
        return columns.to(self._matrix)

    def _once(self, columns: Tensor) -> Tensor:
        if self._pairs is not None:
            vectors = self._pairs[1]
            inner = (vectors.T @ columns) / self._values[:, None].to(columns)
            return vectors @ inner
        L = self._cholesky
        inner = torch.linalg.solve_triangular(L, columns.to(L), upper=False)
        return torch.linalg.solve_triangular(L.T, inner, upper=True).to(columns)

    def _factorised(self) -> Tensor:
        """L with c A + δ I = L Lᵀ."""
        for dtype in dict.fromkeys([self._matrix.dtype, torch.float64]):
            _check_room(self._matrix, dtype)
            # Column-major, so that LAPACK works in place, and solutions copy nothing.
            rows = self._matrix.to(
                dtype, copy=True, memory_format=torch.contiguous_format
            )
            damped = rows.T
            damped.mul_(self._scale).diagonal().add_(self._damping)
            info = torch.empty((), dtype=torch.int32, device=damped.device)
            torch.linalg.cholesky_ex(damped, out=(damped, info))
            if not info.any():
                return damped
        raise self._below_rounding()

    def _below_rounding(self) -> ValueError:
        return ValueError(
            f"damping: {self._damping:.3g} is below the rounding error of an operator "
            f"with norm {self.norm:.3g} in {self._matrix.dtype}. Use a larger damping, "
            "or float64."
        )


def needs_refinement(condition: float, dtype: torch.dtype) -> bool:
    """Whether solutions for a matrix of a condition number lose too many digits.

    Rounding in A is enlarged by λ/δ, rounding in a factor by that and its size.
    """
    return condition > torch.finfo(dtype).eps ** -0.125


def _check_room(matrix: Tensor, dtype: torch.dtype) -> None:
    needed, free = matrix.numel() * dtype.itemsize, free_memory(matrix.device)
    if needed > free:
        raise MemoryError(
            f"inv: the Cholesky factor of a matrix of {len(matrix)} rows takes "
            f"{needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free on "
            f"{matrix.device}. Solve with scipy.sparse.linalg.cg(op, b), or take fewer "
            "samples or mc_samples."
        )
