"""The directive `verb-reference`: every verb, as `minitron VERB --help` has it. A verb's anchor is its name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from _extensions.links import note_anchors, paragraph, to_key, to_page
from minitron_mcore import verbs
from minitron_mcore.cli import build_parser
from minitron_mcore.keys import section_of
from minitron_mcore.recipe import entries


class VerbReference(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(verbs.__file__)
        self._sections = {path for path, entry in entries() if section_of(entry.type) is not None}
        made = [self._verb(name, verb) for name, verb in verbs.VERBS.items()]
        note_anchors(self.env, self.env.docname, {name: name for name in verbs.VERBS})
        return list(made)

    def _verb(self, name: str, verb: verbs.Verb) -> nodes.section:
        made = nodes.section(ids=[name], names=[name])
        made += nodes.title(name, name)
        summary = verb.summary.partition(" ([")[0]
        made += paragraph(summary[:1].upper() + summary[1:] + ".")
        reads, writes = verb.road.split(" → ")
        rows = [("Reads", [paragraph(reads)]), ("Writes", [paragraph(writes)])]
        rows.append(("Keys", [paragraph(*self._keys(verb))]))
        if pages := re.findall(r"\]\(docs/([\w/-]+)\.md\)", verb.summary):
            rows.append(("More", [paragraph(*map(to_page, pages))]))
        fields = nodes.field_list()
        for label, body in rows:
            fields += nodes.field("", nodes.field_name(label, label), nodes.field_body("", *body))
        made += fields
        made += nodes.literal_block(verb.example, verb.example, language="bash")
        return made

    def _keys(self, verb: verbs.Verb) -> Iterator[nodes.Node | str]:
        for number, key in enumerate(verb.keys):
            if number:
                yield ", "
            yield to_key(key, f"{key}.*" if key in self._sections else key)


class CommandLine(SphinxDirective):
    """The directive `command-line`: what `minitron --help` says of the words around the keys."""

    def run(self) -> list[nodes.Node]:
        made = nodes.definition_list()
        for action in build_parser()._actions:
            if action.help and action.dest not in ("help", "version"):
                words = ", ".join(action.option_strings) or str(action.metavar or action.dest)
                if action.option_strings and action.nargs != 0:
                    words = f"{words} {action.metavar}"
                term = nodes.term("", "", nodes.literal(words, words))
                made += nodes.definition_list_item("", term, nodes.definition("", paragraph(action.help)))
        return [made]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("verb-reference", VerbReference)
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
