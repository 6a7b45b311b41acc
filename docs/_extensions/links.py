"""Links that are made rather than written: from prose of the source, and from every mention of a key or a verb.

A link within the site is a reference to `site:DOCNAME#ANCHOR` until the page that it stands on is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import clean_astext

from _extensions.repository import PAGES
from minitron_mcore.recipe import entries
from minitron_mcore.verbs import VERBS

RECIPE, VERB_PAGE = "reference/recipe", "reference/verbs"
SITE = "site:"
PAGE_OF = {file: name for name, file in PAGES.items()}
KEYS = {path for path, _ in entries()}
_PIECE = re.compile(r"`([^`]+)`|\[[^]]*\]\(docs/([\w/-]+)\.md(?:#[\w-]+)?\)|\bdocs/([\w/-]+)\.md\b")
# `train.lr`, `train.lr=1e-4`, `distill.hidden_states.*`; a word without a dot may be anything.
_KEY = re.compile(r"([a-z_0-9]+\.[a-z_0-9.]+|[a-z_0-9]+(?=\.\*))(?:\.\*)?(?:=.*)?", re.DOTALL)
_COMMAND = re.compile(r"minitron ([a-z]+)")


def inline(text: str) -> Iterator[nodes.Node]:
    """Nodes of a paragraph of plain prose: `code` is code, docs/x.md a link to that page."""
    end = 0
    for found in _PIECE.finditer(text):
        if found.start() > end:
            yield nodes.Text(text[end : found.start()])
        code, *pages = found.groups()
        if code is None:
            yield to_page(next(each for each in pages if each))
        else:
            yield nodes.literal(code, code)
        end = found.end()
    if text[end:]:
        yield nodes.Text(text[end:])


def paragraph(*parts: str | nodes.Node, classes: tuple[str, ...] = ()) -> nodes.paragraph:
    """Texts are read by `inline`."""
    made = nodes.paragraph(classes=list(classes))
    for part in parts:
        made += list(inline(part)) if isinstance(part, str) else [part]
    return made


def to(docname: str, anchor: str, *shown: nodes.Node) -> nodes.reference:
    link = nodes.reference("", "", internal=True, refuri=f"{SITE}{docname}#{anchor}")
    link += list(shown)
    return link


def to_page(name: str) -> nodes.reference:
    """To docs/NAME.md; it shows that page's title."""
    link = to(PAGE_OF.get(f"docs/{name}.md", name), "")
    link["titled"] = True
    return link


def to_key(path: str, shown: str = "") -> nodes.reference:
    """`path`: of a key or a section."""
    return to(RECIPE, path, nodes.literal(shown or path, shown or path))


def to_verb(name: str) -> nodes.reference:
    return to(VERB_PAGE, name, nodes.literal(name, name))


def note_anchors(env: Any, docname: str, anchors: dict[str, str]) -> None:
    """So that Markdown on any page can link to them; `anchors`: anchor -> what a link without a text shows."""
    slugs = env.metadata[docname].setdefault("myst_slugs", {})
    slugs.update({anchor: (None, anchor, text) for anchor, text in anchors.items()})


def target_of(code: str) -> tuple[str, str] | None:
    """(page, anchor) that a piece of code on a page names; None where it names no key and no verb."""
    if (key := _KEY.fullmatch(code)) and key[1] in KEYS:
        return RECIPE, key[1]
    if (command := _COMMAND.fullmatch(code)) and command[1] in VERBS:
        return VERB_PAGE, command[1]
    return None


def resolve(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for code in list(doctree.findall(nodes.literal)):
        found = target_of(code.astext())
        is_free = not any(isinstance(each, nodes.reference | nodes.title) for each in _above(code))
        if found and is_free and found[0] != docname:
            code.replace_self(to(*found, code.deepcopy()))
    for link in doctree.findall(nodes.reference):
        if (uri := link.get("refuri", "")).startswith(SITE):
            page, _, anchor = uri.removeprefix(SITE).partition("#")
            if link.get("titled"):
                link += nodes.Text(clean_astext(app.env.titles[page]))
            relative = app.builder.get_relative_uri(docname, page) if page != docname else ""
            link["refuri"] = f"{relative}#{anchor}" if anchor else relative


def _above(node: Any) -> Iterator[nodes.Node]:
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-resolved", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
