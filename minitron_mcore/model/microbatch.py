"""A microbatch: what every pass reads, and what the teacher's pass leaves in it for the student's.

Legend: s sequence (under context parallelism this rank's part of it), b micro-batch, h hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from minitron_mcore.runtime.groups import context_group, context_part

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
    samples: Tensor | None = None  # int64 [b]: their numbers in what was read
    valid: Tensor | None = None  # [b]: 0 for a sample that fills the microbatch up; None: all are valid
    segments: Tensor | None = None  # int64 [b, s]: number of the segment that a token belongs to; -1: padding
    is_filler: bool = False  # a copy that fills a call of the schedule up
    teacher: TeacherPart = field(default_factory=TeacherPart)

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> Microbatch:
        """What a data reader gives, by the fields' names."""
        return cls(**batch)  # type: ignore[arg-type]

    @classmethod
    def unlabelled(cls, tokens: Tensor, position_ids: Tensor) -> Microbatch:
        """For a pass without a loss: no token counts."""
        return cls(tokens, tokens, torch.zeros_like(tokens, dtype=torch.float32), position_ids)

    def to(self, device: Any) -> Microbatch:
        """On the device, with nothing of a teacher."""
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        moved: Any = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, teacher=TeacherPart(), **moved)


def on_this_context_rank(microbatch: Microbatch) -> Microbatch:
    """The microbatch with this context-parallel rank's part of every sequence: [b, s] -> [b, s / C].

    The groups must stand. No communication.
    """
    group, names = context_group(), ("tokens", "labels", "loss_mask", "position_ids", "segments")
    rows = {name: getattr(microbatch, name) for name in names}
    parts: Any = {
        name: context_part(row, 1, group.rank(), group.size()) for name, row in rows.items() if row is not None
    }
    return replace(microbatch, **parts)


def to_device(batch: Mapping[str, Tensor]) -> Microbatch:
    """What a data reader gives, on the device; under context parallelism this rank's part of every sequence."""
    return on_this_context_rank(Microbatch.of(batch)).to(torch.cuda.current_device())


def uncounted(microbatch: Microbatch) -> Microbatch:
    """A copy none of whose tokens and samples count, and to which no teacher's states belong."""
    valid = torch.zeros_like(microbatch.tokens[:, 0] if microbatch.valid is None else microbatch.valid)
    mask = torch.zeros_like(microbatch.loss_mask)
    return replace(microbatch, loss_mask=mask, valid=valid, is_filler=True, teacher=TeacherPart())
