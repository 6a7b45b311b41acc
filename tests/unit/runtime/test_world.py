"""Who a process is, under every launcher and in every shell; and one that is alone uses nothing of another job's."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.world import World, read_world
from tests import warm
from tests.e2e.launchers import ROOT, environment, write_tool

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
ADDRESS = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
SALLOC = {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}


def test_torchruns_variables() -> None:
    asked = World(5, 8, 1, 4, "env://")
    assert read_world({**TORCHRUN, **ADDRESS}) == asked
    # torchrun inside an allocation: SLURM's variables describe the agents, not the ranks.
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert read_world({**TORCHRUN, **ADDRESS, **slurm}) == asked


@pytest.mark.parametrize(
    "shell",
    [
        {},
        ADDRESS,
        {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"},
        {"WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": "", **ADDRESS},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **ADDRESS},
        # In an allocation's own shell there is no step, or one of its own; a step of one task is a single process.
        SALLOC,
        {**SALLOC, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
        {**SALLOC, "SLURM_STEP_ID": "4294967290"},
        {**SALLOC, "SLURM_STEP_ID": "4294967291"},
        {**SALLOC, "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1"},
        {**SALLOC, "SLURM_STEP_ID": "3", "SLURM_NTASKS": "1"},
    ],
)
def test_a_single_process(shell: dict[str, str]) -> None:
    assert read_world(shell) == World()


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ({"RANK": "0"}, "RANK=0 is set in the environment and WORLD_SIZE is not"),
        ({"RANK": "1", **ADDRESS}, "RANK=1 is set in the environment and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment and RANK is not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment and MASTER_ADDR is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not"),
        ({"RANK": "2", "WORLD_SIZE": "2", **ADDRESS}, "RANK=2 in the environment must be below WORLD_SIZE=2"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK=first in the environment must be a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "1"}, "RANK=-1 in the environment must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "RANK=0 is set in the environment and WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 in the environment must be below WORLD_SIZE=0"),
    ],
)
def test_variables_that_contradict_each_other(shell: dict[str, str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_world(shell)
    assert words in str(caught.value)
    assert str(caught.value).endswith("start the ranks with torchrun or srun, or unset it for a single process")


def srun(node_list: str, **changes: str) -> dict[str, str]:
    step = {"SLURM_PROCID": "11", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0"}
    nodes = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_NODELIST": node_list}
    return {**step, **nodes, "SLURM_JOB_ID": "123456", **changes}


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("gpu001", "gpu001"),
        ("gpu001,gpu002", "gpu001"),
        ("gpu[003-007,12]", "gpu003"),
        ("gpu[12,003-007]", "gpu12"),
        ("gpu[4,7]", "gpu4"),
        ("login1,gpu[3-4]", "login1"),
        ("node[1-2]-ib,login1", "node1-ib"),
        ("rack[0-1]node[00-31]", "rack0node00"),
        ("gpu-a-[01-02].cluster.org", "gpu-a-01.cluster.org"),
        ("", "127.0.0.1"),
    ],
)
def test_sruns_variables(node_list: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container without scontrol the node list is read here. The port is that of launch/slurm.sbatch."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert read_world(srun(node_list)) == World(11, 16, 3, 8, f"tcp://{first}:{20000 + 123456 % 12000}")
    assert read_world({"WORLD_SIZE": "2", **srun(node_list)}).size == 16, "the step is what was started"


@pytest.mark.parametrize(("told", "ranks"), [("8(x2)", 8), ("4,2", 4), ("8", 8)])
def test_ranks_of_a_node(told: str, ranks: int) -> None:
    assert read_world(srun("gpu1", SLURM_NTASKS_PER_NODE=told)).local_size == ranks


def test_srun_asks_slurm_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tool(tmp_path, "scontrol", '#!/bin/sh\n[ "$*" = "show hostnames odd[1-2]" ] && echo first && echo second\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert str(read_world(srun("odd[1-2]")).address).startswith("tcp://first:")
    assert str(read_world(srun("other[5-6]")).address).startswith("tcp://other5:"), "scontrol failed"


def test_an_address_that_is_given_stays() -> None:
    assert read_world(srun("gpu[1-2]", MASTER_ADDR="10.0.0.1", MASTER_PORT="29501")).address == "tcp://10.0.0.1:29501"
    assert read_world(srun("gpu[1-2]", MASTER_ADDR="fe80::1", MASTER_PORT="2")).address == "tcp://[fe80::1]:2"


# A notebook: a model, scores of it; then a child that is forked, and one that is started, do the same.
NOTEBOOK = """
import json, multiprocessing, os, subprocess, sys, torch
import minitron_mcore.api as minitron

def work():
    shape = dict(num_layers=2, hidden_size=16, ffn_hidden_size=32, num_attention_heads=2, num_query_groups=2)
    model = minitron.build({"family": "llama", "vocab_size": 64, "max_position_embeddings": 32, **shape})
    return minitron.lm_loss(model, [torch.arange(32)[None]])

def tell(queue):
    queue.put(work())

if __name__ == "__main__":
    if sys.argv[1:]:
        print(work())
        sys.exit()
    before = dict(os.environ)
    losses = [work()]
    # Megatron sets NVTE_ itself, for Transformer Engine.
    left = {name for name, value in os.environ.items() if before.get(name) != value and not name.startswith("NVTE_")}
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    child = fork.Process(target=tell, args=(queue,))
    child.start()
    child.join(60)
    losses += [queue.get()] if child.exitcode == 0 else [f"forked: {child.exitcode}"]
    started = subprocess.run([sys.executable, __file__, "child"], capture_output=True, text=True)
    losses += [float(started.stdout)] if started.returncode == 0 else [started.stderr]
    gone = before.keys() - os.environ.keys()
    print(json.dumps({"losses": [*losses, work()], "left": sorted(left), "gone": sorted(gone)}))
"""


def test_a_notebook_in_another_jobs_shell(tmp_path: Path) -> None:
    """A host that is none, a port that is taken, an interface that is not there: none is used, all stay as they are."""
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        shell = {"MASTER_ADDR": "gpu-017.invalid", "MASTER_PORT": str(taken.getsockname()[1]), **SALLOC}
        env = environment(**shell, SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1", GLOO_SOCKET_IFNAME="ib7")
        env |= {"CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(ROOT)}
        process = warm.start("notebook", [], output=tmp_path / "shown", env=env, cwd=tmp_path)
        code, shown = process.wait(timeout=100), (tmp_path / "shown").read_text()
    assert code == 0, shown
    told = json.loads(next(line for line in shown.splitlines() if line.startswith("{")))
    assert len(set(told["losses"])) == 1 and isinstance(told["losses"][0], float), told["losses"]
    assert told["left"] == told["gone"] == []
