"""A forked child of a single process, as of `multiprocessing` in a notebook, can start afresh.

gloo's threads stay in the parent: in the child, a collective of the inherited groups would hang and destroying them
would abort. So the child forgets them, and makes new ones when it needs them.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_is_registered = False


def forget_groups_in_children() -> None:
    """Called where this process is alone in its world; under a launcher a child has no world of its own."""
    global _is_registered
    if not _is_registered:
        _is_registered = True
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    if not dist.is_initialized() or dist.get_world_size() > 1:
        return
    from megatron.core import parallel_state

    from minitron_mcore.runtime import parallel

    with suppress(AttributeError):  # private names of torch: there are no public ones
        for group in c10d._pg_map:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # never destroyed
        for known in (c10d._pg_map, c10d._pg_names, c10d._pg_group_ranks, c10d._pg_to_tag, c10d._tags_to_pg):
            known.clear()
        c10d._world.default_pg = None
        parallel._current = None
        parallel._teacher_groups.clear()
        parallel_state.destroy_model_parallel()
