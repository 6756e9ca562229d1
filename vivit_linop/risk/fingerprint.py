"""Fingerprints of data: what tells one pass over the data from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vivit_linop.risk.containers import leaves
from vivit_linop.risk.data import Batch, some_targets
from vivit_linop.risk.samples import Samples


def of_batch(batch: Any) -> bytes:
    """Return a digest of the tensors of one batch, as the loader gives it."""
    digest = hashlib.sha256()
    for leaf in leaves(batch):
        digest.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
        digest.update(_contents(leaf))
    return digest.digest()


def of_data(batches: Iterable[Batch], samples: Samples) -> str:
    """Return a digest of all samples in their order, however they are cut into batches.

    Args:
        batches: Batches of tensors.
        samples: Where samples are. What is the same for all is taken from the first
            batch.
    """
    digests: list[Any] = []
    for X, y in batches:
        axes = samples.axes(X)
        if axes is None:
            parts = [_sample(X, y, samples, n) for n in range(samples.number(X))]
        else:
            parts = [_by_axes(X, y, axes)]
        for part in parts:
            first = not digests
            for position, (leaf, numbered) in enumerate(part):
                if first:
                    shape = leaf.shape[1:] if numbered else leaf.shape
                    name = f"{leaf.dtype}{list(shape)}{numbered}"
                    digests.append(hashlib.sha256(name.encode()))
                if first or numbered:
                    digests[position].update(_contents(leaf))
    return hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()


# Tensors, and whether their first axis numbers samples.
_Tensors = list[tuple[Tensor, bool]]


def _by_axes(X: Any, y: Any, axes: Sequence[int | None]) -> _Tensors:
    """Inputs and targets, with samples along the first axis."""
    inputs = [
        (leaf, False) if axis is None else (leaf.movedim(axis, 0), True)
        for leaf, axis in zip(leaves(X), axes, strict=True)
    ]
    return [*inputs, *((leaf, True) for leaf in leaves(y))]


def _sample(X: Any, y: Any, samples: Samples, n: int) -> _Tensors:
    """Those of one sample: its own, whatever their axes are."""
    index = torch.tensor([n], device="cpu")
    own = (samples.take(X, index), some_targets(y, index))
    return [(leaf, leaf.ndim > 0) for leaf in leaves(own)]


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(_contents(tensor))
    return digest.hexdigest()


def sums(X: Any) -> list[Tensor]:
    """Return weighted sums over the tensors of an input, by the first axis.

    A sign of change that costs one reading: weights are those of no symmetry, so that
    a flip or a permutation shows.
    """
    return [_weighted_sums(leaf.detach()) for leaf in leaves(X)]


def _weighted_sums(leaf: Tensor) -> Tensor:
    if leaf.layout != torch.strided:
        leaf = leaf.to_dense()
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf.resolve_conj())
    if not leaf.is_floating_point():
        leaf = leaf.double()
    rows = leaf.reshape(len(leaf) if leaf.ndim else 1, -1)
    weights = torch.arange(rows.shape[1], device=leaf.device).cos().add_(1.5)
    return rows @ weights.to(rows)


def _contents(tensor: Tensor) -> Any:
    """The bytes of a tensor, for a hash; they come to the host for that."""
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    # Conjugates and negatives are kept as marks on the tensor, not in its bytes.
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()
