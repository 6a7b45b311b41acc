"""`python -m tests.e2e.killed_at EVENT ENDING VERB ...`: minitron, killed at the audit event whose path ends so.

ENDED_BY in the environment names another signal than SIGKILL.
"""

import os
import signal
import sys
from typing import Any

from minitron_mcore import cli


def main() -> int:
    event, ending, *command = sys.argv[1:]
    number = signal.Signals[os.environ.get("ENDED_BY", "SIGKILL")]

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        if name == event and str(arguments[name == "os.rename"]).endswith(ending):
            os.kill(os.getpid(), number)

    sys.addaudithook(watch)
    return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
