"""The directive `recipe-reference`: every section and key of a recipe, from the dataclasses that check them.

The anchor of a key or section is its path: reference/recipe.md#train.lr.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from _extensions.links import inline, note_anchors, paragraph, to_key, to_verb
from minitron_mcore.errors import shown
from minitron_mcore.keys import (
    BOUNDS,
    choices_of,
    default_of,
    entry_of,
    is_path,
    options_of,
    plain_type,
    section_of,
    type_words,
)
from minitron_mcore.recipe import Recipe, entries
from minitron_mcore.verbs import VERBS

KIND = "recipe-key"
# Sections whose own docstring says no more than that they are dataclasses.
FIELDS = [(path, entry) for path, entry in entries()]


def readers_of(path: str) -> tuple[str, ...]:
    """The verbs that read a key."""
    return tuple(name for name, verb in VERBS.items() if any(f"{path}.".startswith(f"{key}.") for key in verb.keys))


def entries_of(kind: Any) -> tuple[str, Any]:
    """("NAME" or "[]", the section) of a dictionary or list of sections; ("", None) for another type."""
    for option in map(plain_type, options_of(kind)):
        if typing.get_origin(option) in (dict, list):
            inner = section_of(typing.get_args(option)[-1])
            if inner is not None:
                return ("NAME" if typing.get_origin(option) is dict else "[]"), inner
    return "", None


def kind_words(kind: Any) -> str:
    """A key's type in words, its null left out."""
    choices = choices_of(kind) or choices_of(entry_of(kind))
    if choices:
        return ("a list of: " if entry_of(kind) else "one of: ") + ", ".join(f"`{each}`" for each in choices)
    words = type_words(kind).replace(" or null", "")
    if any(map(is_path, options_of(kind))):
        words = words.replace("text", "a path", 1)
    elif entry_of(kind) is not None and any(map(is_path, options_of(entry_of(kind)))):
        words = words.replace("a list", "a list of paths", 1)
    return words.replace("a list as in [first,second]", "a list")


def range_of(entry: dataclasses.Field[Any]) -> str:
    """What a value must be besides; "" where any of the type will do."""
    said = [f"{words} {entry.metadata[bound]:,}" for bound, words in BOUNDS.items() if bound in entry.metadata]
    said += ["not empty"] * bool(entry.metadata.get("filled")) + ["each once"] * bool(entry.metadata.get("distinct"))
    return ", ".join(said)


class RecipeReference(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        for name in sorted(self._files()):
            self.env.note_dependency(name)
        self.anchors: dict[str, str] = {}
        top = [each for each in dataclasses.fields(Recipe) if section_of(each.type) is None]
        first = self._section("recipe", "Keys of the recipe itself", "They stand in no section.", top, "")
        sections = [each for each in dataclasses.fields(Recipe) if section_of(each.type) is not None]
        made = [first, *(self._of_kind(each.name, each) for each in sections)]
        note_anchors(self.env, self.env.docname, self.anchors)
        return list(made)

    @staticmethod
    def _files() -> set[str]:
        kinds = [Recipe, *(section_of(entry.type) for _, entry in FIELDS)]
        return {inspect.getsourcefile(kind) or "" for kind in kinds if kind is not None}

    def _of_kind(self, path: str, entry: dataclasses.Field[Any]) -> nodes.section:
        kind = section_of(entry.type)
        return self._section(path, path, entry.metadata["description"], dataclasses.fields(kind), f"{path}.")

    def _section(self, path: str, title: str, text: str, fields: Any, prefix: str) -> nodes.section:
        """`prefix`: of the paths of its keys."""
        made = nodes.section(ids=[path], names=[path])
        made += nodes.title(title, title)
        made += paragraph(text[:1].upper() + text[1:].rstrip(".") + ".")
        readers = readers_of(path) if prefix else None
        if readers:
            made += paragraph("Read by ", *_listed(map(to_verb, readers)), ".", classes=("readers",))
        self.anchors[path] = path
        inner = [each for each in fields if section_of(each.type) is not None and default_of(each) is not None]
        for each in fields:
            if each not in inner:
                made += self._key(f"{prefix}{each.name}", each, readers)
        made += [self._of_kind(f"{prefix}{each.name}", each) for each in inner]
        return made

    def _key(self, path: str, entry: dataclasses.Field[Any], known: tuple[str, ...] | None) -> addnodes.desc:
        """`known`: the verbs that its section was said to be read by."""
        made = addnodes.desc(domain="std", objtype=KIND, desctype=KIND, classes=["std", KIND])
        signature = addnodes.desc_signature(path, "", ids=[path], _toc_name="", _toc_parts=())
        signature += addnodes.desc_name(path, path)
        default = default_of(entry)
        # A section that may be left out whole.
        value = "null" if default is None else shown(default) or '""'
        signature += addnodes.desc_annotation("", "", addnodes.desc_sig_punctuation("", " = "), nodes.inline("", value))
        made += signature
        content = addnodes.desc_content()
        content += paragraph(entry.metadata["description"])
        content += paragraph("; ".join(self._facts(path, entry)), classes=("facts",))
        content += list(self._entries(path, entry))
        readers = readers_of(path.partition("[]")[0].partition(".NAME")[0])
        if readers and readers != known:
            content += paragraph("Read by ", *_listed(map(to_verb, readers)), ".", classes=("readers",))
        made += content
        self.env.domains.standard_domain.note_object(KIND, path, path, location=made)
        self.anchors[path] = path
        return made

    @staticmethod
    def _facts(path: str, entry: dataclasses.Field[Any]) -> Iterator[str]:
        yield kind_words(entry.type)
        if bounds := range_of(entry):
            yield bounds
        if type(None) in options_of(entry.type):
            yield "may be `null`"
        if entry.metadata.get("may_change"):
            yield "may change when a run goes on"
        elif entry.metadata.get("budget"):
            yield "a longer budget may follow when a run goes on"

    def _entries(self, path: str, entry: dataclasses.Field[Any]) -> Iterator[nodes.Node]:
        """What the sections hold that a list, a dictionary, or a section that may be null is made of."""
        step, kind = entries_of(entry.type)
        below = f"{path}.{step}." if step == "NAME" else f"{path}[]."
        if kind is None:
            kind, below = section_of(entry.type), f"{path}."
        if kind is None:
            return
        like = next((each.name for each in dataclasses.fields(Recipe) if section_of(each.type) is kind), None)
        if like is not None:
            said = paragraph("Its keys are those of ", to_key(like), ".")
            said["ids"] = [f"{below}{each.name}" for each in dataclasses.fields(kind)]
            self.anchors |= {name: name for name in said["ids"]}
            yield said
            return
        yield paragraph("Each has the keys" if step else "Its keys:")
        for each in dataclasses.fields(kind):
            yield self._key(f"{below}{each.name}", each, readers_of(path))


def _listed(links: Iterator[nodes.reference]) -> Iterator[nodes.Node | str]:
    for number, link in enumerate(links):
        if number:
            yield ", "
        yield link


class FlagReference(SphinxDirective):
    """The directive `flag-reference`: flags of Megatron-LM and NeMo, and what stands for them here."""

    def run(self) -> list[nodes.Node]:
        from minitron_mcore import megatron_names

        self.env.note_dependency(megatron_names.__file__)
        known = {path for path, _ in entries()}
        rows = []
        for words, flags in megatron_names.FLAGS.items():
            key, _, how = words.partition(": ")
            here = [to_key(key)] if key in known else []
            rows.append((self._flags(flags), here, how))
        return [table(("There", "Here", "How"), rows)]

    @staticmethod
    def _flags(flags: str) -> list[nodes.Node]:
        made: list[nodes.Node] = []
        for flag in flags.split():
            text = "--" + flag.replace("_", "-")
            made += [nodes.Text(", "), nodes.literal(text, text)] if made else [nodes.literal(text, text)]
        return made


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> nodes.table:
    """Cells are texts, or lists of nodes."""
    made = nodes.table()
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    group += nodes.thead("", _row(head))
    group += nodes.tbody("", *map(_row, rows))
    made += group
    return made


def _row(cells: tuple[Any, ...]) -> nodes.row:
    made = nodes.row()
    for cell in cells:
        made += nodes.entry("", nodes.paragraph("", "", *(inline(cell) if isinstance(cell, str) else cell)))
    return made


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_object_type(KIND, KIND, objname="key of a recipe")
    app.add_directive("recipe-reference", RecipeReference)
    app.add_directive("flag-reference", FlagReference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
