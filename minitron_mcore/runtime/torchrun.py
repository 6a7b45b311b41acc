"""`python -m minitron_mcore.runtime.torchrun …` is `torchrun …`, but that a Ctrl-C or SIGTERM, which torchrun hands on
to its ranks, ends it with the shell's exit code for it and without a traceback of its own."""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main as torchrun

from minitron_mcore.runtime.interrupt import exit_code


def main() -> int:
    """torchrun with this process's arguments; returns the exit code."""
    try:
        torchrun()
    except SignalException as error:
        return exit_code(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
