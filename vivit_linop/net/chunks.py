"""Products with the columns of a matrix, as many at a time as memory and torch bear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vivit_linop.devices import Room, fresh, is_out_of_memory
from vivit_linop.noise import Noise

# ``[d] -> [m]`` and ``[K, d] -> [K, m]``, rows contiguous.
Product = Callable[[Tensor], Tensor]


class Chunks:
    """What is known of the products of several vectors together.

    torch's rules for batches are not all right, and some operations have none. So the
    first product of each kind is compared with one of a single vector; where they
    differ, or it fails, vectors are multiplied one by one from then on. Where memory
    does not suffice, fewer are taken for the time being.
    """

    def __init__(self, device: torch.device) -> None:
        self._possible, self._checked = True, set[str]()
        self._room = Room(device)

    def trust(self, *products: str) -> None:
        """Leave the check of products of some names to who takes them."""
        self._checked.update(products)

    def apply(self, product: Product, X: Tensor, size: int, chunk: int) -> Tensor:
        """Multiply the columns of a matrix, ``[d, K] -> [m, K]``.

        Args:
            product: Of rows, whose parts lie together in memory.
            X: The columns.
            size: m.
            chunk: How many of them at a time.
        """
        rows = X.T.contiguous()
        result = fresh(X, X.shape[1], size)
        chunk, start = self._room.most(chunk) if self._possible else 1, 0
        while start < len(rows):
            part, images = (t[start : start + chunk] for t in (rows, result))
            try:
                self._multiply(product, part, images)
            except RuntimeError as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                chunk = self._room.shrink(len(part))
            else:
                start += len(part)
        return result.T

    def _multiply(self, product: Product, rows: Tensor, images: Tensor) -> None:
        """Write the images of some rows; together where that is right."""
        if len(rows) > 1 and self._possible:
            try:
                if self._is_right(product, rows, images.copy_(product(rows))):
                    return
            # Not all operations can be batched; all can be done row by row.
            except (RuntimeError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
            self._possible = False
        for row, image in zip(rows, images, strict=True):
            image.copy_(product(row))

    def _is_right(self, product: Product, rows: Tensor, images: Tensor) -> bool:
        """Whether images of rows together are those of rows alone; checked once.

        By the image of a random combination.
        """
        name: str = product.__name__
        if name in self._checked:
            return True
        weights = Noise()(len(rows), like=rows)
        error = weights @ images - product(weights @ rows)
        size = (weights * images.norm(dim=1)).norm()
        if not error.norm() <= 100 * torch.finfo(rows.dtype).eps ** 0.75 * size:
            return False
        self._checked.add(name)
        return True
