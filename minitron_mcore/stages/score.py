"""`score`: importance of every axis of the teacher, from one forward pass over the calibration samples."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from megatron.core import parallel_state

from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.data.calibration import calibration_batches
from minitron_mcore.data.dataset import build_calibration_dataset
from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.importance.score import TOLERANCE, score_model
from minitron_mcore.importance.scores import Scores, load_scores, save_scores
from minitron_mcore.model.gpt import build_model
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import lay_out
from minitron_mcore.stages.train import check_tokenizer
from minitron_mcore.training.reader import to_device

REPORT_SECONDS = 10.0


def run(recipe: Recipe, runtime: Runtime) -> Scores:
    """Write `scores`; a file that was made in the same way is left as it is. Every rank calls; all get the scores."""
    lay_out(recipe, runtime)
    importance = recipe.importance
    folder, iteration = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    if not recipe.scores:
        raise InputError("scores is not given: name the file to write")
    path = Path(recipe.scores)
    architecture = read_architecture(folder)
    tokenizer = load_tokenizer(recipe.tokenizer)
    check_tokenizer(tokenizer, architecture)
    settings = describe(recipe, folder, iteration, tokenizer.fingerprint)
    if path.exists():
        scores = made_in_the_same_way(path, settings)
        runtime.print(f"score: {path} is there, made in the same way")
        return scores
    if importance.micro_batch_size < 1:
        raise InputError(f"importance.micro_batch_size={importance.micro_batch_size} must be at least 1")

    dataset = build_calibration_dataset(
        recipe.data, tokenizer, num_samples=importance.num_samples, seed=recipe.seed
    )
    data_parallel = parallel_state.get_data_parallel_world_size()
    batches = calibration_batches(
        dataset,  # type: ignore[arg-type]  # every rank builds it
        num_samples=importance.num_samples,
        micro_batch_size=importance.micro_batch_size,
        seed=recipe.seed,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=data_parallel,
        num_workers=recipe.data.num_workers,
    )
    chunks = build_model(architecture, recipe.parallel, recipe.precision, trainable=False)
    load_weights(folder, iteration, as_chunks(chunks), architecture)
    runtime.print(
        f"score: {architecture.num_parameters:,} parameters of {folder} at iteration {iteration}, "
        f"{importance.num_samples:,} samples of {recipe.data.sequence_length:,} tokens -> {path}"
    )
    report = progress(runtime, importance.num_samples, importance.micro_batch_size * data_parallel)
    scores = score_model(
        chunks, map(to_device, batches), architecture, importance, settings=settings, report=report
    )
    if runtime.is_main:
        save_scores(scores, path)
    runtime.barrier()
    runtime.print(table(scores))
    return scores


def describe(recipe: Recipe, folder: Path, iteration: int, fingerprint: str) -> dict[str, Any]:
    """What the scores depend on, and how closely they are known. The layout is not among it."""
    return {
        "teacher": {"checkpoint": str(folder), "iteration": iteration},
        "importance": dataclasses.asdict(recipe.importance),
        "data": {"calibration": recipe.data.calibration or recipe.data.train, "from": CALIBRATION[
            recipe.data.calibration is None]},
        "num_samples": recipe.importance.num_samples,
        "sequence_length": recipe.data.sequence_length,
        "precision": recipe.precision,
        "seed": recipe.seed,
        "tokenizer": fingerprint,
        "tolerance": TOLERANCE[recipe.precision],
    }
