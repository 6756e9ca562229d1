"""The ranks of a process group of ``torch.distributed``.

Here are all collectives of the package but those that gather sharded parameters.
Before ranks exchange anything they vote: that none of them has failed, that all do the
same, with the same vectors. So an error of one rank is an error on all of them, and not
a deadlock.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vivit_linop.devices import free_memory, is_out_of_memory
from vivit_linop.ranks.alone import ALONE, Ballot, Ranks
from vivit_linop.ranks.messages import (
    Layout,
    Note,
    RankError,
    VectorsDifferError,
    as_error,
    checksum,
    decisive,
    is_known,
    known,
    layout_of,
    name_of,
    packed,
    unpacked,
)

Result = TypeVar("Result")

# How many votes each group has had, of all risks together.
_VOTES: dict[str, int] = {}


class _Voting(threading.local):
    """What this thread does that all ranks will vote on: the names of the groups."""

    def __init__(self) -> None:
        self.groups: list[str] = []


_VOTING = _Voting()


def as_ranks(group: Any) -> Ranks:
    """Return the ranks of a process group, or of a device mesh with one dimension.

    Args:
        group: The group; None for one process.

    Raises:
        TypeError: If it is neither.
        ValueError: If this process is not in it.
    """
    if group is None:
        return ALONE
    if hasattr(group, "get_group"):  # a DeviceMesh, whose module takes time to import
        if group.ndim != 1:
            raise ValueError(
                f"process_group: a mesh with one dimension, got {group.ndim}. Take "
                'one of them, mesh["dp"].'
            )
        group = group.get_group()
    none: Any = dist.GroupMember.NON_GROUP_MEMBER
    outside = isinstance(group, type(none)) and group == none
    if not isinstance(group, dist.ProcessGroup) and not outside:
        raise TypeError(
            "process_group: a group of torch.distributed or a DeviceMesh, got "
            f"{type(group).__name__}."
        )
    if outside or dist.get_rank(group) < 0:
        raise ValueError("process_group: this process is not in it.")
    return ALONE if dist.get_world_size(group) == 1 else Group(group)


class Group(Ranks):
    """The ranks of a process group, of more than one process."""

    is_many = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._device = group, torch.device("cpu")
        Ranks.are_many = True
        if dist.get_backend(group) == "nccl":  # has no tensors on the host
            self._device = torch.device("cuda", torch.cuda.current_device())
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def __copy__(self) -> Group:
        """The same ranks."""
        ranks = object.__new__(Group)
        ranks.__dict__.update(self.__dict__)
        return ranks

    def __deepcopy__(self, memo: object) -> Group:
        """Return itself: a group is one for all."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to travel."""
        raise TypeError(
            "An operator of a process group cannot be pickled: other processes are not "
            "in the group. vl.save writes results to a file."
        )

    def __str__(self) -> str:
        return f", {self.size} ranks"

    def on(self, device: torch.device) -> Group:
        ranks = copy.copy(self)
        ranks._device = device
        return ranks

    def counted(self, counts: Sequence[int]) -> Group:
        ranks = copy.copy(self)
        ranks.counts = tuple(counts)
        ranks.first = sum(ranks.counts[: self.rank])
        return ranks

    @property
    def leader(self) -> int:
        """The first rank that has samples."""
        return next((r for r, n in enumerate(self.counts) if n), 0)

    @property
    def leads(self) -> bool:
        return self.rank == self.leader

    # What operators ask for ----------------------------------------------------------

    def summed(self, local: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Add up over ranks, all with the same order in memory."""
        part, shape, dtype, _ = self._part(local, inputs)
        if part is None:
            part = torch.zeros(shape, dtype=dtype, device=self._device)
        # BLAS would round in another way on columns than on rows.
        return self.total(part) if part.ndim == 1 else self.total(part.T).T

    def listed(self, local: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        part, shape, dtype, heights = self._part(local, inputs)
        if part is None:
            part = torch.zeros(0, *shape[1:], dtype=dtype, device=self._device)
        padded = part.new_zeros(max(heights), *part.shape[1:])
        padded[: len(part)] = part
        every = [torch.empty_like(padded) for _ in heights]
        with _explained():
            dist.all_gather(every, padded, group=self._group)
        pairs = zip(every, heights, strict=True)
        return torch.cat([rows[:height] for rows, height in pairs])

    def led(self, compute: Callable[..., Result], *inputs: Any) -> Result:
        result: Any = None
        with self.together(f"led {name_of(compute, inputs)}"):
            if self.leads:
                result = compute(*inputs)
        return self.sent(result)

    def owner(self, sample: int) -> int:
        return next(r for r, n in enumerate(accumulate(self.counts)) if sample < n)

    def _part(
        self, local: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, torch.Size, torch.dtype, list[int]]:
        """What this rank has to give, None without samples; the leader's shape.

        And how many rows each has.

        Ranks on different hardware may have rounded in different ways on the way to
        the inputs; then all take the leader's. With samples on all ranks the shape is
        this rank's.
        """
        part: Tensor | None = None
        try:
            with self.together(name_of(local), *inputs) as ballot:
                if self.counts[self.rank]:
                    part = local(*inputs)
                    ballot.rows = len(part) if part.ndim else 0
        except VectorsDifferError as error:
            return self._part(local, self._those_of_leader(inputs, error))
        if part is not None and all(self.counts):
            return part, part.shape, part.dtype, ballot.heights
        shape, dtype = self.sent(None if part is None else (part.shape, part.dtype))
        return part, shape, dtype, ballot.heights

    def agreed(self, X: Tensor) -> Tensor:
        try:
            with self.together("x", X):
                return X
        except VectorsDifferError as error:
            return self._those_of_leader((X,), error)[0]

    def _those_of_leader(
        self, inputs: tuple[Tensor, ...], error: VectorsDifferError
    ) -> tuple[Tensor, ...]:
        """Return what the leader has where it differs; an error if not by rounding."""
        theirs = tuple(self.sent(X) for X in inputs)
        with self.together("rounding"):
            if not all(map(_is_rounding, inputs, theirs)):
                raise error
        return theirs

    # Collectives ---------------------------------------------------------------------

    def total(self, part: Tensor) -> Tensor:
        """Add up, by one all-reduce."""
        part = part.contiguous()
        with _explained():
            dist.all_reduce(part, group=self._group)
        return part

    def to_leader(self, rows: Tensor) -> Tensor | None:
        """Send the rows of this rank's samples to the leader."""
        with self.together("rows of this rank") as ballot:
            ballot.rows = len(rows)
        heights = ballot.heights
        with self.together("rows for the leader"):
            total = sum(heights) if self.leads else 0
            self._check_fits(total, rows)
            whole = rows.new_empty(total, *rows.shape[1:])
        operations: list[tuple[Callable[..., Any], Tensor, int]] = []
        if self.leads:
            for rank, part in enumerate(whole.split(heights)):
                if rank == self.rank:
                    part.copy_(rows)
                elif len(part):
                    operations.append((dist.irecv, part, rank))
        elif len(rows):
            operations.append((dist.isend, rows.contiguous(), self.leader))
        with _explained():
            self._exchange(operations)
        return whole if self.leads else None

    def _check_fits(self, total: int, rows: Tensor) -> None:
        """Raise an error if so many rows do not fit into memory."""
        needed = total * math.prod(rows.shape[1:]) * rows.element_size()
        free = free_memory(self._device)
        if needed > free:
            raise MemoryError(
                f"A matrix of {total} rows takes {needed / 1e9:.3g} GB, and "
                f"{free / 1e9:.3g} GB are free on {self._device} of the rank that "
                "decomposes it. What needs its products only: G.eigh(k=…, "
                "route='ARPACK on K') and scipy.sparse.linalg.cg."
            )

    def in_turn(self, items: Iterator[Result]) -> Iterator[Result]:
        """Send each item to all."""
        for rank in range(self.size):
            while True:
                item: Any = None
                with self.together(f"items of rank {rank}") as ballot:
                    if rank == self.rank:
                        item = next(items, None)
                        ballot.flag = item is not None
                if not ballot.flag:
                    break
                yield self.sent(item, rank)

    def gathered(self, item: Result) -> Sequence[Result]:
        found: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(found, item, group=self._group)
        return found

    def sent(self, item: Any, by: int | None = None) -> Any:
        """Return the object of the leader, or of another rank, on all ranks."""
        by = self.leader if by is None else by
        source = self._global(by)
        head, tensors = packed(item)
        box: list[Any] = [head]
        with _explained():
            dist.broadcast_object_list(box, src=source, group=self._group)
            content, layout = layout_of(box[0])
            if self.rank == by:
                tensors = [tensor.to(self._device) for tensor in tensors]
            else:
                tensors = self._empty(layout)
            for tensor in tensors:
                if tensor.numel():
                    dist.broadcast(tensor, src=source, group=self._group)
        return unpacked(content, _at_home(tensors, layout))

    def shifted(
        self, items: Iterator[Any], distance: int, use: Callable[[Any], None]
    ) -> None:
        """Vote for each item; ranks with fewer send nothing in the end."""
        other: Any = None
        while True:
            with self.together(f"columns at distance {distance}") as ballot:
                if other is not None:
                    use(other)
                item = next(items, None)
                ballot.flag = item is not None
            if not ballot.flag:  # on no rank there was another one
                return
            other = self.swapped(item, -distance) if distance else item

    def swapped(self, item: Any, distance: int) -> Any:
        head, tensors = packed(item)
        mine = torch.frombuffer(bytearray(head), dtype=torch.uint8).to(self._device)
        size = torch.tensor([len(head)], device=self._device)
        with _explained():
            (size,) = self._swap([size], [torch.empty_like(size)], distance)
            buffer = torch.empty(int(size), dtype=torch.uint8, device=self._device)
            (buffer,) = self._swap([mine], [buffer], distance)
            content, layout = layout_of(buffer.cpu().numpy().tobytes())
            given = [tensor.to(self._device) for tensor in tensors]
            received = self._swap(given, self._empty(layout), distance)
        return unpacked(content, _at_home(received, layout))

    def _swap(
        self, given: list[Tensor], received: list[Tensor], distance: int
    ) -> list[Tensor]:
        sink, source = ((self.rank + d) % self.size for d in (distance, -distance))
        both: list[tuple[Callable[..., Any], Tensor, int]]
        both = [(dist.isend, t, sink) for t in given if t.numel()]
        both += [(dist.irecv, t, source) for t in received if t.numel()]
        self._exchange(both)
        return received

    def _exchange(self, wanted: list[tuple[Callable[..., Any], Tensor, int]]) -> None:
        """Send to ranks and receive from ranks, all at once."""
        operations = [
            dist.P2POp(f, tensor, self._global(peer), self._group)
            for f, tensor, peer in wanted
        ]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()

    def _empty(self, layout: Layout) -> list[Tensor]:
        return [torch.empty(s, dtype=d, device=self._device) for d, s, _ in layout]

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self._group, rank)

    # Votes ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, what: str, *inputs: Tensor) -> Iterator[Ballot]:
        """Do what all ranks do at the same time, each for itself; then vote.

        Raises:
            RankError: If another rank fails, does something else, or has other inputs.
        """
        ballot, error = Ballot(), None
        _VOTING.groups.append(self._group.group_name)
        try:
            yield ballot
        except BaseException as raised:
            error = raised
        _VOTING.groups.pop()
        self._vote(what, inputs, error, ballot)

    @contextlib.contextmanager
    def called(self, what: str) -> Iterator[None]:
        """Vote at the end, unless all know of an error; not inside of what is voted on.

        Raises:
            RankError: If another rank fails, or does something else.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
        is_voted_on = self._group.group_name in _VOTING.groups
        if error is not None and (is_voted_on or is_known(error)):
            raise error
        if not is_voted_on:
            self._vote(what, (), error, Ballot())

    def _vote(
        self,
        what: str,
        inputs: tuple[Tensor, ...],
        error: BaseException | None,
        ballot: Ballot,
    ) -> None:
        name = self._group.group_name
        number = _VOTES[name] = _VOTES.get(name, 0) + 1
        deed = zlib.crc32(f"{number}{what}".encode())
        seen = checksum(inputs + ballot.given)
        heights = [0] * self.size
        heights[self.rank] = ballot.rows
        slip = torch.tensor(
            [error is not None, ballot.flag, deed, -deed, seen, -seen, *heights],
            dtype=torch.int64,
            device=self._device,
        )
        with _explained(error):
            dist.all_reduce(slip, op=dist.ReduceOp.MAX, group=self._group)
        failed, flag, deed_max, deed_min, seen_max, seen_min, *heights = slip.tolist()
        ballot.flag, ballot.heights = bool(flag), heights
        if not failed and deed_max == -deed_min and seen_max == -seen_min:
            return
        notes = list(self.gathered(Note.of(what, number, seen, error)))
        # Whatever has been left out on some ranks: now all are at the same place.
        _VOTES[name] = max(note.number for note in notes)
        first = decisive(notes)
        if error is not None and first is not None:
            if notes[first].kind == notes[self.rank].kind:
                raise known(error)
        raise as_error(notes, self.rank) from error


@contextlib.contextmanager
def _explained(error: BaseException | None = None) -> Iterator[None]:
    """Say what it means that ranks cannot be reached; an error of before is raised."""
    try:
        yield
    except RuntimeError as failure:
        if error is not None:
            raise known(error) from failure
        if is_out_of_memory(failure):
            raise known(failure) from None
        raise RankError(
            "a rank has ended, or has not come within the time limit of the process "
            f"group ({failure}). Start the processes again."
        ) from failure


def _at_home(tensors: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Return tensors on the types of devices that they came from."""
    pairs = zip(tensors, layout, strict=True)
    return [t if t.device.type == kind else t.to(kind) for t, (*_, kind) in pairs]


def _is_rounding(own: Tensor, theirs: Tensor) -> bool:
    if own.shape != theirs.shape:
        return False
    eps = torch.finfo(own.dtype).eps
    return bool((own - theirs).norm() <= eps**0.5 * theirs.norm())
