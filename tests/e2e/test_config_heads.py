"""Every recipe in configs/ opens with what `estimate` says of it, and that is what it says.

python -m tests.e2e.test_config_heads        writes the numbers anew, where an estimate has changed for a good reason
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest

from minitron_mcore import cli

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
# A command, which may go on in the next line, and below it lines of what it prints.
HEAD = re.compile(r"^#   minitron (estimate (?:.|\\\n)*?)\n((?:#   \| .*\n)+)", re.MULTILINE)
MARK = "#   | "


def told(path: Path) -> tuple[list[str], list[str]]:
    """(the words of the command, the lines that it is said to print) of the recipe's head."""
    head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert head is not None
    (found,) = HEAD.findall(head[0])
    lines = [line.removeprefix(MARK) for line in found[1].splitlines()]
    return shlex.split(re.sub(r"\\\n#", " ", found[0])), lines


def printed(words: list[str], folder: Path) -> list[str]:
    """What the command prints, typed in ROOT."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert cli.main([*words, f"estimate.output={folder}/estimate.json"]) == 0
    return [line.rstrip() for line in shown.getvalue().splitlines()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_estimate(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words, lines = told(path)
    assert words[:3] == ["estimate", "--config", f"configs/{path.name}"] and len(lines) > 1
    # Columns may be wider than they were.
    shown = [line.split() for line in printed(words, tmp_path)]
    assert [line for line in lines if line.split() not in shown] == []


def label(line: str) -> list[str]:
    """What a line is about: its first two words that hold no number."""
    return [word for word in line.split() if not re.search(r"\d", word)][:2]


def rewrite(path: Path) -> None:
    """Put what `estimate` prints now in place of the lines of the same labels."""
    words, lines = told(path)
    with tempfile.TemporaryDirectory() as folder:
        shown = printed(words, Path(folder))
    text, seen = path.read_text(encoding="utf-8"), 0
    for line in lines:
        rest = [place for place in range(seen, len(shown)) if label(shown[place]) == label(line)]
        if not rest:
            print(f"{path.name}: nothing like this is printed any more: {line}")
            continue
        seen = rest[0] + 1
        text = text.replace(f"{MARK}{line}\n", f"{MARK}{shown[rest[0]]}\n", 1)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)
    for recipe in RECIPES:
        rewrite(recipe)
