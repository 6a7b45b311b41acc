"""What stands in the documents: blocks of code, commands, notebooks. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<margin> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^ *```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:\A|\n)\n((?: {4}\S[^\n]*\n)+)")
SHELL = ("bash", "sh", "console", "shell")
# How a command begins in a block that does not say that it is one of a shell; `minitron train: ...` is a message.
STARTS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\$ )?"
    r"(?:minitron [a-z]+(?=\s|$)|torchrun |make |launch/|sbatch |srun |docker |python3? -m |\./)"
)
INLINE = re.compile(r"`((?:minitron|torchrun|launch/|make|sbatch|python) [^`]+)`")
# What stands where a reader puts something of their own.
PLACEHOLDER = re.compile(r"…|\.\.\.|^[A-Z]+$|^\[?key=value")


def documents() -> list[Path]:
    """The pages whose commands and code are tried."""
    pages = sorted(path for path in (ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", ROOT / "launch" / "README.md", *pages]


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks() -> Iterator[Block]:
    """Fenced and indented blocks of every document, in their order."""
    for path in documents():
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        for found in FENCE.finditer(text):
            margin = found["margin"]
            lines = [line.removeprefix(margin) for line in found["text"].splitlines()]
            line = text.count("\n", 0, found.start()) + 2
            yield Block(name, line, found["language"].strip(), "\n".join(lines) + "\n")
        without = FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
        for found in INDENTED.finditer(without):
            line = without.count("\n", 0, found.start(1)) + 1
            yield Block(name, line, "", re.sub(r"^ {4}", "", found[1], flags=re.MULTILINE))


@dataclass(frozen=True)
class Command:
    """words: as a shell splits them; a line that ends in a backslash goes on in the next. recipe: the YAML that stands
    last above it in the document."""

    where: str
    words: tuple[str, ...]
    recipe: str = ""

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words)}"


def commands_of(block: Block, recipe: str = "") -> Iterator[Command]:
    """The commands of a shell's block, or those lines of another one that are commands of ours."""
    joined, number = "", 0
    for place, line in enumerate(block.text.splitlines()):
        number = number if joined else place
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        command, joined = joined.strip(), ""
        is_shell = block.language in SHELL
        if not command or command.startswith("#") or not (is_shell or STARTS.match(command)):
            continue
        try:
            words = shlex.split(command.removeprefix("$ "), comments=True)
        except ValueError:
            words = command.split()
        yield Command(f"{block.document}:{block.line + number}", tuple(words), recipe)


def commands() -> list[Command]:
    """Of all documents, and every verb's own example."""
    found: list[Command] = []
    recipe, document = "", ""
    for block in blocks():
        recipe = recipe if block.document == document else ""
        document = block.document
        if block.language == "yaml":
            recipe = block.text
        elif block.language in ("", *SHELL):
            found += commands_of(block, recipe)
    return found + [Command(f"verbs.py: {name}", tuple(verb.example.split())) for name, verb in VERBS.items()]


def mentions() -> list[Command]:
    """Commands in running text that name keys."""
    found = []
    for path in documents():
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        for words in INLINE.findall(text):
            split = " ".join(words.split()).split(" ")
            found.append(Command(str(path.relative_to(ROOT)), tuple(split)))
    return found
