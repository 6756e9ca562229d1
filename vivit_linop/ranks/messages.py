"""What ranks send each other: votes before they exchange anything, and objects."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Error = TypeVar("Error", bound=BaseException)

_MODULUS = 2**62
_STOP = "stop"
# The columns of the table of words of which a checksum adds up rows and columns.
_SIDE = 256
# What callers may catch, on the ranks that have not failed too.
_KINDS = (
    MemoryError,
    ModuleNotFoundError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    TypeError,
    ArithmeticError,
)
# Of each tensor: its dtype, its shape, and on what type of device it is.
Layout = list[tuple[torch.dtype, torch.Size, str]]


# Votes -------------------------------------------------------------------------------


class RankError(Exception):
    """Another rank has failed or has ended, or ranks do not do the same.

    Of the builtin kind of the other's error, and of no other: what catches the one
    error must catch this one, or ranks part.
    """


class VectorsDifferError(RankError):
    """The ranks multiply different vectors."""


class Note(NamedTuple):
    """What a rank tells the others when something is wrong.

    Attributes:
        what: What it was doing.
        number: Its number among all that the group has done.
        seen: The checksum of its inputs.
        said: Its error, None if it has none.
        kind: The builtin kind of that error; that of no error stops processes.
    """

    what: str
    number: int
    seen: int
    said: str | None = None
    kind: str = ""

    @classmethod
    def of(cls, what: str, number: int, seen: int, error: BaseException | None) -> Note:
        """Describe an error, if there is one."""
        if error is None:
            return cls(what, number, seen)
        kind = next((k.__name__ for k in _KINDS if isinstance(error, k)), "")
        kind = kind if isinstance(error, Exception) else _STOP
        return cls(what, number, seen, f"{type(error).__name__}: {error}", kind)


def decisive(notes: Sequence[Note]) -> int | None:
    """Return the rank whose error all ranks raise, or one of its kind; None for none.

    What stops a process stops all: an error may be caught, and another way taken.
    """
    failed = [rank for rank, note in enumerate(notes) if note.said is not None]
    stopped = [rank for rank in failed if notes[rank].kind == _STOP]
    return next(iter(stopped + failed), None)


def known(error: Error) -> Error:
    """Return an error, as one that all ranks know of."""
    vars(error)["is_known"] = True
    return error


def is_known(error: BaseException | None) -> bool:
    """Whether all ranks know of an error, or of what it comes from."""
    while error is not None:
        if isinstance(error, RankError) or "is_known" in vars(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def as_error(notes: Sequence[Note], rank: int) -> RankError:
    """Return what a rank raises with no such error of its own, from notes of all."""
    if (other := decisive(notes)) is not None:
        return like(notes[other].kind)(f"rank {other} raised {notes[other].said}")
    if len({note[:2] for note in notes}) > 1:
        deeds = [f"rank {r}: {n.what} (number {n.number})" for r, n in enumerate(notes)]
        return RankError("ranks do not do the same: " + ", ".join(deeds))
    return VectorsDifferError(
        f"{notes[rank].what}: the vectors, or numbers, differ between ranks. All must "
        "give the same: make them from the same seed, or broadcast them. SciPy's "
        "solvers draw start vectors that differ: give them v0=, or let one rank run "
        "the solver with vl.led(function, operator)."
    )


def like(kind: str) -> type[RankError]:
    """Return the error of ranks that is also of a builtin kind."""
    for builtin in _KINDS:
        if builtin.__name__ == kind:
            return type("RankError", (RankError, builtin), {"__module__": __name__})
    return RankError


def name_of(function: Callable[..., Any], inputs: Sequence[Any] = ()) -> str:
    """How a call is named in messages: not the same with other numbers and words."""
    if isinstance(function, functools.partial):
        inputs = (*function.args, *function.keywords.values(), *inputs)
        function = function.func
    name = str(getattr(function, "__qualname__", type(function).__name__))
    told = (given for given in inputs if isinstance(given, (int, float, str)))
    # On other hardware numbers may have been rounded in another way.
    return " ".join([name, *(f"{t:.6g}" if type(t) is float else f"{t}" for t in told)])


def checksum(tensors: tuple[Tensor, ...]) -> int:
    """A number of the bits of tensors, below 2⁶²; other bits or orders change it.

    Reads them twice, and takes no memory.
    """
    total = 0
    for place, tensor in enumerate(tensors, 1):
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        whole = len(bits) - len(bits) % (8 * _SIDE)
        table = bits[:whole].view(torch.int64).view(-1, _SIDE)
        parts = table.sum(0), table.sum(1), bits[whole:].long()
        sums = [int((part * _weights(part)).sum()) for part in parts]
        total += place * (sums[0] + 3 * sums[1] + 5 * sums[2] + len(bits))
    return total % _MODULUS


def _weights(part: Tensor) -> Tensor:
    return 2 * torch.arange(len(part), device=part.device) + 1


# Objects -----------------------------------------------------------------------------


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
