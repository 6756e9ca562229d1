"""Modes of torch that a caller may be in, and that must not change results.

Some belong to a thread, others to the process: switches of kernels and of the compiler,
precisions, the generator of random numbers.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.compiler import is_dynamo_compiling

from vivit_linop.checkpoints import RECOMPUTED
from vivit_linop.ranks.alone import Ranks
from vivit_linop.ranks.messages import name_of

P = ParamSpec("P")
Result = TypeVar("Result")


def uncompiled(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a function that a caller's ``torch.compile`` is to leave as it is.

    The graph breaks there: the function, and all that it calls, runs uncompiled. It
    costs a call where nothing is compiled, and the compiler, which takes seconds to
    import, is imported only where the caller has done so.
    """

    @functools.wraps(function)
    def decorated(*args: P.args, **kwargs: P.kwargs) -> Result:
        if is_dynamo_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return _named_as(decorated, function)


def _named_as(
    decorated: Callable[P, Result], function: Callable[P, Result]
) -> Callable[P, Result]:
    """Give a wrapper a code object, by which the compiler counts what it compiles."""
    code = decorated.__code__
    decorated.__code__ = code.replace(co_name=function.__name__)
    return decorated


class _Here(threading.local):
    """How often this thread has entered the ordinary mode."""

    depth = 0


_HERE = _Here()


class ordinary_mode:
    """Run outside of the caller's inference mode, autocast, precision and compilation.

    What is kept must be ordinary tensors, and everything is computed in the precision
    of the operators: autocast and reduced precisions of float32 (TF32 and the like) are
    off, of which TF32 is torch's default for convolutions on a GPU. For ``with``, and
    as a decorator of functions.
    """

    _modes: Sequence[contextlib.AbstractContextManager[object]] = ()
    _precise: bool = False

    def __call__(self, function: Callable[P, Result]) -> Callable[P, Result]:
        """Decorate a function; one context for each call, since they may be nested."""

        @functools.wraps(function)
        def decorated(*args: P.args, **kwargs: P.kwargs) -> Result:
            if is_dynamo_compiling():
                return torch.compiler.disable(decorated)(*args, **kwargs)
            precise = _HERE.depth > 0
            if not precise:
                with _PRECISE.lock:
                    precise = not _PRECISE.undo and not _reduced()
            if Ranks.are_many and not _HERE.depth:
                with _shared(function, args, kwargs), ordinary_mode():
                    result = function(*args, **kwargs)
            elif precise and not to_leave():
                # As nearly always, and sooner than to enter a context.
                _HERE.depth += 1
                try:
                    result = function(*args, **kwargs)
                finally:
                    _HERE.depth -= 1
            else:
                with ordinary_mode():
                    result = function(*args, **kwargs)
            # It has enabled gradients; the caller may not want them.
            if isinstance(result, torch.Tensor) and result.requires_grad:
                return result if torch.is_grad_enabled() else result.detach()  # type: ignore[return-value]
            return result

        return _named_as(decorated, function)

    def __enter__(self) -> None:
        """Leave the modes."""
        # Written out, since it is entered in each product.
        if (
            torch.is_inference_mode_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.is_autocast_enabled("cuda")
        ):
            self._modes = to_leave()
            for mode in self._modes:
                mode.__enter__()
        depth = _HERE.depth
        if depth == 0:
            # Locked: another thread may be about to put reduced precisions back.
            with _PRECISE.lock:
                if _PRECISE.undo or _reduced():
                    _PRECISE.enter()
                    self._precise = True
        _HERE.depth = depth + 1

    def __exit__(self, *exception: object) -> None:
        """Enter them again."""
        _HERE.depth -= 1
        if self._precise:
            self._precise = False
            _PRECISE.leave()
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)


def _shared(
    function: Callable[..., Any], args: Sequence[Any], named: dict[str, Any]
) -> contextlib.AbstractContextManager[object]:
    """A call that all processes make which share what it is given, if any do."""
    given = [*args, *named.values()]
    each = [getattr(getattr(x, "risk", x), "ranks", None) for x in given]
    for ranks in each:
        if isinstance(ranks, Ranks) and ranks.is_many:
            return ranks.called(name_of(function, given))
    return contextlib.nullcontext()


def to_leave(
    inference: bool = True,
) -> list[contextlib.AbstractContextManager[object]]:
    """What leaves autocast and, if asked to, inference mode, asked in each product."""
    modes: list[contextlib.AbstractContextManager[object]] = []
    if inference and torch.is_inference_mode_enabled():
        modes.append(torch.inference_mode(False))
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            modes.append(torch.autocast(device, enabled=False))
    return modes


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Record a graph, and save for it what was computed.

    Gradients are recorded also where the caller has turned that off. Hooks of the
    caller's (``torch.autograd.graph.saved_tensors_hooks``) may round or change what a
    graph saves, and nobody can tell which do. So all of them have no effect inside,
    ``save_on_cpu`` included; the ``memory`` of a risk bounds what is kept.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        try:
            with disable_saved_tensors_hooks("There are none."):
                pass
        except RuntimeError:  # torch refuses to while there are some in this thread
            stack.enter_context(saved_tensors_hooks(_with_version, _unchanged))
        yield


def _with_version(tensor: Tensor) -> tuple[Tensor, int]:
    """Save a tensor as torch does without hooks, which looks at versions too."""
    # Detached: an output would own the graph that owns it, and never be freed.
    return tensor.detach(), tensor._version


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError(
            "A tensor that is needed for a gradient has been modified by an inplace "
            "operation."
        )
    return tensor


@contextlib.contextmanager
def as_guest(device: torch.device) -> Iterator[None]:
    """Run the user's code so that nothing global of the user's is changed.

    The random number generators are put back. Attention runs on the kernel that has
    all derivatives, and gradients are recorded also where the caller has turned that
    off. Frozen attention in eval mode does not take its fused path either: that rounds
    otherwise and sets padded positions to zero, and a net that is watched does not take
    it, so that outputs would depend on who calls; as they would in the caller's
    precision, which is off too (:class:`ordinary_mode`). What ``torch.compile`` has
    compiled runs as it was written: compiled code has no second derivatives, and no
    calls that could be recorded. Graphs keep what was computed, whatever hooks of the
    caller on saved tensors make of it (:func:`recorded`).

    What of this is one for the process is set while any thread is inside, and put back
    when the last one leaves. The device is that of the model.

    Raises:
        ValueError: Inside of a function that ``torch.func`` transforms, where ordinary
            derivatives are zero without a word.
    """
    try:
        is_traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
        is_recorded = is_traced or type(_LEAF.detach()) is not Tensor
        _LEAF.requires_grad_()
    except AssertionError:  # of FakeTensorMode
        is_recorded = True
    except RuntimeError as error:
        raise ValueError(
            "torch.func: a pass over the data would be differentiated or batched too, "
            "and what is kept of it would be wrong. Products with an operator may be "
            "transformed; compute what else the data are needed for "
            "(G.gram.to_dense(), G.diagonal(), …) before, or call .backward()."
        ) from error
    if is_recorded:
        raise ValueError(
            "torch.jit.trace, torch.export, FakeTensorMode: what runs inside is "
            "recorded or has no values, and operators are made of values. Compute "
            "outside; functions that torch.compile compiles may use them."
        )
    with contextlib.ExitStack() as stack:
        _GUESTS.enter(device)
        stack.callback(_GUESTS.leave)
        # A product has entered it already.
        if _HERE.depth == 0 or to_leave():
            stack.enter_context(ordinary_mode())
        stack.enter_context(recorded())
        if RECOMPUTED.seen:  # a loss may have some
            stack.enter_context(RECOMPUTED)
        yield


Undo = list[Callable[[], object]]


class Shared:
    """What is one for the process: set by the first that enters, put back by the last.

    Args:
        set_for: Sets it for a device, and says how that is undone.

    Attributes:
        lock: Held while they change.
        undo: What is to be put back; empty while nothing had to be set.
    """

    def __init__(self, set_for: Callable[[torch.device | None, Undo], None]) -> None:
        self._set_for = set_for
        # Reentrant: a handler of signals may run a product in the middle of this.
        self.lock, self._inside = threading.RLock(), 0
        self.undo: Undo = []
        self._devices: set[torch.device | None] = set()

    def enter(self, device: torch.device | None = None) -> None:
        """Set the switches, unless another thread has for this device."""
        with self.lock:
            self._inside += 1
            if device in self._devices:
                return
            try:
                self._set_for(device, self.undo)
            except BaseException:
                self.leave()
                raise
            self._devices.add(device)

    @contextlib.contextmanager
    def inside(self, device: torch.device | None = None) -> Iterator[None]:
        """Enter and leave."""
        self.enter(device)
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Put the switches back, if nobody else is inside."""
        with self.lock:
            self._inside -= 1
            if self._inside:
                return
            self._devices.clear()
            while self.undo:
                self.undo.pop()()


def _reduced() -> list[tuple[Any, object]]:
    """Where, of all devices in use, float32 is computed in less, and in what."""
    backends, found = _PRECISE_ON["cpu"], []
    if torch.cuda.is_initialized():
        backends = backends + _PRECISE_ON["cuda"]
    for backend in backends:
        if (precision := getattr(backend, _SWITCH)) not in _FULL:
            found.append((backend, precision))
    return found


def _set_precisions(_: torch.device | None, undo: Undo) -> None:
    """Compute in float32 what is float32."""
    for backend, precision in _reduced():
        undo.append(functools.partial(setattr, backend, _SWITCH, precision))
        setattr(backend, _SWITCH, _FULL[0])


def _set_for_guests(device: torch.device | None, undo: Undo) -> None:
    """Save the generators, and set the switches of kernels and of the compiler."""
    undo.append(functools.partial(torch.set_rng_state, torch.get_rng_state()))
    if device is not None and device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        undo.append(functools.partial(torch.cuda.set_rng_state, state, device))
    for get, put, value in _KERNELS:
        before = get()
        if before != value:
            undo.append(functools.partial(put, before))
            put(value)
    # Setting the stance imports the compiler, which takes seconds; without it nothing
    # is compiled.
    if "torch._dynamo" in sys.modules:
        stance = torch.compiler.set_stance("force_eager")
        undo.append(functools.partial(stance.__exit__, None, None, None))


_BACKENDS: Any = torch.backends
_MHA, _SDP = torch.backends.mha, torch.backends.cuda
_KERNELS: list[tuple[Callable[[], bool], Callable[[bool], object], bool]] = [
    (_MHA.get_fastpath_enabled, _MHA.set_fastpath_enabled, False),
    (_SDP.math_sdp_enabled, _SDP.enable_math_sdp, True),
    (_SDP.flash_sdp_enabled, _SDP.enable_flash_sdp, False),
    (_SDP.mem_efficient_sdp_enabled, _SDP.enable_mem_efficient_sdp, False),
    (_SDP.cudnn_sdp_enabled, _SDP.enable_cudnn_sdp, False),
]
# By the type of a device, where torch keeps the precision of products of float32; its
# name there, and what stands for the full one.
_CPU, _GPU = _BACKENDS.mkldnn, _BACKENDS.cudnn
_SWITCH: str = "allow_tf32"
_FULL: tuple[object, ...] = (False,)
_PRECISE_ON: dict[str, list[Any]] = {"cpu": [], "cuda": [_BACKENDS.cuda.matmul, _GPU]}
if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9
    _SWITCH, _FULL = "fp32_precision", ("ieee", "none")
    _PRECISE_ON = {
        "cpu": [_CPU.matmul, _CPU.conv, _CPU.rnn],
        "cuda": [_BACKENDS.cuda.matmul, _GPU.conv, _GPU.rnn],
    }


def _turn_off_cudnn(_: torch.device | None, undo: Undo) -> None:
    """Leave recurrences to kernels that torch has all derivatives of."""
    undo.append(functools.partial(setattr, _GPU, "enabled", _GPU.enabled))
    _GPU.enabled = False


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """Run a net with recurrent layers so that it has all derivatives on a GPU.

    cuDNN's recurrences have no backward pass in eval mode, and no second derivatives in
    any. Torch's own have both. They launch some kernels a time step, where cuDNN
    launches a few for all, so long sequences of small layers take several times as
    long; and convolutions beside them do their forward pass without cuDNN.
    """
    return _RECURRENCES.inside()


_PRECISE = Shared(_set_precisions)
_RECURRENCES = Shared(_turn_off_cudnn)
# While a guest is inside, a thread that is none should not draw from the generators:
# the same numbers would come again.
_GUESTS = Shared(_set_for_guests)
# Sets what is one for the process once for all guests inside, on a device.
guests_to_come = _GUESTS.inside
_REPLAY = threading.RLock()


# What generators draw from: the host's, and that of a device that is none.
States = list[Tensor]


def random_states(device: torch.device) -> States:
    """Return the states of the generators that a model on a device may draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: States, device: torch.device) -> None:
    """Put these generators into other states."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def seeded(seed: int, device: torch.device) -> States:
    """Return their states after a seed."""
    # Not by torch.manual_seed, which reaches the generators of all devices.
    places = dict.fromkeys(("cpu", device if device.type == "cuda" else "cpu"))
    return [torch.Generator(place).manual_seed(seed).get_state() for place in places]


@contextlib.contextmanager
def replayed(states: States, device: torch.device) -> Iterator[None]:
    """Draw from these generators in given states, one thread at a time.

    The caller's states come back.
    """
    with _REPLAY, _GUESTS.inside(device):
        before = random_states(device)
        try:
            set_random_states(states, device)
            yield
        finally:
            set_random_states(before, device)


@contextlib.contextmanager
def numbers_put_back(seed: int | None = None) -> Iterator[list[bool]]:
    """Put NumPy's generator and Python's back; says at the end whether they were used.

    To ask them takes as long as a small net, and few nets draw from them.

    Args:
        seed: What they are to draw from inside, if not from what they are at.
    """
    before = np.random.get_state(legacy=False), random.getstate()
    if seed is not None:
        np.random.seed(seed)
        random.seed(seed)
    used: list[bool] = []
    try:
        yield used
    finally:
        now = np.random.get_state(legacy=False), random.getstate()
        used.append(pickle.dumps(now) != pickle.dumps(before))
        if used[0]:
            np.random.set_state(before[0])
            random.setstate(before[1])


_DEFAULT_DTYPE = threading.RLock()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let what is made without a dtype have this one, which is one for the process.

    Where that needs a change, one thread at a time.
    """
    if torch.get_default_dtype() is dtype:
        yield
        return
    with _DEFAULT_DTYPE:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


# In what a transformation of ``torch.func`` runs, torch refuses ``requires_grad_()``.
with torch.inference_mode(False):  # in which the package may be imported
    _LEAF = torch.zeros((), device="cpu", requires_grad=True)


def needs_a_node(X: Tensor) -> bool:
    """Whether a product with X must be a node of autograd.

    Where derivatives are wanted in X. And in what ``torch.func`` transforms: what a
    node computes is outside of that.
    """
    if X.requires_grad and torch.is_grad_enabled():
        return True
    try:
        _LEAF.requires_grad_()
        return forward_ad.unpack_dual(X).tangent is not None
    except RuntimeError:
        return True


def is_differentiated(X: Tensor) -> bool:
    """Whether derivatives are wanted in a tensor, in reverse or in forward mode."""
    return (X.requires_grad and torch.is_grad_enabled()) or has_tangent(X)


def has_tangent(X: Tensor) -> bool:
    """Whether forward-mode differentiation goes through a tensor."""
    try:
        return forward_ad.unpack_dual(X).tangent is not None
    except RuntimeError:  # vmap does not tell
        return True


def is_followed(tensor: Tensor) -> bool:
    """Whether forward mode, or a transformation of ``torch.func``, follows a tensor."""
    try:
        _LEAF.requires_grad_()
    except RuntimeError:
        try:
            tensor.data_ptr()
        except RuntimeError:  # it stands for another one
            return True
    return has_tangent(tensor)
