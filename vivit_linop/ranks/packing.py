"""Objects that are sent: bytes, and the tensors in them apart."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Of each tensor: its dtype, its shape, and on what type of device it is.
Layout = list[tuple[torch.dtype, torch.Size, str]]


class _Packer(pickle.Pickler):
    """Leaves tensors out, and counts those that are one only once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[Tensor] = []
        self._places: dict[Any, int] = {}

    def persistent_id(self, item: Any) -> int | None:
        """Number the tensors."""
        if not isinstance(item, Tensor) or item.is_meta:
            return None
        # The stride along an axis of length 1 means nothing.
        strides = [s for s, n in zip(item.stride(), item.shape, strict=True) if n > 1]
        key = item.data_ptr(), item.shape, tuple(strides), item.dtype
        if key not in self._places:
            self._places[key] = len(self.tensors)
            self.tensors.append(item)
        return self._places[key]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def packed(item: Any) -> tuple[bytes, list[Tensor]]:
    """Turn an object into bytes, which know the layout of the tensors, and these."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(item)
    layout: Layout = [(t.dtype, t.shape, t.device.type) for t in packer.tensors]
    tensors = [tensor.detach().contiguous() for tensor in packer.tensors]
    return pickle.dumps((file.getvalue(), layout), protocol=5), tensors


def layout_of(head: bytes) -> tuple[bytes, Layout]:
    """Return the content of such bytes, and the layout of the tensors."""
    content, layout = pickle.loads(head)
    return content, layout


def unpacked(content: bytes, tensors: Sequence[Tensor]) -> Any:
    """The inverse of :func:`packed`."""
    return _Unpacker(io.BytesIO(content), tensors).load()
