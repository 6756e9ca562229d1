"""The examples in the docstrings of all public modules run as shown."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import vivit_linop as vl
from vivit_linop.operators.methods import VerbMethods
from vivit_linop.risk.base import Risk
from vivit_linop.risk.derived import DerivableRisk

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


# What a reader looks for in the text of a function.
SHAPES = re.compile(r"``\[|``\(|scalar|operator|without axes|\bone number|numbers?\b")
COSTS = re.compile(
    r"\b[Cc]osts?\b|\b[Tt]akes?\b|\bpass(es)?\b|\bproducts?\b|backward|closed form|O\("
)
REFUSES = re.compile(r"^\s+raise \w|self\._check_", re.MULTILINE)
# Classes whose methods are for users, but for what other rooms of the package call.
CLASSES = {
    VerbMethods: set(),
    DerivableRisk: {"is_current"},
    Risk: {
        "batches",
        "targets",
        "does_not_fit",
        "check_outputs",
        "has_outputs",
        "inputs_differ",
        "other_data",
    },
    vl.GGN: set(),
    vl.GGNFactor: set(),
    vl.PerSampleGradients: set(),
    vl.EmpiricalFisher: set(),
    vl.Hessian: set(),
    vl.KFAC: set(),
    vl.EKFAC: set(),
    vl.Eigenpairs: set(),
    vl.LanczosSpectrum: set(),
    vl.Laplace: set(),
}

WITHOUT_TENSORS = {"calibrate", "Eigenpairs.plot", "LanczosSpectrum.plot"}


def public() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """The functions and methods that users call: name, function, class's docstring."""
    for name in vl.__all__:
        if inspect.isfunction(found := getattr(vl, name)):
            yield name, found, ""
    for of_class, internal in CLASSES.items():
        for name, found in vars(of_class).items():
            if inspect.isfunction(found) and name[0] != "_" and name not in internal:
                yield (
                    f"{of_class.__name__}.{name}",
                    found,
                    inspect.getdoc(of_class) or "",
                )


PUBLIC = {name: (function, about) for name, function, about in public()}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_say_shapes_costs_errors_and_have_an_example(name: str) -> None:
    function, about_class = PUBLIC[name]
    text = inspect.getdoc(function) or ""
    assert name in WITHOUT_TENSORS or SHAPES.search(text), "no shape"
    assert COSTS.search(text), "no cost"
    if REFUSES.search(inspect.getsource(inspect.unwrap(function))):
        assert "Raises:" in text or "Raises:" in about_class, "no errors"
    method = name.rpartition(".")[2]
    shown = [text, *(line for line in about_class.splitlines() if ">>>" in line)]
    own = ">>>" in text or "has an example" in text or "; see " in text
    assert own or any(f".{method}(" in line for line in shown[1:]), "no example"


@pytest.mark.parametrize("name", vl.linalg.__all__)
def test_verbs_have_an_example_or_name_the_method_that_has(name: str) -> None:
    verb = getattr(vl.linalg, name)
    if not isinstance(verb, type):
        text = inspect.getdoc(verb) or ""
        assert SHAPES.search(text), "no shape"
        method = f"``A.{'eigh' if name == 'eigendecomposition' else name}``"
        assert ">>>" in text or method in text


def test_what_a_docstring_lacks_is_seen() -> None:
    assert not SHAPES.search("Return the diagonal.")
    assert not COSTS.search("Return the diagonal, ``[n]``.")
    assert REFUSES.search("def f():\n    raise ValueError(1)")
    assert len(PUBLIC) > 60
