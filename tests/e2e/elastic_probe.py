"""What restarts are tried with: each rank writes which start this is, and ends as HOW says.

Run as a module, in place of minitron_mcore (MINITRON_MODULE); it imports nothing that takes long. Appends a line to
`rank<R>` in $LAUNCH_PROBE_FOLDER. HOW: killed (rank 1 by SIGKILL, in the first start), refused (exit code 2).
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    how, rank, start = sys.argv[1], os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with Path(os.environ["LAUNCH_PROBE_FOLDER"], f"rank{rank}").open("a") as file:
        file.write(f"{start}\n")
    if how == "refused":
        return 2
    if start == 0:
        if rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
