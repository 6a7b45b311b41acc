"""A line or a warning from where no Runtime is at hand."""

from __future__ import annotations

import sys
from functools import cache

import torch


@cache
def say(text: str) -> None:
    """Print it once, on the first rank's standard error; any rank may call."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text, file=sys.stderr)


def warn(warning: str) -> None:
    say(f"warning: {warning}")
