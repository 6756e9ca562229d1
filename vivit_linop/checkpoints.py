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
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils import checkpoint

Contexts = Callable[[], tuple[Any, Any]]

_torch: Any = checkpoint
# Runs a checkpoint of the other variant, and keeps the function. Private to torch: if
# it is gone, checkpoints in checkpoints raise torch's own error on a GPU, and selective
# ones at a second backward pass.
_START = "_checkpoint_without_reentrant_generator"


class _Here(threading.local):
    """How often this thread is inside, and whether it has met a checkpoint."""

    depth, seen = 0, False


class _Recomputed:
    """For ``with``: reentrant checkpoints of this thread run as the other variant.

    It stands in for ``CheckpointFunction`` while any thread is inside.

    Attributes:
        seen: Whether there has been one, or a selective one.
    """

    def __init__(self) -> None:
        self._lock, self._entered = threading.Lock(), 0
        self._here, self.seen = _Here(), False

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
        self._here.depth += 1

    def __exit__(self, *exception: object) -> None:
        """Give it back, if no other thread needs it."""
        self._here.depth -= 1
        with self._lock:
            self._entered -= 1
            if not self._entered:
                _torch.CheckpointFunction = self._original
                if self._start is not None:
                    setattr(_torch, _START, self._start)

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run a checkpoint, by torch's own function in threads that are not inside."""
        if not self._here.depth:
            return self._original.apply(function, preserve, *args)
        self.seen = self._here.seen = True
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
        if self._here.depth:
            function = partial(self._inside, function)
            contexts = partial(self._without_policy, contexts)
        return start(function, preserve, contexts, *args, **given)

    def _inside(self, function: Callable[..., Any], *args: Any, **given: Any) -> Any:
        """Also what is recomputed may have checkpoints, in a thread of autograd's."""
        with self:
            return function(*args, **given)

    def _without_policy(self, contexts: Contexts) -> tuple[Any, Any]:
        """Return contexts of a checkpoint, for running and for recomputing."""
        found = contexts()
        if isinstance(found[0], getattr(_torch, "_CachingTorchDispatchMode", ())):
            self.seen = self._here.seen = True
            found = _torch.noop_context_fn()
        return found

    def seen_here(self) -> bool:
        """Whether this thread has met one since it was asked last."""
        seen, self._here.seen = self._here.seen, False
        return seen


RECOMPUTED = _Recomputed()
