"""How a rank that fails says so: on standard error, and in torchrun's report, which ends with it. Pure."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path


def say_failure(sentence: str) -> None:
    """Print `sentence`; torchrun, whose report of some forty lines comes after it, is to show it as the root cause."""
    print(sentence, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}), encoding="utf-8")
