"""What the launchers are tried with: the package's own start-up, one collective, one file for each rank.

Run as a module, in place of minitron_mcore (MINITRON_MODULE). Writes `rank<R>.json` into $LAUNCH_PROBE_FOLDER.
"""

import json
import os
import sys
from pathlib import Path

import torch

from minitron_mcore.runtime.start import start, stop


def main() -> None:
    runtime = start()
    total = torch.tensor([runtime.rank + 1.0], device=runtime.device)
    torch.distributed.all_reduce(total)
    facts = {
        "world_size": runtime.world_size,
        "local_rank": runtime.local_rank,
        "total": total.item(),
        "arguments": sys.argv[1:],
        "threads": os.environ["OMP_NUM_THREADS"],
    }
    Path(os.environ["LAUNCH_PROBE_FOLDER"], f"rank{runtime.rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    runtime.barrier()
    stop()


if __name__ == "__main__":
    main()
