"""This process, started once, and the layout of its models."""

from __future__ import annotations

import dataclasses
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.parallel import is_laid_out, layout_stands, seed_everything, use_layout
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.start import start as start_process

_standing: tuple[Runtime, ParallelConfig] | None = None


def start(*, seed: int = 1234, **parallel: Any) -> Runtime:
    """Start this process and lay models out as `parallel` says: tensor, pipeline, virtual_pipeline, sequence.

    Not needed in a notebook: the other functions start a single process by themselves. Models loaded at another layout
    cannot be used afterwards. Every rank calls. Raises InputError.
    """
    global _standing
    wanted = ParallelConfig(**parallel)
    if wanted.context > 1:
        raise InputError("context", wanted.context, "does not work here, where scores need whole sequences", "omit it")
    runtime = start_process()
    use_layout(wanted, runtime.world_size)
    seed_everything(seed)
    _standing = runtime, wanted
    return runtime


def started() -> tuple[Runtime, ParallelConfig]:
    """This process and its models' layout, which a verb called in between may have changed."""
    if _standing is None or not layout_stands():
        start()
    elif not is_laid_out(_standing[1]):
        start(**dataclasses.asdict(_standing[1]))
    assert _standing is not None
    return _standing


def standing_layout() -> ParallelConfig:
    """The layout that `start` was given, else that of a single process; starts nothing."""
    return ParallelConfig() if _standing is None else _standing[1]
