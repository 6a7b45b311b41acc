"""Equal subsets of the ranks that work side by side, each as if it were alone.

Megatron's groups are made of all the ranks of torch.distributed's world, and much code asks for its size. So within
`apart` a rank leaves the world's process group for one of its subset:

    ranks    0 1 2 3 | 4 5 6 7        two subsets, each of which lays itself out as 4 ranks
    within   0 1 2 3 | 0 1 2 3

Between subsets there are no collectives, which would have to end in time: they meet on the store of the world's group,
and wait for as long as another works.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from minitron_mcore.errors import InputError, MemoryExhaustedError
from minitron_mcore.runtime.agree import wait_until
from minitron_mcore.runtime.parallel import release_layout
from minitron_mcore.runtime.progress import chosen
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.world import collective_timeout, own_interface

T = TypeVar("T")


class Subset:
    """This rank's subset: `runtime` is its world. index: which of `count` subsets it is."""

    def __init__(self, runtime: Runtime, index: int, count: int, store: Store | None) -> None:
        self.runtime, self.index, self.count = runtime, index, count
        self._store = store
        self._meetings = itertools.count()

    def numbers(self, total: int) -> Iterator[int]:
        """The numbers below `total` that this subset is to work on: whichever is free takes the next. Every rank of
        every subset calls, as often as the others."""
        turn = f"numbers/{next(self._meetings)}"
        for place in range(total):
            number = place if self._store is None else self._take(self._store, turn)
            if number >= total:
                return
            yield number

    def _take(self, store: Store, turn: str) -> int:
        return self.runtime.on_main(lambda: store.add(turn, 1) - 1)

    def gathered(self, value: T) -> list[T]:
        """Every subset's picklable `value`, in the order of subsets, once all have come here. Every rank calls.

        Raises what another subset has failed with.
        """
        if self._store is None:
            return [value]
        store, turn = self._store, f"gathered/{next(self._meetings)}"

        def meet() -> list[Any]:
            _put(store, f"{turn}/{self.index}", value)
            keys = [f"{turn}/{index}" for index in range(self.count)]

            def there() -> bool:
                if store.check(keys):
                    return True
                if store.check(["failed"]):
                    raise pickle.loads(store.get("failed"))
                return False

            wait_until(there)
            return [pickle.loads(store.get(key)) for key in keys]

        return self.runtime.on_main(meet)

    def fail(self, error: Exception) -> None:
        """Have the other subsets raise `error` when they meet, unless one of them has failed before."""
        if self._store is None or self._store.check(["failed"]):
            return
        if not isinstance(error, InputError | MemoryExhaustedError):
            error = RuntimeError(f"rank {self.runtime.rank} of subset {self.index + 1}: {error}")
        _put(self._store, "failed", error)


def _put(store: Store, key: str, value: Any) -> None:
    store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # bytes are taken, too


@contextmanager
def apart(runtime: Runtime, count: int) -> Iterator[Subset]:
    """Within the `with`, the ranks are `count` subsets; every rank calls, and `count` divides their number.

    The layout that stands is released, at the beginning and at the end. What is raised within is raised in the other
    subsets too, as soon as they meet; then the ranks stay apart, since one of them may be lost.
    """
    if count == 1:
        yield Subset(runtime, 0, 1, None)
        return
    size = runtime.world_size // count
    index, rank = divmod(runtime.rank, size)
    world = dist.distributed_c10d._get_default_store()
    turn = world.add(f"minitron/apart/{runtime.rank}", 1)
    store = PrefixStore(f"minitron/apart/{turn}", world)
    backend = dist.get_backend()
    # Several first ranks share the terminal: of one there are lines, as a bar would not stay in its place.
    style = "lines" if chosen(runtime.progress_style) != "none" and index == 0 else "none"
    own = dataclasses.replace(runtime, rank=rank, world_size=size, progress_style=style)
    subset = Subset(own, index, count, store)
    _regroup(store, "out", runtime.world_size, backend, f"subset/{index}", rank, size)
    try:
        yield subset
        subset.gathered(None)
    except Exception as error:
        subset.fail(error)
        raise
    _regroup(store, "back", runtime.world_size, backend, "world", runtime.rank, runtime.world_size)
    runtime.stop_signal = own.stop_signal


def _regroup(store: Store, step: str, ranks: int, backend: str, name: str, rank: int, size: int) -> None:
    """Leave the process group of this rank for a new one, `name`, of `size` ranks, when all `ranks` of the world are
    here: one that is still in a collective of the old group must find the others there."""
    release_layout()
    store.add(step, 1)
    wait_until(lambda: store.add(step, 0) == ranks)
    dist.destroy_process_group()
    timeout = collective_timeout()
    with own_interface(size):
        dist.init_process_group(backend, store=PrefixStore(name, store), rank=rank, world_size=size, timeout=timeout)
