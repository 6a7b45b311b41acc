"""`python -m tests.faults.shifted RANK SECONDS SHIFT VERB ...`: minitron; after SECONDS the clock of that rank, of all
where it is negative, jumps by SHIFT seconds.

What Python reads of the time of day jumps, `time.time` and `datetime.now`; what counts seconds does not, as where a
clock is set.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from typing import Any

from minitron_mcore import cli

TRUE = datetime.datetime


def main() -> int:
    rank, after, shift, *command = sys.argv[1:]
    if int(rank) >= 0 and rank != os.environ["RANK"]:
        return cli.main(command)
    jumps, of_day, of_day_ns = time.monotonic() + float(after), time.time, time.time_ns

    def offset() -> float:
        return float(shift) if time.monotonic() >= jumps else 0.0

    class Shifted(TRUE):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return TRUE.now(tz) + datetime.timedelta(seconds=offset())

    time.time = lambda: of_day() + offset()
    time.time_ns = lambda: of_day_ns() + int(1e9 * offset())
    for module in list(sys.modules.values()):
        if getattr(module, "datetime", None) is TRUE:
            module.datetime = Shifted  # type: ignore[attr-defined]
    return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
