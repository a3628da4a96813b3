"""How Sphinx makes the site of these pages; `scripts/docs.sh` runs it."""

from __future__ import annotations

import re
from typing import Any

import embedtrain

project = "embedtrain"
author = "the embedtrain authors"
project_copyright = author
version = release = embedtrain.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "index"
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["examples", "conf.py"]

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 4
# A fence without a language holds commands; a prompt or an output in it is no Python.
highlight_language = "sh"

# Docstrings are Markdown by habit: a name between single backticks is code, and a link if the site has that name.
default_role = "py:obj"
napoleon_use_ivar = True
autodoc_default_options = {"member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 120
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "embedtrain"
html_show_sourcelink = False
html_show_copyright = False
html_static_path: list[str] = ["static"]
html_css_files = ["site.css"]
# Pages without pages below them: there is nothing to list at their left.
html_sidebars: dict[str, list[str]] = {"index": [], "tutorial": [], "results": []}
html_theme_options = {
    "show_nav_level": 1,
    "navigation_depth": 2,
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "navbar_start": ["navbar-logo", "version-switcher"],
    "navbar_align": "left",
    # `scripts/docs.sh` writes this file beside the folders of the versions.
    "switcher": {"json_url": "../switcher.json", "version_match": version},
    "check_switcher": False,
    "footer_start": ["sphinx-version"],
    "footer_end": ["theme-version"],
    "secondary_sidebar_items": ["page-toc"],
}

_OWN_SECTION = re.compile(r"^(Collective|Source): ")
_LONE_ASTERISK = re.compile(r"(?<![*\\\w])\*(?=[^*\s])")


def _as_restructured_text(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Rewrites docstrings for Sphinx: sections of one line, lone asterisks, and colons in texts of attributes."""
    text = _LONE_ASTERISK.sub(r"\\*", "\n".join(lines))
    lines[:] = [_OWN_SECTION.sub(r"**\1:** ", line) for line in text.split("\n")]
    if what in ("attribute", "data", "property"):
        # Napoleon would take the words before a colon in the first line for a type. An empty comment prevents this.
        lines[:0] = ["..", ""]


def setup(app: Any) -> None:
    """Connects what this file adds to Sphinx."""
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=400)
