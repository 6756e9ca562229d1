"""The documentation: pages, the reference from docstrings, a gallery of examples."""

import re
import socket
import sys
from pathlib import Path

from sphinx import addnodes

import vivit_linop

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "vivit-linop"
author = "The vivit-linop authors"
version = release = vivit_linop.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # a copy of MathJax: pages need no network
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "backlinks",  # stands in _ext, as do the others
    "built_links",
    "drawn_results",
    "trees",
]
exclude_patterns = ["_build", "_generated"]
nitpicky = False  # types of torch and SciPy have no pages here

html_theme = "furo"
html_title = f"vivit-linop {version}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures in full are longer than what they say
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
# Else attributes that are also properties are listed twice.
napoleon_use_ivar = True

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# The README's links to files that are no pages. tests/test_links.py looks at all links.
suppress_warnings = ["myst.xref_missing"]


def reachable(host: str) -> bool:
    """Whether a site answers. Without a network there are no links to other sites."""
    try:
        socket.create_connection((host, 443), timeout=2).close()
    except OSError:
        return False
    return True


linkcheck_ignore = [] if reachable("github.com") else [r"https?://"]
intersphinx_mapping = {
    name: (f"https://{site}/", None)
    for name, site in {
        "python": "docs.python.org/3",
        "numpy": "numpy.org/doc/stable",
        "scipy": "docs.scipy.org/doc/scipy",
        "torch": "docs.pytorch.org/docs/stable",
    }.items()
    if reachable(site.partition("/")[0])
}

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    # Some need a large package, processes or minutes: they are shown, and not run.
    "filename_pattern": r"/(?!_|gpt2|minilm)\w+\.py$",
    "ignore_pattern": r"(^|/)_",
    "reset_modules": ("matplotlib", "gallery_rules.fresh_torch"),
    "within_subsection_order": "gallery_rules.Order",
    "download_all_examples": False,
    "min_reported_time": 1,
    "write_computation_times": False,
}


def keep_letters(app, what, name, obj, options, lines: list[str]) -> None:
    """Keep ``samples: N.`` from becoming a list, and a colon from meaning a type."""
    if what in ("property", "attribute", "data") and lines:
        lines[0] = lines[0].replace(": ", " – ", 1)
    for i, line in enumerate(lines):
        lines[i] = re.sub(r"^(\s*(?:\w+: )?[A-Za-z])\.(?= |$)", r"\1\\.", line)


def keep_one_signature(app, domain: str, kind: str, content) -> None:
    """Keep one signature of a verb, which else has one for each of its rules."""
    if (domain, kind) == ("py", "function"):
        _, *others = content.parent.findall(addnodes.desc_signature)
        for signature in others:
            content.parent.remove(signature)


def setup(app) -> None:
    app.connect("object-description-transform", keep_one_signature)
    app.connect("autodoc-process-docstring", keep_letters, priority=100)
