"""A line, a warning or a failure, told where no Runtime is at hand. Pure."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from minitron_mcore.runtime.world import read_world


@cache
def say(text: str) -> None:
    """Print it once, on the first rank's standard error; any rank may call."""
    if read_world(os.environ).rank == 0:
        print(text, file=sys.stderr)


def warn(warning: str) -> None:
    say(f"WARNING: {warning}")


# Where it is set, torchrun will report nothing of its own (runtime/torchrun.py).
SHORT = "MINITRON_SHORT_REPORT"
FOLLOWS = "minitron: what torchrun reports now says no more than the line above (launch/torchrun.sh leaves it out)"


def say_failure(sentence: str) -> None:
    """How a rank that fails says so: print `sentence`; torchrun, whose report of some forty lines comes after it, is to
    show it as the root cause, and is announced."""
    print(sentence, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}), encoding="utf-8")
        if not os.environ.get(SHORT):
            print(FOLLOWS, file=sys.stderr, flush=True)
