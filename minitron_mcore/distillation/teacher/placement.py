"""Where a frozen model's layers lie while they do not run: sharded over the ranks that hold copies, or in host memory.

    resident    every layer on the device, as Megatron builds it: this module is not used
    sharded     of every layer each rank of `group` keeps its 1 / size; gathered over the group before the layer runs
    offloaded   every layer in host memory (on CUDA in pinned blocks), copied to the device before it runs

Embedding, final norm and output head stay on the device. Of the layers, two at a time lie there whole: while one runs,
the next one that the schedule will ask for is on its way into the other buffer.

    layer runs      0   1   2   3   0        microbatch after microbatch
    buffer A        0   2   2   0   0
    buffer B        1   1   3   3   1

A layer's parameters are views of one flat buffer, of bytes, so that a fetch is one collective or one copy.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from minitron_mcore.distillation.teacher.blocks import aligned, host_blocks
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.initialize import named_parameters
from minitron_mcore.model.specs import BareLayer
from minitron_mcore.runtime.groups import data_group


@dataclass
class FlatLayer:
    """A layer's parameters in one flat buffer, to be cut into `cuts`: where each of them lies, in bytes."""

    layer: BareLayer
    chunk: int
    cuts: int
    nbytes: int = 0
    places: list[tuple[torch.nn.Parameter, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, parameter in self.layer.named_parameters():
            self.places.append((parameter, self.nbytes))
            self.nbytes += aligned(self.layer.parameter_shapes[name].numel() * parameter.element_size())
        self.nbytes = aligned(self.nbytes, self.cuts)

    def views(self, flat: torch.Tensor) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Every parameter, and its place in `flat`, [nbytes] or more of uint8."""
        found = []
        for (parameter, start), shape in zip(self.places, self.layer.parameter_shapes.values(), strict=True):
            stop = start + shape.numel() * parameter.element_size()
            found.append((parameter, flat[start:stop].view(parameter.dtype).view(shape)))
        return found

    def attach(self, flat: torch.Tensor) -> None:
        for parameter, view in self.views(flat):
            parameter.data = view

    def detach(self) -> None:
        """Take the weights away, so that a layer that runs without being fetched fails instead of using another's."""
        for parameter, _ in self.places:
            parameter.data = parameter.data.new_empty(0)


# Two sources that keep the layers: `keep` gets one in host memory, and `fetch` starts to bring it into `target` on the
# device; what it returns makes the device wait until it is there. A layer's size can be cut into `cuts`.


class ShardedSource:
    """Every rank of `group` keeps its part of every layer, on the device. All of them fetch in the same order."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.group, self.cuts = group, group.size()
        self.parts: dict[int, torch.Tensor] = {}

    def keep(self, index: int, flat: torch.Tensor) -> None:
        part = flat.chunk(self.cuts)[self.group.rank()]
        self.parts[index] = part.to(torch.cuda.current_device(), copy=True)

    def fetch(self, index: int, target: torch.Tensor) -> Callable[[], Any]:
        part = self.parts[index]
        whole = target[: part.numel() * self.cuts]
        return torch.distributed.all_gather_into_tensor(whole, part, group=self.group, async_op=True).wait


class OffloadedSource:
    """Every rank keeps its layers whole in its own host memory, each in a few blocks (see blocks.py)."""

    cuts = 1

    def __init__(self) -> None:
        self.parts: dict[int, list[torch.Tensor]] = {}
        self.stream = torch.cuda.Stream()

    def keep(self, index: int, flat: torch.Tensor) -> None:
        blocks = flat.split(host_blocks(len(flat)))
        self.parts[index] = [torch.empty(len(each), dtype=each.dtype, pin_memory=True).copy_(each) for each in blocks]

    def fetch(self, index: int, target: torch.Tensor) -> Callable[[], Any]:
        # The layer whose buffer this was may still be running.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            start = 0
            for block in self.parts[index]:
                target[start : start + len(block)].copy_(block, non_blocking=True)
                start += len(block)
        return lambda: torch.cuda.current_stream().wait_stream(self.stream)


@dataclass
class _Slot:
    """A buffer on the device for one whole layer."""

    memory: torch.Tensor
    index: int | None = None  # the layer that is in it, or on its way
    wait: Callable[[], Any] | None = None  # until it is there


class Placement:
    """The layers of a frozen model's chunks, kept in `source` and brought in by hooks as they run.

    `chunks`: from `build_model(..., trainable=False, bare_layers=True)`. Fill them by a loader that takes `rows`.
    Layers may run in any order; the one to come is known, and fetched ahead, within `passing`. A source that
    communicates needs every rank of its group to run the same layers in the same order, as data-parallel replicas do.
    """

    def __init__(self, chunks: list[LanguageModel], source: ShardedSource | OffloadedSource) -> None:
        self.chunks, self.source = chunks, source
        layers = ((layer, number) for number, chunk in enumerate(chunks) for layer in chunk.decoder.layers)
        self.layers = [FlatLayer(layer, number, source.cuts) for layer, number in layers]
        self._owner = {id(p): index for index, flat in enumerate(self.layers) for p, _ in flat.places}
        self._first = {flat.chunk: index for index, flat in reversed(list(enumerate(self.layers)))}
        self._slots: list[_Slot] = []
        self._ran: int | None = None  # the layer that ran last, or runs
        self._coming: deque[int] = deque()  # chunks that the schedule will run, in order
        for index, flat in enumerate(self.layers):
            flat.layer.register_forward_pre_hook(partial(self._before, index))

    def rows(self, chunk: LanguageModel) -> Iterator[tuple[str, int | None, torch.Tensor]]:
        """`named_parameters` of a chunk, to be filled one after another: a layer's lie in host memory, and go to the
        source when the next layer's turn comes. So no more than one layer is ever whole."""
        rows = named_parameters(chunk)
        for owner, of_owner in itertools.groupby(rows, key=lambda row: self._owner.get(id(row[2]))):
            if owner is None:  # stays on the device
                yield from of_owner
                continue
            flat = torch.empty(self.layers[owner].nbytes, dtype=torch.uint8)
            views = {id(parameter): view for parameter, view in self.layers[owner].views(flat)}
            for key, layer, parameter in of_owner:
                yield key, layer, views[id(parameter)]
            self.source.keep(owner, flat)

    @contextmanager
    def passing(self, num_microbatches: int) -> Iterator[None]:
        """Within the `with`, one forward-only schedule over `num_microbatches` runs; every rank calls.

        Afterwards no layer lies whole on the device.
        """
        group_size = self.chunks[0].config.microbatch_group_size_per_vp_stage or 1  # None without virtual stages
        table = get_schedule_table(num_microbatches, len(self.chunks), group_size)
        self._coming = deque(chunk for _, chunk in table)
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Give the device's buffers back; the next layer to run is fetched anew."""
        for slot in self._slots:
            self._empty(slot)
        self._slots, self._ran = [], None
        self._coming.clear()

    def _before(self, index: int, layer: torch.nn.Module, args: Any) -> None:
        """A layer is about to run: have its weights there, and start to fetch those of the next one."""
        if not self._slots:
            size, device = max(flat.nbytes for flat in self.layers), torch.cuda.current_device()
            self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(2)]
        slot, other = self._slots if self._slots[0].index == index else reversed(self._slots)
        if slot.index != index:
            slot, other = (slot, other) if other.index == self._ran else (other, slot)
            self._start(index, slot)
        self._arrive(slot)
        self._ran = index
        following = self._following(index)
        if following is not None and following not in (slot.index, other.index):
            self._start(following, other)

    def _start(self, index: int, slot: _Slot) -> None:
        """Begin to fetch a layer into a slot, in the place of another."""
        self._empty(slot)
        slot.index, slot.wait = index, self.source.fetch(index, slot.memory)

    def _arrive(self, slot: _Slot) -> None:
        if slot.wait is not None and slot.index is not None:
            slot.wait()
            slot.wait = None
            self.layers[slot.index].attach(slot.memory)

    def _empty(self, slot: _Slot) -> None:
        self._arrive(slot)
        if slot.index is not None:
            self.layers[slot.index].detach()
            slot.index = None

    def _following(self, index: int) -> int | None:
        """The layer that runs after `index`, which is about to; None where that is not known."""
        chunk = self.layers[index].chunk
        if index == self._first[chunk] and self._coming and self._coming.popleft() != chunk:
            self._coming.clear()  # another order than expected, which therefore predicts nothing more
        if index + 1 < len(self.layers) and self.layers[index + 1].chunk == chunk:
            return index + 1
        return self._first[self._coming[0]] if self._coming else None


def place(
    chunks: list[LanguageModel], placement: str, group: torch.distributed.ProcessGroup | None = None
) -> Placement | None:
    """What keeps the layers of bare `chunks`, and is to be filled by `rows`; None where they are "resident".

    `group`: the ranks that hold copies of this rank's shard, over which "sharded" divides its layers; None: the
    data-parallel x context-parallel ranks of the current layout.
    """
    if placement == "resident":
        return None
    sharded = placement == "sharded"
    return Placement(chunks, ShardedSource(group or data_group(with_context=True)) if sharded else OffloadedSource())
