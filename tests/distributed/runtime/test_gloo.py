"""gloo's groups on the CPU: one worker thread each, since gathers that two of them carry out at a time crash."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_on_ranks

ROOT = Path(__file__).parents[3]
# Twelve coalesced gathers in flight, each from its own part of what it writes to, as Megatron's overlapped ones.
GATHERS = """
import sys, time, torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from minitron_mcore.runtime.start import start, stop

torch.set_num_threads(1)
rank, size = start().rank, dist.get_world_size()
group, parts = dist.new_group([*range(size)]), [torch.randn(60032) for _ in range(12)]
ends, again, turns = time.monotonic() + float(sys.argv[1]), torch.ones(1), 0
while again.item():
    if rank == 0:
        time.sleep(0.004 * (turns % 7))
    started = []
    for whole in parts:
        with _coalescing_manager(group, async_ops=True) as handle:
            dist.all_gather_into_tensor(whole, whole.view(size, -1)[rank], group=group, async_op=True)
        started.append(handle)
    for handle in started:
        torch.randn(128, 128) @ torch.randn(128, 128)
        handle.wait()
    again.fill_(float(time.monotonic() < ends))
    dist.broadcast(again, 0)
    turns += 1
stop()
print("turns", turns)
"""


def options_of_groups() -> list[tuple[int, float]]:
    from minitron_mcore.runtime.start import start

    start()
    groups = [dist.group.WORLD, dist.new_group([0, 1]), dist.new_group([0, 1], timeout=timedelta(seconds=77))]
    options = [group._get_backend(torch.device("cpu")).options for group in groups]  # type: ignore[union-attr]
    return [(each._threads, each._timeout.total_seconds()) for each in options]


def test_every_group_has_one_worker_and_its_own_patience() -> None:
    for (threads, _), *others in run_on_ranks(options_of_groups, 2):
        assert threads == 1 and [count for count, _ in others] == [1, 1] and others[1][1] == 77.0


@pytest.mark.slow
def test_gathers_at_the_same_time_do_not_crash() -> None:
    """Three times as long as what crashed with two workers had lasted at most."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    words = [*launcher, sys.executable, "-c", GATHERS, "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count("turns") == 2, (done.returncode, done.stderr[-2000:])
