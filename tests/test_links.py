"""Pages: links lead somewhere, every page is led to, tables have rows of one length."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import vivit_linop as vl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BUILT = {"_build", "_generated", "gallery"}
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "docs/**/*.rst")
    for path in ROOT.glob(pattern)
    if not BUILT & set(path.relative_to(ROOT).parts)
)
# Made by the build: from examples, and by docs/_ext/drawn_results.py.
MADE = {DOCS / "gallery" / "index.rst"} | {
    DOCS / "_generated" / name
    for name in ("mlp.svg", "3c3d.svg", "mlp-at-most.svg", "3c3d-at-most.svg")
}
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names that headings of a Markdown page get."""
    headings = re.findall(r"(?m)^#{1,6} (.+)$", prose(page))
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def targets(page: Path) -> list[tuple[Path, str]]:
    """The files that a page links to, and the headings in them."""
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    found = [link for link in links if "://" not in link]
    if page.suffix == ".rst":
        found += [f"{name}.rst" for name in re.findall(r":doc:`([^`<]+)`", text)]
    parts = (link.partition("#") for link in found)
    return [
        ((page.parent / name).resolve() if name else page, anchor)
        for name, _, anchor in parts
    ]


def as_page(path: Path) -> Path:
    """``:doc:`` leaves out whether a page is .rst or .md."""
    return path if path.exists() else path.with_suffix(".md")


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in targets(page):
        assert target in MADE or as_page(target).exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: #{anchor} of {target}"


@by_name
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    for table in re.findall(r"(?m)(?:^\|.*\n)+", prose(page)):
        rows = table.splitlines()
        assert {row.count("|") - row.count(r"\|") for row in rows} == {
            rows[0].count("|")
        }, rows[0]


def test_links_are_found() -> None:
    """The patterns above find links to pages, pictures, headings and other folders."""
    found = [target for page in PAGES for target in targets(page)]
    assert len(found) > 60
    assert {path.suffix for path, _ in found} >= {".md", ".py", ".png", ".rst", ".svg"}
    assert (DOCS / "models_and_losses.rst").resolve() in [path for path, _ in found]
    assert "what-is-kept" in anchors(DOCS / "large_data.md")


@by_name
def test_links_of_pages_in_the_documentation_stay_there(page: Path) -> None:
    """Files outside of docs/ are linked to as downloads: examples, and nothing else."""
    if DOCS in page.parents:
        for target, _ in targets(page):
            inside = target.is_relative_to(DOCS) or target.parent.name == "examples"
            assert inside, f"{page.name}: {target}"


def listed(page: Path) -> list[Path]:
    """What the tables of contents of a page name."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        blocks = re.findall(r"(?ms)^```\{toctree\}\n(.*?)^```", text)
    else:
        blocks = re.findall(r"(?ms)^\.\. toctree::\n(.*?)(?=^\S|\Z)", text)
    names = [line.strip() for block in blocks for line in block.splitlines()]
    return [page.parent / name for name in names if name and not name.startswith(":")]


def test_every_page_is_in_a_table_of_contents() -> None:
    named = {path for page in PAGES for path in listed(page)}
    for path in named - {DOCS / "gallery" / "index"}:
        assert any(path.with_suffix(end).exists() for end in (".md", ".rst")), path
    pages = {page.with_suffix("") for page in PAGES if DOCS in page.parents}
    assert pages - named == {DOCS / "index"}


def test_the_front_pages_have_the_same_doors() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    front = (DOCS / "index.md").read_text(encoding="utf-8")
    doors = re.findall(r"(?m)^- \*\*\[.+?\]\(docs/(.+?)\.md\)\*\*", readme)
    assert len(doors) == 3
    assert re.findall(r"(?m)^:link: (\S+)$", front) == doors
    for marker in re.findall(r':(?:start-after|end-before): "(.+)"', front):
        assert readme.count(marker) == 1, marker


def test_tutorial_pages_say_what_to_read_next() -> None:
    pages = sorted((DOCS / "tutorial").glob("*.md"))
    assert len(pages) == 5
    for page, following in zip(pages, [*pages[1:], None], strict=True):
        last = page.read_text(encoding="utf-8").rstrip().split("\n\n")[-1]
        assert last.startswith("**Next:**")
        assert following is None or f"({following.name})" in last


def test_the_reference_has_every_public_name() -> None:
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.rst"))
    documented = re.findall(r"auto(?:class|function):: (?:\S+\.)?(\w+)", text)
    modules = {name for name in vl.__all__ if inspect.ismodule(getattr(vl, name))}
    assert set(vl.__all__) - modules - set(documented) == set()
