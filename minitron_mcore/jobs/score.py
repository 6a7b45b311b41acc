"""`score`: importance of every axis of the teacher, by a forward pass over calibration samples or without one. Pure."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.data.corpus import check_file
from minitron_mcore.data.described import describe_calibration
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.questions import Task, load_task, read_questions
from minitron_mcore.files import kind_of
from minitron_mcore.importance.config import check_blocks, measured
from minitron_mcore.importance.scores import OF_WEIGHTS, load_scores, tolerance_of
from minitron_mcore.jobs.inputs import TEXT, find_model, require
from minitron_mcore.jobs.job import NOTHING, SCORES, Item, Job, Model, Promises
from minitron_mcore.jobs.layouts import check_model, refuse_context
from minitron_mcore.jobs.tokenizers import model_tokenizer
from minitron_mcore.jobs.training import data_items
from minitron_mcore.keys import flat
from minitron_mcore.pruning.plan_file import check_same_model
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World

# Settings that leave the scores as they are.
NO_MATTER = {"importance.micro_batch_size", "tolerance"}


@dataclass(frozen=True, kw_only=True)
class ScoreJob(Job):
    """The scores of `teacher`, to the file `target`.

    tokenizer: None if no text is read. task: the questions, if any metric asks them. settings: how the scores are made.
    is_there: `target` holds scores made in the same way.
    """

    teacher: Model
    target: Path
    tokenizer: Tokenizer | None
    task: Task | None
    settings: dict[str, Any]
    is_there: bool


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> ScoreJob:
    """`teacher.checkpoint` -> the file `scores`. Raises InputError, also if the file was made in another way."""
    importance = recipe.importance
    reads_text = importance.method == "activation"
    scores = "the file to write, as in scores=scores.safetensors"
    needed = {"teacher.checkpoint": "the teacher's folder", "scores": scores}
    require(recipe, needed, TEXT if reads_text and not recipe.data.calibration else {})
    teacher = find_model(recipe.teacher.checkpoint, "teacher.checkpoint", promises)
    check_model(teacher.architecture, recipe, world, reads_text=reads_text)
    if reads_text:
        refuse_context(recipe, "score")
    tokenizer = model_tokenizer(recipe, teacher, promises) if reads_text else None
    metrics, target = measured(importance.depth_metrics), Path(str(recipe.scores))
    check_blocks(metrics, importance.block_lengths, teacher.architecture.num_layers)
    for path in (target, *(beside(target) if metrics else ())):
        check_file(str(path), "scores")
    task = find_task(recipe, teacher.architecture, tokenizer)
    settings = describe(recipe, teacher, tokenizer) | ({"multiple_choice": task.digest} if task else {})
    is_promised = teacher.iteration is None or (reads_text and tokenizer is None)
    is_there = not is_promised and is_made(target, teacher.architecture, settings)
    data: tuple[Item, ...] = ()
    if reads_text and not is_there:
        described = describe_calibration(recipe.data, tokenizer, importance.num_samples, promises.prefixes)
        data = data_items(described)
    return ScoreJob(
        recipe=recipe,
        reads=(teacher, *data),
        makes=(Item("scores", str(target), SCORES),),
        teacher=teacher,
        target=target,
        tokenizer=tokenizer,
        task=task,
        settings=settings,
        is_there=is_there,
    )


def beside(scores: Path) -> tuple[Path, Path]:
    """scores.safetensors -> scores.depth.csv, scores.depth.png"""
    return scores.with_name(f"{scores.stem}.depth.csv"), scores.with_name(f"{scores.stem}.depth.png")


def find_task(recipe: Recipe, teacher: Architecture, tokenizer: Tokenizer | None) -> Task | None:
    """The questions of importance.multiple_choice; None if there are none, or their tokenizer is promised."""
    file = recipe.importance.multiple_choice
    if file is None:
        return None
    if tokenizer is None:
        read_questions(file)
        return None
    return load_task(file, tokenizer, teacher.max_position_embeddings)


def describe(recipe: Recipe, teacher: Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """How the scores are made, and their tolerance; the layout has no effect and is left out."""
    data, importance = recipe.data, recipe.importance
    method = importance.method
    settings: dict[str, Any] = {"teacher": {"checkpoint": str(teacher.folder), "iteration": teacher.iteration}}
    if method == "magnitude":
        settings |= {"importance": {"method": method}, "tolerance": OF_WEIGHTS}
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
            "tokenizer": tokenizer.fingerprint if tokenizer else None,
            "tolerance": tolerance_of(recipe.precision, importance.batch_aggregation, importance.sequence_aggregation),
        }
    return json.loads(json.dumps(settings))


def is_made(path: Path, architecture: Architecture, settings: dict[str, Any]) -> bool:
    """Whether `path` holds scores made with `settings`. Raises InputError if it holds others, or something else."""
    if not path.exists():
        return False
    try:
        stored = load_scores(path)
    except InputError as error:
        rule = f"exists and {kind_of(path) or 'is not a scores file'}"
        raise InputError("scores", path, rule, "name another file") from error
    check_same_model(stored.architecture, architecture, "scores", path)
    there, here = flat(stored.settings), flat(settings)
    # By the method there may be other keys.
    for key in sorted({*there, *here} - NO_MATTER, key=lambda key: (key != "importance.method", key)):
        if there.get(key) != here.get(key):
            rule = f"was made in another way: {key} is {there.get(key)} there and {here.get(key)} here"
            raise InputError("scores", path, rule, "name another file, or delete that one")
    return True
