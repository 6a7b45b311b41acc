"""`reproduce`: a claim of a paper, tried: the arms of a comparison, each a run below its seed's teacher. Pure.

output/tokenizer, data                 what all claims in the folder share, unless the recipe names its own
output/teachers/teacher-seed-S         one a seed, likewise; named by reproduce.teacher
output/NAME/data                       of reproduce.input; NAME is the recipe's name
output/NAME/ARM/seed-S                 what `run` makes of the arm, as far as the measured model needs it
output/NAME/ARM/seed-S/losses.json     what that model loses on each held-out document
output/NAME/reproduction.json, .png    differences of the arms, and the verdict
output/reproduction.md                 the verdicts of every claim in the folder
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.data.described import Part, describe, held_out_part
from minitron_mcore.errors import InputError
from minitron_mcore.files import as_yaml
from minitron_mcore.jobs.continuation import refuse_other_run
from minitron_mcore.jobs.inputs import output_folder, recipe_tokenizer, require
from minitron_mcore.jobs.iterate import Step
from minitron_mcore.jobs.job import NOTHING, Item, Job, Model, Promises, absolute
from minitron_mcore.jobs.run import SECTIONS, Road, RunJob, lay_road, refuse_others, with_data
from minitron_mcore.reading import load_text, put
from minitron_mcore.recipe import Recipe, recipe_of, to_yaml, with_keys
from minitron_mcore.reproduction.config import NAME, NAMES, ArmConfig, ReproduceConfig
from minitron_mcore.runtime.config import check_layout
from minitron_mcore.runtime.world import World

LOSSES, RESULT, PLOT, SUMMARY = "losses.json", "reproduction.json", "reproduction.png", "reproduction.md"
# What the claims of a folder have in common.
RESERVED = ("tokenizer", "data", "teachers", "done")
SHARED = ("input", "hf", "tokenizer", "preprocess", "data")


@dataclass(frozen=True)
class Arm:
    """One arm with one seed: `run`, whose model in `checkpoint` is measured on documents of `part`, into `target`."""

    name: str
    seed: int
    run: RunJob
    checkpoint: Path
    part: Part
    target: Path


@dataclass(frozen=True, kw_only=True)
class ReproduceJob(Job):
    """`shared`: what is made first, in order; then the `arms`, seed by seed; results into `target`, below `folder`."""

    folder: Path
    target: Path
    world: World
    shared: tuple[RunJob, ...]
    arms: tuple[Arm, ...]


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> ReproduceJob:
    """`reproduce.*` and all that `run` reads -> the folder `output`. Raises InputError."""
    config, folder = recipe.reproduce, _folder(recipe)
    check_layout(recipe.parallel, world.size)
    road = Road(folder, world, promises)
    base = with_data(recipe, road)
    teachers = dict(_teachers(base, road))
    shared = [_run_job(common(recipe), road, folder)]
    target = folder / recipe.name
    if config.input is not None:
        road = Road(target, world, road.promises)
        base = with_data(with_keys(base, {"input": config.input, "data.train": None, "data.valid": None}), road)
        refuse_other_run(target, base, SHARED, "output")
        shared.append(_run_job(base, road, target))
    arms = [
        _arm(base, name, arm, seed, teachers[seed], target, world, road.promises)
        for seed in config.seeds
        for name, arm in config.arms.items()
    ]
    makes = [made for run in (*shared, *(arm.run for arm in arms)) for made in run.makes]
    makes.append(Item("output", str(target / RESULT), "differences of the arms, and the verdict"))
    return ReproduceJob(
        recipe,
        makes=tuple(makes),
        folder=folder,
        target=target,
        world=world,
        shared=tuple(shared),
        arms=tuple(arms),
    )


def common(recipe: Recipe) -> Recipe:
    """What of it every claim in the folder shares."""
    return with_keys(recipe, {"name": "reproduce", "reproduce": ReproduceConfig()})


def _folder(recipe: Recipe) -> Path:
    """Raises InputError where none is named, or it holds anything but claims that share text and teachers."""
    named = {"reproduce.arms": "what is compared", "reproduce.orders": "what the claim says of the arms, as a < b"}
    require(recipe, {"output": "the folder to write to"})
    for key, what in named.items():
        if not getattr(recipe.reproduce, key.rpartition(".")[2]):
            raise InputError(key, None, "is not given", f"name {what}, or a recipe of configs/reproduce as --config")
    if recipe.name in RESERVED or not NAME.fullmatch(recipe.name):
        raise InputError("name", recipe.name, "is to be a folder's name in output, beside what claims share", NAMES)
    folder = output_folder(recipe.output, "output")
    refuse_other_run(folder, common(recipe), SHARED, "output")
    refuse_others(folder, "reproduced claims")
    return folder


def _teachers(base: Recipe, road: Road) -> Iterator[tuple[int, str]]:
    """(seed, its teacher's checkpoint); all the same one where the recipe names a teacher."""
    seeds = base.reproduce.seeds
    if base.teacher.checkpoint:
        yield from ((seed, base.teacher.checkpoint) for seed in seeds)
        return
    if base.hf:
        target = str(road.folder / "teachers" / "imported")
        road.add("import", "import the teacher", "import", with_keys(base, {"checkpoint": target}), replaces=True)
        yield from ((seed, target) for seed in seeds)
        return
    for seed in seeds:
        name = f"{base.reproduce.teacher}-seed-{seed}"
        target = str(road.folder / "teachers" / name)
        told = {"name": name, "seed": seed, "train.checkpoint": target}
        road.add(f"train-{name}", f"train the {base.reproduce.teacher} of seed {seed}", "train", with_keys(base, told))
        yield seed, target


def _arm(
    base: Recipe, name: str, arm: ArmConfig, seed: int, teacher: str, target: Path, world: World, promises: Promises
) -> Arm:
    own = target / name / f"seed-{seed}"
    recipe = changed(base, arm.keys, f"reproduce.arms.{name}.keys")
    if arm.model in ("next_token", "random"):
        recipe = with_keys(recipe, {"run.baselines": [arm.model]})
    told = {"name": f"{base.name}-{name}-{seed}", "seed": seed, "output": str(own), "teacher.checkpoint": teacher}
    recipe = with_keys(recipe, {**told, "hf": None, "scores": None, "reproduce": ReproduceConfig()})
    refuse_other_run(own, recipe, SECTIONS, "output")
    road = Road(own, world, promises, leaves_out=("evaluate", "export", "generate"))
    lay_road(recipe, road)
    checkpoint = _measured(road, arm.model)
    part = held_out_part(recipe.data, base.reproduce.documents, promises.prefixes)
    (part,) = describe(recipe.data, [part], recipe_tokenizer(recipe, promises), promises.prefixes).parts
    road.steps = needed(road.steps, checkpoint)
    run = _run_job(recipe, road, own)
    return Arm(name, seed, run, checkpoint, part, own / LOSSES)


def changed(recipe: Recipe, keys: dict[str, Any], path: str) -> Recipe:
    """The recipe with `keys`, as a user writes them, on top; errors name them below `path`. Raises InputError."""
    if not keys:
        return recipe
    tree = load_text(to_yaml(recipe))
    for key, value in load_text(as_yaml(keys)).items():
        put(tree, key, value, lambda place: None)
    try:
        return recipe_of(tree)
    except InputError as error:
        raise error.under(path) from error


def _measured(road: Road, model: str) -> Path:
    """The folder of the model that is measured."""
    if model in ("next_token", "random"):
        return road.folder / "baselines" / model
    students = [step.recipe.distill.checkpoint for step, _ in road.steps if step.name.startswith("distill-")]
    distilled = Path(str(students[-1]))
    return distilled if model == "distilled" else distilled.with_name("pruned")


def needed(steps: list[tuple[Step, Job | None]], checkpoint: Path) -> list[tuple[Step, Job | None]]:
    """Of a run's steps those that lead to `checkpoint`. Of steps that are done, all that may: they cost nothing."""
    wanted = {absolute(checkpoint)}
    kept: list[tuple[Step, Job | None]] = []
    for step, job in reversed(steps):
        if job is None:
            kept.append((step, job))
        elif {_place(made) for made in job.makes} & wanted:
            wanted |= {_place(read) for read in job.reads}
            kept.append((step, job))
    return kept[::-1]


def _place(item: Model | Item) -> Path:
    return absolute(item.folder if isinstance(item, Model) else item.path)


def _run_job(recipe: Recipe, road: Road, folder: Path) -> RunJob:
    return RunJob(recipe, makes=road.makes, folder=folder, world=road.world, steps=tuple(road.steps))
