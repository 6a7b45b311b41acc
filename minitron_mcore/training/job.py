"""What the loop is given, and the progress from which it resumes."""

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
from minitron_mcore.training.reader import TrainingData
from minitron_mcore.training.teaching import TrainedTeacher

# Without a save interval, a run saves after each of PARTS equal parts, or every MOST_ITERATIONS if that is sooner.
PARTS, MOST_ITERATIONS = 10, 500


@dataclass
class Progress:
    """What a run resumes from, beside the tensors."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    skipped_iterations: int = 0  # without a step, because a loss or the gradient norm was NaN or Inf
    nan_iterations: int = 0  # those of them with such a loss
    skipped_in_a_row: int = 0  # up to now
    data_order: dict[int, str] = field(default_factory=dict)  # fingerprints of what was read (reader.data_order)
    hidden_states_alpha: float | None = None  # dynamic weight of the hidden-state losses in the next step

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
    data: TrainingData
    precision: str
    folder: Path  # for checkpoints and metrics; the run resumes from its newest finished iteration
    describe: Callable[[Progress], None]  # writes what lies beside the weights; the first rank calls
    recipe: dict[str, Any]
    name: str
    teaching: TrainedTeacher | None = None  # the objective's teacher, if it is trained in the same job

    @property
    def iterations(self) -> int:
        return self.timetable.iterations

    @property
    def save_interval(self) -> int:
        """Iterations between checkpoints, 0 for one at the end: by default a tenth of the run, at most 500."""
        given = self.train.save_interval
        return min(-(-self.iterations // PARTS), MOST_ITERATIONS) if given is None else given
