"""A polite end: SIGTERM (SLURM's warning before a time limit or a preemption) saves a checkpoint first."""

from __future__ import annotations

import signal
from types import FrameType

import torch


class StopRequest:
    """Remembers a SIGTERM to any rank; `on_any_rank` tells all of them, at the same iteration."""

    def __init__(self) -> None:
        self.received = False
        self._previous = signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_any_rank(self) -> bool:
        """Whether any rank was asked to stop. Every rank calls, once an iteration."""
        flag = torch.tensor(int(self.received), device=torch.cuda.current_device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self._previous)
