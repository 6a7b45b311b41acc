"""This project's own engine under the clock, as the model lies over the ranks.

Memory that runs out is a failure of a model, or of a size, that all ranks know of; the others are measured still.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from minitron_mcore import __version__
from minitron_mcore.architecture import Architecture
from minitron_mcore.bench.engines import OURS, SizeError
from minitron_mcore.bench.figures import Run
from minitron_mcore.bench.worker import Memory
from minitron_mcore.checkpoint.store import as_chunks, load_model
from minitron_mcore.inference.engine import Engine, Sampling
from minitron_mcore.runtime.agree import all_come, gathered
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.exhausted import is_out_of_memory

T = TypeVar("T")
# Seconds that a rank without memory waits for the others, which fail alike if they hold as much.
PATIENCE = 60.0


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

    @property
    def kv_cache(self) -> str:
        return self.precision

    def load(self) -> None:
        """Raises EngineError where there is no memory for it."""
        self._on_cuda = torch.cuda.is_available()
        self._memory = Memory(self._on_cuda)
        self._engine: Any = self._within_memory(self._loaded)

    def _loaded(self) -> Engine:
        chunks = as_chunks(load_model(self.place, self.architecture, self.parallel, self.precision))
        self._memory.loaded(sum(each.nbytes for chunk in chunks for each in chunk.parameters()))
        return Engine(chunks, self.architecture, max_batch=self.batch)

    def close(self) -> None:
        """Leave the model to the garbage."""
        self._engine = None
        gc.collect()
        torch.cuda.empty_cache()

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """Make exactly `new_tokens` of each prompt; seconds are those of the slowest rank, memory of the one with most.
        A data-parallel rank may have no prompt, and then no seconds. Raises SizeError where memory runs out."""
        seconds: list[float] = []

        def on_token(step: int) -> None:
            if self._on_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)

        gathered(None)  # all ranks begin together
        self._memory.run_begins()
        start = time.perf_counter()
        self._within_memory(lambda: self._engine.generate(prompts, Sampling(new_tokens), on_token=on_token))
        of_ranks = gathered((seconds, self._memory.run_ended()))
        memory = [each for _, each in of_ranks if each is not None]
        of_steps = zip(*(each for each, _ in of_ranks if each), strict=True)
        return Run([max(of_step) for of_step in of_steps], max(memory) if memory else None)

    def tokens(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """What they are. Raises SizeError where memory runs out."""
        made = self._within_memory(lambda: self._engine.generate(prompts, Sampling(new_tokens)))
        return [list(each.tokens) for each in made]

    def _within_memory(self, work: Callable[[], T]) -> T:
        """What `work` gives. Where memory runs out on any rank, SizeError on all; but a rank for which the others wait
        in a collective raises what it met, and leaves."""
        said = ""
        try:
            result = work()
            if self._on_cuda:
                torch.cuda.synchronize()  # what waits for another rank's collective does not come to the meeting
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            if not all_come(PATIENCE):
                raise
        else:
            all_come()
        # The error is gone by now, and with it what its frames held.
        if said := next((each for each in gathered(said) if each), ""):
            gc.collect()
            torch.cuda.empty_cache()
            raise SizeError(f"out of memory: {said[:300]}")
        return result
