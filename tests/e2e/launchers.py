"""The launchers as a test starts them: torchrun agents on loopback, and SLURM played by shell scripts.

The stand-in for srun starts SLURM_NTASKS local processes with the variables that srun sets, and records what it was
asked for.
"""

import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests import warm

ROOT = Path(__file__).resolve().parents[2]

FAKE_SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$FAKE_SLURM/srun.arguments"
printf '%s\\0' "$MASTER_ADDR" "$MASTER_PORT" > "$FAKE_SLURM/srun.master"
[[ -z ${FAKE_SRUN_TELLS_SCRIPT:-} ]] || kill -TERM $PPID
[[ -z ${FAKE_SRUN_ENDS_WITH:-} ]] || exit "$FAKE_SRUN_ENDS_WITH"
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) SLURM_STEP_ID=0 "$@" &
  tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show hostnames $SLURM_JOB_NODELIST") printf '127.0.0.1\\nnode-2\\n' ;;
  "show job $SLURM_JOB_ID") printf '   PreemptEligibleTime=2026 PreemptTime=%s\\n' "${FAKE_PREEMPTED:-None}" ;;
  "requeue $SLURM_JOB_ID") touch "$FAKE_SLURM/requeued"; exit "${FAKE_REQUEUE_ENDS_WITH:-0}" ;;
  *) exit 3 ;;
esac
"""


def environment(**extra: str) -> dict[str, str]:
    """The caller's, with this interpreter first on the path and no rank or SLURM job from outside."""
    launchers = re.compile("(LOCAL_|NODE_)?RANK|WORLD_SIZE|NNODES|(MASTER|SLURM|TORCHELASTIC|NPROC|CONTAINER)_.*")
    env = {key: value for key, value in os.environ.items() if not launchers.fullmatch(key)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return {**env, "OMP_NUM_THREADS": "1", **extra}


def free_port() -> str:
    """One that is free, and that the system gives to nobody who asks for any: those begin at 32768, or at 16000."""
    return str(next(port for port in random.sample(range(10000, 16000), 100) if is_free(port)))


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for all; a failure shows every process's output, and leaves none running."""
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


def start_torchrun(arguments: list[str], **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [ROOT / "launch" / "torchrun.sh", *arguments],
        cwd=ROOT,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_ranks(
    arguments: list[str], folder: Path, world_size: int, module: str = "minitron_mcore", **extra: str
) -> list[warm.Process]:
    """`python -m module ...` on each rank, as srun starts them; rank R writes into `folder`/rankR.log."""
    folder.mkdir()
    world = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        warm.start(
            module,
            arguments,
            output=folder / f"rank{rank}.log",
            env=environment(**world, **extra, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(world_size)
    ]


def write_tool(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    (folder / name).chmod(0o755)


def run_sbatch(
    folder: Path, arguments: list[str], nodes: int, tasks_per_node: int, **extra: str
) -> subprocess.CompletedProcess[str]:
    """The script as slurmd starts it on the first node; what the stand-ins record goes to `folder`."""
    write_tool(folder, "srun", FAKE_SRUN)
    write_tool(folder, "scontrol", FAKE_SCONTROL)
    # A job id whose port is free here: the script's rule is 20000 + id % 12000.
    port = next(port for port in range(21000, 32000) if is_free(port))
    env = environment(
        FAKE_SLURM=str(folder),
        SLURM_JOB_ID=str(port - 20000 + 12000 * 7),
        SLURM_JOB_NODELIST="node-[1-2]",
        SLURM_NNODES=str(nodes),
        SLURM_NTASKS=str(nodes * tasks_per_node),
        SLURM_NTASKS_PER_NODE=str(tasks_per_node),
        **extra,
    )
    env["PATH"] = f"{folder}:{env['PATH']}"
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        assert recorded(folder, "srun.master") == ["127.0.0.1", str(port)]
    return done


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def recorded(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text(encoding="utf-8").split("\0")[:-1]
