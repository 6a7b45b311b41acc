"""A line or a warning from where no Runtime is at hand. Pure."""

from __future__ import annotations

import os
import sys
from functools import cache

from minitron_mcore.runtime.world import read_world


@cache
def say(text: str) -> None:
    """Print it once, on the first rank's standard error; any rank may call."""
    if read_world(os.environ).rank == 0:
        print(text, file=sys.stderr)


def warn(warning: str) -> None:
    say(f"warning: {warning}")
