"""The launchers, run as users run them: torchrun agents on loopback, and SLURM's script with SLURM played by a shell.

The stand-in for srun starts SLURM_NTASKS local processes with the variables that srun sets; what it was asked for is
compared with srun's and pyxis' own options.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Spaces, quotes, an empty word and a glob: a launcher that splits or expands its arguments changes them.
ARGUMENTS = ["distill", "--config", "a b.yaml", "name=it's", "", "data.train=[*.bin]", "--flag"]

FAKE_SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$FAKE_SLURM/srun.arguments"
printf '%s\\0' "$MASTER_ADDR" "$MASTER_PORT" > "$FAKE_SLURM/srun.master"
[[ -z ${FAKE_SRUN_ONLY_RECORDS:-} ]] || exit 0
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
[[ "$*" == "show hostnames $SLURM_JOB_NODELIST" ]] || exit 3
printf '127.0.0.1\\nnode-2\\n'
"""


def environment(**extra: str) -> dict[str, str]:
    """The caller's, with this interpreter first on the path and no rank or SLURM job from outside."""
    launchers = re.compile("(LOCAL_|NODE_)?RANK|WORLD_SIZE|NNODES|(MASTER|SLURM|TORCHELASTIC|NPROC|CONTAINER)_.*")
    env = {key: value for key, value in os.environ.items() if not launchers.fullmatch(key)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return {**env, "OMP_NUM_THREADS": "1", "MINITRON_MODULE": "tests.e2e.launch_probe", **extra}


def read_ranks(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank*.json"))}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for all; a failure shows every process's output, and leaves none running."""
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


def start_torchrun(folder: Path, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [ROOT / "launch" / "torchrun.sh", *ARGUMENTS],
        cwd=ROOT,
        env=environment(LAUNCH_PROBE_FOLDER=str(folder), **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def expected(world_size: int, local_rank: int) -> dict:
    total = world_size * (world_size + 1) / 2
    facts = {"world_size": world_size, "local_rank": local_rank, "total": total}
    return {**facts, "arguments": ARGUMENTS, "threads": "1"}


def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """Two agents, as on two hosts, with one process each."""
    cluster = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    finish([start_torchrun(tmp_path, NODE_RANK=str(node), **cluster) for node in range(2)])
    assert read_ranks(tmp_path) == {"rank0": expected(2, 0), "rank1": expected(2, 0)}


def test_torchrun_on_one_node(tmp_path: Path) -> None:
    """Two processes, each with a local rank of its own."""
    finish([start_torchrun(tmp_path, NPROC_PER_NODE="2")])
    assert read_ranks(tmp_path) == {"rank0": expected(2, 0), "rank1": expected(2, 1)}


@pytest.mark.parametrize(("listing", "processes"), [("GPU 0: A (UUID: x)\nGPU 1: A (UUID: y)\n", "2"), ("", "1")])
def test_torchrun_starts_a_process_for_each_gpu(tmp_path: Path, listing: str, processes: str) -> None:
    """Both tools are stand-ins: one lists GPUs (or fails, as without a driver), the other shows what it was given."""
    write_tool(tmp_path, "nvidia-smi", f"#!/bin/sh\nprintf '%s' '{listing}'\n[ -n '{listing}' ]\n")
    write_tool(tmp_path, "torchrun", "#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    env = environment()
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = subprocess.run([ROOT / "launch" / "torchrun.sh", "run"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--standalone", "--nproc-per-node", processes, "-m", "tests.e2e.launch_probe", "run"]


def write_tool(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    (folder / name).chmod(0o755)


def run_sbatch(folder: Path, nodes: int, tasks_per_node: int, **extra: str) -> subprocess.CompletedProcess[str]:
    """The script as slurmd starts it on the first node; everything it writes goes to `folder`."""
    write_tool(folder, "srun", FAKE_SRUN)
    write_tool(folder, "scontrol", FAKE_SCONTROL)
    # A job id whose port is free here: the script's rule is 20000 + id % 12000.
    port = next(port for port in range(21000, 32000) if is_free(port))
    env = environment(
        FAKE_SLURM=str(folder),
        LAUNCH_PROBE_FOLDER=str(folder),
        SLURM_JOB_ID=str(port - 20000 + 12000 * 7),
        SLURM_JOB_NODELIST="node-[1-2]",
        SLURM_NNODES=str(nodes),
        SLURM_NTASKS=str(nodes * tasks_per_node),
        SLURM_NTASKS_PER_NODE=str(tasks_per_node),
        **extra,
    )
    env["PATH"] = f"{folder}:{env['PATH']}"
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *ARGUMENTS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        assert recorded(folder, "srun.master") == ["127.0.0.1", str(port)]
    return done


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def recorded(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text(encoding="utf-8").split("\0")[:-1]


@pytest.mark.parametrize(("nodes", "tasks_per_node"), [(2, 1), (1, 2)])
def test_slurm(tmp_path: Path, nodes: int, tasks_per_node: int) -> None:
    done = run_sbatch(tmp_path, nodes, tasks_per_node)
    assert done.returncode == 0, done.stdout + done.stderr
    command = ["python", "-m", "tests.e2e.launch_probe", *ARGUMENTS]
    assert recorded(tmp_path, "srun.arguments") == ["--kill-on-bad-exit=1", *command]
    last = 1 if tasks_per_node == 2 else 0
    assert read_ranks(tmp_path) == {"rank0": expected(2, 0), "rank1": expected(2, last)}


@pytest.mark.parametrize("mounts", ["", "/data:/data,/scratch:/tmp"])
def test_slurm_with_a_container(tmp_path: Path, mounts: str) -> None:
    image = "registry#team/minitron:1 0"
    done = run_sbatch(tmp_path, 2, 1, CONTAINER_IMAGE=image, CONTAINER_MOUNTS=mounts, FAKE_SRUN_ONLY_RECORDS="1")
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path, "srun.arguments") == [
        "--kill-on-bad-exit=1",
        f"--container-image={image}",
        f"--container-mounts={ROOT}:{ROOT}" + (f",{mounts}" if mounts else ""),
        f"--container-workdir={ROOT}",
        *("python", "-m", "tests.e2e.launch_probe", *ARGUMENTS),
    ]


def test_slurm_fails_when_a_task_fails(tmp_path: Path) -> None:
    done = run_sbatch(tmp_path, 1, 2, MINITRON_MODULE="tests.e2e.no_such_module")
    assert done.returncode != 0
    assert "no_such_module" in done.stderr


def test_slurm_directives() -> None:
    """What makes a job outlive preemption: requeued, log appended to, tasks (not the shell, no `B:`) warned in time."""
    text = (ROOT / "launch" / "slurm.sbatch").read_text(encoding="utf-8")
    directives = set(re.findall(r"^#SBATCH (\S+)$", text, flags=re.MULTILINE))
    assert {"--requeue", "--open-mode=append", "--signal=TERM@120", "--ntasks-per-node=8"} <= directives
    assert text.index("#SBATCH --signal") < text.index("set -euo pipefail"), "sbatch stops reading at the first command"
