"""What `train` and `distill` do alike once model and objective stand: describe the checkpoint, call the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder_lock import one_writer
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.estimate.exhausted import explaining_memory
from minitron_mcore.estimate.forecast import Forecast
from minitron_mcore.estimate.run import forecast_run, forecast_words
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.host import measured_world
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import TrainingData, describe_trained
from minitron_mcore.training.budget import Timetable
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.job import Job, Progress
from minitron_mcore.training.loop import fit
from minitron_mcore.training.teaching import TrainedTeacher


def forecast_here(
    recipe: Recipe,
    runtime: Runtime,
    section: str,
    architecture: Architecture,
    timetable: Timetable,
    teacher: Architecture | None = None,
) -> Forecast:
    """`forecast_run` on the ranks that are here, printed; every rank calls."""
    world = measured_world(runtime)
    expected = forecast_run(recipe, section, architecture, timetable, world, teacher)
    runtime.print("\n".join(forecast_words(expected, world.memory)))
    return expected


def fit_model(
    recipe: Recipe,
    runtime: Runtime,
    *,
    section: str,
    folder: Path,
    chunks: list[LanguageModel],
    architecture: Architecture,
    objective: Objective,
    tokenizer: Tokenizer,
    data: TrainingData,
    source: Path | None,
    lineage: Callable[[], dict[str, Any]],
    memory: Forecast,
) -> Progress:
    """Train `chunks` into `folder`. Every rank calls.

    `section` is the recipe's, `data` what `read_data` gave, `source` the checkpoint that the weights are from,
    `memory` what `forecast_run` gave.
    """

    def describe(progress: Progress) -> None:
        describe_trained(folder, recipe, architecture, tokenizer, source, lineage(), progress.consumed_tokens)

    train: TrainConfig = getattr(recipe, section)
    if train.eval_iters and "" not in data.read_valid:
        runtime.print(
            f"warning: {section}: no validation{' of the whole blend' if data.read_valid else ''}, for data.valid is "
            f"not set and data.split={recipe.data.split} holds out less than one sample of "
            f"{recipe.data.sequence_length + 1} tokens: preprocess.valid_fraction can hold out more, and "
            f"{section}.eval_iters=0 says that none is wanted"
        )
    teaching = objective.teacher if isinstance(objective.teacher, TrainedTeacher) else None
    folders = {f"{section}.checkpoint": folder} | ({"correct.checkpoint": teaching.folder} if teaching else {})
    with one_writer(folders), explaining_memory(memory, "while training"):
        return fit(
            Job(
                chunks=chunks,
                architecture=architecture,
                objective=objective,
                train=train,
                log=recipe.log,
                runtime=runtime,
                timetable=data.timetable,
                read_train=data.read_train,
                read_valid=data.read_valid,
                precision=recipe.precision,
                folder=folder,
                describe=describe,
                recipe=dataclasses.asdict(recipe),
                name=recipe.name,
                data_order=data.order,
                teaching=teaching,
            )
        )
