"""`evaluate`: held-out LM loss of checkpoints, and tasks of the LM Evaluation Harness. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.hf_config import read_config
from minitron_mcore.data.corpus import check_file, check_folder
from minitron_mcore.data.described import Described, Part, describe, held_out_part
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.config import EvaluateConfig
from minitron_mcore.evaluation.harness.local_tasks import text_files
from minitron_mcore.evaluation.harness.names import KEY, Asked, asked_tasks
from minitron_mcore.jobs.compared import Compared, find_compared
from minitron_mcore.jobs.inputs import data_items, refuse_context, require
from minitron_mcore.jobs.job import NOTHING, Item, Job, Promises
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


@dataclass(frozen=True)
class Evaluated:
    """One of the models. architecture: None: of a family that is known to transformers alone. tokenizer: None: it is
    promised, or not needed."""

    name: str
    compared: Compared
    architecture: Architecture | None
    tokenizer: Tokenizer | None


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(Job):
    """`models` on held-out text, `part` of which the local tasks are made too (None: there is none), and on `tasks`;
    the results into the file `target`, the harness's own and the models' answers into folders."""

    models: tuple[Evaluated, ...]
    part: Part | None
    tasks: tuple[Asked, ...]
    target: Path
    details: Path
    answers: Path


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> EvaluateJob:
    """`checkpoint`, or `checkpoints` -> `results`, by default results.json beside the one checkpoint. Raises
    InputError."""
    config = recipe.evaluate
    has_text = bool(recipe.data.valid or recipe.data.train)
    reads_text = has_text or not config.tasks
    needed = {} if recipe.checkpoints else {"checkpoint": "the folder of a checkpoint"}
    text = {} if has_text or config.tasks else {"data.valid": "held-out tokens, the prefix of a .bin/.idx pair"}
    require(recipe, needed | text)
    tasks = asked_tasks(config.tasks, config.shots, config.task_folder) if config.tasks else ()
    if tasks:
        refuse_context(recipe, "evaluate.tasks")
    compared = find_compared(recipe, world, promises, reads_samples=reads_text)
    models = tuple(_evaluated(each, recipe) for each in compared)
    described = _describe(recipe, models, promises) if reads_text else None
    _check_text(config, tasks, described)
    target = _target(recipe, compared)
    details = target.with_name(f"{target.stem}_lm_eval")
    answers = Path(config.answers) if config.answers else details / "answers"
    makes = [Item("results", str(target), "held-out losses" + (", scores of tasks" if tasks else ""))]
    if tasks:
        for folder, key in ((details, "results"), (answers, "evaluate.answers")):
            check_folder(str(folder), key)
        makes.append(Item("results", str(details), "the harness's own results, with samples"))
    reads = tuple(each.model or Item("checkpoint", str(each.folder), "Hugging Face folder") for each in compared)
    return EvaluateJob(
        recipe,
        (*reads, *(data_items(described) if described else ())),
        tuple(makes),
        models=models,
        part=described.parts[0] if described else None,
        tasks=tasks,
        target=target,
        details=details,
        answers=answers,
    )


def _evaluated(each: Compared, recipe: Recipe) -> Evaluated:
    if each.model is not None:
        return Evaluated(each.name, each, each.model.architecture, each.model.tokenizer)
    try:
        architecture = read_config(each.folder, recipe.model.make_vocab_size_divisible_by)
    except InputError as error:
        if error.key != "model_type":  # transformers may know families that are not known here
            raise
        architecture = None
    return Evaluated(each.name, each, architecture, load_tokenizer(str(each.folder)))


def _describe(recipe: Recipe, models: tuple[Evaluated, ...], promises: Promises) -> Described:
    """The held-out text, which every model must be able to read."""
    part = held_out_part(recipe.data, recipe.evaluate.samples, promises.prefixes)
    found = [describe(recipe.data, [part], each.tokenizer, promises.prefixes) for each in models]
    return found[0]


def _check_text(config: EvaluateConfig, tasks: tuple[Asked, ...], described: Described | None) -> None:
    local = next((each.name for each in tasks if each.is_local), None)
    if config.text is not None:
        if local is None:
            raise InputError("evaluate.text", config.text, "has no effect with these evaluate.tasks", "leave it out")
        text_files(config.text)
    elif local and described is None:
        remedy = "name token files as data.valid, or text as evaluate.text"
        raise InputError(KEY, local, "is made from held-out text, and none is given", remedy)


def _target(recipe: Recipe, compared: tuple[Compared, ...]) -> Path:
    if recipe.results:
        target = Path(recipe.results)
    elif len(compared) == 1 and compared[0].model is not None:
        target = compared[0].folder / "results.json"
    elif recipe.output:
        target = Path(recipe.output) / "results.json"
    else:
        raise InputError("results", None, "is not given", "name the file to write, as results=results.json")
    check_file(str(target), "results")
    return target
