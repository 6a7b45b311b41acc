"""Rows that hold several segments, laid end to end, with attention and positions separate for each segment. Pure.

    two rows of 7      A A A B B · ·    C D D D D D D      · padding, a segment of its own
    end to end         A A A B B · · C D D D D D D         [1, 14], boundaries 0 3 5 7 8 14

Megatron calls this "thd": given the boundaries, its rotary embedding begins anew at each, and so does attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the segments of a microbatch lie, whose t tokens are laid end to end."""

    boundaries: Tensor  # int32 [n + 1]: where each of the n segments begins, and t; "cu_seqlens"
    lengths: tuple[int, ...]  # of the n segments, at least 1 each

    @classmethod
    def of(cls, segments_bS: Tensor) -> Packed:
        """Of rows whose tokens have the segments' numbers, int64 [b, s]: where the number changes another one begins,
        and with every row. On the device of the numbers, which it waits for."""
        is_first = torch.ones_like(segments_bS, dtype=torch.bool)
        is_first[:, 1:] = segments_bS[:, 1:] != segments_bS[:, :-1]
        starts = is_first.flatten().nonzero().flatten()
        boundaries = torch.cat([starts, starts.new_tensor([segments_bS.numel()])])
        return cls(boundaries.int(), tuple(boundaries.diff().tolist()))

    @property
    def longest(self) -> int:
        """Tokens of the longest segment: as many positions as Megatron needs."""
        return max(self.lengths)

    def numbers(self) -> Tensor:
        """Segments numbered from 0 on, int64 [1, t]: what `of` takes."""
        counts = torch.tensor(self.lengths, device=self.boundaries.device)
        return torch.arange(len(self.lengths), device=counts.device).repeat_interleave(counts).unsqueeze(0)

    def to(self, device: Any) -> Packed:
        return Packed(self.boundaries.to(device, non_blocking=True), self.lengths)
