"""Which process of how many this one is, and what its machine has, as far as it is known without torch.

The ranks are those of torchrun's variables, else srun's, else a process is alone.

A single process needs no address. Variables that the shell has from another job (MASTER_ADDR, MASTER_PORT, an
allocation's SLURM variables, the cluster's network interface) are neither used nor changed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import psutil

from minitron_mcore.errors import InputError

# SLURM numbers steps that srun did not start (the shell of an allocation, a batch script) from here on.
_FIRST_OWN_STEP = 0xFFFFFFF0
_CGROUP = Path("/sys/fs/cgroup")
TIMEOUT = "MINITRON_TIMEOUT_MINUTES"
GRACE = "MINITRON_GRACE_SECONDS"
_START = "start the ranks with torchrun or srun, or unset it for a single process"


@dataclass(frozen=True)
class Memory:
    """Bytes that the rank, or the node, with the least memory has."""

    free: int  # of a rank's device; on CPU its share of the host's
    total: int
    host_free: int  # of a node
    host_total: int


@dataclass(frozen=True)
class World:
    """The ranks of a job, and which of them this process is; it may also be made by hand, as for a dry run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # ranks of this node
    address: str | None = None  # where the ranks meet, for torch.distributed; None for a process that is alone
    device: str = "cpu"  # or "cuda"
    memory: Memory | None = None  # None: not known
    engine: str | None = None  # version of Transformer Engine, "" where it is not installed; None: not known
    capability: tuple[int, int] | None = None  # compute capability of the oldest GPU; None: not known
    cuda: tuple[int, int] | None = None  # that torch was built with; None: not known


def read_world(env: Mapping[str, str]) -> World:
    """The world that the variables `env` describe; an empty one counts as unset. Raises InputError where they
    contradict each other."""
    env = {name: value for name, value in env.items() if value}
    given = [name for name in ("RANK", "WORLD_SIZE") if name in env]
    if len(given) == 2:
        return _of_torchrun(env)
    # Inside `salloc` SLURM_NTASKS is the allocation's number of tasks, not the step's.
    tasks = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", 1)
    is_step = "SLURM_PROCID" in env and _number(env, "SLURM_STEP_ID", _FIRST_OWN_STEP) < _FIRST_OWN_STEP
    if is_step and tasks > 1:
        return _of_srun(env, tasks)
    if given and env[given[0]] != {"WORLD_SIZE": "1"}.get(given[0]):
        missing = {"RANK": "WORLD_SIZE", "WORLD_SIZE": "RANK"}[given[0]]
        raise InputError(given[0], env[given[0]], f"is set in the environment and {missing} is not", _START)
    return World()


def _of_torchrun(env: Mapping[str, str]) -> World:
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if rank >= size:
        rule = f"in the environment must be below WORLD_SIZE={size}, as ranks count from 0"
        raise InputError("RANK", rank, rule, _START)
    if size == 1:
        return World()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in env:
            raise InputError("WORLD_SIZE", size, f"is set in the environment and {name} is not", _START)
    local_rank = _number(env, "LOCAL_RANK", 0)
    return World(rank, size, local_rank, _number(env, "LOCAL_WORLD_SIZE", 1), "env://")


def _of_srun(env: Mapping[str, str], tasks: int) -> World:
    host = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "")))
    port = env.get("MASTER_PORT") or str(20000 + _number(env, "SLURM_JOB_ID", 0) % 12000)
    address = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
    # "8", "8(x2)" for two equal nodes, "8,4" for two different ones.
    of_node = re.match(r"\d+", env.get("SLURM_NTASKS_PER_NODE", env.get("SLURM_STEP_TASKS_PER_NODE", "1")))
    local_rank = _number(env, "SLURM_LOCALID", 0)
    return World(_number(env, "SLURM_PROCID"), tasks, local_rank, int(of_node[0]) if of_node else 1, address)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    given = env.get(name, "" if default is None else str(default))
    if not given.isdecimal():
        raise InputError(name, given, "in the environment must be a whole number, 0 or more", _START)
    return int(given)


def _first_host(node_list: str) -> str:
    """First host of a SLURM node list such as `gpu[003-007,12]-ib,login1`."""
    if "[" in node_list:
        try:
            command = ["scontrol", "show", "hostnames", node_list]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            node_list = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", node_list)  # in a container without scontrol
    return node_list.split(",")[0] or "127.0.0.1"


def on_this_machine(world: World) -> World:
    """`world` with what is installed, its device and, on a CPU, the memory of a rank: its share of the node's."""
    world = replace(world, engine=engine_version())
    if os.path.exists("/dev/nvidiactl") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return replace(world, device="cuda")
    free, total = host_memory()
    share = Memory(free // world.local_size, total // world.local_size, free, total)
    return replace(world, device="cpu", memory=share)


def engine_version() -> str:
    """Of Transformer Engine, which is not imported for it; "" where it is not installed, "?" where it says none."""
    if importlib.util.find_spec("transformer_engine") is None:
        return ""
    try:
        return importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return "?"


def host_memory() -> tuple[int, int]:
    """(free, total) bytes of this node's host memory, or of its container's, for all of its ranks."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    files = [_CGROUP / f"memory.{name}" for name in ("max", "current")]
    limit, used = (file.read_text().strip() if file.is_file() else "" for file in files)
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        free, total = min(free, int(limit) - int(used)), int(limit)
    return free, total


def collective_timeout() -> timedelta:
    """How long a rank waits for the others in a collective before it gives them up, in every process group.

    Raises InputError where the variable is not a whole number of minutes.
    """
    given = os.environ.get(TIMEOUT, "30")
    if not given.isdecimal() or int(given) < 1:
        raise InputError(TIMEOUT, given, "must be a whole number of minutes, 1 or more")
    return timedelta(minutes=int(given))


def grace_seconds() -> float | None:
    """How long after its first signal the launcher lets this process live; None where it does not say. Raises
    InputError where it says no whole number of seconds."""
    given = os.environ.get(GRACE)
    if given and not given.isdecimal():
        raise InputError(GRACE, given, "must be a whole number of seconds")
    return float(given) if given else None


@contextmanager
def own_interface(world_size: int) -> Iterator[None]:
    """Within the `with`, a single process makes its gloo groups on the loopback interface, whichever the shell names;
    afterwards the environment is as it was."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    if world_size == 1 and sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = before
