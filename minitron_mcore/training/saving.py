"""Saving an iteration and what is said of it beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import latest_iteration
from minitron_mcore.checkpoint.store import save_state
from minitron_mcore.files import writing
from minitron_mcore.runtime.start import Runtime


def save_described(
    folder: Path,
    iteration: int,
    state: ShardedStateDict,
    runtime: Runtime,
    architecture: Architecture,
    describe: Callable[[], None],
) -> None:
    """Write `state`, of a model of `architecture`, as an iteration of `folder`; all ranks call.

    `describe`, on the first rank, tells of it.

    What is described is the newest whole iteration: a save that fails leaves the word of the one before. Only of the
    first one the description comes before the weights, which nobody could read without.
    """

    def tell() -> None:
        with writing(str(folder)):
            describe()

    is_first = runtime.on_main(lambda: latest_iteration(folder) is None)
    if is_first:
        runtime.on_main(tell)
    save_state(folder, iteration, state, runtime, architecture)
    if not is_first:
        runtime.on_main(tell)
