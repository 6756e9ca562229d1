"""Watching an iterative eigensolver: how many products, and how far it has come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vivit_linop.operators.base import TorchLinearOperator


@contextlib.contextmanager
def watched(op: TorchLinearOperator, k: int) -> Iterator[TorchLinearOperator]:
    """Show the products with an operator while its k largest pairs are computed.

    The bar on stderr counts the products, and shows the largest residual
    ‖A x − θ x‖ / θ_max of the k best approximations (θ, x) in the vectors so far.

    Args:
        op: A, self-adjoint.
        k: How many pairs are looked for.
    """
    with tqdm(desc=f"eigh(k={k})", unit=" products") as bar:
        watch = RitzWatch(op, k, bar)
        yield watch
        watch.update()


class RitzWatch(TorchLinearOperator):
    """An operator that computes Ritz pairs from the vectors that it multiplies.

    Rayleigh–Ritz on the span of the vectors of a Krylov method and the best Ritz
    vectors before them, as methods with thick restarts do it (Wu & Simon 2000);
    the images of all of them are known, so that it takes no product of its own, but
    the memory of up to 8 k vectors (80 for small k).

    Args:
        op: A, self-adjoint.
        k: How many Ritz pairs are followed.
        bar: Where they are shown.

    Attributes:
        products: How many columns were multiplied.
        residual: The largest of ‖A x − θ x‖ / θ_max, NaN before there is one.
    """

    self_adjoint = True

    def __init__(self, op: TorchLinearOperator, k: int, bar: tqdm) -> None:
        super().__init__(op.shape, op.torch_dtype, op.device)
        self._op, self._k, self._bar = op, k, bar
        self._vectors: list[Tensor] = []
        self._images: list[Tensor] = []
        self._count = 0
        self._kept = max(2 * k + 1, 20)
        self.products, self.residual = 0, float("nan")

    def _multiply(self, X: Tensor) -> Tensor:
        images = self._op.apply(X)
        # Copies: the solver may write into what it gave and what it got. The vector
        # that it starts from need not have the length of the others.
        lengths = X.norm(dim=0)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        self._vectors.append(X / lengths)
        self._images.append(images / lengths)
        self.products += X.shape[1]
        self._count += X.shape[1]
        first = self.residual != self.residual  # NaN
        if self._count >= (1 if first else 2) * self._kept:
            self.update()
        self._bar.update(X.shape[1])
        return images

    def update(self) -> None:
        """Replace the vectors by the best Ritz vectors in their span."""
        if self._count < self._k:
            return
        X, images = torch.cat(self._vectors, dim=1), torch.cat(self._images, dim=1)
        # Coordinates in which the span has an orthonormal basis.
        sizes, T = torch.linalg.eigh((X.T @ X).double())
        found = sizes > 1e3 * torch.finfo(X.dtype).eps * sizes[-1]
        T = T[:, found] / sizes[found].sqrt()
        projected = T.T @ (X.T @ images).double() @ T
        values, Z = torch.linalg.eigh((projected + projected.T) / 2)
        values, weights = values[-self._kept :], (T @ Z[:, -self._kept :]).to(X.dtype)
        X, images = X @ weights, images @ weights
        errors = (images - X * values.to(X.dtype)).norm(dim=0)[-self._k :]
        self.residual = (errors.max() / values.abs().max()).item()
        self._bar.set_postfix(residual=f"{self.residual:.1e}")
        self._vectors, self._images, self._count = [X], [images], X.shape[1]
