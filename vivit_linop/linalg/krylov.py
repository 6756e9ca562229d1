"""What iterative eigensolvers are given: operators whose products are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor
from tqdm.auto import tqdm

from vivit_linop.bars import bar
from vivit_linop.operators.base import TorchLinearOperator


@contextlib.contextmanager
def watched(
    op: TorchLinearOperator, k: int, total: int
) -> Iterator[TorchLinearOperator]:
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
    """An operator that tells a bar how many columns it has multiplied.

    Args:
        op: A, square.
        shown: The bar where they are counted.
    """

    def __init__(self, op: TorchLinearOperator, shown: tqdm) -> None:
        super().__init__(op.shape, op.torch_dtype, op.device)
        self.self_adjoint = op.self_adjoint
        self._op, self._bar = op, shown

    def _made_of(self) -> tuple[TorchLinearOperator]:
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
