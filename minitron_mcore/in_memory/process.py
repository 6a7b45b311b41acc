"""This process, started once, and the layout of its models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.parallel import is_laid_out, seed_everything, use_layout
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.start import start as start_process

_standing: tuple[Runtime, ParallelConfig] | None = None
_seed = 1234


def start(*, seed: int = 1234, **parallel: Any) -> Runtime:
    """Start this process and lay models out as `parallel` says: tensor, pipeline, virtual_pipeline, sequence.

    Not needed in a notebook: the other functions start a single process by themselves. Models loaded at another layout
    cannot be used afterwards. Every rank calls. Raises InputError.
    """
    global _seed, _standing
    wanted = ParallelConfig(**parallel)
    if wanted.context > 1:
        raise InputError("context", wanted.context, "does not work here, where scores need whole sequences", "omit it")
    runtime = start_process()
    use_layout(wanted, runtime.world_size)
    seed_everything(seed)
    _standing, _seed = (runtime, wanted), seed
    return runtime


def started() -> tuple[Runtime, ParallelConfig]:
    """This process and its models' layout, which a verb called in between may have changed."""
    if _standing is None or not _stands(_standing[0].world_size):
        start()
    elif not is_laid_out(_standing[1]):
        start(seed=_seed, **dataclasses.asdict(_standing[1]))
    assert _standing is not None
    return _standing


def _stands(world_size: int) -> bool:
    """Whether this process is still in a process group of so many ranks."""
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() == world_size


def standing_layout() -> ParallelConfig:
    """The layout that `start` was given, else that of a single process; starts nothing."""
    return ParallelConfig() if _standing is None else _standing[1]
