"""Products of K vectors with columns Σ_p b_p ⊗ a_p, in few and large matrix products.

On several threads a matrix product ends when the last of them does, which beside other
processes is some time slices later, however small the product was. So the vectors of a
layer are multiplied together. On one thread smaller products are the faster ones: what
they read and write stays in the caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What is brought into another order at a time. On a CPU with one thread this stays in
# the cache of a core; with several it is more, for fewer products; and other devices
# want to be busy.
_COPIED_BYTES = 2 * 2**20
_THREADS_FACTOR, _DEVICE_FACTOR = 4, 64


def add_outer_products(
    out: Tensor, signals: Tensor, inputs: Tensor, inputs_first: bool, add: bool
) -> None:
    """Write Σ_np s_np ⊗ a_np for each of K vectors.

    Args:
        out: ``[K, numel]``; its rows are contiguous.
        signals: s, ``[K, n, G, b, P]``.
        inputs: a, ``[G, n·P, a]``.
        inputs_first: Whether a row of ``out`` is ``[G, a, b]`` instead of
            ``[G, b, a]``.
        add: Whether to add to what is there.
    """
    K, _, G, b, P = signals.shape
    if G == P == 1:
        left, right = signals[:, :, 0, :, 0].mT, inputs.expand(K, -1, -1)
        if inputs_first:
            left, right = right.mT, left.mT
        target = out.view(K, left.shape[1], right.shape[2])
        apart = not target.is_contiguous()
        if K > 1 and apart and out.is_cpu and torch.get_num_threads() > 1:
            _add_together(target, left, right, add)
        else:
            target.baddbmm_(left, right, beta=int(add))
        return
    for signal, row in zip(signals, out, strict=True):
        left, right = signal.permute(1, 2, 0, 3).reshape(G, b, -1), inputs
        if inputs_first:
            left, right = right.mT, left.mT
        target = row.view(G, left.shape[1], right.shape[2])
        target.baddbmm_(left, right, beta=int(add))


def _add_together(target: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """Write ``left @ right`` into matrices that lie apart in memory, as ``[K, b, a]``.

    There torch multiplies them one by one. Side by side they are one product.
    """
    K, b, a = target.shape
    chunk = _chunk(target, K * a, b)
    side_by_side = target.new_empty(K * chunk * a)
    pairs = zip(left.split(chunk, dim=1), target.split(chunk, dim=1), strict=True)
    for some, place in pairs:
        product = side_by_side[: place.numel()].view(place.shape)
        product.baddbmm_(some, right, beta=0)
        if add:
            place.add_(product)
        else:
            place.copy_(product)


def images(rows: Tensor, inputs: Tensor, positions: int, inputs_first: bool) -> Tensor:
    """Return X a_np for each of K matrices X.

    Args:
        rows: X, ``[K, numel]``, rows or columns contiguous.
        inputs: a, ``[G, n·P, a]``.
        positions: P.
        inputs_first: Whether X is ``[G, a, b]`` instead of ``[G, b, a]``.

    Returns:
        ``[K, n, G·b·P]``.
    """
    G, size, a = inputs.shape
    K, n, b = len(rows), size // positions, rows.shape[1] // (G * a)
    if rows.stride(1) > 1:
        if K > 1 and G == positions == 1:
            return _images_of_columns(rows, inputs[0], inputs_first)
        rows = rows.contiguous()
    # From contiguous rows to [K, G, a, b].
    matrices = rows.view(K, G, a, b) if inputs_first else rows.view(K, G, b, a).mT
    if G == positions == 1:
        return torch.bmm(inputs.expand(K, -1, -1), matrices.squeeze(1))
    result = rows.new_empty(K, n, G, b, positions)
    for matrix, image in zip(matrices, result, strict=True):
        product = torch.bmm(inputs, matrix).view(G, n, positions, b)
        image.copy_(product.permute(1, 0, 3, 2))
    return result.flatten(2)


def _images_of_columns(rows: Tensor, inputs: Tensor, inputs_first: bool) -> Tensor:
    """Where each X is a column of a matrix that lies row by row in memory.

    For inputs ``[n, a]``. Some rows are brought together at a time, and read once. The
    images are where products with cotangents want them: K numbers beside each other.
    """
    (n, a), K = inputs.shape, len(rows)
    b = rows.shape[1] // a
    matrices = rows.view(K, a, b).mT if inputs_first else rows.view(K, b, a)
    result = rows.new_empty(n, b, K)
    chunk = _chunk(rows, K * a, b)
    together = rows.new_empty(chunk * K * a)
    some = zip(matrices.split(chunk, dim=1), result.split(chunk, dim=1), strict=True)
    for part, place in some:
        part = part.transpose(0, 1)
        part = together[: part.numel()].view(part.shape).copy_(part)
        place.view(n, -1).addmm_(inputs, part.flatten(0, 1).T, beta=0)
    return result.permute(2, 0, 1)


def _chunk(like: Tensor, entries: int, most: int) -> int:
    """How many rows of so many entries to copy at a time, at most as many as given."""
    size = _COPIED_BYTES
    if not like.is_cpu:
        size *= _DEVICE_FACTOR
    elif torch.get_num_threads() > 1:
        size *= _THREADS_FACTOR
    return max(1, min(most, size // max(1, entries * like.element_size())))
