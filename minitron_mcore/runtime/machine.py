"""The machine that a process runs on, as far as it is known without torch. Pure."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import psutil

from minitron_mcore.runtime.world import Memory, World

_CGROUP = Path("/sys/fs/cgroup")


def on_this_machine(world: World) -> World:
    """`world` with its device and, on a CPU, the memory of a rank: its share of the node's."""
    if os.path.exists("/dev/nvidiactl") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return replace(world, device="cuda")
    free, total = host_memory()
    share = Memory(free // world.local_size, total // world.local_size, free, total)
    return replace(world, device="cpu", memory=share)


def host_memory() -> tuple[int, int]:
    """(free, total) bytes of this node's host memory, or of its container's, for all of its ranks."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    limit, used = (_read(_CGROUP / f"memory.{name}") for name in ("max", "current"))
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        free, total = min(free, int(limit) - int(used)), int(limit)
    return free, total


def _read(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""
