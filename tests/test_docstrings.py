"""The examples in the docstrings of all public modules run as shown."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import vivit_linop as vl

pytestmark = pytest.mark.host("shows what the CPU prints")

MODULES = [
    "vivit_linop",
    *(
        module.name
        for module in pkgutil.walk_packages(vl.__path__, "vivit_linop.")
        if not any(part.startswith("_") for part in module.name.split("."))
    ),
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    if name == "vivit_linop.interop.laplace":
        pytest.importorskip("laplace")
    module = importlib.import_module(name)
    torch.manual_seed(0)
    results = doctest.testmod(
        module, extraglobs={"torch": torch, "vl": vl}, optionflags=FLAGS
    )
    assert results.failed == 0


def test_operators_have_examples() -> None:
    """What the package exports shows how it is used, exceptions aside."""
    finder = doctest.DocTestFinder()
    for name in vl.__all__:
        exported = getattr(vl, name)
        if not isinstance(exported, type) and not callable(exported):
            continue  # a module
        tests = finder.find(exported, name)
        assert any(test.examples for test in tests), f"vl.{name} shows no example"
