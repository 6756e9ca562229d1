"""Memory that a net reads and that others may write into without a word.

Arrays of NumPy, tensors behind global variables or in objects that are no module: a
risk has no copies of these. What is kept of a run lies on them too, so that a product
after a change would be half of the one net and half of the other, and quantities of
one risk would be of two nets. So the memory is compared with what it was, entry by
entry, before each run of the net and each product on what is kept.

Not seen are numbers and lists in Python, and a global variable that is given another
array: what is kept stays as it was, and other runs are seen by their outputs. Nor is
what a backward pass alone reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vivit_linop.risk.data.containers import strided_parts
from vivit_linop.risk.model.parameters import bits
from vivit_linop.risk.model.tensors_used import Watch, tensors_in

# What gives tensors on memory that somebody else has.
_SHARING = {
    torch.as_tensor,
    torch.asarray,
    torch.from_numpy,
    torch.frombuffer,
    torch.utils.dlpack.from_dlpack,
}
# What copies some entries of a tensor, which may be a table much larger than all else.
_LOOKING_UP = {
    F.embedding,
    torch.index_select,
    Tensor.index_select,
    torch.gather,
    Tensor.gather,
    torch.take,
    Tensor.take,
    torch.take_along_dim,
    Tensor.take_along_dim,
    Tensor.__getitem__,
}
# As many rows of a table are compared, evenly spaced.
_COMPARED_ROWS = 4096


class Part(NamedTuple):
    """Some memory.

    Attributes:
        now: What it is now, as integers: NaN equals itself.
        then: A copy of what it was.
        what: A name for it.
    """

    now: Tensor
    then: Tensor
    what: str

    @property
    def has_changed(self) -> bool:
        """Whether it has. On a GPU the host waits for it."""
        # What lies beyond the end of memory that was cut off is not to be touched.
        if _bounds(self.now)[1] > self.now.untyped_storage().nbytes():
            return True
        return not torch.equal(self.now, self.then)


class ForeignMemory:
    """What a net or a loss reads that is neither the risk's nor made in its runs.

    Attributes:
        parts: It, by place. What the reader itself writes into is not among it.
    """

    def __init__(self, reader: str = "model: its forward pass") -> None:
        self._reader = reader
        self.parts: dict[int, Part] = {}
        self._written: set[int] = set()
        self._settled = False

    def __reduce__(self) -> Any:
        """Travel as nothing: memory elsewhere is other memory."""
        return ForeignMemory, (self._reader,)

    @contextlib.contextmanager
    def read_by(self, own: Iterable[Tensor]) -> Iterator[Mapping[int, Tensor]]:
        """Learn what a run reads, inside; gives the tensors, by identity.

        Args:
            own: What belongs to the risk, or is taken care of elsewhere.
        """
        self.check()
        with _Reads(list(own)) as reads:
            yield reads.used
        self._written |= reads.written
        parts = dict(self.parts)
        for where, tensors in reads.read.items():
            parts[where] = _part_of(tensors, parts.get(where))
        for where, tensor in reads.tables.items():
            now = bits(tensor.detach()[:: -(-len(tensor) // _COMPARED_ROWS) or 1])
            parts.setdefault(where, Part(now, now.clone(), _described(tensor)))
        for where in self._written & parts.keys():
            del parts[where]
        self.parts = parts

    def copied_from(self, named: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return copies of the tensors that lie on it."""
        tensors = {k: v for k, v in named.items() if isinstance(v, Tensor)}
        return {k: t.clone() for k, t in tensors.items() if place(t) in self.parts}

    def settle(self) -> None:
        """Let it be an error from now on if something has changed.

        What changes before belongs to the net, which runs on several inputs meanwhile.
        """
        self.check()
        self._settled = True

    def has_changed(self) -> bool:
        """Whether something is not what it was."""
        return any(part.has_changed for part in self.parts.values())

    def check(self) -> None:
        """Raise an error if something is not what it was; before that, leave it out."""
        parts = self.parts
        changed = [where for where, part in parts.items() if part.has_changed]
        if not self._settled:
            self._written.update(changed)
            self.parts = {w: part for w, part in parts.items() if w not in changed}
        elif changed:
            raise ValueError(
                f"{self._reader} reads {parts[changed[0]].what} behind a "
                "global variable or in an object that is no module, of which the risk "
                "has no copy, and it is not what it was when the risk was built. An "
                "operator is one matrix: make a new risk, or keep it as a tensor on "
                "the module (an attribute or a buffer)."
            )


class _Reads(Watch):
    """Sees what is read that is neither in some places nor made meanwhile.

    Attributes:
        written: The places that were written into.
        read: What was read, by place.
        tables: What single entries were looked up in, by place.
    """

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self._own = own
        self._were_made(own)  # most nets read nothing else, and no places are asked
        self.written: set[int] = set()
        self.read: dict[int, list[Tensor]] = {}
        self.tables: dict[int, Tensor] = {}

    @cached_property
    def _own_places(self) -> set[int]:
        return {0, *map(place, self._own)}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        wanted = filter(self._is_wanted, given)
        foreign = [part for tensor in wanted for part in strided_parts(tensor)]
        versions = [*map(_version, foreign)]
        result = func(*args, **kwargs)
        made = tensors_in(result)
        if func in _SHARING and not given:
            return result  # what it has made is memory of others
        shared, looked_up = set[int](), sum(map(Tensor.numel, made))
        for tensor, version in zip(foreign, versions, strict=True):
            if (where := place(tensor)) in self._own_places:
                continue
            if _version(tensor) != version:
                self.written.add(where)
            if not made:
                continue  # it was asked for its shape, its dtype or the like
            self.used[id(tensor)] = tensor
            if any(new is tensor or place(new) == where for new in made):
                shared.add(where)  # it or a view of it, which is what will be read
            elif func in _LOOKING_UP and 0 < tensor.ndim and looked_up < tensor.numel():
                self.tables[where] = tensor
            else:
                self.read.setdefault(where, []).append(tensor)
        if shared:
            made = [new for new in made if place(new) not in shared]
        self._were_made(made)
        return result


def _version(tensor: Tensor) -> int:
    """How often it was written into; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _part_of(tensors: Sequence[Tensor], before: Part | None) -> Part:
    """The memory from the first to the last entry of tensors in one place.

    With what is known of it before.
    """
    storage = tensors[0].untyped_storage()
    bounds = [*map(_bounds, tensors)]
    if before is not None:
        bounds.append(_bounds(before.now))
    start, stop = min(b[0] for b in bounds), max(b[1] for b in bounds)
    # Words are compared in an eighth of the time; the last ones may be cut off.
    start, stop = start - start % 8, min(stop + -stop % 8, storage.nbytes())
    dtype = torch.int8 if (stop - start) % 8 else torch.int64
    size, now = dtype.itemsize, torch.empty(0, dtype=dtype, device=tensors[0].device)
    now.set_(storage, start // size, ((stop - start) // size,), (1,))
    return Part(now, now.clone(), _described(tensors[0]))


def _bounds(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one after its last."""
    size, first = tensor.element_size(), int(tensor.storage_offset())
    if not tensor.numel():
        return first * size, first * size
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum((length - 1) * step for length, step in steps)
    return first * size, (last + 1) * size


def _described(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"an array or a tensor {list(tensor.shape)} of {kind}"


def place(tensor: Tensor) -> int:
    """Where the entries of a tensor are; 0 if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    # It wraps others.
    except RuntimeError:
        return 0
