"""Eigenpairs, and the contract of the decompositions that they are chosen from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from vivit_linop.arguments import Scalar, as_float, as_numbers, check_k, check_real
from vivit_linop.drawing import axes_for, numbers
from vivit_linop.modes import ordinary_mode

Select: TypeAlias = Callable[[Tensor], Sequence[int] | Tensor] | None
"""A criterion for pairs: it is given all eigenvalues, and returns indices."""


class Eigenpairs:
    """Eigenvalues and orthonormal eigenvectors; unpacks to these two.

    Args:
        eigenvalues: ``[K]``.
        eigenvectors: ``[n, K]``, or a function that forms them when first asked.

    Attributes:
        eigenvalues: ``[K]``.
        route: How they were computed.

    Example:
        >>> import torch, vivit_linop as vl
        >>> pairs = vl.Dense(torch.tensor([[2.0, 0.0], [0.0, 5.0]])).eigh(k=1)
        >>> evals, evecs = pairs
        >>> evals, evecs.shape
        (tensor([5.]), torch.Size([2, 1]))
    """

    def __init__(
        self, eigenvalues: Tensor, eigenvectors: Tensor | Callable[[], Tensor]
    ) -> None:
        _check_pairs(eigenvalues, eigenvectors)
        self.eigenvalues = eigenvalues
        self.route = "dense"
        self._eigenvectors = eigenvectors

    @cached_property
    def eigenvectors(self) -> Tensor:
        """Orthonormal columns ``[n, K]``, formed when first asked for and kept."""
        with ordinary_mode():
            return self._form()

    def _form(self) -> Tensor:
        given = self._eigenvectors
        return given if isinstance(given, Tensor) else given()

    def __iter__(self) -> Iterator[Tensor]:
        """Unpack to ``eigenvalues, eigenvectors``."""
        yield self.eigenvalues
        yield self.eigenvectors

    def __len__(self) -> int:
        """The number of pairs, K."""
        return len(self.eigenvalues)

    def __repr__(self) -> str:
        """Say how many pairs there are and what their eigenvalues span."""
        if not len(self):
            return f"<{type(self).__name__}: none>"
        low, high = self.eigenvalues.min().item(), self.eigenvalues.max().item()
        return f"<{type(self).__name__}: {len(self)} in [{low:.3g}, {high:.3g}]>"

    def plot(self, ax: Any | None = None, **options: Any) -> Any:
        """Draw the eigenvalues by rank, the largest first.

        Costs nothing: no vector is formed. The ordinate is logarithmic, or linear
        around zero where one is not positive.

        Args:
            ax: Axes of matplotlib; None for new ones.
            options: Those of matplotlib's ``plot``.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: Without matplotlib: ``pip install vivit-linop[plot]``.

        Example:
            >>> import torch, vivit_linop as vl
            >>> A = vl.Diagonal(torch.tensor([4.0, 1.0, 2.0]))
            >>> A.eigh().plot().lines[0].get_ydata().tolist()
            [4.0, 2.0, 1.0]
        """
        ax = axes_for(ax, "rank", "eigenvalue")
        largest_first = numbers(self.eigenvalues.sort(descending=True).values)
        if len(self) and largest_first[-1] > 0:
            ax.set_yscale("log")
        elif len(self) and largest_first.any():
            threshold = 1e-3 * abs(largest_first).max()
            ax.set_yscale("symlog", linthresh=threshold)
        ranks = range(1, len(self) + 1)
        ax.plot(ranks, largest_first, **{"marker": ".", "linestyle": "", **options})
        return ax

    def combine(self, weights: Tensor) -> Tensor:
        """Return the combination ``E @ weights`` of the eigenvectors, ``[n]``.

        Costs forming them, if nobody has asked for them; pairs of V Vᵀ take one product
        with V in its place.

        Args:
            weights: ``[K]``.

        Raises:
            ValueError: If there is not one for each eigenvector.

        Example:
            >>> import torch, vivit_linop as vl
            >>> pairs = vl.Diagonal(torch.tensor([2.0, 5.0])).eigh()
            >>> pairs.combine(torch.tensor([0.0, 1.0])).abs()
            tensor([0., 1.])
            >>> pairs.components(vl.Diagonal(torch.tensor([1.0, 7.0]))).abs()
            tensor([[1., 0.],
                    [0., 7.]])
        """
        if not isinstance(weights, Tensor) or weights.shape != self.eigenvalues.shape:
            raise ValueError(
                f"weights: a tensor [{len(self)}], one for each eigenvector, got "
                f"{list(weights.shape) if isinstance(weights, Tensor) else weights!r}."
            )
        return self._combination(weights.to(self.eigenvalues))

    def _combination(self, weights: Tensor) -> Tensor:
        return self.eigenvectors @ weights

    def components(self, factor: LinearOperator) -> Tensor:
        """Return ``factor.T @ E``, ``[R, K]``: columns of a factor along eigenvectors.

        Costs K products with ``factor.T``; pairs of V Vᵀ take the cross-Gram matrix in
        its place. :meth:`combine` has an example.

        Args:
            factor: An operator or a matrix, ``[n, R]``.

        Raises:
            TypeError: If it is neither.
            ValueError: If it has another number of rows.
        """
        if not isinstance(factor, (LinearOperator, Tensor)):
            raise TypeError(f"factor: an operator, got {type(factor).__name__}.")
        if len(factor.shape) != 2 or factor.shape[0] != self._size():
            raise ValueError(
                f"factor: needs {self._size()} rows, as eigenvectors have entries, got "
                f"shape {tuple(factor.shape)}."
            )
        return self._components(factor)

    def _size(self) -> int:
        """How many entries an eigenvector has."""
        return len(self.eigenvectors)

    def _components(self, factor: LinearOperator) -> Tensor:
        if isinstance(factor, Tensor):
            factor = factor.to(self.eigenvectors)
        return torch.as_tensor(factor.T @ self.eigenvectors)


class Eigendecomposition(ABC):
    """The eigenvalues of an operator, and the way to its eigenvectors.

    Attributes:
        count: How many eigenvalues there are.
        rest: The eigenvalue that all others have (a low-rank operator's zero), or None
            if there are no others.
    """

    count: int
    rest: Scalar | None = None

    @property
    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """The eigenvalues, ascending, ``[count]``."""

    @abstractmethod
    def pairs(self, indices: Tensor) -> Eigenpairs:
        """Return the pairs of these indices, in their order."""

    def default(self) -> Tensor:
        """The indices of the pairs that are wanted if nothing is said: all."""
        return torch.arange(self.count, device="cpu")

    def choose(self, k: int | None, select: Select, rcond: float | None) -> Tensor:
        """Turn the arguments of ``eigh`` into indices; checks them first."""
        if k is not None and select is not None:
            raise ValueError("k, select: give one of them, not both.")
        if rcond is not None:
            check_real(rcond, "rcond")
            if not rcond >= 0.0:
                raise ValueError(f"rcond: a number of at least 0, got {rcond!r}.")
        if k is not None:
            return self.outmost(k)
        if select is not None:
            if not callable(select):
                raise TypeError(
                    "select: a function of the eigenvalues that returns indices, got "
                    f"{select!r}."
                )
            indices = checked_indices(select(self.eigenvalues.clone()), self.count)
        elif rcond is not None:
            sizes = self.eigenvalues.abs()
            indices = (sizes > rcond * sizes.max()).nonzero().squeeze(1)
        else:
            indices = self.default()
        return indices.to(self.eigenvalues.device)

    def outmost(self, k: int, which: str = "LA") -> Tensor:
        """The indices of k pairs at an end of the spectrum, ascending; checks k first.

        Args:
            k: How many.
            which: ``"LA"`` for the largest, ``"SA"`` for the smallest, ``"LM"`` for
                those of largest magnitude.

        Raises:
            ValueError: If eigenvalues without vectors are among them.
        """
        check_k(k, self.count)
        evals = self.eigenvalues
        chosen = torch.arange(self.count - int(k), self.count, device=evals.device)
        if which != "LA":
            order = outwards(evals, which).argsort(descending=True)
            chosen = order[: int(k)].sort().values
        if self.rest is not None:
            # As floats: a damping may be a tensor with a gradient.
            rest, known = as_float(self.rest), evals.detach()
            least = outwards(known[chosen], which).min().item()
            error = 100 * torch.finfo(evals.dtype).eps * known.abs().max().item()
            if outwards(rest, which) > least + error:
                raise ValueError(
                    f"k: the {k} eigenvalues at this end include {rest:.3g}, which a "
                    "low-rank operator has no vectors for. Choose with select=, or "
                    "give tol= for an iteration."
                )
        return chosen


def outwards(values: Any, which: str) -> Any:
    """What is larger, the further out at an end of the spectrum eigenvalues are."""
    if which == "LM":
        return abs(values)
    return values if which == "LA" else -values


def checked_indices(indices: Any, count: int) -> Tensor:
    """Turn what a criterion returned into indices, or say what is wrong with it."""
    try:
        given = as_numbers(indices, "select").detach().cpu()
    except TypeError:
        given = torch.tensor(torch.nan, device="cpu")  # no indices of any kind
    if given.ndim == 1 and given.numel() == 0:
        return torch.empty(0, dtype=torch.long, device="cpu")
    if given.dtype == torch.bool and given.shape == (count,):
        return given.nonzero().squeeze(1)
    if given.ndim != 1 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(
            "select: the criterion must return a list of integer indices (or a "
            f"boolean mask of all {count} eigenvalues), it returned {indices!r}."
        )
    numbers = given.tolist()
    if min(numbers) < -count or max(numbers) >= count:
        raise ValueError(
            f"select: the criterion was given {count} eigenvalues and returned indices "
            f"from {min(numbers)} to {max(numbers)}."
        )
    places = [number % count for number in numbers]
    if len(set(places)) < len(places):
        raise ValueError(
            f"select: the criterion returned an index more than once: {indices!r}."
        )
    return torch.tensor(places, device="cpu")


def _check_pairs(eigenvalues: Any, eigenvectors: Any) -> None:
    """Raise an error unless there is a column for each eigenvalue."""
    if not isinstance(eigenvalues, Tensor) or eigenvalues.ndim != 1:
        raise TypeError(f"eigenvalues: a tensor [K], got {eigenvalues!r}.")
    if isinstance(eigenvectors, Tensor):
        if eigenvectors.ndim != 2 or eigenvectors.shape[1] != len(eigenvalues):
            raise ValueError(
                f"eigenvectors: [n, {len(eigenvalues)}] for that many eigenvalues, got "
                f"{list(eigenvectors.shape)}."
            )
    elif not callable(eigenvectors):
        raise TypeError(f"eigenvectors: a tensor [n, K], got {eigenvectors!r}.")
