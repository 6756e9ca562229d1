"""Spectral densities of operators whose eigenvalues are too many to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivit_linop.extras import extra
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.lowrank import LowRank

Boundaries = tuple[float | None, float | None]


class LanczosSpectrum:
    """Estimates of the spectral density p(λ) = 1/D Σ_i δ(λ − λ_i) of an operator.

    Stochastic Lanczos quadrature by curvlinops (Papyan 2020, *JMLR* 21(252), algorithm
    2 and section C.7): each run of ``ncv`` products with the operator starts from
    another random vector. Runs are kept, so that a density with another resolution or
    width costs nothing, and one with more runs only the further ones.

    Args:
        operator: Self-adjoint, ``[D, D]``.
        ncv: The number of Lanczos vectors of a run.
        boundaries: The smallest and largest eigenvalue (of the absolute values, for
            :meth:`log_density`), None for what is not known. What a low-rank operator
            knows of them is filled in; the rest is estimated by
            ``scipy.sparse.linalg.eigsh``.
        boundaries_tol: The relative accuracy of that.
        seed: For the random vectors; torch's own generator is left as it is.

    Raises:
        TypeError: If the operator is not self-adjoint.
        ValueError: If ``ncv`` is not at least 2 and at most D, or for a low-rank
            operator with R columns R + 1, after which Lanczos iterations end.

    Example:
        >>> import torch, vivit_linop as vl
        >>> A = vl.Diagonal(torch.linspace(1.0, 2.0, 200))
        >>> spectrum = vl.LanczosSpectrum(A, ncv=20, boundaries=(1.0, 2.0))
        >>> grid, density = spectrum.density(num_points=100, num_repeats=3)
        >>> grid.shape, density.shape
        (torch.Size([100]), torch.Size([100]))
        >>> mass = torch.trapezoid(density, grid)
        >>> bool(0.9 < mass < 1.1)
        True
    """

    def __init__(
        self,
        operator: TorchLinearOperator,
        ncv: int,
        boundaries: Boundaries | None = None,
        boundaries_tol: float = 1e-2,
        seed: int = 0,
    ) -> None:
        if not isinstance(operator, TorchLinearOperator) or not operator.self_adjoint:
            raise TypeError(
                f"operator: a self-adjoint TorchLinearOperator, got {operator!r}."
            )
        most = operator.shape[0]
        if isinstance(operator, LowRank):
            most = min(most, operator.factor.shape[1] + 1)
        if isinstance(ncv, bool) or not isinstance(ncv, int) or not 2 <= ncv <= most:
            raise ValueError(f"ncv: an integer from 2 to {most}, got {ncv!r}.")
        self._operator, self._ncv = operator, ncv
        self._boundaries, self._tol, self._seed = boundaries, boundaries_tol, seed
        self._cached: dict[type, Any] = {}
        self._states: dict[type, list[Tensor]] = {}

    def density(
        self,
        num_points: int = 1024,
        num_repeats: int = 1,
        kappa: float = 3.0,
        margin: float = 0.05,
    ) -> tuple[Tensor, Tensor]:
        """Return a grid of λ and p(λ) on it, ``[num_points]`` each.

        Args:
            num_points: The resolution.
            num_repeats: The number of runs that are averaged.
            kappa: The width of the Gaussian for an eigenvalue, more than 1.
            margin: By how much of its length the grid is longer than the spectrum.
        """
        # Imported where it is used: it takes time, and warns.
        with extra("curvlinops"):
            from curvlinops import LanczosApproximateSpectrumCached

        arguments = num_repeats, num_points, kappa, margin
        return self._seeded(
            LanczosApproximateSpectrumCached,
            lambda cached: cached.approximate_spectrum(*arguments),
        )

    def log_density(
        self,
        num_points: int = 1024,
        num_repeats: int = 1,
        kappa: float = 1.04,
        margin: float = 0.05,
        epsilon: float = 1e-5,
    ) -> tuple[Tensor, Tensor]:
        """Return a logarithmic grid of ``|λ| + ε`` and the density on it.

        The density is that of ``|λ| + ε``, with Gaussians in its logarithm.

        Args:
            num_points: The resolution.
            num_repeats: The number of runs that are averaged.
            kappa: The width of the Gaussian for an eigenvalue, more than 1.
            margin: By how much of its length the grid is longer than the spectrum.
            epsilon: ε, which keeps the logarithm of zeros finite.
        """
        with extra("curvlinops"):
            from curvlinops import LanczosApproximateLogSpectrumCached

        arguments = num_repeats, num_points, kappa, margin, epsilon
        return self._seeded(
            LanczosApproximateLogSpectrumCached,
            lambda cached: cached.approximate_log_spectrum(*arguments),
        )

    def _known_boundaries(self) -> Boundaries | None:
        low, high = (None, None) if self._boundaries is None else self._boundaries
        op = self._operator
        if isinstance(op, LowRank) and op.semidefinite:
            if low is None and op.factor.shape[1] < op.shape[0]:
                low = 0.0
            if high is None:
                high = op.eigh(k=1).eigenvalues.item()
        return None if low is None and high is None else (low, high)

    def _seeded(
        self, kind: type, estimate: Callable[[Any], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Run with random numbers of our own, which go on where they ended."""
        device = self._operator.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            if kind in self._states:
                torch.set_rng_state(self._states[kind][0])
                for state in self._states[kind][1:]:
                    torch.cuda.set_rng_state(state, device)
            else:
                torch.manual_seed(self._seed)
                self._cached[kind] = kind(
                    _ForCurvlinops(self._operator),
                    self._ncv,
                    self._known_boundaries(),
                    self._tol,
                )
            result = estimate(self._cached[kind])
            self._states[kind] = [
                torch.get_rng_state(),
                *(torch.cuda.get_rng_state(d) for d in devices),
            ]
        return result


class _ForCurvlinops:
    """An operator with the names that curvlinops uses.

    Args:
        operator: The operator.
    """

    def __init__(self, operator: TorchLinearOperator) -> None:
        self._operator = operator
        self.shape = operator.shape
        self.dtype, self.device = operator.torch_dtype, operator.device

    def __matmul__(self, x: Tensor) -> Tensor:
        product: Tensor = self._operator @ x
        return product

    def to_scipy(self, dtype: np.dtype | None = None) -> TorchLinearOperator:
        """A SciPy linear operator, which ours are."""
        return self._operator
