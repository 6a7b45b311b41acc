"""`score`: importance of every axis of the teacher, from one forward pass over the calibration samples, or without
one (importance.method)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.data.calibration import calibration_batches, draw_samples
from minitron_mcore.data.corpus import check_file
from minitron_mcore.data.dataset import build_calibration_dataset
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.importance import magnitude
from minitron_mcore.importance.baselines import random_scores
from minitron_mcore.importance.score import score_model
from minitron_mcore.importance.scores import Scores, load_scores, save_scores, tolerance_of
from minitron_mcore.jobs.tokenizers import checkpoint_tokenizer
from minitron_mcore.model.gpt import LanguageModel, build_model
from minitron_mcore.model.microbatch import Microbatch, to_device
from minitron_mcore.pruning.plan import check_same_model
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.runtime.pace import Pace
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages import score_depth
from minitron_mcore.stages.common import check_model, lay_out, refuse_context

# Settings that leave the scores as they are.
NO_MATTER = {"importance.micro_batch_size", "tolerance"}


def run(recipe: Recipe, runtime: Runtime) -> Path:
    """Write `scores` and return its path; a file made in the same way stays as it is. Every rank calls."""
    lay_out(recipe, runtime)
    importance = recipe.importance
    folder, iteration = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    architecture = read_architecture(folder)
    check_model(architecture, recipe, reads_text=importance.method == "activation")
    if importance.method == "activation":
        refuse_context(recipe, "score")
    tokenizer = checkpoint_tokenizer(recipe, folder) if importance.method == "activation" else None
    task = score_depth.prepare(recipe, runtime, architecture, tokenizer)
    settings = describe(recipe, folder, iteration, tokenizer.fingerprint if tokenizer else None)
    if task is not None:
        settings["multiple_choice"] = task.digest
    # The first rank looks, for all: one that came later would find what the first has written meanwhile.
    path, is_there = runtime.on_main(lambda: scores_file(recipe, architecture, settings))
    if is_there:
        runtime.print(f"score: {path} is there, made in the same way")
        return path

    if tokenizer is not None:
        batches = read_calibration(recipe, tokenizer)
        chunks = build_model(architecture, recipe.parallel, recipe.precision, trainable=False)
        load_weights(folder, iteration, as_chunks(chunks), architecture)
        runtime.print(
            f"score: {architecture.num_parameters:,} parameters of {folder}, {importance.num_samples:,} samples of "
            f"{recipe.data.sequence_length:,} tokens -> {path}"
        )
        scores = from_activations(recipe, runtime, chunks, architecture, batches, settings)
        scores = score_depth.with_depth(recipe, runtime, chunks, batches, task, scores, path)
    else:
        runtime.print(f"score: {architecture.num_parameters:,} parameters of {folder}, {importance.method} -> {path}")
        scores = from_weights(recipe, folder, iteration, architecture, settings)
    if runtime.is_main:
        save_scores(scores, path)
    runtime.print(table(scores))
    runtime.barrier()
    return path


def read_calibration(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[], Iterator[Microbatch]]:
    """A function that reads the calibration samples once through: this rank's microbatches, on the device."""
    importance = recipe.importance
    dataset = build_calibration_dataset(recipe.data, tokenizer, num_samples=importance.num_samples, seed=recipe.seed)
    assert dataset is not None
    # Too few samples are to be found out before a model is built.
    draw_samples(dataset, importance.num_samples, recipe.seed)

    def batches() -> Iterator[Microbatch]:
        once = calibration_batches(
            dataset,
            num_samples=importance.num_samples,
            micro_batch_size=importance.micro_batch_size,
            seed=recipe.seed,
            data_parallel_rank=data_group().rank(),
            data_parallel_size=data_group().size(),
            num_workers=recipe.data.num_workers,
        )
        return map(to_device, once)

    return batches


def from_activations(
    recipe: Recipe,
    runtime: Runtime,
    chunks: list[LanguageModel],
    architecture: Architecture,
    batches: Callable[[], Iterator[Microbatch]],
    settings: dict[str, Any],
) -> Scores:
    """All axes from one pass. Every rank calls."""
    importance = recipe.importance
    total, a_round, pace = importance.num_samples, importance.micro_batch_size * data_group().size(), Pace()

    def report(rounds: int) -> None:
        done = min(rounds * a_round, total)  # every data-parallel rank is as far
        if pace.is_due(done, total):
            runtime.print(f"score: {pace.line(done, total, 'samples')}")

    return score_model(chunks, batches(), architecture, importance, settings=settings, report=report)


def from_weights(
    recipe: Recipe, folder: Path, iteration: int, architecture: Architecture, settings: dict[str, Any]
) -> Scores:
    """The baselines, which need neither data nor a model in memory. Every rank calls."""
    if recipe.importance.method == "random":
        return random_scores(architecture, recipe.seed, settings)
    return magnitude.magnitude_scores(folder, iteration, architecture, settings)


def describe(recipe: Recipe, folder: Path, iteration: int, fingerprint: str | None) -> dict[str, Any]:
    """How the scores are made, and how closely they are known; the layout does not matter and is not told.

    `fingerprint`: the tokenizer's; None where no data is read.
    """
    data, importance = recipe.data, recipe.importance
    method = importance.method
    settings: dict[str, Any] = {"teacher": {"checkpoint": str(folder), "iteration": iteration}}
    if method == "magnitude":
        settings |= {"importance": {"method": method}, "tolerance": magnitude.TOLERANCE}
    elif method == "random":
        settings |= {"importance": {"method": method}, "seed": recipe.seed, "tolerance": 0.0}
    else:
        drawn_from = {"train": data.train, "valid": data.valid, "split": data.split}
        settings |= {
            "importance": dataclasses.asdict(importance),
            "data": drawn_from if data.calibration is None else {"calibration": data.calibration},
            "num_samples": importance.num_samples,
            "sequence_length": data.sequence_length,
            "precision": recipe.precision,
            "seed": recipe.seed,
            "tokenizer": fingerprint,
            "tolerance": tolerance_of(recipe.precision, importance.batch_aggregation, importance.sequence_aggregation),
        }
    return json.loads(json.dumps(settings))


def scores_file(recipe: Recipe, architecture: Architecture, settings: dict[str, Any]) -> tuple[Path, bool]:
    """(where to write, whether it is there, made with `settings`). Raises InputError where it was made otherwise."""
    if not recipe.scores:
        raise InputError("scores is not given: name the file to write, as in scores=scores.safetensors")
    path = Path(recipe.scores)
    check_file(recipe.scores, "scores")
    if not path.exists():
        return path, False
    try:
        stored = load_scores(path)
    except InputError as error:
        raise InputError(f"scores={path} is there and is no scores file: name another file") from error
    check_same_model(stored.architecture, architecture, f"scores={path} are of")
    there, here = flat(stored.settings), flat(settings)
    # Other keys are there, or not, by the method.
    for key in sorted({*there, *here} - NO_MATTER, key=lambda key: (key != "importance.method", key)):
        if there.get(key) != here.get(key):
            raise InputError(
                f"scores={path} was made otherwise: {key} is {there.get(key)!r} there and {here.get(key)!r} here; "
                "name another file, or delete that one"
            )
    return path, True


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"teacher": {"iteration": 3}} -> {"teacher.iteration": 3}."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def table(scores: Scores, shown: int = 8) -> str:
    """Size and spread of every axis, and the layers of least importance."""
    lines = [f"{'axis':<8}{'scores':>14}{'least':>12}{'median':>12}{'most':>12}"]
    for axis, values in scores.arrays():
        if "/" in axis:
            continue
        size = " x ".join(f"{part:,}" for part in values.shape)
        spread = "".join(f"{value:>12.4g}" for value in (values.min(), numpy.median(values), values.max()))
        lines.append(f"{axis:<8}{size:>14}{spread}")
    if scores.variants:
        lines.append(f"further variants: {', '.join(scores.variants)}")
    order = numpy.argsort(scores.layers, kind="stable")[:shown]
    least = ", ".join(f"{index} ({scores.layers[index]:.3g})" for index in order)
    method = scores.settings.get("importance", {}).get("method", "activation")
    what = "block influence" if method == "activation" else method
    return "\n".join([*lines, f"layers of least {what} (the first layer is 0): {least}"])
