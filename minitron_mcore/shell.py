"""Verbs, keys and their values in the shell, after a tab: bash, zsh and fish, by argcomplete. Pure.

eval "$(register-python-argcomplete minitron)"        in ~/.bashrc or ~/.zshrc
register-python-argcomplete --shell fish minitron | source
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from typing import Any

from minitron_mcore.keys import choices_of, entry_of, plain_type
from minitron_mcore.verbs import keys_of

_OPTIONS = re.compile(r"\s(?:--config(?:\s+|=)\S+|--json|--verify|--dry-run)(?=\s)")


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks, and exit; return where none does."""
    import argcomplete

    # Behind an option, argparse takes no more words key=value; what is finished of options says nothing of them.
    line = os.environ.get("COMP_LINE", "")
    point = int(os.environ.get("COMP_POINT", len(line)))
    os.environ["COMP_LINE"] = before = _OPTIONS.sub("", line[:point])
    os.environ["COMP_POINT"] = str(len(before))
    for action in parser._actions:
        if action.dest == "overrides":
            action.completer = words  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def words(prefix: str, parsed_args: argparse.Namespace, **unused: Any) -> list[str]:
    """What may follow the verb and begins with `prefix`: `key=`, or `key=value` where the key has few values. Paths are
    left to the shell."""
    if not getattr(parsed_args, "verb", None):
        return []
    return [word for word in _words(prefix, parsed_args.verb) if word.startswith(prefix)]


def _words(prefix: str, verb: str) -> Iterator[str]:
    keys = keys_of(verb)
    path, equals, _ = prefix.partition("=")
    if equals:
        for name, entry in keys:
            if name == path:
                yield from (f"{path}={value}" for value in _values(entry.type))
        return
    if verb == "init":
        from minitron_mcore.files import shipped
        from minitron_mcore.jobs.init import listed

        yield from (name for name, _ in listed(shipped("configs")))
    yield from (f"{name}=" for name, _ in keys)


def _values(kind: Any) -> tuple[str, ...]:
    if plain_type(kind) is bool:
        return "true", "false"
    return tuple(choices_of(kind) or choices_of(entry_of(kind)) or ())
