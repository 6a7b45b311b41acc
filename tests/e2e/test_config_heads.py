"""Every recipe in configs/ opens with what `estimate` says of it, and that is what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from minitron_mcore import cli

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
# A command, which may go on in the next line, and below it lines of what it prints.
HEAD = re.compile(r"^#   minitron (estimate (?:.|\\\n)*?)\n((?:#   \| .*\n)+)", re.MULTILINE)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_estimate(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    assert head is not None
    (found,) = HEAD.findall(head[0])
    words = shlex.split(re.sub(r"\\\n#", " ", found[0]))
    assert words[:3] == ["estimate", "--config", f"configs/{path.name}"]
    assert cli.main([*words, f"estimate.output={tmp_path}/estimate.json"]) == 0
    # Columns may be wider than they were.
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    told = [line.removeprefix("#   | ").split() for line in found[1].splitlines()]
    assert len(told) > 1 and [line for line in told if line not in shown] == []
