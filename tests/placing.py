"""What a test makes without naming a device lies on the device that tests run on.

``pytest --device cuda`` runs every test there; their bodies say nothing of devices.
The makers of tensors (``torch.rand``, ``nn.Linear`` …) look at who asks. Asked by a
test, or by torch on its behalf, they make the tensor on the host and move it: all
devices see the same numbers. Asked by the package they do what torch does: a
``device=`` that it forgot shows as a tensor of the wrong device, which
``torch.set_default_device`` would hide. NumPy gets a test's tensors through the host.
Recurrent layers that tests run by themselves, for what is expected, run without cuDNN,
which lacks derivatives of them; the package has to see to that where it runs a net.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vivit_linop
from vivit_linop.linalg.krylov import solver_on

TESTS = str(Path(__file__).parent)
PACKAGE = str(Path(vivit_linop.__file__).parent)
HOST = torch.device("cpu")
# Lengths of packed sequences are the host's.
OF_THE_HOST = torch.nn.utils.rnn.__file__

_MAKERS = """
    arange as_tensor asarray empty eye from_numpy full linspace logspace ones rand
    randint randn randperm tensor tril_indices triu_indices zeros
""".split()
_MAKERS_LIKE = ["rand_like", "randint_like", "randn_like"]
_DRAWN_IN_PLACE = ["bernoulli_", "exponential_", "normal_", "random_", "uniform_"]


class _Now:
    """Where tests make their tensors."""

    device = HOST


def device() -> torch.device:
    """Where tests make their tensors."""
    return _Now.device


def krylov(side: str) -> str:
    """The route to a few eigenpairs of an operator, where tests run."""
    return f"{solver_on(device())} on {side}"


@contextlib.contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Tests make their tensors on another device for a while."""
    before, _Now.device = _Now.device, device
    try:
        yield
    finally:
        _Now.device = before


def place(device: torch.device) -> None:
    """From now on, what tests make lies on this device."""
    _Now.device = device
    # Torch compiles rules for forward mode from source when they are first needed.
    # Its compiler knows the makers of tensors, and not what takes their place below.
    one = torch.ones(())
    torch.func.jvp(torch.sin, (one,), (one,))
    replaced: Any = torch
    for name in _MAKERS:
        setattr(replaced, name, _moved(getattr(torch, name)))
    for name in _MAKERS_LIKE:
        setattr(replaced, name, _moved_like(getattr(torch, name)))
    replaced = Tensor
    for name in _DRAWN_IN_PLACE:
        setattr(replaced, name, _drawn_on_the_host(getattr(Tensor, name)))
    for name in ("numpy", "__array__"):
        setattr(replaced, name, _through_the_host(getattr(Tensor, name)))
    for replaced in (nn.RNN, nn.LSTM, nn.GRU):
        replaced.forward = _with_derivatives(replaced.forward)


def asked_by_a_test() -> bool:
    """Whether a test stands nearer on the stack than the package."""
    frame = sys._getframe(2)
    while frame is not None:
        who = _whose(frame.f_code.co_filename)
        if who:
            return who == TESTS
        frame = frame.f_back  # type: ignore[assignment]
    return False


@functools.cache
def _whose(file: str) -> str | None:
    if file == __file__:
        return None
    if file == OF_THE_HOST:
        return file
    return next((room for room in (PACKAGE, TESTS) if file.startswith(room)), None)


def _moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def moved(*args: Any, **given: Any) -> Tensor:
        of_tensor = bool(args) and isinstance(args[0], Tensor)
        named = given.get("device") is not None or given.get("out") is not None
        if _Now.device == HOST or of_tensor or named or not asked_by_a_test():
            return make(*args, **given)
        requires_grad = given.pop("requires_grad", False)
        made = make(*args, **given)
        if made.device == HOST:  # and not where torch's default device is another one
            made = made.to(_Now.device)
        return made.requires_grad_() if requires_grad else made

    return moved


def _moved_like(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def moved(like: Tensor, *args: Any, **given: Any) -> Tensor:
        here = like.is_cuda and given.get("device") is None and asked_by_a_test()
        if not here:
            return make(like, *args, **given)
        return make(like.detach().cpu(), *args, **given).to(like.device)

    return moved


def _drawn_on_the_host(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(draw)
    def drawn(self: Tensor, *args: Any, **given: Any) -> Tensor:
        if not (self.is_cuda and asked_by_a_test()):
            return draw(self, *args, **given)
        return self.copy_(draw(self.detach().cpu(), *args, **given))

    return drawn


def _through_the_host(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def through(self: Tensor, *args: Any, **given: Any) -> Any:
        on_host = self.cpu() if self.is_cuda and asked_by_a_test() else self
        return read(on_host, *args, **given)

    return through


def _with_derivatives(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **given: Any) -> Any:
        if _runs_in_the_package():
            return forward(*args, **given)
        with torch.backends.cudnn.flags(enabled=False):
            return forward(*args, **given)

    return run


def _runs_in_the_package() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if _whose(frame.f_code.co_filename) == PACKAGE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
