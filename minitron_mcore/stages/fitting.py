"""What `train` and `distill` do alike once model and objective stand: describe the checkpoint, call the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.companions import carry_companions
from minitron_mcore.checkpoint.folder import write_description
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.recipe import Recipe, to_yaml
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.job import Job, Progress
from minitron_mcore.training.loop import fit
from minitron_mcore.training.reader import BatchReader


def fit_model(
    recipe: Recipe,
    runtime: Runtime,
    *,
    train: TrainConfig,
    folder: Path,
    chunks: list[LanguageModel],
    architecture: Architecture,
    objective: Objective,
    tokenizer: Tokenizer,
    data: tuple[int, BatchReader, BatchReader | None],
    source: Path | None,
    lineage: Callable[[], dict[str, Any]],
) -> Progress:
    """Train `chunks` into `folder`. Every rank calls.

    `train` is the recipe's section, `data` what `read_data` gave, `source` the checkpoint that the weights are from.
    """
    iterations, read_train, read_valid = data

    def describe(progress: Progress) -> None:
        facts = {**lineage(), "tokens": progress.consumed_tokens, "tokenizer": tokenizer.fingerprint}
        write_description(folder, architecture, lineage=facts, recipe=to_yaml(recipe), save_tokenizer=tokenizer.save)
        if source is not None:
            carry_companions(source, folder)

    return fit(
        Job(
            chunks=chunks,
            architecture=architecture,
            objective=objective,
            train=train,
            log=recipe.log,
            runtime=runtime,
            read_train=read_train,
            read_valid=read_valid,
            sequence_length=recipe.data.sequence_length,
            iterations=iterations,
            precision=recipe.precision,
            folder=folder,
            describe=describe,
            recipe=dataclasses.asdict(recipe),
            name=recipe.name,
        )
    )
