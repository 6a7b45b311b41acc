"""Bytes to text: what is not UTF-8 becomes U+FFFD, and is counted."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

REPLACEMENT = "\ufffd"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Replacements:
    """How many characters were replaced, of which files, and where the first of each stands."""

    characters: int = 0
    first: dict[str, str] = field(default_factory=dict)  # path -> where its first one is: "line 3"

    def decode(self, raw: bytes, path: str, unit: str, number: int) -> str:
        """`raw` as text. Of plain text (`unit` is line) that begins in line `number` the line is counted on."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = number + raw.count(b"\n", 0, error.start)
        text = raw.decode("utf-8", errors="replace")
        # Those that were there before are bytes of UTF-8 like any others.
        self._add(text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode()), path, f"{unit} {line:,}")
        return text

    def without_surrogates(self, text: str, path: str, where: str) -> str:
        """`text` that JSON spelled: half of a surrogate pair is no character, and no tokenizer accepts it."""
        text, count = LONE_SURROGATE.subn(REPLACEMENT, text)
        if count:
            self._add(count, path, where)
        return text

    def add(self, other: Replacements) -> None:
        """Those of text that comes after."""
        self.characters += other.characters
        for path, where in other.first.items():
            self.first.setdefault(path, where)

    def __str__(self) -> str:
        """A warning; empty without any."""
        if not self.characters:
            return ""
        path, where = next(iter(self.first.items()))
        return (
            f"WARNING: characters that are not UTF-8, replaced by U+FFFD: {self.characters:,} (files: "
            f"{len(self.first):,}), the first in {path}, {where}"
        )

    def _add(self, count: int, path: str, where: str) -> None:
        self.characters += count
        self.first.setdefault(path, where)
