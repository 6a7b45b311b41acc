"""`python -m minitron_mcore.runtime.torchrun …` is `torchrun …`, but short about how its ranks ended.

They have said themselves what is wrong. So this process ends with the first failed rank's exit code, and without
torchrun's log, traceback and report; only of a rank that a signal ended, which could say nothing, is there a line. A
Ctrl-C or SIGTERM, which torchrun hands on to its ranks, ends it with the shell's exit code for it.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from minitron_mcore.runtime.interrupt import exit_code, name_of


def main() -> int:
    """torchrun with this process's arguments; returns the exit code."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun()
    except SignalException as error:
        return exit_code(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"torchrun: rank {rank} was ended by {name_of(-failure.exitcode)}", file=sys.stderr)
        return exit_code(-failure.exitcode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
