"""`score`: importance of every axis of the teacher, from one forward pass over the calibration samples."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from megatron.core import parallel_state

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.data.calibration import calibration_batches
from minitron_mcore.data.corpus import check_file
from minitron_mcore.data.dataset import build_calibration_dataset
from minitron_mcore.errors import InputError
from minitron_mcore.importance.config import ImportanceConfig
from minitron_mcore.importance.score import score_model
from minitron_mcore.importance.scores import AXES, TOLERANCE, Scores, load_scores, save_scores
from minitron_mcore.model.gpt import build_model
from minitron_mcore.plan import check_same_model
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import check_model, checkpoint_tokenizer, lay_out
from minitron_mcore.training.reader import to_device

REPORT_SECONDS = 10.0
# Settings that leave the scores as they are.
NO_MATTER = {"importance.micro_batch_size", "tolerance"}


def run(recipe: Recipe, runtime: Runtime) -> Path:
    """Write `scores` and return its path; a file made in the same way stays as it is. Every rank calls."""
    lay_out(recipe, runtime)
    importance = recipe.importance
    check_importance(importance)
    folder, iteration = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    architecture = read_architecture(folder)
    tokenizer = checkpoint_tokenizer(recipe, folder)
    check_model(architecture, recipe)
    settings = describe(recipe, folder, iteration, tokenizer.fingerprint)
    path = scores_file(recipe, architecture, settings)
    if path.exists():
        runtime.print(f"score: {path} is there, made in the same way")
        return path

    dataset = build_calibration_dataset(recipe.data, tokenizer, num_samples=importance.num_samples, seed=recipe.seed)
    assert dataset is not None
    data_parallel = parallel_state.get_data_parallel_world_size()
    batches = calibration_batches(
        dataset,
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
        f"score: {architecture.num_parameters:,} parameters of {folder}, {importance.num_samples:,} samples of "
        f"{recipe.data.sequence_length:,} tokens -> {path}"
    )
    report = progress(runtime.print, importance.num_samples, importance.micro_batch_size * data_parallel)
    scores = score_model(chunks, map(to_device, batches), architecture, importance, settings=settings, report=report)
    if runtime.is_main:
        save_scores(scores, path)
    runtime.print(table(scores))
    runtime.barrier()
    return path


def check_importance(importance: ImportanceConfig) -> None:
    """Raise InputError for numbers that nothing can be scored with."""
    for name in ("num_samples", "micro_batch_size"):
        if getattr(importance, name) < 1:
            raise InputError(f"importance.{name}={getattr(importance, name)} must be at least 1")


def describe(recipe: Recipe, folder: Path, iteration: int, fingerprint: str) -> dict[str, Any]:
    """How the scores are made, and how closely they are known; the layout does not matter and is not told."""
    data = recipe.data
    drawn_from = {"train": data.train, "valid": data.valid, "split": data.split}
    settings = {
        "teacher": {"checkpoint": str(folder), "iteration": iteration},
        "importance": dataclasses.asdict(recipe.importance),
        "data": drawn_from if data.calibration is None else {"calibration": data.calibration},
        "num_samples": recipe.importance.num_samples,
        "sequence_length": data.sequence_length,
        "precision": recipe.precision,
        "seed": recipe.seed,
        "tokenizer": fingerprint,
        "tolerance": TOLERANCE[recipe.precision],
    }
    return json.loads(json.dumps(settings))


def scores_file(recipe: Recipe, architecture: Architecture, settings: dict[str, Any]) -> Path:
    """Where to write. Raises InputError where something is there already that was not made with `settings`."""
    if not recipe.scores:
        raise InputError("scores is not given: name the file to write, as in scores=scores.safetensors")
    path = Path(recipe.scores)
    check_file(recipe.scores, "scores")
    if not path.exists():
        return path
    try:
        stored = load_scores(path)
    except InputError as error:
        raise InputError(f"scores={path} is there and is no scores file: name another file") from error
    check_same_model(stored.architecture, architecture, f"scores={path} are of")
    there, here = flat(stored.settings), flat(settings)
    for key in sorted({*there, *here} - NO_MATTER):
        if there.get(key) != here.get(key):
            raise InputError(
                f"scores={path} was made otherwise: {key} is {there.get(key)!r} there and {here.get(key)!r} here; "
                "name another file, or delete that one"
            )
    return path


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"teacher": {"iteration": 3}} -> {"teacher.iteration": 3}."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def progress(say: Callable[[str], None], num_samples: int, samples_a_round: int) -> Callable[[int], None]:
    """A report for `score_model` that says, now and then, how far it is; every data-parallel rank is as far."""
    started = time.perf_counter()
    last = started

    def report(rounds: int) -> None:
        nonlocal last
        done, now = min(rounds * samples_a_round, num_samples), time.perf_counter()
        if now - last < REPORT_SECONDS and done < num_samples:
            return
        last = now
        rate = done / (now - started)
        say(f"score: {done:,}/{num_samples:,} samples, {rate:.3g} samples/s, {(num_samples - done) / rate:.0f} s left")

    return report


def table(scores: Scores, shown: int = 8) -> str:
    """Size and spread of every axis, and the layers of least influence."""
    lines = [f"{'axis':<8}{'scores':>14}{'least':>12}{'median':>12}{'most':>12}"]
    for axis in AXES:
        values = getattr(scores, axis)
        size = " x ".join(f"{part:,}" for part in values.shape)
        spread = "".join(f"{value:>12.4g}" for value in (values.min(), numpy.median(values), values.max()))
        lines.append(f"{axis:<8}{size:>14}{spread}")
    order = numpy.argsort(scores.layers, kind="stable")[:shown]
    least = ", ".join(f"{index} ({scores.layers[index]:.3g})" for index in order)
    return "\n".join([*lines, f"layers of least block influence (the first layer is 0): {least}"])
