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
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.questions import Task, load_task, read_questions
from minitron_mcore.files import kind_of
from minitron_mcore.importance.config import blocks_of, measured
from minitron_mcore.importance.scores import OF_WEIGHTS, load_scores, tolerance_of
from minitron_mcore.jobs.inputs import TEXT, data_items, find_reader, require
from minitron_mcore.jobs.job import NOTHING, SCORES, Item, Model, ModelJob, Promises
from minitron_mcore.keys import flat
from minitron_mcore.pruning.plan_file import check_same_model
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World

# Settings that leave the scores as they are.
NO_MATTER = {"importance.micro_batch_size", "tolerance"}


@dataclass(frozen=True, kw_only=True)
class ScoreJob(ModelJob):
    """The scores of the teacher, to the file `target`.

    task: the questions, if any metric asks them. settings: how the scores are made. is_there: `target` holds scores
    made in the same way.
    """

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
    teacher = find_reader(recipe, world, promises, "teacher.checkpoint", whole="score", reads_text=reads_text)
    metrics, target = measured(importance.depth_metrics), Path(str(recipe.scores))
    blocks_of(metrics, importance.block_lengths, teacher.architecture.num_layers)
    for path in (target, *(beside(target) if metrics else ())):
        check_file(str(path), "scores")
    task = None
    if (questions := importance.multiple_choice) and teacher.tokenizer:
        task = load_task(questions, teacher.tokenizer, teacher.architecture.max_position_embeddings)
    elif questions:
        read_questions(questions)
    settings = describe(recipe, teacher) | ({"multiple_choice": task.digest} if task else {})
    is_promised = teacher.iteration is None or (reads_text and teacher.tokenizer is None)
    is_there = not is_promised and is_made(target, teacher.architecture, settings)
    reads: tuple[Model | Item, ...] = (teacher,)
    if reads_text and not is_there:
        described = describe_calibration(recipe.data, teacher.tokenizer, importance.num_samples, promises.prefixes)
        reads += data_items(described)
    makes = (Item("scores", str(target), SCORES),)
    return ScoreJob(recipe, reads, makes, model=teacher, target=target, task=task, settings=settings, is_there=is_there)


def beside(scores: Path) -> tuple[Path, Path]:
    """scores.safetensors -> scores.depth.csv, scores.depth.png"""
    return scores.with_name(f"{scores.stem}.depth.csv"), scores.with_name(f"{scores.stem}.depth.png")


def describe(recipe: Recipe, teacher: Model) -> dict[str, Any]:
    """How the scores are made, and their tolerance; the layout has no effect and is left out."""
    data, importance, method = recipe.data, recipe.importance, recipe.importance.method
    drawn_from = {"train": data.train, "valid": data.valid, "split": data.split}
    own: dict[str, dict[str, Any]] = {
        "magnitude": {"importance": {"method": method}, "tolerance": OF_WEIGHTS},
        "random": {"importance": {"method": method}, "seed": recipe.seed, "tolerance": 0.0},
        "activation": {
            "importance": dataclasses.asdict(importance),
            "data": drawn_from if data.calibration is None else {"calibration": data.calibration},
            "num_samples": importance.num_samples,
            "sequence_length": data.sequence_length,
            "precision": recipe.precision,
            "seed": recipe.seed,
            "tokenizer": teacher.tokenizer and teacher.tokenizer.fingerprint,
            "tolerance": tolerance_of(recipe.precision, importance.batch_aggregation, importance.sequence_aggregation),
        },
    }
    settings = {"teacher": {"checkpoint": str(teacher.folder), "iteration": teacher.iteration}, **own[method]}
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
