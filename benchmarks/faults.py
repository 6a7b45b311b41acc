"""A campaign of faults against every stage: nothing that was finished is lost, nothing hangs, and the same command ends
where it ends undisturbed.

    python benchmarks/faults.py                            some 200 faults, half an hour on two cores
    python benchmarks/faults.py --faults 20 --seed 5       other ones, fewer
    python benchmarks/faults.py --only kill,hang --stage distill,run
    python benchmarks/faults.py --numbers 17,23            of the same plan these alone

Every stage is carried out undisturbed first, and once more, which must give the same. Each fault then meets a stage of
its own at a moment that the seed draws: ranks that are killed, told to end, or stopped; files that are cut off, changed
or removed, of a run that was killed or of what a stage reads; disks that are full, read-only or gone (only root can do
that); a clock that jumps; Weights & Biases that is down; data that change while they are read. Then what was damaged
is mended, and the same command is started again, until it ends well. What it leaves is compared with what it leaves
undisturbed: all logged losses, checksums of weights and optimizer states, results, to the last bit. "taken" is
what nobody can tell from what it may have been, as a bit of a text that turned over, or tokens that changed before they
were read: the end is that of what was read. What is not as it should be stays in the folder, with its logs. Ends with a
table and one JSON line; exit code 1 where something is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> int:
    from tests.faults.campaign import Campaign
    from tests.faults.damage import cannot
    from tests.faults.plan import KINDS, WHOLE, plan, row, summary
    from tests.faults.stages import STAGES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=WHOLE)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help=f"kinds of faults, of {', '.join(KINDS)}")
    parser.add_argument("--stage", default="", help=f"stages, of {', '.join(STAGES)}")
    parser.add_argument("--numbers", default="", help="of the plan these faults alone")
    parser.add_argument("--lanes", type=int, default=(os.cpu_count() or 1) + 1, help="faults at a time")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds in which whatever is to end must have")
    parser.add_argument("--folder", type=Path, help="a new folder; default: a temporary one")
    options = parser.parse_args()
    kinds, stages = (list(filter(None, text.split(","))) for text in (options.only, options.stage))
    for given, known in ((kinds, KINDS), (stages, STAGES)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{', '.join(unknown)}: not one of {', '.join(known)}")

    began, root = time.monotonic(), options.folder or Path(tempfile.mkdtemp(prefix="faults_"))
    faults, left_out = plan(options.seed, options.faults, kinds=kinds, stages=stages, but=cannot(root / "tried"))
    if options.numbers:
        numbers = [int(number) for number in options.numbers.split(",")]
        faults = [fault for fault in faults if fault.number in numbers]
    for name in left_out:
        print(f"left out, since only root, with tmpfs and loop devices, can do it: {KINDS[name].what}", flush=True)
    campaign, results = Campaign(root, options.limit), []
    unlike = list(campaign.prepare(sorted({fault.stage for fault in faults}), options.lanes))
    print(*unlike, f"{len(STAGES)} stages undisturbed: {time.monotonic() - began:.0f} s", sep="\n", flush=True)
    print("number | stage | fault | exit codes | seconds to the end | steps done again | what it ends with", flush=True)
    with ThreadPoolExecutor(options.lanes) as pool:
        for result in pool.map(campaign.carry_out, faults):
            results.append(result)
            print(" | ".join(row(result)), flush=True)
    print(f"\n{summary(results)}")
    met = [result for result in results if not result.is_missed]
    bad = [result for result in results if result.problems]
    if bad or unlike:
        print(f"what is bad lies in {root}")
    else:
        shutil.rmtree(root)
    facts = {"seed": options.seed, "faults": len(met), "missed": len(results) - len(met), "bad": len(bad)}
    facts |= {"equal": sum(result.equal for result in met), "taken": sum(result.taken for result in met)}
    facts |= {"steps_lost": sum(result.steps for result in met)}
    facts |= {"seconds": round(time.monotonic() - began), "left_out": left_out, "unlike": unlike}
    print(json.dumps({**facts, "problems": [{**asdict(each.fault), "problems": each.problems} for each in bad]}))
    return 1 if bad or unlike else 0


if __name__ == "__main__":
    sys.exit(main())
