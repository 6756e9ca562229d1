"""Torch's C++ is told that there is a GPU. Imported before torch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def built() -> Path:
    """The library, compiled once for a version of torch and of the source."""
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"vivit-linop-guard-{digest}.so"
    if not library.exists():
        torch = torch_folder()
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                *(shutil.which("g++") or "c++", "-shared", "-fPIC", "-O0"),
                *("-std=c++20", "-w", str(SOURCE), "-o", str(unfinished)),
                *("-I", str(torch / "include")),
                *("-L", str(torch / "lib"), "-lc10", "-ltorch_cpu"),
            ],
            check=True,
        )
        unfinished.replace(library)
    return library


def load() -> None:
    """Load torch's libraries and this one: torch asks for a GPU once, and remembers."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built()))
