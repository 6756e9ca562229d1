"""Spectral densities of operators whose eigenvalues are too many to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vivit_linop.arguments import as_count, check_finite
from vivit_linop.drawing import axes_for, numbers
from vivit_linop.extras import extra
from vivit_linop.modes import ordinary_mode
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.operators.lowrank import LowRank

Boundaries: TypeAlias = tuple[float | None, float | None]
Run: TypeAlias = tuple[Tensor, Tensor]
"""Ritz values of a run, and the eigenvectors of its tridiagonal matrix."""


class LanczosSpectrum:
    """Estimates of the spectral density p(λ) = 1/D Σ_i δ(λ − λ_i) of an operator.

    Stochastic Lanczos quadrature (Papyan 2020, *JMLR* 21(252), algorithm 2 and section
    C.7; densities of runs by curvlinops): each run of ``ncv`` products with an operator
    starts from another random vector. Runs are kept, and serve :meth:`density` and
    :meth:`log_density`: another resolution or width costs nothing, more runs cost the
    further ones. The ends of the spectrum come from the runs themselves, whose extreme
    Ritz values converge first, from inside.

    Args:
        operator: Self-adjoint, ``[D, D]``.
        ncv: The number of Lanczos vectors of a run.
        boundaries: The smallest and largest eigenvalue (of the absolute values, for
            :meth:`log_density`), None for what is not known and comes from the runs.
            That a low-rank operator has zeros is known.
        seed: For the random vectors; torch's own generator is left as it is.

    Raises:
        TypeError: If the operator is not self-adjoint, or a tensor of it requires grad.
        ValueError: If ``ncv`` is not at least 2 and at most D, or for a low-rank
            operator with R columns R + 1, after which Lanczos iterations end.

    Example:
        >>> import torch, vivit_linop as vl
        >>> A = vl.Diagonal(torch.linspace(1.0, 2.0, 200))
        >>> spectrum = vl.LanczosSpectrum(A, ncv=20)
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
        seed: int = 0,
    ) -> None:
        if not isinstance(operator, TorchLinearOperator) or not operator.self_adjoint:
            raise TypeError(
                f"operator: a self-adjoint TorchLinearOperator, got {operator!r}."
            )
        if operator.requires_grad or operator._is_followed:
            raise TypeError(
                f"operator: a tensor of this {type(operator).__name__} requires grad "
                "or has a tangent, and an iteration passes no derivatives to it. Take "
                ".detach()ed tensors."
            )
        most = operator.shape[0]
        if isinstance(operator, LowRank):
            most = min(most, operator.factor.shape[1] + 1)
        self.ranks = operator.ranks
        with self.ranks.together(f"LanczosSpectrum, ncv={ncv}"):
            of_kind = isinstance(ncv, (int, np.integer)) and not isinstance(ncv, bool)
            if not of_kind or not 2 <= ncv <= most:
                raise ValueError(f"ncv: an integer from 2 to {most}, got {ncv!r}.")
        self._operator, self._ncv = operator, ncv
        self._boundaries = _checked_boundaries(boundaries)
        seed = as_count(seed, "seed", 0)
        self._state = torch.Generator("cpu").manual_seed(seed).get_state()
        self._runs: list[Run] = []

    def __repr__(self) -> str:
        """Say what it is made of."""
        return f"<LanczosSpectrum of {self._operator!r}, ncv={self._ncv}>"

    @ordinary_mode()
    def density(
        self,
        num_points: int = 1024,
        num_repeats: int = 1,
        kappa: float = 3.0,
        margin: float = 0.05,
    ) -> tuple[Tensor, Tensor]:
        """Return a grid of λ and p(λ) on it, ``[num_points]`` each.

        Costs ``ncv`` products for each run; runs are kept for what follows.

        Args:
            num_points: The resolution.
            num_repeats: The number of runs that are averaged.
            kappa: The width of the Gaussian for an eigenvalue, more than 1.
            margin: By how much of its length the grid is longer than the spectrum.
        """
        approximate = _theirs().lanczos_approximate_spectrum_from_iter
        return self._mean(approximate, num_repeats, num_points, kappa, margin)

    @ordinary_mode()
    def log_density(
        self,
        num_points: int = 1024,
        num_repeats: int = 1,
        kappa: float = 1.04,
        margin: float = 0.05,
        epsilon: float = 1e-5,
    ) -> tuple[Tensor, Tensor]:
        """Return a logarithmic grid of ``|λ| + ε`` and the density on it.

        The density is that of ``|λ| + ε``, with Gaussians in its logarithm, both
        ``[num_points]``. Costs ``ncv`` products for each run; runs are kept. The class
        has an example.

        Args:
            num_points: The resolution.
            num_repeats: The number of runs that are averaged.
            kappa: The width of the Gaussian for an eigenvalue, more than 1.
            margin: By how much of its length the grid is longer than the spectrum.
            epsilon: ε, which keeps the logarithm of zeros finite.
        """
        check_finite(epsilon, "epsilon")
        if not epsilon > 0.0:
            raise ValueError(f"epsilon: a positive number, got {epsilon!r}.")
        if any(end is not None and end < 0.0 for end in self._boundaries):
            raise ValueError(
                "boundaries: in log_density they are those of |λ|, which is not "
                f"negative, got {self._boundaries!r}."
            )
        approximate = _theirs().lanczos_approximate_log_spectrum_from_iter
        return self._mean(approximate, num_repeats, num_points, kappa, margin, epsilon)

    def plot(
        self, ax: Any | None = None, log: bool = True, num_repeats: int = 1
    ) -> Any:
        """Draw the density; costs the runs that have not been made before.

        Args:
            ax: Axes of matplotlib; None for new ones.
            log: Whether that of ``|λ| + ε`` over the logarithm (:meth:`log_density`),
                else that of λ (:meth:`density`); ordinates are logarithmic.
            num_repeats: The number of runs that are averaged.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: Without matplotlib: ``pip install vivit-linop[plot]``.

        Example:
            >>> import torch, vivit_linop as vl
            >>> A = vl.Diagonal(torch.linspace(1.0, 2.0, 200))
            >>> vl.LanczosSpectrum(A, ncv=20).plot().get_xscale()
            'log'
        """
        ax = axes_for(ax, "|λ| + ε" if log else "λ", "spectral density")
        grid, density = (self.log_density if log else self.density)(
            num_repeats=num_repeats
        )
        # What Gaussians leave far from all eigenvalues would be most of the picture.
        floor = 1e-8 * density.max()
        ax.plot(numbers(grid), numbers(density.clamp(min=floor)))
        ax.set_xscale("log" if log else "linear")
        ax.set_yscale("log")
        return ax

    def _mean(
        self,
        approximate: Callable[..., tuple[Tensor, Tensor]],
        num_repeats: int,
        num_points: int,
        kappa: float,
        margin: float,
        *epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the grid and the mean of the densities of runs."""
        as_count(num_points, "num_points")
        check_finite(kappa, "kappa")
        if not kappa > 1.0:
            raise ValueError(f"kappa: a number above 1, got {kappa!r}.")
        check_finite(margin, "margin")
        if not margin >= 0.0:
            raise ValueError(f"margin: a number of at least 0, got {margin!r}.")
        runs = self._first(num_repeats)
        values = torch.cat([values for values, _ in runs])
        ends = self._ends(values.abs() if epsilon else values)
        grid = ends, num_points, kappa, margin, *epsilon
        found = [approximate(run, *grid) for run in runs]
        return found[0][0], torch.stack([density for _, density in found]).mean(0)

    def _ends(self, ritz_values: Tensor) -> tuple[float, float]:
        """The smallest and the largest eigenvalue, as far as they are known."""
        op, (low, high) = self._operator, self._boundaries
        if low is None and isinstance(op, LowRank) and op.semidefinite:
            low = 0.0 if op.factor.shape[1] < op.shape[0] else None
        low = ritz_values.min().item() if low is None else low
        high = ritz_values.max().item() if high is None else high
        rounding = 100 * torch.finfo(op.torch_dtype).eps * max(abs(low), abs(high))
        if not high - low > rounding:
            raise ValueError(
                f"boundaries: the spectrum is from {low:.6g} to {high:.6g}, which is "
                "one point. Give boundaries=(lower, higher) around it."
            )
        return low, high

    def _first(self, num_repeats: int) -> list[Run]:
        """Return that many runs; with random numbers of our own, which go on."""
        as_count(num_repeats, "num_repeats")
        generator = torch.Generator("cpu")
        generator.set_state(self._state)
        op = self._operator
        while len(self._runs) < num_repeats:
            start = torch.randn(
                op.shape[0], generator=generator, dtype=op.torch_dtype, device="cpu"
            )
            self._state = generator.get_state()
            with torch.no_grad():
                self._runs.append(self._run(start.to(op.device)))
        return self._runs[:num_repeats]

    def _run(self, start: Tensor) -> Run:
        """Iterate without orthogonalising, as Papyan's algorithm 2."""
        v, before = start / start.norm(), torch.zeros_like(start)
        alphas, betas = list[Tensor](), [start.new_zeros(())]
        for _ in range(self._ncv):
            rest = self._operator @ v - betas[-1] * before
            alphas.append(rest @ v)
            rest -= alphas[-1] * v
            betas.append(rest.norm())
            before, v = v, rest / betas[-1]
        beside = torch.stack(betas[1:-1])
        matrix = torch.stack(alphas).diag() + beside.diag(1) + beside.diag(-1)
        if not matrix.isfinite().all():  # after a division by zero
            raise ValueError(
                f"ncv: iterations end before {self._ncv} vectors: there are fewer "
                "different eigenvalues, or a product has NaN or Inf. Give a smaller "
                "ncv, or take eigvalsh."
            )
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors


def _checked_boundaries(boundaries: Boundaries | None) -> Boundaries:
    if boundaries is None:
        return None, None
    if not isinstance(boundaries, (tuple, list)) or len(boundaries) != 2:
        raise TypeError(
            "boundaries: the smallest and the largest eigenvalue, or None for either, "
            f"got {boundaries!r}."
        )
    low, high = boundaries
    for end in (low, high):
        if end is not None:
            check_finite(end, "boundaries")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"boundaries: ascending, got {boundaries!r}.")
    return low, high


def _theirs() -> Any:
    """Return the densities of curvlinops, whose import takes time, and warns."""
    with extra("curvlinops"):
        from curvlinops.papyan2020traces import spectrum

    return spectrum
