"""What `run` notes while it walks, in journal.jsonl: how it was started, and what each step took. Pure.

{"kind": "start", "time": …, "command": "minitron run …", "ranks": 2, "device": "cpu", "versions": {"torch": …, …}}
{"kind": "step", "time": …, "name": "distill-width", "title": …, "seconds": 93.1, "forecast": {"weights": bytes, …}}
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from minitron_mcore import __version__

JOURNAL = "journal.jsonl"
PACKAGES = ("megatron-core", "torch", "transformers", "numpy")


def note(folder: Path, kind: str, **facts: Any) -> None:
    """Append a line. One process calls."""
    line = json.dumps({"kind": kind, "time": round(time.time(), 3), **facts})
    with (folder / JOURNAL).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def note_start(folder: Path, ranks: int, device: str) -> None:
    """How this command was started, and with which versions. One process calls."""
    command = shlex.join(["minitron", *sys.argv[1:]])
    note(folder, "start", command=command, ranks=ranks, device=device, versions=versions())


def versions() -> dict[str, str]:
    found = {"minitron_mcore": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
