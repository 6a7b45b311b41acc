"""Whether a training can have local checkpoints: the library, the folder, and where copies go. Pure."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.world import World
from minitron_mcore.training.config import TrainConfig

LIBRARY, PACKAGE = "nvidia_resiliency_ext", "nvidia-resiliency-ext"
# What short trainings are given, which begin anew rather than go on.
NO_LOCAL = {
    "non_persistent_save_interval": None,
    "non_persistent_local_ckpt_dir": None,
    "replication": False,
    "replication_jump": None,
    "replication_factor": 2,
}


def check_local(train: TrainConfig, folder: Path, section: str, world: World) -> None:
    """Raise InputError where the ranks of `world` cannot have the local checkpoints that `section` asks for, beside the
    checkpoints of `folder`."""
    if train.non_persistent_save_interval is None:
        return
    key = f"{section}.non_persistent_save_interval"
    if importlib.util.find_spec(LIBRARY) is None:
        rule = f"needs {PACKAGE}, which is not installed"
        raise InputError(key, train.non_persistent_save_interval, rule, f"pip install '{PACKAGE}>=0.4.1,<0.5'")
    local = Path(str(train.non_persistent_local_ckpt_dir))
    if (inner := local.absolute().resolve()).is_relative_to(outer := folder.absolute().resolve()):
        rule = f"lies in the folder of the checkpoints, {outer}, which all nodes share"
        remedy = "name one in a node's memory, as below /dev/shm, or on its own disk"
        raise InputError(f"{section}.non_persistent_local_ckpt_dir", inner, rule, remedy)
    if not train.replication:
        return
    jump, factor = train.replication_jump or world.local_size, train.replication_factor
    if world.size % (jump * factor):
        given = f"replication_jump={jump}" + ("" if train.replication_jump else ", the ranks of a node")
        rule = f"with {given} makes groups of {jump * factor} ranks, which do not divide the {world.size} there are"
        remedy = "change one of the two, or the number of ranks, or leave replication out"
        raise InputError(f"{section}.replication_factor", factor, rule, remedy)
