"""Files of the repository that are no pages of docs/: the same relative link works on GitHub and in the site.

- README.md and its like are pages: docs/project/NAME.md stands for the file that PAGES names, whose text it shows.
- Any other file or folder that a page links to is shown as it is, at repository/PATH; or the link leads to
  `repository_url`, where conf.py names one.
"""

from __future__ import annotations

import html
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "project/readme": "README.md",
    "project/launching": "launch/README.md",
    "project/contributing": "CONTRIBUTING.md",
    "project/changelog": "CHANGELOG.md",
    "project/security": "SECURITY.md",
    "project/benchmarks": "benchmarks/README.md",
    # search.html is the page on which Sphinx searches the site.
    "search-shapes": "docs/search.md",
}
SCHEME = "repository:"
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_DOCNAMES = {file: name for name, file in PAGES.items()}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".sbatch": "bash", ".toml": "toml"}
LANGUAGES |= {".json": "json", ".cff": "yaml"}


def read_source(app: Sphinx, docname: str, source: list[str]) -> None:
    """A page of PAGES gets its file's text; links that leave docs/ are led to what stands for their targets."""
    file = PAGES.get(docname, f"docs/{docname}")
    if docname in PAGES:
        source[0] = (ROOT / file).read_text(encoding="utf-8")
        app.env.note_dependency(str(ROOT / file))
    parts = _FENCE.split(source[0])
    folder = posixpath.dirname(file)
    parts[::2] = [_LINK.sub(lambda found: _led(found, folder, docname in PAGES), part) for part in parts[::2]]
    source[0] = "".join(parts)


def _led(found: re.Match[str], folder: str, is_outside: bool) -> str:
    target, anchor = found[1], found[2] or ""
    if ":" in target or target.startswith("/"):
        return found[0]
    path = posixpath.normpath(posixpath.join(folder, target))
    if path in _DOCNAMES:
        return f"/{_DOCNAMES[path]}.md{anchor}"
    if path.startswith("docs/"):
        return f"/{path.removeprefix('docs/')}{anchor}" if is_outside else found[0]
    return f"{SCHEME}{path}{anchor}"


def links_in(doctree: nodes.Node) -> Iterator[nodes.reference]:
    return (link for link in doctree.findall(nodes.reference) if link.get("refuri", "").startswith(SCHEME))


def page_of(path: str) -> str:
    return posixpath.join("repository", path, "index" if (ROOT / path).is_dir() else "").rstrip("/")


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for link in links_in(doctree):
        path, _, anchor = link["refuri"].removeprefix(SCHEME).partition("#")
        outside = app.config.repository_url
        link["refuri"] = f"{outside}/{path}" if outside else app.builder.get_relative_uri(docname, page_of(path))
        link["refuri"] += f"#{anchor}" if anchor else ""
        link["internal"] = not outside


def collect(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The pages of all files that are linked to, and of what lies in linked folders."""
    if app.config.repository_url:
        return
    found = {
        link["refuri"].removeprefix(SCHEME).partition("#")[0]
        for docname in app.env.found_docs
        for link in links_in(app.env.get_doctree(docname))
    }
    for path in sorted(_with_contents(found)):
        yield page_of(path), _context(app, path), "page.html"


def _with_contents(paths: Iterable[str]) -> set[str]:
    found = set()
    for path in paths:
        found.add(path)
        if (ROOT / path).is_dir():
            found |= _with_contents(f"{path}/{name}" for name in _names(path))
    return found


def _names(folder: str) -> list[str]:
    hidden = ("__pycache__",)
    return sorted(name for name in os.listdir(ROOT / folder) if name not in hidden and not name.startswith("."))


def _context(app: Sphinx, path: str) -> dict[str, Any]:
    here = page_of(path)
    head = f"<h1>{html.escape(path)}</h1>"
    if (ROOT / path).is_dir():
        rows = [f"{path}/{name}" for name in _names(path)]
        body = "".join(f'<li><a href="{_uri(app, here, row)}">{html.escape(_shown(row))}</a></li>' for row in rows)
        return {"title": path, "body": f"<section>{head}<ul>{body}</ul></section>", "parents": []}
    try:
        text = (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = f"{(ROOT / path).stat().st_size:,} bytes"
    highlighter: Any = app.builder.highlighter  # type: ignore[attr-defined]
    code = highlighter.highlight_block(text, LANGUAGES.get(Path(path).suffix, "none"))
    return {"title": path, "body": f"<section>{head}{code}</section>", "parents": []}


def _uri(app: Sphinx, here: str, path: str) -> str:
    return html.escape(app.builder.get_relative_uri(here, _DOCNAMES.get(path) or page_of(path)))


def _shown(path: str) -> str:
    return posixpath.basename(path) + ("/" if (ROOT / path).is_dir() else "")


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of links to what is not there."""
    from sphinx.util import logging

    for docname in env.found_docs:
        for link in links_in(env.get_doctree(docname)):
            path = link["refuri"].removeprefix(SCHEME).partition("#")[0]
            if path.startswith("..") or not (ROOT / path).exists():
                logging.getLogger(__name__).warning("%s is not in the repository", path, location=docname)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("repository_url", "", "env")
    app.connect("source-read", read_source)
    app.connect("doctree-resolved", resolve)
    app.connect("env-check-consistency", check)
    app.connect("html-collect-pages", collect)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
