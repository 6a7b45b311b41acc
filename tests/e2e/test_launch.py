"""The launchers start the ranks they should and hand every argument on, under torchrun and under SLURM."""

import contextlib
import json
import os
import pty
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.runtime.notice import FOLLOWS
from tests.e2e.launchers import (
    ROOT,
    environment,
    finish,
    free_port,
    recorded,
    run_sbatch,
    start_torchrun,
    write_tool,
)
from tests.terminal import screen

# Spaces, quotes, an empty word and a glob: a launcher that splits or expands its arguments changes them.
ARGUMENTS = ["distill", "--config", "a b.yaml", "name=it's", "", "data.train=[*.bin]", "--flag"]
PROBE = "tests.e2e.launch_probe"


def probe(folder: Path) -> dict[str, str]:
    return {"MINITRON_MODULE": PROBE, "LAUNCH_PROBE_FOLDER": str(folder)}


def read_ranks(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank*.json"))}


def expected(world_size: int, local_rank: int) -> dict[str, Any]:
    total = world_size * (world_size + 1) / 2
    facts = {"world_size": world_size, "local_rank": local_rank, "total": total}
    return {**facts, "arguments": ARGUMENTS, "threads": "1"}


@pytest.mark.slow  # test_launch_train.py trains so
def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """Two agents, as on two hosts, with one process each."""
    cluster = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    finish([start_torchrun(ARGUMENTS, NODE_RANK=str(node), **cluster, **probe(tmp_path)) for node in range(2)])
    assert read_ranks(tmp_path) == {"rank0": expected(2, 0), "rank1": expected(2, 0)}


@pytest.mark.slow  # test_run.py runs so
def test_torchrun_on_one_node(tmp_path: Path) -> None:
    """Two processes, each with a local rank of its own."""
    finish([start_torchrun(ARGUMENTS, NPROC_PER_NODE="2", **probe(tmp_path))])
    assert read_ranks(tmp_path) == {"rank0": expected(2, 0), "rank1": expected(2, 1)}


def test_a_refusal_under_torchrun_is_one_sentence() -> None:
    process = start_torchrun(["train", "train.lr=-1"], NPROC_PER_NODE="2")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2, said
    assert said.count("\n") == 1 and said.startswith("minitron train: train.lr=-1"), said


@pytest.mark.parametrize("how", ["killed", pytest.param("refused", marks=pytest.mark.slow)])
def test_ranks_are_started_again(how: str, tmp_path: Path) -> None:
    """After `kill -9` of one, not after a refusal. The agent is torchrun's own, and so are its processes."""
    elastic = {"MAX_RESTARTS": "2", "NPROC_PER_NODE": "2", "MINITRON_MODULE": "tests.e2e.elastic_probe"}
    process = start_torchrun([how], LAUNCH_PROBE_FOLDER=str(tmp_path), **elastic)
    said = process.communicate(timeout=120)[0]
    starts = {path.name: path.read_text().split() for path in tmp_path.glob("rank*")}
    if how == "refused":
        assert process.returncode == 2 and said == "", said
        assert {start for each in starts.values() for start in each} == {"0"}
    else:
        assert process.returncode == 0, said
        assert said == "torchrun: rank 1 was ended by SIGKILL; all ranks are started again (restart 1 of 2)\n"
        assert starts == {"rank0": ["0", "1"], "rank1": ["0", "1"]}


@pytest.mark.slow
def test_bare_torchrun_says_what_its_report_is() -> None:
    """The sentence comes first, then a line that says whose lines follow; they end with the sentence again."""
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "minitron_mcore", "train", "train.lr=-1"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if "OMP_NUM_THREADS" not in line and set(line) - {"*"}]
    place = next(number for number, line in enumerate(lines) if line.startswith("minitron train: train.lr=-1"))
    assert lines[place + 1] == FOLLOWS and done.returncode == 1
    assert not [line for line in lines[:place] if "Traceback" in line or "Error" in line]
    assert lines[place] in "\n".join(lines[place + 2 :])


@pytest.mark.slow  # what a terminal shows is in tests/unit/runtime/test_progress.py; here, that torchrun hands it on
def test_the_first_rank_alone_draws_on_the_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = ["tokenizer", f"tokenizer.model={tmp_path}/tokenizer.model", f"tokenizer.input={ROOT}/minitron_mcore"]
    env = environment(NPROC_PER_NODE="2", TERM="xterm", COLUMNS="100")
    command = [str(ROOT / "launch" / "torchrun.sh"), *words, "tokenizer.extensions=[.py]", "tokenizer.vocab_size=600"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 1 << 16):
            written += part
    os.close(ours)
    assert process.wait(timeout=100) == 0, written
    text = written.decode()
    assert text.count("\rtokenizer: reading:   0%|") == 1
    lines = screen(text)
    assert all(line.startswith("tokenizer: ") for line in lines if line) and "|" not in "".join(lines), lines


@pytest.mark.parametrize(("listing", "processes"), [("GPU 0: A (UUID: x)\nGPU 1: A (UUID: y)\n", "2"), ("", "1")])
def test_torchrun_starts_a_process_for_each_gpu(tmp_path: Path, listing: str, processes: str) -> None:
    """Both tools are stand-ins: one lists GPUs (or fails, as without a driver), the other shows what it was given."""
    write_tool(tmp_path, "nvidia-smi", f"#!/bin/sh\nprintf '%s' '{listing}'\n[ -n '{listing}' ]\n")
    write_tool(tmp_path, "python", "#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    env = environment()
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = subprocess.run([ROOT / "launch" / "torchrun.sh", "run"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        *("-m", "minitron_mcore.runtime.torchrun"),
        *("--standalone", "--shutdown-timeout", "600", "--nproc-per-node", processes),
        *("-m", "minitron_mcore", "run"),
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"NNODES": "2", "NODE_RANK": "1"}, "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500"),
        (
            {"NNODES": "2:3", "MAX_RESTARTS": "5"},
            "--nnodes 2:3 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 --rdzv-id minitron "
            "--rdzv-conf last_call_timeout=30 --max-restarts 5",
        ),
        ({"MAX_RESTARTS": "5"}, "--standalone --max-restarts 5"),
    ],
)
def test_torchrun_is_told_of_nodes_and_restarts(tmp_path: Path, given: dict[str, str], expected: str) -> None:
    write_tool(tmp_path, "python", "#!/bin/sh\nprintf '%s ' \"$@\"\n")
    env = environment(MASTER_ADDR="10.0.0.1", **given)
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = subprocess.run([ROOT / "launch" / "torchrun.sh", "run"], env=env, capture_output=True, text=True, check=True)
    assert f"runtime.torchrun {expected} --shutdown-timeout 600 " in done.stdout


@pytest.mark.parametrize(
    ("nodes", "tasks_per_node"),
    [pytest.param(2, 1, marks=pytest.mark.slow), (1, 2)],  # test_launch_train.py trains on two nodes
)
def test_slurm(tmp_path: Path, nodes: int, tasks_per_node: int) -> None:
    done = run_sbatch(tmp_path, ARGUMENTS, nodes, tasks_per_node, **probe(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    command = ["python", "-m", PROBE, *ARGUMENTS]
    assert recorded(tmp_path, "srun.arguments") == ["--kill-on-bad-exit=1", *command]
    last = 1 if tasks_per_node == 2 else 0
    assert read_ranks(tmp_path) == {"rank0": expected(2, 0), "rank1": expected(2, last)}


@pytest.mark.parametrize("mounts", ["", "/data:/data,/scratch:/tmp"])
def test_slurm_with_a_container(tmp_path: Path, mounts: str) -> None:
    image = "registry#team/minitron:1 0"
    container = {"CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": mounts}
    done = run_sbatch(tmp_path, ARGUMENTS, 2, 1, FAKE_SRUN_ENDS_WITH="0", **container)
    assert done.returncode == 0, done.stderr
    assert recorded(tmp_path, "srun.arguments") == [
        "--kill-on-bad-exit=1",
        f"--container-image={image}",
        f"--container-mounts={ROOT}:{ROOT}" + (f",{mounts}" if mounts else ""),
        f"--container-workdir={ROOT}",
        *("python", "-m", "minitron_mcore", *ARGUMENTS),
    ]


@pytest.mark.parametrize("listing", ["GPU 0: A (UUID: x)\n", ""])
def test_docker(tmp_path: Path, listing: str) -> None:
    """The stand-in for docker shows what it was asked for: arguments as they are, and no secret among them."""
    write_tool(tmp_path, "nvidia-smi", f"#!/bin/sh\nprintf '%s' '{listing}'\n")
    write_tool(tmp_path, "docker", "#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    given = {"DOCKER_MOUNTS": "/data /a b:/b:ro", "WANDB_API_KEY": "a secret", "MINITRON_IMAGE": "team/minitron:1"}
    env = environment(**given)
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    script = [str(ROOT / "launch" / "docker.sh"), *ARGUMENTS]
    done = subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("\0")[:-1]
    place = words.index("--entrypoint")
    assert words[place:] == ["--entrypoint", "/opt/minitron/launch/torchrun.sh", "team/minitron:1", *ARGUMENTS]
    volumes = [after for word, after in pairwise(words) if word == "--volume"]
    assert volumes == [f"{tmp_path}:{tmp_path}", "/data:/data", "/a:/a", "b:/b:ro"]
    assert words[:2] == ["run", "--rm"] and f"{os.getuid()}:{os.getgid()}" in words and "none" in words
    assert ("--gpus" in words) == bool(listing) and "--tty" not in words
    assert "WANDB_API_KEY" in words and "secret" not in done.stdout


def test_slurm_fails_when_a_task_fails(tmp_path: Path) -> None:
    done = run_sbatch(tmp_path, ARGUMENTS, 1, 2, MINITRON_MODULE="tests.e2e.no_such_module")
    assert done.returncode != 0
    assert "no_such_module" in done.stderr and not (tmp_path / "requeued").exists()


PREEMPTED = "2026-01-01T01:00:00"


@pytest.mark.parametrize(
    ("code", "variables", "requeued"),
    [
        (0, {}, False),
        (200, {}, True),
        (201, {}, True),
        (138, {}, False),  # a time limit before anything was finished, which the next start would meet again
        (143, {}, False),  # what srun says where a rank has failed
        (143, {"FAKE_PREEMPTED": PREEMPTED}, True),
        (0, {"FAKE_PREEMPTED": PREEMPTED}, False),
        (200, {"FAKE_SRUN_TELLS_SCRIPT": "1"}, False),  # scancel, which would not end a job that requeues itself
        (143, {"FAKE_SRUN_TELLS_SCRIPT": "1", "FAKE_PREEMPTED": PREEMPTED}, False),
        (200, {"FAKE_REQUEUE_ENDS_WITH": "1"}, True),
    ],
)
def test_what_is_unfinished_is_requeued(tmp_path: Path, code: int, variables: dict[str, str], requeued: bool) -> None:
    done = run_sbatch(tmp_path, ARGUMENTS, 2, 1, FAKE_SRUN_ENDS_WITH=str(code), **variables)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "requeued").exists() is requeued
    said = f"minitron: stopped with exit code {code}, unfinished: the job is requeued\n"
    assert done.stdout == (said if requeued else "")
    assert done.stderr == (
        "minitron: it was not requeued; the same sbatch command goes on\n"
        if "FAKE_REQUEUE_ENDS_WITH" in variables
        else ""
    )


def test_slurm_directives() -> None:
    """What makes a job outlive preemption: requeued, log appended to, tasks (not the shell, no `B:`) warned in time."""
    text = (ROOT / "launch" / "slurm.sbatch").read_text(encoding="utf-8")
    directives = set(re.findall(r"^#SBATCH (\S+)$", text, flags=re.MULTILINE))
    assert {"--requeue", "--open-mode=append", "--signal=USR1@600", "--ntasks-per-node=8"} <= directives
    assert text.index("#SBATCH --signal") < text.index("set -euo pipefail"), "sbatch stops reading at the first command"
