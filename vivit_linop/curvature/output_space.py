"""Operators in output space: block-diagonal over samples, one block a sample.

Rows are outputs, sample-major: entry n·C + c is output c of sample n, with a sample's
outputs flattened. These operators know the outputs of the net, not the net.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import count
from operator import attrgetter

import torch
from torch import Tensor

from vivit_linop.devices import free_memory
from vivit_linop.operators.base import TorchLinearOperator
from vivit_linop.ranks.alone import Ranks
from vivit_linop.risk.empirical import EmpiricalRisk
from vivit_linop.risk.row_layout import RowLayout


def check_blocks_fit(
    risk: EmpiricalRisk, what: str, columns: RowLayout, copies: int = 1
) -> None:
    """Raise an error if so many copies of the largest batch's blocks do not fit.

    Raises:
        MemoryError: It says how large they are and what needs none.
    """
    rows = risk.layout
    shapes = zip(rows.samples, rows.each, columns.each, strict=True)
    samples, C, R = max(shapes, key=math.prod)
    size, free = samples * C * R * risk.dtype.itemsize, free_memory(risk.device)
    if copies * size > free:
        raise MemoryError(
            f"{what} has a block [{C}, {R}] for each sample: "
            f"{size / 1e9:.3g} GB for a batch of {samples}, times {copies} while it is "
            f"computed; {free / 1e9:.3g} GB are free on {risk.device}. Products with "
            "GGN and LossHessian do not form it. For a factor, its Gram matrix and all "
            "that follows take mc_samples=1 or a few more; smaller batches help where "
            "one block fits."
        )


class OfRisk(TorchLinearOperator):
    """An operator of a risk, over its processes."""

    risk: EmpiricalRisk

    @property
    def ranks(self) -> Ranks:
        """Those of the risk."""
        return self.risk.ranks


class OutputOperator(OfRisk):
    """A block-diagonal operator with a block ``[C, R]`` for each sample.

    Args:
        risk: What the samples and outputs are.
        width: R, the columns of each block; or which columns belong to which sample,
            where they have different numbers of them.

    Attributes:
        width: R; the largest.
        layout: Which columns belong to which sample. Rows do as outputs,
            ``risk.layout``.
        determined: Whether two operators of this type and of one risk are one matrix,
            so that what is computed for one of them is true of the other.
        certain: Whether its blocks are known to exist.
    """

    determined: bool = False
    certain: bool = True

    def __init__(self, risk: EmpiricalRisk, width: int | RowLayout) -> None:
        if isinstance(width, int):
            width = RowLayout.uniform(risk.batch_sizes, width).counted(risk.ranks)
        self.risk, self.layout, self.width = risk, width, width.width
        shape = risk.num_rows, width.among(risk.num_samples)
        super().__init__(shape, risk.dtype, risk.device)

    @abstractmethod
    def apply_batch(self, batch: int, X: Tensor) -> Tensor:
        """Multiply the blocks of one batch, ``[n R, K] -> [n C, K]``."""

    def apply_adjoint_batch(self, batch: int, X: Tensor) -> Tensor:
        """Multiply their adjoints, ``[n C, K] -> [n R, K]``, if there are others."""
        if not self.self_adjoint:
            raise NotImplementedError(
                f"{type(self).__name__} does not define apply_adjoint_batch."
            )
        return self.apply_batch(batch, X)

    @abstractmethod
    def dense_batch(self, batch: int) -> Tensor:
        """The blocks of one batch, ``[n, C, R]``."""

    def _multiply(self, X: Tensor) -> Tensor:
        return self.risk.ranks.listed(self._images, X)

    def _images(self, X: Tensor) -> Tensor:
        return self.own_rows(self.layout.of_all(X))

    def own_rows(self, rows: Tensor) -> Tensor:
        """Multiply rows of this rank's samples."""
        parts = rows.split(self.layout.sizes)
        return torch.cat([*map(self.apply_batch, count(), parts)])

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return self.risk.ranks.listed(self._adjoint_images, X)

    def _adjoint_images(self, X: Tensor) -> Tensor:
        layout = self.risk.layout
        parts = layout.of_all(X).split(layout.sizes)
        return torch.cat([*map(self.apply_adjoint_batch, count(), parts)])

    def outer(self) -> OutputOperator:
        """The operator times its adjoint."""
        return Outer(self)

    @property
    def block_entries(self) -> int:
        """How many entries products with one sample's block read."""
        return self.risk.layout.width * self.width

    def blocks_fit(self) -> bool:
        """Whether the blocks of every batch fit into memory."""
        return True

    def own_dense_rows(self) -> Tensor:
        """The rows of this rank's samples."""
        batches = map(self.dense_batch, range(len(self.risk.batch_sizes)))
        blocks = [block for batch in batches for block in batch]
        before, own = self.layout.before, self.layout.total
        # Without rows: the columns of other ranks' samples.
        zeros = self.risk.example[0].new_zeros(0, self.shape[1])
        left, _, right = zeros.tensor_split([before, before + own], dim=1)
        return torch.block_diag(left, *blocks, right)


class OutputIdentity(OutputOperator):
    """The identity in output space: what Jᵀ itself is pulled back from."""

    self_adjoint = True
    determined = True

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__(risk, risk.layout)

    def apply_batch(self, batch: int, X: Tensor) -> Tensor:
        return X

    def dense_batch(self, batch: int) -> Tensor:
        n, width = self.risk.batch_sizes[batch], self.layout.each[batch]
        check_blocks_fit(self.risk, "The Jacobian of all outputs", self.layout)
        unit = torch.eye(width, dtype=self.torch_dtype, device=self.device)
        return unit.expand(n, -1, -1)

    @property
    def block_entries(self) -> int:
        return 0

    def outer(self) -> OutputOperator:
        return self


class FactoredOutputOperator(OutputOperator):
    """An operator in output space whose blocks are given as tensors.

    The blocks of a batch are ``[n, c, s, P]``: for each of P positions that the loss
    does not couple, a matrix of c output channels and s columns. As matrices they have
    C = c·P rows and R = s·P columns.

    Blocks are kept while they are few, and formed anew beyond that: what is kept does
    not grow with N.
    """

    def __init__(self, risk: EmpiricalRisk, width: int | RowLayout) -> None:
        super().__init__(risk, width)
        self._blocks: dict[int, Tensor] = {}
        self._budget = risk.kept.small_budget

    def blocks(self, batch: int) -> Tensor:
        """The blocks of one batch, ``[n, c, s, P]``."""
        if batch in self._blocks:
            return self._blocks[batch]
        formed = self._form(batch)
        with self.risk.kept.making:  # threads count what others keep
            kept = sum(map(attrgetter("nbytes"), self._blocks.values()))
            if kept + formed.nbytes <= self._budget:
                return self._blocks.setdefault(batch, formed)
        return formed

    def _form(self, batch: int) -> Tensor:
        """Form the blocks of one batch."""
        raise NotImplementedError

    def apply_batch(self, batch: int, X: Tensor) -> Tensor:
        return _by_position(self.blocks(batch), X)

    def apply_adjoint_batch(self, batch: int, X: Tensor) -> Tensor:
        return _by_position(self.blocks(batch).transpose(1, 2), X)

    def dense_batch(self, batch: int) -> Tensor:
        F = self.blocks(batch)
        if F.shape[3] == 1:
            return F.squeeze(3)
        check_blocks_fit(self.risk, "The factor of the loss Hessian", self.layout)
        dense = F.diag_embed(dim1=2, dim2=4)  # [n, c, P, s, P]
        return dense.flatten(3, 4).flatten(1, 2)


def _by_position(F: Tensor, X: Tensor) -> Tensor:
    """Blocks ``[n, c, s, P]`` times ``[n·s·P, K]``, ``[n·c·P, K]``."""
    n, _, s, positions = F.shape
    X = X.reshape(n, s, positions, X.shape[1])
    return torch.einsum("ncsp,nspk->ncpk", F, X).reshape(-1, X.shape[3])


class Outer(OutputOperator):
    """An operator in output space times its adjoint."""

    self_adjoint = True

    def __init__(self, root: OutputOperator) -> None:
        self.root = root
        super().__init__(root.risk, root.risk.layout)

    def apply_batch(self, batch: int, X: Tensor) -> Tensor:
        return self.root.apply_batch(batch, self.root.apply_adjoint_batch(batch, X))

    def dense_batch(self, batch: int) -> Tensor:
        dense = self.root.dense_batch(batch)
        return dense @ dense.mT
