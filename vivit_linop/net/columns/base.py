"""What the columns that one parameter has in a pullback can do, and formed ones."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence, Set
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

# A symmetric product is halved while a block has twice this many rows, and copied to
# its other half so many rows at a time: on the CPU, and on other devices, where the
# launches of small parts take longer than what they spare.
_SYMMETRIC_LEAF, _DEVICE_LEAF = 96, 2048
_MIRRORED_ROWS, _DEVICE_ROWS = 256, 4096
# Sums over so many columns lose no digits that matter.
_SHORT_SUM = 1024
# So many entries are squared at a time, in a cache.
_SQUARED_AT_A_TIME = 2**20


class ColumnCost(NamedTuple):
    """What the columns of a parameter, or of a part of one, cost.

    Attributes:
        contraction: The way to their Gram matrix.
        forward: The operations of the layer's forward pass.
        gram: Those of the Gram matrix, with symmetry.
        product: Those of a product with stored columns V, or with Vᵀ.
        inner: Those of a product with VᵀV.
        entries: How many entries are stored.
    """

    contraction: str
    forward: float
    gram: float
    product: float
    inner: float
    entries: float

    @classmethod
    def of_formed(cls, numel: int, samples: int, width: int) -> ColumnCost:
        """Return what formed columns cost."""
        rows = float(samples * width)
        formed = rows * numel
        forward, product = 2.0 * samples * numel, 2 * formed
        return cls("dense", forward, rows * formed, product, 2 * product, formed)


class LayerColumns(ABC):
    """The columns of one parameter, ``n·R`` of them, for n samples.

    Attributes:
        width: R.
        num_samples: n.
        numel: The number of entries of the parameter.
        cotangents_key: One object for columns with the same cotangents, such as those
            of a weight and a bias.
        of_data: Attributes that are not there without data.
    """

    width: int
    num_samples: int
    numel: int
    cotangents_key: Hashable
    of_data: ClassVar[Set[str]] = frozenset()

    @abstractmethod
    def add_gram(self, gram: Tensor, other: LayerColumns, memory: int) -> None:
        """Add the inner products of these columns with others to ``[n·R, m·Q]``.

        Args:
            gram: What to add to, in place.
            other: Of the same kind and parameter. If it is this object, only what is
                on and above the diagonal needs to be right (see :func:`mirror`).
            memory: The bytes that temporaries may take.
        """

    @abstractmethod
    def rows(self) -> Tensor:
        """The columns as rows, ``[n·R, numel]``."""

    @abstractmethod
    def signals(self, weights: Tensor) -> Tensor:
        """Combine the cotangents, ``[K, n, R] -> [K, n, s]``.

        Columns with the same cotangents have the same signals and images.
        """

    @abstractmethod
    def combine(self, signals: Tensor, out: Tensor, add: bool) -> None:
        """Write the combinations of columns that belong to signals.

        Args:
            signals: ``[K, n, s]``.
            out: ``[K, numel]``; its rows are contiguous.
            add: Whether to add to what is there.
        """

    @abstractmethod
    def images(self, rows: Tensor) -> Tensor:
        """Return what the layer makes of parameters ``[K, numel]``: ``[K, n, s]``."""

    @abstractmethod
    def components(self, images: Tensor) -> Tensor:
        """Return the products of cotangents and images, ``[K, n, s] -> [K, n, R]``."""

    @abstractmethod
    def sizes(self) -> Tensor:
        """About the norms of the columns, ``[n, R]``, at the cost of reading them.

        Terms that are added up in a column are taken as orthogonal.
        """

    @abstractmethod
    def combination(self, weights: Tensor) -> Tensor:
        """Σ_nr w_nr column_nr, ``[n, R] -> [numel]``."""

    def residual(self, weights: Tensor, expected: Tensor) -> Tensor:
        """How far a combination is from what it should be.

        Args:
            weights: w, ``[n, R]``.
            expected: What Σ_nr w_nr column_nr should be, ``[numel]``.

        Returns:
            A vector whose norm is about that of the difference, and zero if that is.
        """
        return self.combination(weights) - expected

    def squared_norms(self, memory: int) -> Tensor:
        """The squared norms of the columns, ``[n·R]``.

        Args:
            memory: The bytes that temporaries may take, here and below.
        """
        return self.rows().square().sum(1)

    def sample_grams(self, other: LayerColumns, memory: int) -> Tensor:
        """The inner products of columns with others of their samples, ``[n, R, Q]``."""
        pair = self, other
        rows, others = (c.rows().view(c.num_samples, c.width, -1) for c in pair)
        return rows @ others.mT

    def entry_squares(self, memory: int) -> Tensor:
        """The squares of the entries, summed over all columns, ``[numel]``."""
        first, *others = self.rows().split(
            max(1, _SQUARED_AT_A_TIME // max(1, self.numel))
        )
        total = first.square().sum(0)
        for few in others:
            total += few.square().sum(0)
        return total

    def sample_entry_squares(self, memory: int) -> Tensor:
        """The squares of the entries, summed over each sample, ``[n, numel]``."""
        rows = self.rows().view(self.num_samples, self.width, self.numel)
        return rows.square().sum(1)

    def entry_sums(self) -> Tensor:
        """The sum of all columns, ``[numel]``."""
        return self.rows().sum(0)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory that they take."""

    def cost(self, samples: int, width: int, shared: bool) -> ColumnCost:
        """Return what columns like these cost.

        Args:
            samples: For how many samples.
            width: R.
            shared: Whether the cotangents are counted elsewhere.
        """
        return ColumnCost.of_formed(self.numel, samples, width)

    def without_data(self) -> Self:
        """The same columns, of tensors that have shapes only: for what they cost."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if name in self.of_data:
                delattr(twin, name)
            elif isinstance(value, Tensor):
                setattr(twin, name, value.to("meta"))
        return twin

    # Columns put together -------------------------------------------------------------

    def compacted(self) -> LayerColumns:
        """The same columns, formed where that takes no more memory."""
        return self

    def transposed(self, shape: torch.Size) -> LayerColumns:
        """The same columns, for the transpose of a parameter of this shape."""
        matrices = self.rows().view(self.num_samples, self.width, *shape).mT
        return DenseColumns(matrices.flatten(2))

    def joined(self, others: Sequence[LayerColumns]) -> LayerColumns:
        """The sums of these columns and those of other uses of the parameter."""
        rows = sum((part.rows() for part in others), start=self.rows())
        return DenseColumns(rows.view(self.num_samples, self.width, -1))

    def beside(self, others: Sequence[Self]) -> LayerColumns:
        """The columns of this parameter and of others with the same cotangents."""
        raise NotImplementedError

    def continues(self, other: LayerColumns) -> bool:
        """Whether these are like others, of other samples, and can follow them."""
        return False

    def followed_by(self, others: Sequence[Self]) -> LayerColumns:
        """The columns of these samples and of others, which can follow them."""
        raise NotImplementedError


class DenseColumns(LayerColumns):
    """Columns that are formed: of n samples, R each, with all entries in a row.

    Args:
        values: The columns, ``[n, R, numel]``.
    """

    def __init__(self, values: Tensor) -> None:
        self.num_samples, self.width, self.numel = values.shape
        self.cotangents_key = object()
        self._rows = values.reshape(-1, self.numel)
        self._norms: Tensor | None = None

    def rows(self) -> Tensor:
        return self._rows

    def continues(self, other: LayerColumns) -> bool:
        return isinstance(other, DenseColumns) and self.width == other.width

    def followed_by(self, others: Sequence[Self]) -> DenseColumns:
        rows = torch.cat([part.rows() for part in (self, *others)])
        return DenseColumns(rows.view(-1, self.width, self.numel))

    @property
    def nbytes(self) -> int:
        return self._rows.numel() * self._rows.element_size()

    def signals(self, weights: Tensor) -> Tensor:
        return weights

    def combine(self, signals: Tensor, out: Tensor, add: bool) -> None:
        out.addmm_(signals.flatten(1), self._rows, beta=int(add))

    def sizes(self) -> Tensor:
        """Exact: no terms are added up. Computed once."""
        if self._norms is None:
            self._norms = torch.linalg.vector_norm(self._rows, dim=1)
        return self._norms.view(self.num_samples, self.width)

    def squared_norms(self, memory: int) -> Tensor:
        return self.sizes().reshape(-1).square()

    def combination(self, weights: Tensor) -> Tensor:
        """Some columns at a time: rounding errors of long sums would grow."""
        pairs = zip(
            weights.reshape(-1).split(_SHORT_SUM),
            self._rows.split(_SHORT_SUM),
            strict=True,
        )
        sums = [few @ rows for few, rows in pairs]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def images(self, rows: Tensor) -> Tensor:
        return (rows @ self._rows.T).view(len(rows), self.num_samples, self.width)

    def components(self, images: Tensor) -> Tensor:
        return images

    def add_gram(self, gram: Tensor, other: LayerColumns, memory: int) -> None:
        add_product(gram, self.rows(), other.rows(), other is self)


def add_product(gram: Tensor, left: Tensor, right: Tensor, symmetric: bool) -> None:
    """Add ``left @ right.T`` to a matrix; above the diagonal only if symmetric."""
    if not symmetric or pays_whole(left):
        gram.addmm_(left, right.T)
        return
    # The diagonal blocks by recursion, the block beside them once.
    half = len(left) // 2
    top, bottom = left[:half], left[half:]
    add_product(gram[:half, :half], top, top, True)
    add_product(gram[half:, half:], bottom, bottom, True)
    gram[:half, half:].addmm_(top, bottom.T)


def pays_whole(rows: Tensor) -> bool:
    """Whether ``rows @ rows.T`` is made as a whole sooner than half of it."""
    return len(rows) < 2 * (_SYMMETRIC_LEAF if rows.is_cpu else _DEVICE_LEAF)


def mirror(matrix: Tensor) -> None:
    """Copy what is above the diagonal of a square matrix to below it."""
    step = _MIRRORED_ROWS if matrix.is_cpu else _DEVICE_ROWS
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        diagonal = matrix[rows, rows]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        matrix[start + step :, rows] = matrix[rows, start + step :].T


def merged(
    pairs: Sequence[tuple[LayerColumns, LayerColumns]],
) -> list[tuple[LayerColumns, LayerColumns]]:
    """Put columns with the same cotangents together, such as a weight's and a bias's.

    The Gram matrix of all is the same, and that of the cotangents is needed once.
    """
    groups: dict[Hashable, list[tuple[LayerColumns, LayerColumns]]] = {}
    for left, right in pairs:
        key = left.cotangents_key, right.cotangents_key
        groups.setdefault(key, []).append((left, right))
    stacked = []
    for (left, right), *more in groups.values():
        if not more:
            stacked.append((left, right))
            continue
        lefts, rights = zip(*more, strict=True)
        both = left.beside(lefts)
        same = left is right and lefts == rights
        stacked.append((both, both if same else right.beside(rights)))
    return stacked
