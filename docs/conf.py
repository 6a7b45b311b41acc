"""How the site is built: `make docs`. Nothing here reaches for a network, nor does a page that a reader looks at."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from minitron_mcore import __version__
from minitron_mcore.runtime.libraries import quiet_libraries

quiet_libraries()  # Megatron warns while it is imported

project = "minitron_mcore"
author = "The minitron_mcore contributors"
project_copyright = f"{author}, Apache-2.0"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "_extensions.docstrings",
    "_extensions.links",
    "_extensions.mathml",
    "_extensions.recipe_reference",
    "_extensions.repository",
    "_extensions.verb_reference",
]
exclude_patterns = ["_extensions", "_static", "search.md"]  # search-shapes.md stands for the last
nitpicky = True
# Types of other packages in signatures: they are shown, and lead nowhere without a network.
nitpick_ignore_regex = [(r"py:.*", r".*")]
suppress_warnings = ["mystnb.unknown_mime_type"]

# Where files of the repository that are no pages are linked to, as https://HOST/OWNER/NAME/blob/main; "": they become
# pages of the site (_extensions/repository.py).
repository_url = os.environ.get("MINITRON_REPOSITORY_URL", "")

# Markdown: what GitHub renders too. Headings get the anchors that GitHub gives them.
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_dmath_allow_labels = False
myst_dmath_allow_space = False
myst_dmath_allow_digits = False
myst_fence_as_directive = ["math"]
myst_url_schemes = {"http": None, "https": None, "mailto": None, "repository": None}
# Blocks without a language are drawings and console output.
highlight_language = "none"

# Notebooks are stored without outputs and run while the site is built, once for each change.
nb_execution_mode = os.environ.get("MINITRON_DOCS_NOTEBOOKS", "cache")
nb_execution_cache_path = str(DOCS.parent / "build" / "notebooks")
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
toc_object_entries = False

html_theme = "furo"
html_title = "minitron_mcore"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
