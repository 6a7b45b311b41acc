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
from minitron_mcore.training.config import LogConfig, TrainConfig
from minitron_mcore.training.reader import BatchReader


@dataclass
class Progress:
    """What a resumed run goes on from, beside the tensors."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Job:
    """What to train, on what, how, and where it is kept."""

    chunks: list[LanguageModel]
    architecture: Architecture
    objective: Objective
    train: TrainConfig
    log: LogConfig
    runtime: Runtime
    read_train: BatchReader
    read_valid: BatchReader | None
    sequence_length: int
    iterations: int
    precision: str
    folder: Path  # checkpoints and metrics; resumed from where it holds a finished iteration
    describe: Callable[[Progress], None]  # writes what lies beside the weights; the first rank calls
    recipe: dict[str, Any]
    name: str
