"""Lines on the console that say whose they are, where several work side by side. Pure."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


def named_lines(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """Within the `with`, every line that this process prints opens with `name: `; None: as they are."""
    return contextlib.redirect_stdout(_Named(sys.stdout, name)) if name else contextlib.nullcontext()


class _Named:
    """A stream that passes on whole lines, since those of other processes may come between two parts of one."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name, self._begun = stream, name, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._stream.write(f"{self._name}: {line}\n" if line else "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()
