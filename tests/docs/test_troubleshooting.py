"""Messages that docs/troubleshooting.md explains are those that the source says."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = re.findall(r"^#{3,4} `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


def test_messages_are_the_sources() -> None:
    said = "\n".join(path.read_text() for path in (ROOT / "minitron_mcore").rglob("*.py"))
    said += "\n".join(path.read_text() for path in (ROOT / "launch").iterdir() if path.is_file())
    assert len(ENTRIES) >= 40
    assert [entry for entry in ENTRIES if entry not in said] == []
