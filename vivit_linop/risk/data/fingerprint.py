"""Fingerprints of data: what tells one pass over the data from another."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vivit_linop.risk.data.batches import Batch, some_targets
from vivit_linop.risk.data.containers import leaves, strided_parts
from vivit_linop.risk.data.sample_search import Search
from vivit_linop.risk.data.samples import has_entries

# In units of eps.
_ROUNDING = 1e3


def of_batch(batch: Any) -> bytes:
    """Return a digest of the tensors of one batch, as the loader gives it."""
    digest = hashlib.sha256()
    for leaf in leaves(batch, has_entries):
        if isinstance(leaf, Tensor):
            _add(digest, leaf)
        else:  # texts, or an array
            digest.update(_entries(leaf))
    return digest.digest()


def _add(digest: Any, tensor: Tensor, name: str = "") -> None:
    digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
    for part in strided_parts(tensor):
        digest.update(_contents(part))


def _entries(value: Any) -> bytes:
    """The numbers and texts in a list or an array."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.tobytes()
    if isinstance(value, (list, tuple, np.ndarray)):
        return b"".join(b"[" + _entries(entry) for entry in value)
    return repr(value).encode() if isinstance(value, (str, int, float)) else b""


def of_samples(batches: Iterable[Batch], search: Search) -> tuple[bytes, list[bytes]]:
    """Return a digest of what samples have in common, and one of each sample.

    They do not depend on how samples are cut into batches. What is the same for all is
    taken from the first batch. Of no samples there is nothing.
    """
    common, digests = hashlib.sha256(), list[bytes]()
    for X, y in batches:
        axes, number = search.samples.axes(X), search.samples.number(X)
        if axes is None:
            for one in torch.arange(number, device="cpu").split(1):
                part = search.samples.take(X, one), some_targets(y, one)
                digests.append(of_batch(part))
            continue
        both = [*leaves(X), *leaves(y)]
        places = [*axes, *[0] * (len(both) - len(axes))]
        # With samples along the first axis, and whether there are any.
        tensors = [
            (leaf if axis is None else leaf.movedim(axis, 0), axis is not None)
            for leaf, axis in zip(both, places, strict=True)
        ]
        if not digests:
            for leaf, numbered in tensors:
                shape = leaf.shape[1:] if numbered else leaf.shape
                common.update(f"{leaf.dtype}{list(shape)}{numbered}".encode())
                for own in () if numbered else strided_parts(leaf):
                    common.update(_contents(own))
        digests += _of_each([leaf for leaf, numbered in tensors if numbered])
    return (common.digest() if digests else b""), digests


def _of_each(leaves: Sequence[Tensor]) -> Iterator[bytes]:
    """Yield a digest of each row of tensors, whose first axis is as long."""
    rows = [_contents(leaf.to_dense()).reshape(len(leaf), -1) for leaf in leaves]
    for parts in zip(*rows, strict=True):
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        yield digest.digest()


def joined(parts: Iterable[tuple[bytes, list[bytes]]]) -> str:
    """Return a digest of all samples in their order, from those of parts of them."""
    whole, first = hashlib.sha256(), b""
    for common, digests in parts:
        first = first or common
        for digest in digests:
            whole.update(digest)
    return hashlib.sha256(first + whole.digest()).hexdigest()


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in named:
        _add(digest, tensor, name)
    return digest.hexdigest()


class Sums:
    """Weighted sums over the tensors of an input, by the first axis.

    A sign of change that costs one reading: weights are those of no symmetry, so that
    a flip or a permutation shows.
    """

    def __init__(self, X: Any) -> None:
        tensors = [strided_parts(leaf.detach()) for leaf in leaves(X)]
        self._tensors = len(tensors)
        # What a sparse tensor consists of has no axis of samples.
        self._values = [
            _weighted_sums(part if len(parts) == 1 else part.reshape(1, part.numel()))
            for parts in tensors
            for part in parts
        ]

    def __len__(self) -> int:
        """Of how many tensors they are."""
        return self._tensors

    @functools.cached_property
    def _rounding(self) -> list[Tensor]:
        """What sums may be off by where threads add up in another order."""
        return [
            _ROUNDING * torch.finfo(sums.dtype).eps * largest(sums)
            for sums in self._values
        ]

    def differ_from(self, before: Sums) -> list[Tensor]:
        """Whether they are others, by tensor; not read by the host.

        Of tensors with NaN or Inf they say nothing.
        """
        pairs = list(zip(self._values, before._values, strict=False))
        if len(self._values) != len(before._values) or any(
            now.shape != then.shape for now, then in pairs
        ):
            return [torch.tensor(True, device="cpu")]
        return [
            largest(now - then) > rounding
            for (now, then), rounding in zip(pairs, before._rounding, strict=True)
            if len(then)
        ]


def largest(sums: Tensor) -> Tensor:
    """The largest size of an entry, 0 of none; not read by the host."""
    if not sums.numel():
        return sums.new_zeros(())
    return torch.linalg.vector_norm(sums, math.inf)


def _weighted_sums(leaf: Tensor) -> Tensor:
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf.resolve_conj())
    if not leaf.is_floating_point():
        leaf = leaf.double()
    elif leaf.itemsize < 4:  # in their own precision sums would say nothing
        leaf = leaf.float()
    rows = torch.atleast_1d(leaf).unsqueeze(-1).flatten(1)  # also of no entries
    return rows @ _weights(rows.shape[1], rows.dtype, rows.device)


@functools.lru_cache(maxsize=4)
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    numbers = torch.arange(count, dtype=torch.float64, device=device)
    return numbers.cos().add_(1.5).to(dtype)


def _contents(tensor: Tensor) -> Any:
    """The bytes of a tensor, for a hash; they come to the host for that."""
    tensor = tensor.detach().cpu()
    # Conjugates and negatives are kept as marks on the tensor, not in its bytes.
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()
