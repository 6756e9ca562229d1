"""A pretended GPU: tensors that say ``cuda:0`` over numbers on the CPU.

Every operation of torch goes through :func:`run`. It computes on the CPU, wraps the
results, raises an error as CUDA does where devices are mixed, and writes down what
would make the host wait for the device, and what is copied between them. It knows
nothing of time, kernels or memory.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from . import guard

guard.load()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import (  # noqa: E402
    TorchDispatchMode,
    return_and_correct_aliasing,
)

CUDA = torch.device("cuda:0")
# Whose result is read by the host, or has a size that it must know.
_WAITS = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "argwhere",
    "bincount",
    "equal",
    "is_nonzero",
    "linalg_eig",
    "linalg_eigh",
    "linalg_lstsq",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}
_INDEXING = {"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"}
# What computes nothing and is no view by its schema.
_NO_KERNEL = {"_unsafe_view", "promote_types", "is_same_size", "set_"}
# Which take tensors of the host.
_MIXING = {"_to_copy", "copy_", "detach", "lift_fresh", *_INDEXING}


class Events(Counter[str]):
    """How often the host waits or copies, by what and where in the package.

    Attributes:
        launches: How many operations on the device are no mere views.
    """

    active: Events | None = None
    launches: int = 0

    @staticmethod
    def note(what: str) -> None:
        if Events.active is not None:
            Events.active[f"{what} {_place()}"] += 1

    @classmethod
    @contextlib.contextmanager
    def recorded(cls) -> Iterator[Events]:
        cls.active = events = cls()
        try:
            yield events
        finally:
            cls.active = None


def _place() -> str:
    """Where the package is, innermost first."""
    frames, frame = [], sys._getframe(1)
    while frame is not None and len(frames) < 3:
        file = frame.f_code.co_filename
        if "vivit_linop/" in file and "tests" not in file:
            frames.append(f"{file.rsplit('vivit_linop/', 1)[1]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(frames)


class Pretended(Tensor):
    """A tensor that says that it is on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        wrapper: Pretended = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        Events.note("waits: tolist")
        return self.inner.tolist()

    def __format__(self, spec: str) -> str:
        Events.note("waits: format")
        return self.inner.__format__(spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = Pretended(self.inner.detach().clone())
            copied.requires_grad_(self.requires_grad)
            copied.__dict__.update(
                {k: v for k, v in self.__dict__.items() if k != "inner"}
            )
            memo[id(self)] = copied
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_of_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        parts = index if isinstance(index, tuple) else (index,)
        if any(isinstance(part, (Tensor, list)) for part in parts):
            # CUDA makes a tensor of the host of it, and waits for its copy.
            if isinstance(value, (bool, int, float)):
                Events.note("waits: a number put at an index")
        super().__setitem__(_of_tensors(index), value)


def _of_tensors(index: Any) -> Any:
    """An index whose lists are tensors: torch's C++ would make them on the device."""
    if isinstance(index, tuple):
        return tuple(_of_tensors(part) for part in index)
    return torch.as_tensor(index) if isinstance(index, list) else index


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the numbers."""
    name = func._schema.name.split("::")[1]
    ours: list[Tensor] = []
    hosts: list[Tensor] = []

    def plain(x: Any) -> Any:
        if isinstance(x, Pretended):
            ours.append(x)
            return x.inner
        if isinstance(x, Tensor):
            hosts.append(x)
        return x

    plain_args, given = _mapped(plain, args), _mapped(plain, kwargs)
    on_gpu = bool(ours)
    if given.get("device") is not None:
        target = torch.device(given["device"])
        on_gpu = target.type == "cuda"
        given["device"] = torch.device("cpu") if on_gpu else target
    if on_gpu and kwargs.get("generator") is not None:
        if kwargs["generator"].device.type != "cuda":
            raise RuntimeError(f"{name}: a generator of the CPU at {_place()}")
    if name == "copy_":
        on_gpu = isinstance(args[0], Pretended)
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        # Tensors of shapes alone have no numbers to wait for.
        if given.get("device") == torch.device("meta"):
            pass
        elif isinstance(source, Pretended) and not on_gpu:
            Events.note("waits: a copy to the host")
        elif on_gpu and not isinstance(source, Pretended):
            Events.note("copies to the device")
    elif name in _INDEXING:
        _check_index(name, args)
    elif ours and name not in _MIXING and any(host.ndim > 0 for host in hosts):
        raise RuntimeError(f"{name}: tensors of two devices at {_place()}")
    if ours and name in _WAITS:
        Events.note(f"waits: {name}")
    if on_gpu and Events.active is not None and _launches(func, name):
        Events.active.launches += 1
    out = func(*plain_args, **given)
    if func._schema.is_mutable and not name.startswith("_native_batch"):
        return _written(func, args, kwargs, out, on_gpu)
    if not on_gpu:
        return out
    out = _mapped(_pretending, out)
    if name == "_to_copy":
        return out
    # Some functions have no rule for what their results share with their arguments.
    with contextlib.suppress(Exception):
        out = return_and_correct_aliasing(func, args, kwargs, out)
    return out


@functools.cache
def _launches(func: Any, name: str) -> bool:
    """Whether an operation computes: it is no view, and gives more than memory."""
    if name in _NO_KERNEL or name.startswith(("empty", "new_empty")):
        return False
    returns = [said.alias_info for said in func._schema.returns]
    return any(alias is None or alias.is_write for alias in returns)


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """Arguments or results with what is in their lists and tables changed."""
    if isinstance(x, dict):
        return {name: _mapped(change, part) for name, part in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)([_mapped(change, part) for part in x])
    return change(x)


def _pretending(x: Any) -> Any:
    is_plain = isinstance(x, Tensor) and not isinstance(x, Pretended)
    return Pretended(x) if is_plain else x


def _check_index(name: str, args: Any) -> None:
    on_gpu = isinstance(args[0], Pretended)
    for index in args[1]:
        if index is None:
            continue
        if index.dtype == torch.bool and isinstance(index, Pretended):
            Events.note("waits: an index of truth values")
        if on_gpu and not isinstance(index, Pretended):
            Events.note("copies to the device: an index")
        if isinstance(index, Pretended) and not on_gpu:
            raise RuntimeError(f"{name}: an index of the GPU at {_place()}")
    if "put" in name and on_gpu:
        value = args[2]
        if not isinstance(value, Pretended) and value.ndim > 0:
            raise RuntimeError(f"{name}: a value of the CPU at {_place()}")


def _written(func: Any, args: Any, kwargs: Any, out: Any, on_gpu: bool) -> Any:
    """The arguments that were written to, where results are these."""
    schema = func._schema
    named = list(zip(schema.arguments, args, strict=False))
    named += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
    results = []
    outs = out if isinstance(out, (tuple, list)) else (out,)
    for said, result in zip(schema.returns, outs, strict=False):
        alias = said.alias_info
        if alias is not None and alias.is_write:
            results += [
                value
                for argument, value in named
                if argument.alias_info is not None
                and argument.alias_info.is_write
                and argument.alias_info.before_set == alias.before_set
            ][:1]
        else:
            results.append(_pretending(result) if on_gpu else result)
    if isinstance(out, (tuple, list)) and len(results) != 1:
        return tuple(results)
    return results[0] if results else None


class PretendedGPU(TorchDispatchMode):
    """Operations that make tensors where ``device="cuda"`` says so."""


def _dispatch(
    mode: PretendedGPU, func: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    return run(func, args, kwargs or {})


# Of a class that defines it torch wraps it for its compiler, whose import takes longer
# than what is rehearsed.
PretendedGPU.__torch_dispatch__ = _dispatch


class Generator(torch.Generator):
    """One of the CPU that says where it was asked for."""

    said: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        generator = super().__new__(cls, "cpu")
        generator.said = torch.device(device)
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA if self.said.type == "cuda" else self.said


def on_the_gpu(x: Any) -> Any:
    """Copies of tensors, and modules as they are, on the pretended GPU."""
    if isinstance(x, nn.Module):
        for module in x.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    moved = nn.Parameter(on_the_gpu(p), p.requires_grad)
                    module._parameters[name] = moved
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = on_the_gpu(b)
        return x
    return Pretended(x.detach().clone())


def _install() -> None:
    """What is asked of ``torch.cuda``, and the makers of tensors that pass dispatch."""
    state = torch.zeros(16, dtype=torch.uint8)
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_rng_state = lambda device="cuda": state.clone()
    cuda.set_rng_state = lambda new, device="cuda": None
    cuda.mem_get_info = lambda device=None: (int(4e9), int(8e9))
    cuda.memory_reserved = lambda device=None: 0
    cuda.memory_allocated = lambda device=None: 0
    cuda.synchronize = lambda device=None: Events.note("waits: synchronize")

    tensor, new_tensor = torch.tensor, torch.Tensor.new_tensor

    def made(data: Any, *, device: Any = None, **given: Any) -> Tensor:
        if device is not None and torch.device(device).type == "cuda":
            Events.note("copies to the device: torch.tensor")
            return Pretended(tensor(data, **given))
        return tensor(data, device=device, **given)

    def made_like(self: Tensor, data: Any, *, device: Any = None, **given: Any) -> Any:
        if isinstance(self, Pretended) and device is None:
            Events.note("copies to the device: new_tensor")
            return Pretended(new_tensor(self.inner, data, **given))
        return new_tensor(self, data, device=device, **given)

    replaced: Any = torch
    replaced.tensor = made
    replaced.Generator = Generator
    replaced.Tensor.new_tensor = made_like


_install()
