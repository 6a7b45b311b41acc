"""Docstrings are plain prose with `code`, as Markdown has it: autodoc gets reStructuredText made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

from _extensions.links import PAGE_OF

_PAGE = re.compile(r"\bdocs/([\w/-]+)\.md\b")
_LIST = re.compile(r"(?:[-*]|\d+\.) ")
_ENTRY = re.compile(r"(\w+)(?: \([^)]*\))?: ")


def converted(lines: list[str]) -> list[str]:
    """Paragraphs stay, indented text becomes a block of code, `code` becomes ``code``."""
    made: list[str] = []
    for block in _blocks(lines):
        indented = [line.startswith(" ") for line in block]
        if all(indented):
            made += ["::", "", *block]
        elif _LIST.match(block[0]):
            made += [_in_line(line) for line in block]
        elif indented[-1] and not indented[0] and block[0].endswith(":"):
            made += [f"**{_in_line(block[0])}**", "", *_entries(block[1:])]
        else:
            made += [_in_line(line.strip()) for line in block]
        made.append("")
    return made


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Paragraphs, and runs of indented lines with the empty lines between them."""
    block: list[str] = []
    for place, line in enumerate(lines):
        if line.strip():
            block.append(line.rstrip())
            continue
        following = next((each for each in lines[place:] if each.strip()), "")
        if block and all(each.startswith(" ") or not each for each in block) and following.startswith(" "):
            block.append("    ")
        elif block:
            yield block
            block = []
    if block:
        yield block


def _entries(lines: list[str]) -> Iterator[str]:
    """A heading's `name: text` lines as a list."""
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    for line in lines:
        text = line[margin:]
        if entry := _ENTRY.match(text):
            text = f"`{entry[1]}`{text[entry.end(1) :]}"
        yield f"  {_in_line(text.strip())}" if text.startswith(" ") else f"- {_in_line(text)}"


def _in_line(text: str) -> str:
    """Text outside code with what reStructuredText would read as a mark made harmless."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a code that goes on in the next line
        parts = [text.replace("`", "")]
    made = ""
    for number, part in enumerate(parts):
        if number % 2 and part.strip():
            made += ("\\ " if made[-1:].isalnum() else "") + f"``{part.strip()}``"
            made += "\\ " if parts[number + 1][:1].isalnum() else ""
        else:
            made += _PAGE.sub(_to_page, re.sub(r"([*|\\]|_(?!\w))", r"\\\1", part))
    return made


def _to_page(found: re.Match[str]) -> str:
    return f":doc:`{found[0]} </{PAGE_OF.get(found[0], found[1])}>`"


def process(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    lines[:] = converted(list(lines))


def signature(
    app: Sphinx, what: str, name: str, found: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Defaults that are made anew each time as ..., without which autodoc cannot read, and shorten, the rest."""
    return (re.sub(r"<factory>", "...", arguments), returns) if arguments else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
