"""This project's own engine under the clock, as the model lies over the ranks."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_mcore import __version__
from minitron_mcore.architecture import Architecture
from minitron_mcore.bench.engines import OURS
from minitron_mcore.bench.figures import Run
from minitron_mcore.bench.worker import Memory
from minitron_mcore.checkpoint.store import as_chunks, load_model
from minitron_mcore.inference.engine import Engine, Sampling
from minitron_mcore.runtime.agree import gathered
from minitron_mcore.runtime.config import ParallelConfig


@dataclass
class Ours:
    """One model; every rank calls every method. place: (folder, iteration) of its weights."""

    model: str
    place: tuple[Path, int]
    architecture: Architecture
    parallel: ParallelConfig
    precision: str
    batch: int
    engine: str = OURS
    version: str = __version__

    def load(self) -> None:
        self._on_cuda = torch.cuda.is_available()
        self._memory = Memory(self._on_cuda)
        chunks = as_chunks(load_model(self.place, self.architecture, self.parallel, self.precision))
        self._engine: Any = Engine(chunks, self.architecture, max_batch=self.batch)
        self._memory.loaded(sum(each.nbytes for chunk in chunks for each in chunk.parameters()))

    def close(self) -> None:
        """Leave the model to the garbage."""
        self._engine = None
        gc.collect()
        torch.cuda.empty_cache()

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """Make exactly `new_tokens` of each prompt; seconds are those of the slowest rank, memory of the one with most.
        A data-parallel rank may have no prompt, and then no seconds."""
        seconds: list[float] = []

        def on_token(step: int) -> None:
            if self._on_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)

        gathered(None)  # all ranks begin together
        self._memory.run_begins()
        start = time.perf_counter()
        self._engine.generate(prompts, Sampling(new_tokens), on_token=on_token)
        of_ranks = gathered((seconds, self._memory.run_ended()))
        memory = [each for _, each in of_ranks if each is not None]
        of_steps = zip(*(each for each, _ in of_ranks if each), strict=True)
        return Run([max(of_step) for of_step in of_steps], max(memory) if memory else None)

    def tokens(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """What they are."""
        return [list(made.tokens) for made in self._engine.generate(prompts, Sampling(new_tokens))]
