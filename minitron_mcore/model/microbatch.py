"""A microbatch: what every pass reads, and what the teacher's pass leaves in it for the student's.

Legend: s sequence (under context parallelism this rank's part of it), b micro-batch, h hidden size. Packed rows are one
sequence: then b is 1, and s the tokens of all rows (packing.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minitron_mcore.model.packing import Packed
from minitron_mcore.runtime.groups import context_group, context_part

ROWS = ("tokens", "labels", "loss_mask", "position_ids", "segments")  # a value for each token
State = tuple[str, int]  # site, layer of the teacher


@dataclass
class TeacherPart:
    """What a teacher that ran ahead has left, each on the ranks of the student's pipeline stage that needs it."""

    final: Any = None  # final hidden states [s, b, h]; from a cache, few outcomes (logits/sparse_target.py)
    states: dict[State, Tensor] = field(default_factory=dict)  # inner states
    used: Counter[State] = field(default_factory=Counter)

    def take_state(self, state: State, uses: int) -> Tensor:
        """An inner state that `uses` losses need; the last of them gives it up."""
        self.used[state] += 1
        if self.used[state] < uses:
            return self.states[state]
        del self.used[state]
        return self.states.pop(state)


@dataclass(eq=False)
class Microbatch:
    """Equal for all ranks of a data-parallel replica, but for the context-parallel part of the sequence."""

    tokens: Tensor  # int64 [b, s]
    labels: Tensor  # int64 [b, s]
    loss_mask: Tensor  # fp32 [b, s]: each token's weight in the loss
    position_ids: Tensor  # int64 [b, s]
    samples: Tensor | None = None  # int64 [samples]: their numbers in what was read
    valid: Tensor | None = None  # [samples]: 0 for one that fills the microbatch up; None: all are valid
    segments: Tensor | None = None  # int64 [b, s]: number of the segment that a token belongs to; -1: padding
    packed: Packed | None = None  # where attention and positions begin anew; None: with every row
    is_filler: bool = False  # a copy that fills a call of the schedule up
    teacher: TeacherPart = field(default_factory=TeacherPart)

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Microbatch:
        """What a data reader gives, by the fields' names. A sample may be several rows, [b, rows, s].

        `packed`, a bool for each sample and true for all: rows hold several `segments`, to be kept apart. A reader
        says so for all of its samples or for none: the microbatches of a pass have one shape.
        """
        fields = {name: value.flatten(0, -2) if name in ROWS else value for name, value in batch.items()}
        is_packed = bool(fields.pop("packed", torch.tensor(False)).all())
        microbatch = cls(**fields)  # type: ignore[arg-type]
        return end_to_end(microbatch) if is_packed else microbatch

    @classmethod
    def unlabelled(cls, tokens: Tensor, position_ids: Tensor) -> Microbatch:
        """For a pass without a loss: no token counts."""
        return cls(tokens, tokens, torch.zeros_like(tokens, dtype=torch.float32), position_ids)

    def to(self, device: Any) -> Microbatch:
        """On the device, with nothing of a teacher."""
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        moved: Any = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        packed = None if self.packed is None else self.packed.to(device)
        return replace(self, packed=packed, teacher=TeacherPart(), **moved)

    def by_row(self) -> dict[str, Tensor]:
        """The fields that have a value for each token, as far as there are any."""
        return {name: value for name in ROWS if (value := getattr(self, name)) is not None}


def end_to_end(microbatch: Microbatch) -> Microbatch:
    """The rows one after another as a single one, [b, s] -> [1, b s], attention and positions kept within `segments`.
    On the CPU: what is on a GPU is waited for."""
    assert microbatch.segments is not None, "packed rows say which segment each token belongs to"
    rows: Any = {name: value.reshape(1, -1) for name, value in microbatch.by_row().items()}
    return replace(microbatch, packed=Packed.of(microbatch.segments), **rows)


def on_this_context_rank(microbatch: Microbatch) -> Microbatch:
    """The microbatch with this context-parallel rank's part of every sequence: [b, s] -> [b, s / C].

    The groups must stand. No communication.
    """
    group = context_group()
    assert microbatch.packed is None or group.size() == 1, "packed rows are not cut (runtime.config.check_packing)"
    rows = microbatch.by_row().items()
    parts: Any = {name: context_part(value, 1, group.rank(), group.size()) for name, value in rows}
    return replace(microbatch, **parts)


def to_device(batch: Mapping[str, Tensor]) -> Microbatch:
    """What a data reader gives, on the device; under context parallelism this rank's part of every sequence."""
    return on_this_context_rank(Microbatch.of(batch)).to(torch.cuda.current_device())


def uncounted(microbatch: Microbatch) -> Microbatch:
    """A copy none of whose tokens, segments and samples count, and to which no teacher's states belong."""
    valid = torch.zeros_like(microbatch.tokens[:, 0] if microbatch.valid is None else microbatch.valid)
    mask, segments = torch.zeros_like(microbatch.loss_mask), microbatch.segments
    none = None if segments is None else torch.full_like(segments, -1)
    return replace(microbatch, loss_mask=mask, segments=none, valid=valid, is_filler=True, teacher=TeacherPart())
