"""Reentrant activation checkpoints, run as those of torch's other variant.

What ``checkpoint(…, use_reentrant=True)`` recomputes has a backward pass of its own,
which cannot give gradients of chosen tensors (``torch.autograd.grad``), nor second
derivatives. The other variant can, at the same memory. Which of the two runs is decided
where torch looks up its ``CheckpointFunction``, so this name is taken while a net with
such checkpoints is inside; threads that are not get torch's own. Backward passes on a
GPU run in a thread of autograd's, and so does what they recompute: the function that
torch keeps for that says that it is inside.

Selective checkpoints keep what a policy chooses, for one backward pass alone. Inside
they recompute everything.

What a net runs in a :class:`Repeated` mode is recomputed in that mode, and with the
tensors that its modules had (``torch.func.functional_call``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

Contexts = Callable[[], tuple[Any, Any]]
Again = Callable[[], contextlib.AbstractContextManager[Any]]

_torch: Any = checkpoint
# Runs a checkpoint of the other variant, and keeps the function. Private to torch: if
# it is gone, checkpoints in checkpoints raise torch's own error on a GPU, and selective
# ones at a second backward pass.
_START = "_checkpoint_without_reentrant_generator"


class _Here(threading.local):
    """How often this thread is inside, and the modes that it is in."""

    def __init__(self) -> None:
        self.depth = 0
        self.modes: list[Repeated] = []


_HERE = _Here()


class Repeated(TorchFunctionMode):
    """A mode for a run of a net, and for what checkpoints recompute of it."""

    def __enter__(self) -> Any:
        """Enter the mode."""
        _HERE.modes.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Leave it."""
        _HERE.modes.pop()
        super().__exit__(*exception)

    def again(self) -> Again:
        """Return what makes the mode for recomputing what runs from now on."""
        return lambda: self


class _Recomputed:
    """For ``with``: reentrant checkpoints of this thread run as the other variant.

    It stands in for ``CheckpointFunction`` while any thread is inside.

    Attributes:
        seen: Whether there has been one.
        copies: Makes what copies functions with the tensors that modules have now.
    """

    seen = False
    copies: Callable[[], Any]

    def __init__(self) -> None:
        self._lock, self._entered = threading.Lock(), 0

    def __enter__(self) -> None:
        """Take the name, if no other thread has."""
        with self._lock:
            if not self._entered:
                self._original = _torch.CheckpointFunction
                self._start = getattr(_torch, _START, None)
                _torch.CheckpointFunction = self
                if self._start is not None:
                    setattr(_torch, _START, partial(self._recomputing, self._start))
            self._entered += 1
        _HERE.depth += 1

    def __exit__(self, *exception: object) -> None:
        """Give it back, if no other thread needs it."""
        _HERE.depth -= 1
        with self._lock:
            self._entered -= 1
            if not self._entered:
                _torch.CheckpointFunction = self._original
                if self._start is not None:
                    setattr(_torch, _START, self._start)

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run a checkpoint, by torch's own function in threads that are not inside."""
        if not _HERE.depth:
            return self._original.apply(function, preserve, *args)
        self.seen = True
        return _torch.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve
        )

    def _recomputing(
        self,
        start: Callable[..., Any],
        function: Callable[..., Any],
        preserve: bool,
        contexts: Contexts,
        *args: Any,
        **given: Any,
    ) -> Any:
        """Start torch's other variant."""
        if _HERE.depth:
            self.seen = True
            modes, copies = [mode.again() for mode in _HERE.modes], self.copies()
            function = partial(self._inside, copies.of_called(function), modes)
            args = tuple(map(copies.of, args))
            given = {name: copies.of(value) for name, value in given.items()}
            # With contexts of its own a checkpoint may not be debugged.
            if contexts is not _torch.noop_context_fn:
                contexts = partial(_without_policy, contexts)
        return start(function, preserve, contexts, *args, **given)

    def _inside(
        self,
        function: Callable[..., Any],
        modes: Sequence[Again],
        *args: Any,
        **given: Any,
    ) -> Any:
        """Recompute; there may be checkpoints again, in a thread of autograd's."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self)
            for mode in modes:
                stack.enter_context(mode())
            return function(*args, **given)


def _without_policy(contexts: Contexts) -> tuple[Any, Any]:
    """Return contexts of a checkpoint, for running and for recomputing."""
    found = contexts()
    if isinstance(found[0], getattr(_torch, "_CachingTorchDispatchMode", ())):
        found = _torch.noop_context_fn()
    return found


RECOMPUTED = _Recomputed()
