"""Files that are there as a whole or not at all, and that tell when they are damaged.

A file is what ``torch.save`` writes, then the version of the format and a SHA-256
digest. So ``torch.load(weights_only=True)`` reads it too; here the digest is compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch

_VERSION = 3
_MARK = f"vivit_linop {_VERSION} sha256 ".encode()
_END = len(_MARK) + hashlib.sha256().digest_size * 2


def check_place(path: str | os.PathLike[str]) -> Path:
    """Return where a file of that name is to be written; a link stays a link.

    Raises:
        TypeError: If it is no name.
        FileNotFoundError: If there is no such folder.
        IsADirectoryError: If it is a folder.
        PermissionError: If it may not be written there.
        ValueError: If it is neither a file nor a folder, such as a pipe.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            "path: the name of a file, after the result: save(result, path, risk), got "
            f"{type(path).__name__}."
        )
    place = Path(os.path.realpath(path))
    folder = place.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"path: there is no folder {folder}. Make it first.")
    if place.is_dir():
        raise IsADirectoryError(f"path: {path} is a folder. Give the name of a file.")
    if place.exists() and not place.is_file():
        raise ValueError(f"path: {path} is no file. Give the name of a file.")
    for needed in (folder, place):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise PermissionError(f"path: {needed} may not be written.")
    return place


def write(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a file, in place of one of that name only when it is complete and on disk.

    Of tensors, numbers and strings in dictionaries. One that is there keeps its
    permissions. Whoever writes at the same time writes a file of his own: the last one
    stays.

    Raises:
        OSError: As :func:`check_place`; if there is no room.
    """
    place = check_place(path)
    unfinished = place.with_name(f"{place.name[:40]}.{uuid4().hex}.unfinished")
    try:
        # A new file, with the permissions that the process gives to such.
        with unfinished.open("xb+") as file:
            if place.exists():
                unfinished.chmod(stat.S_IMODE(place.stat().st_mode))
            torch.save(content, file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.write(_MARK + digest.encode())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(place)
        _sync_folder(place.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the new name of a file on disk, where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            # Some network file systems have no such thing.
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: str | os.PathLike[str], device: torch.device) -> Any:
    """Read what :func:`write` wrote, to the last bit.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is damaged, or something else.
    """
    with open(path, "rb") as file:
        _check(file, path)
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)


def _check(file: BinaryIO, path: str | os.PathLike[str]) -> None:
    size = os.fstat(file.fileno()).st_size
    file.seek(max(size - _END, 0))
    end = re.fullmatch(rb"vivit_linop (\d+) sha256 ([0-9a-f]{64})", file.read())
    if end is None:
        raise ValueError(
            f"path: {path} is no file that vl.save wrote, or its end is missing or "
            "damaged. Compute the result again, and save it."
        )
    if int(end[1]) != _VERSION:
        raise ValueError(
            f"path: {path} has version {int(end[1])} of the format, this package reads "
            f"version {_VERSION}. Load it with the package that saved it."
        )
    with (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents,
        memoryview(contents) as view,
        view[: size - _END] as payload,
    ):
        digest = hashlib.sha256(payload).hexdigest()
    if digest.encode() != end[2]:
        raise ValueError(
            f"path: {path} is damaged, its digest is not the one that it was saved "
            "with. Compute the result again, and save it."
        )
