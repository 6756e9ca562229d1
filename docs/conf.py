"""The documentation: the pages of this folder, the API from docstrings, a gallery."""

import vivit_linop

project = "vivit-linop"
author = "The vivit-linop authors"
version = release = vivit_linop.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = f"vivit-linop {version}"
exclude_patterns = ["_build"]
nitpicky = False  # types of torch and SciPy have no pages here

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures in full are longer than what they say
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
# Else attributes that are also properties are listed twice.
napoleon_use_ivar = True

myst_heading_anchors = 3
# The README's links to scripts. tests/test_readme.py looks at all links.
suppress_warnings = ["myst.xref_missing"]

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    # Two of them need a large package, and minutes: they are shown, and not run.
    "filename_pattern": r"/(?!_|gpt2|minilm)\w+\.py$",
    "ignore_pattern": r"(^|/)_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "min_reported_time": 1,
    "write_computation_times": False,
}
