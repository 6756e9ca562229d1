"""A factor that is given by its columns: what BackPACK's backward pass leaves.

It has no risk to make columns of, as pullbacks have; so it has the verbs that these
have, on columns that are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vivit_linop.devices import fresh
from vivit_linop.net.columns.base import DenseColumns, LayerColumns, mirror
from vivit_linop.net.pieces import Piece, StoredColumns
from vivit_linop.operators.base import Op, TorchLinearOperator
from vivit_linop.operators.verbs import gram_matrix, to_dense


class ColumnFactor(TorchLinearOperator):
    """V with rows for several parameters, from the columns of each, ``[d, n·R]``.

    Column n·R + r belongs to sample n. Products and Gram matrices use the structure of
    the layers, so that V is formed for a parameter at most.

    Args:
        columns: Those of each parameter, in the order of the rows.
        dtype: That of the columns.
        device: Likewise.
        memory: The bytes that temporaries of a Gram matrix may take.
    """

    def __init__(
        self,
        columns: Sequence[LayerColumns],
        dtype: torch.dtype,
        device: torch.device,
        memory: int,
    ) -> None:
        self.columns, self.memory = list(columns), memory
        self.num_samples, self.width = columns[0].num_samples, columns[0].width
        named = {str(at): part for at, part in enumerate(self.columns)}
        sizes = {name: part.numel for name, part in named.items()}
        shape = sum(sizes.values()), self.num_samples * self.width
        self.piece = Piece(slice(0, shape[1]), slice(0, self.num_samples), named, sizes)
        super().__init__(shape, dtype, device)

    def _multiply(self, X: Tensor) -> Tensor:
        return StoredColumns([self.piece]).multiply(X)

    def _multiply_adjoint(self, X: Tensor) -> Tensor:
        return StoredColumns([self.piece]).multiply_adjoint(X)

    def by_parameter(self, X: Tensor) -> list[Tensor]:
        """Return V X, transposed, as ``[K, d]`` of each parameter.

        Each lies in memory of its own, where products of layers are written at once.
        """
        rows = X.T.contiguous()
        parts = {name: fresh(X, len(rows), d) for name, d in self.piece.sizes.items()}
        self.piece.combine(rows, parts, add=False)
        return [*parts.values()]

    def components_of(self, parts: Sequence[Tensor]) -> Tensor:
        """Return Vᵀ times what :meth:`by_parameter` returns, ``[R, K]``."""
        named = dict(zip(self.piece.sizes, parts, strict=True))
        return self.piece.components(named).T


def formed(columns: Sequence[LayerColumns]) -> DenseColumns:
    """Return the columns of several parameters side by side, formed."""
    rows = torch.cat([part.rows() for part in columns], dim=1)
    return DenseColumns(rows.view(columns[0].num_samples, columns[0].width, -1))


@gram_matrix.register
def gram_matrix_of_columns(left: ColumnFactor, right: Op) -> Tensor:
    """Add up the parameters'."""
    if not isinstance(right, ColumnFactor):
        return left.T.apply(to_dense(right))
    gram = torch.zeros(
        left.shape[1], right.shape[1], dtype=left.torch_dtype, device=left.device
    )
    for part, other in left.piece.pairs(right.piece, list(left.piece.sizes)):
        part.add_gram(gram, other, left.memory)
    if left is right:
        mirror(gram)
    return gram


@to_dense.register
def columns_to_dense(op: ColumnFactor) -> Tensor:
    """One parameter below the other."""
    out = torch.empty(op.shape[::-1], dtype=op.torch_dtype, device=op.device)
    return op.piece.rows(list(op.piece.sizes), out).T
