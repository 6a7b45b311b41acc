"""`python -m tests.e2e.hung_at HOW VERB ...`: minitron, whose rank HUNG_RANK hangs as it begins its third iteration.

HOW: waiting (in a call that lets other threads run), holding (in C, with the interpreter's lock, so that no other
thread of the process runs), or stopped (SIGSTOP).
"""

import ctypes
import os
import signal
import sys
import time
from typing import Any

from minitron_mcore import cli
from minitron_mcore.runtime.pulse import PULSE, Pulse

HOWS = {
    "waiting": lambda: time.sleep(1000),
    "holding": lambda: ctypes.PyDLL(None).sleep(1000),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}


def main() -> int:
    how, *command = sys.argv[1:]
    begin = PULSE.begin

    def hang(iteration: int, **keywords: Any) -> None:
        begin(iteration, **keywords)
        if iteration == 3:
            HOWS[how]()

    if os.environ["RANK"] == os.environ["HUNG_RANK"]:
        Pulse.begin = staticmethod(hang)  # type: ignore[assignment]
    return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
