"""Packages that only parts of the library use: the extras of its installation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# The names of the distributions, by the names of the extras.
_PACKAGES = {
    "backpack": "backpack-for-pytorch",
    "curvlinops": "curvlinops-for-pytorch",
    "laplace": "laplace-torch",
    "plot": "matplotlib",
}


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the extra that is missing where an import inside fails.

    Raises:
        ModuleNotFoundError: If a module is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"This needs {_PACKAGES[name]} ({error}): "
            f"pip install 'vivit-linop[{name}]'.",
            name=error.name,
        ) from error
