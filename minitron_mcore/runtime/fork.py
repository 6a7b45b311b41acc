"""A child that a process of its own forks, as `multiprocessing` in a notebook does, can start anew.

gloo's threads stay behind in the parent: in the child a collective of the inherited groups would never end, and taking
them down would abort. So the child forgets them, and whoever needs groups makes some, as in any process.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_is_registered = False


def forget_groups_in_children() -> None:
    """From here on, where this process is alone in its world. Under a launcher a child has no world of its own."""
    global _is_registered
    if not _is_registered:
        _is_registered = True
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    if not dist.is_initialized() or dist.get_world_size() > 1:
        return
    from megatron.core import parallel_state

    from minitron_mcore.runtime import parallel

    with suppress(AttributeError):  # names within torch, for want of public ones
        for group in c10d._pg_map:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # never taken down
        for known in (c10d._pg_map, c10d._pg_names, c10d._pg_group_ranks, c10d._pg_to_tag, c10d._tags_to_pg):
            known.clear()
        c10d._world.default_pg = None
        parallel._current = None
        parallel._teacher_groups.clear()
        parallel_state.destroy_model_parallel()
