"""The page on the architecture names the files there are; test files keep to bounds."""

import pkgutil
import re
from pathlib import Path

import pytest

import vivit_linop as vl

pytestmark = pytest.mark.host("text")

PACKAGE = Path(vl.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"


def rooms() -> dict[str, set[str]]:
    """By folder, the modules that the page lists."""
    found: dict[str, set[str]] = {}
    for room, listed in re.findall(
        r"^\| `(\w+)/` \|[^|]*\| (.*) \|$", PAGE.read_text(), re.M
    ):
        folder = room
        for word, slash in re.findall(r"`(\w+)(/?)`", listed):
            if slash:
                folder = f"{room}/{word}"
            else:
                found.setdefault(folder, set()).add(word)
    return found


def test_each_room_lists_its_modules() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    inside: dict[str, set[str]] = {}
    for path in files:
        folder = str(path.parent.relative_to(PACKAGE))
        if folder != ".":
            inside.setdefault(folder, set()).add(path.stem)
    assert rooms() == inside


def test_modules_beside_the_rooms_are_named() -> None:
    text = PAGE.read_text()
    alone = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in alone if f"`{name}`" not in text] == []


def test_paths_in_the_text_exist() -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE.read_text())
    assert named and [name for name in named if not (PACKAGE / name).exists()] == []


def test_names_in_docstrings_exist() -> None:
    reference = re.compile(r":(?:mod|class|func|meth):`~?(vivit_linop\.[\w.]+)`")
    named = {
        (path.name, name)
        for path in PACKAGE.rglob("*.py")
        for name in reference.findall(path.read_text())
    }
    assert named and [name for name in named if not exists(name[1])] == []


def exists(name: str) -> bool:
    """Whether a module, or what one has, is called so."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_test_files_are_short_and_import_no_other() -> None:
    for path in Path(__file__).parent.rglob("test_*.py"):
        source = path.read_text()
        assert source.count("\n") <= 600, path.name
        assert not re.findall(r"^(?:from|import) (?:tests\.)?test_", source, re.M), path
