"""Ranks agree, or fail together: a rank that raised alone would leave the others waiting in their next collective.

Every rank of the world calls each of these; in a single process, with or without a process group, they need nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.pulse import PULSE

T = TypeVar("T")
WAITS, ENDS = "waiting for the first rank", "done, waiting for the others"
LEAVING = 5.0  # seconds for the others to have seen that all are done, before the first rank goes


def is_main() -> bool:
    """Whether this is the first rank. Any rank may ask."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's picklable `value`, in the order of ranks; of `group`, or of the world."""
    if not dist.is_initialized():
        return [value]
    PULSE.note("gather")
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def broadcast(value: T) -> T:
    """The first rank's picklable `value`."""
    box = [value]
    if _has_peers():
        PULSE.note("broadcast")
        dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """The picklable result of `work`, which the first rank alone does. Where it raises, every rank does: an InputError
    as it is, anything else as a RuntimeError beside the first rank's own."""
    result, failure = _tried(work if is_main() else lambda: None)
    _wait_for_main()
    result, told = broadcast((result, _for_others(failure)))
    if failure is not None:
        raise failure
    if told is not None:
        raise told
    return result


def led(work: Callable[[Callable[[Any], Any]], T], do: Callable[[Any], Any]) -> T:
    """The picklable result of `work(ask)`, which the first rank alone does. Its `ask(request)`, of a picklable request,
    has every rank call `do(request)` and gives what that gives on the first. Where `work` raises, every rank does, as
    in `on_main`; a rank that raises in `do` leaves at once, since others may wait for it there."""
    if not is_main():
        while True:
            _wait_for_main()
            request, end = broadcast((None, None))
            if end is not None:
                result, told = end
                if told is not None:
                    raise told
                return result
            do(request)
    is_doing = False

    def ask(request: Any) -> Any:
        nonlocal is_doing
        _wait_for_main()
        broadcast((request, None))
        is_doing = True
        found = do(request)
        is_doing = False
        return found

    result, failure = _tried(lambda: work(ask))
    if failure is not None and is_doing:
        raise failure
    _wait_for_main()
    broadcast((None, (result, _for_others(failure))))
    if failure is not None:
        raise failure
    return result


def all_or_none(work: Callable[[], T], only: type[Exception] = Exception, group: dist.ProcessGroup | None = None) -> T:
    """What `work`, done on every rank, gives on this one. Where it fails on any, every rank raises: its own error, or
    else the first other rank's, told as `on_main` does.

    only: what is told so; any other error is raised at once. Needed where ranks wait for each other within `work`: one
    that has failed there must leave, so that the launcher ends the others. group: whose ranks; None: all.
    """
    result, failure = _tried(work, only)
    raise_together(failure, group)
    return result


def raise_together(failure: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every rank, of `group` or of the world, where any of them passes an error."""
    if _has_peers(group):
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        PULSE.note("agree")
        failed = torch.tensor(failure is not None, dtype=torch.int32, device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
        if failed:
            others = gathered(_for_others(failure), group)
            failure = failure or next(error for error in others if error is not None)
    if failure is not None:
        raise failure


def all_come(within: float | None = None) -> bool:
    """Whether every rank calls this, within so many seconds of this one's call; None: as long as it takes.

    For a rank that failed in work where ranks wait for each other: the others may have failed alike, or they wait for
    it in a collective. Then it must leave. They meet in the store, since a collective would be taken for theirs.
    """
    if not _has_peers():
        return True
    store = dist.distributed_c10d._get_default_store()
    turn = f"minitron/come/{store.add(f'minitron/comings/{dist.get_rank()}', 1)}"
    store.add(turn, 1)
    return wait_until(lambda: store.add(turn, 0) == dist.get_world_size(), within)


def end_together() -> None:
    """Wait until every rank has done its work, so that one which hangs at the very end is seen by the others; the first
    rank, which may hold the store, leaves last."""
    if not _has_peers():
        return
    store, rank, others = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size() - 1
    PULSE.note(ENDS)
    turn = store.add(f"minitron/ends/{rank}", 1)
    left = f"minitron/left/{turn}"
    with suppress(dist.DistError):  # the first rank has gone: all were done
        all_come()
        if rank:
            store.add(left, 1)
        else:
            wait_until(lambda: store.add(left, 0) == others, LEAVING)


def _tried(work: Callable[[], T], caught: type[Exception] = Exception) -> tuple[Any, Exception | None]:
    """What `work` gives, and what it raises."""
    try:
        return work(), None
    except caught as error:
        return None, error


def _has_peers(group: dist.ProcessGroup | None = None) -> bool:
    return dist.is_initialized() and dist.get_world_size(group) > 1


def _for_others(failure: Exception | None) -> Exception | None:
    if failure is None or isinstance(failure, InputError):
        return failure
    said = str(failure) or type(failure).__name__  # a MemoryError says nothing
    return RuntimeError(f"rank {dist.get_rank() if dist.is_initialized() else 0}: {said}")


def _wait_for_main() -> None:
    """Wait on the store, not in a collective: the first rank may work for longer than a collective may take."""
    if not _has_peers():
        return
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    turn = f"minitron/main/{store.add(f'minitron/turns/{rank}', 1)}"
    if rank == 0:
        store.set(turn, "done")
    else:
        PULSE.note(WAITS)
        wait_until(lambda: store.check([turn]))
        PULSE.note("told by the first rank")


def wait_until(there: Callable[[], bool], within: float | None = None) -> bool:
    """Ask `there` until it says so: every 20 ms at first, then ever more rarely, since it may take hours and a thousand
    ranks may ask one store. False where it does not `within` so many seconds."""
    pause, begun = 0.02, time.monotonic()
    while not there():
        if within is not None and time.monotonic() - begun > within:
            return False
        time.sleep(pause)
        pause = min(1.02 * pause, 0.5)
    return True
