"""The teacher runs ahead of the student: forward only, leaving final hidden states, never logits.

A token's hidden states are 8 KB where its logits would be 512 KB, and the student's schedule stays Megatron's own.
"""

from __future__ import annotations

from pathlib import Path

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.model.gpt import LanguageModel, build_model
from minitron_mcore.model.schedule import Microbatch, final_hidden_states
from minitron_mcore.runtime.config import ParallelConfig


class Teacher:
    """A frozen model in the student's layout: no gradients, no optimizer, no DDP buffers, no dropout."""

    def __init__(self, chunks: list[LanguageModel], architecture: Architecture) -> None:
        self.chunks = chunks
        self.architecture = architecture

    @classmethod
    def load(
        cls, folder: Path, iteration: int, architecture: Architecture, parallel: ParallelConfig, precision: str
    ) -> Teacher:
        """Build the teacher under `parallel` and fill it from a checkpoint of any layout; every rank calls."""
        chunks = build_model(architecture, parallel, precision, trainable=False)
        load_weights(folder, iteration, as_chunks(chunks), architecture)
        return cls(chunks, architecture)

    def run_ahead(self, batch: list[Microbatch]) -> None:
        """Put `teacher_hidden` [s, b, h] into every microbatch, on the last stage; every rank calls."""
        states = final_hidden_states(as_chunks(self.chunks), batch)
        for microbatch, hidden in zip(batch, states, strict=False):
            microbatch["teacher_hidden"] = hidden

    def head_weight(self) -> torch.Tensor:
        """This rank's shard of the teacher's head [V / TP, h]; last stage only."""
        return self.chunks[-1].head_weight()
