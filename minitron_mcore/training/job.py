"""What the loop is given, and what it goes on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.budget import Step, Timetable
from minitron_mcore.training.config import LogConfig, TrainConfig
from minitron_mcore.training.reader import BatchReader, StepReader
from minitron_mcore.training.teaching import TrainedTeacher

# A run that is not told when to save does so after each of these parts, or so many iterations if that is less.
PARTS, MOST_ITERATIONS = 10, 500


@dataclass
class Progress:
    """What a resumed run goes on from, beside the tensors."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    skipped_iterations: int = 0  # without a step, since a loss or the gradient norm was none
    nan_iterations: int = 0  # those of them whose loss was none
    skipped_in_a_row: int = 0  # up to now
    data_order: dict[int, str] = field(default_factory=dict)  # of what was read, by reader.data_order
    hidden_states_alpha: float | None = None  # weight of the hidden-state losses in the next step, where it is dynamic

    def advance(self, step: Step) -> None:
        """Count a step that is done."""
        self.iteration += 1
        self.consumed_samples += step.shape.global_batch_size
        self.consumed_tokens += step.shape.tokens


@dataclass
class Job:
    """What to train, on what, how, and where it is kept."""

    chunks: list[LanguageModel]
    architecture: Architecture
    objective: Objective
    train: TrainConfig
    log: LogConfig
    runtime: Runtime
    timetable: Timetable
    read_train: StepReader
    read_valid: dict[str, BatchReader]  # by the source's name, "" for the whole blend; none: no validation
    precision: str
    folder: Path  # checkpoints and metrics; resumed from where it holds a finished iteration
    describe: Callable[[Progress], None]  # writes what lies beside the weights; the first rank calls
    recipe: dict[str, Any]
    name: str
    data_order: dict[int, str] = field(default_factory=dict)  # of what `read_train` reads, by reader.data_order
    teaching: TrainedTeacher | None = None  # the objective's teacher, where it is trained in the same job

    @property
    def iterations(self) -> int:
        return self.timetable.iterations

    @property
    def save_interval(self) -> int:
        """Iterations between checkpoints, 0 for one at the end: by default a tenth of the run, at most 500."""
        given = self.train.save_interval
        return min(-(-self.iterations // PARTS), MOST_ITERATIONS) if given is None else given
