"""`estimate`: what a recipe will need and cost on a cluster, from shapes alone. Pure.

Neither weights nor data nor a tokenizer need be on this machine; a folder with the teacher's architecture.yaml or
config.json will do. A layout that is not possible, or does not fit, is told, not refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.data.corpus import check_file
from minitron_mcore.errors import InputError
from minitron_mcore.estimate import stages
from minitron_mcore.estimate.estimate import Estimate, estimate_of
from minitron_mcore.estimate.forecast import settings_of
from minitron_mcore.estimate.loss_points import Outlook, outlooks
from minitron_mcore.estimate.record import MARK
from minitron_mcore.estimate.stages import Parts, Pass
from minitron_mcore.estimate.work import Beside, Limits, Training
from minitron_mcore.jobs.distill import check_teacher_keys
from minitron_mcore.jobs.dry_run import planned_world
from minitron_mcore.jobs.exchange import exchange_of
from minitron_mcore.jobs.inputs import check_model, teacher_layout
from minitron_mcore.jobs.iterate import Step
from minitron_mcore.jobs.job import NOTHING, Item, Job, Model, Promises
from minitron_mcore.jobs.measured import measured_machine
from minitron_mcore.jobs.narrow import check_narrow
from minitron_mcore.jobs.run import ESTIMATE
from minitron_mcore.jobs.shape import find_shape, says_a_teacher
from minitron_mcore.jobs.sketch import TEACHER, TRAININGS, Work, sketch_road
from minitron_mcore.jobs.sketch_rounds import RoundSketch, has_rounds, made_by, sketch_rounds
from minitron_mcore.jobs.trials import check_lanes, own_world
from minitron_mcore.model.recompute import check_recompute
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import ParallelConfig, check_packing
from minitron_mcore.runtime.devices import Machine, machine_of
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import check_train, plan_timetable
from minitron_mcore.training.learning_rate import check_learning_rate

WRITES = "generate"  # a run's last step


@dataclass(frozen=True, kw_only=True)
class EstimateJob(Job):
    """What is printed, and written to `target` where that is given."""

    estimate: Estimate
    target: Path | None

    @property
    def needs_ranks(self) -> bool:
        return False


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> EstimateJob:
    """The estimate of `recipe` on its `cluster`. Raises InputError."""
    machine, world = machine_of(recipe.cluster), planned_world(recipe.cluster, world)
    if recipe.estimate.measured is not None:
        machine = measured_machine(recipe.estimate.measured, machine, world.device)
    teacher, where, works, made = None, "", [], {}
    if says_a_teacher(recipe) or not has_rounds(recipe):
        teacher, where = find_shape(recipe, promises)
        road = sketch_road(recipe, teacher)
        works, made = road.works, made_by(recipe, road)
        if recipe.cache.folder:
            works.append(Work(Step("cache", "cache the teacher's targets", "cache", recipe), teacher))
    rounds = sketch_rounds(recipe, made) if has_rounds(recipe) else []
    target = target_of(recipe)
    estimate = estimate_of(
        recipe.name,
        world.size,
        machine,
        limits_of(recipe, machine, world),
        teacher,
        where,
        trainings=(
            *(training_of(work, world) for work in works if work.verb in TRAININGS),
            *(training_of_round(each, world) for each in rounds),
        ),
        beside=(*besides(works, world), *references(rounds, world)),
        shown=recipe.estimate.layouts,
        is_timed=machine.peak_flops is not None or machine.peak_flops_fp32 is not None,
        on_cpu=world.device == "cpu",
    )
    left_out = tuple(each.step.title for each in works if each.verb == WRITES)
    aligned = (rounds[0].model, f"align.load={recipe.align.load}") if rounds else None
    estimate = dataclasses.replace(estimate, left_out=left_out, aligned=aligned)
    if recipe.estimate.curve:
        estimate = dataclasses.replace(estimate, outlooks=tuple(outlooks_of(recipe, recipe.estimate.curve)))
    makes = (Item("estimate.output", str(target), "the estimate"),) if target else ()
    return EstimateJob(recipe, makes=makes, estimate=estimate, target=target)


def outlooks_of(recipe: Recipe, path: str) -> list[Outlook]:
    """At the end of distill.tokens. Raises InputError."""
    if not recipe.distill.tokens:
        rule = "is asked of a student, and distill.tokens says no budget"
        raise InputError("estimate.curve", path, rule, "give distill.tokens, or leave it out")
    return outlooks(path, recipe.distill.tokens, recipe.data.sequence_length)


def target_of(recipe: Recipe) -> Path | None:
    """The file to write: `estimate.output`, else estimate.json in `output`. Raises InputError where it is another's."""
    if not (named := recipe.estimate.output) and not recipe.output:
        return None
    key, path = "estimate.output", Path(named or Path(str(recipe.output)) / ESTIMATE)
    check_file(str(path), key)
    if path.is_file() and MARK not in path.read_bytes()[:100].decode(errors="replace"):
        raise InputError(key, path, "is there, and is no estimate", "name another file")
    return path


def limits_of(recipe: Recipe, machine: Machine, world: World) -> Limits:
    """Of the planned machine; of this one, where nothing else is planned for."""
    if recipe.cluster.gpus is None and machine.memory is None and world.memory is not None:
        return Limits(world.memory.total)
    return Limits(int(machine.memory) if machine.memory else None, recipe.cluster.host_memory)


def training_of(work: Work, world: World) -> Training:
    """A training in the recipe's own layout. Raises InputError for a budget or a schedule that cannot be."""
    recipe, section, shape, all_ranks = work.recipe, work.verb, work.model, world
    world = own_world(all_ranks, work.side_by_side)
    train = getattr(recipe, section)
    timetable = plan_timetable(train, recipe.data.sequence_length, section)
    check_learning_rate(train, timetable, section)
    if section == "distill":
        check_teacher_keys(recipe)
    # What no layout could mend.
    check_model(shape, recipe, World(device=world.device), section, ParallelConfig())
    settings = settings_of(recipe, section, shape, timetable, world, work.teacher)

    def lay_out() -> None:
        check_lanes(recipe.parallel, all_ranks, work.side_by_side)
        check_model(shape, recipe, world, section)
        check_recompute(train, shape, recipe.parallel, section)
        exchange_of(recipe, section, shape, world, timetable)
        check_narrow(recipe, section, shape, world, timetable)
        check_train(train, recipe.parallel, world.size // recipe.parallel.replica_ranks, timetable, section)
        if work.teacher is not None:
            teacher_layout(recipe, Model("teacher.checkpoint", Path(), work.teacher), world)

    sizes = section if section != "train" or work.step.name == TEACHER else "distill"
    problem, note = problem_of(lay_out), work.note
    return Training(work.step.title, section, sizes, timetable, tuple(settings), problem, work.side_by_side, note)


def training_of_round(each: RoundSketch, world: World) -> Training:
    """A round of `align` in the recipe's own layout. Raises InputError for a budget or a schedule that cannot be."""
    this, shape, timetable = each.this, each.model, each.timetable
    recipe, config = this.recipe, this.config
    if not each.unknown:
        check_learning_rate(config, timetable, "align")
    check_model(shape, recipe, World(device=world.device), "align", ParallelConfig())
    settings = [
        dataclasses.replace(setting, section=this.key, micro_batch_key=f"{this.key}.micro_batch_size")
        for setting in settings_of(recipe, "align", shape, timetable, world, each.reference, each.sides)
    ]

    def lay_out() -> None:
        check_model(shape, recipe, world, "align")
        check_recompute(config, shape, recipe.parallel, "align")
        exchange_of(recipe, "align", shape, world, timetable)
        check_narrow(recipe, "align", shape, world, timetable)
        check_train(config, recipe.parallel, world.size // recipe.parallel.replica_ranks, timetable, "align")
        if recipe.chat.packing:
            check_packing({"parallel": recipe.parallel})

    return Training(
        each.title,
        this.key,
        this.key,
        timetable,
        tuple(settings),
        problem_of(lay_out),
        note=each.note,
        referenced=each.referenced,
        unknown=each.unknown,
    )


def problem_of(check: Callable[[], object]) -> str:
    """What `check` refuses, in words; "" where it does not."""
    try:
        check()
    except InputError as error:
        return str(error)
    return ""


def besides(works: list[Work], world: World) -> Iterator[Beside]:
    """The stages that are no trainings, each verb once for each shape; a run's few prompts are left out."""
    seen: dict[tuple[str, Architecture], None] = {}
    for work in works:
        if work.verb in (*TRAININGS, WRITES) or (work.verb, work.model) in seen:
            continue
        seen[work.verb, work.model] = None
        yield beside_of(work, world)


def references(rounds: list[RoundSketch], world: World) -> Iterator[Beside]:
    """The passes that work out log-probabilities before rounds, each kind once."""
    seen: set[tuple[object, ...]] = set()
    for each in rounds:
        recipe, config = each.this.recipe, each.this.config
        known = each.model, config.micro_batch_size, config.loss_chunk_tokens
        if not each.reads_before or known in seen:
            continue
        seen.add(known)
        title, verb, parallel = f"reference of {each.title}", "reference", recipe.parallel
        if problem := problem_of(partial(check_model, each.model, recipe, world)):
            yield Beside(title, verb, problem=problem)
            continue
        sizes = recipe.data.sequence_length, config.micro_batch_size
        run = Pass(verb, each.model, parallel, recipe.precision, *sizes, world.device == "cpu")
        parts = [stages.reference_parts(run, config.loss_chunk_tokens, stage) for stage in range(parallel.pipeline)]
        yield Beside(title, verb, tuple(parts))


def beside_of(work: Work, world: World) -> Beside:
    """Under context parallelism, which score and cache do not take, those ranks are data parallel."""
    recipe, verb, shape, title = work.recipe, work.verb, work.model, work.step.title
    parallel, method = dataclasses.replace(recipe.parallel, context=1), recipe.importance.method
    if verb == "export" or (verb == "score" and method != "activation"):
        # One process reads; of random scores nothing.
        count = stages.export_bytes if verb == "export" else stages.magnitude_bytes
        return Beside(title, verb, host=count(shape, recipe.precision) * (verb == "export" or method != "random"))
    reads_text = verb != "prune"
    if problem := problem_of(lambda: check_model(shape, recipe, world, None, parallel, reads_text=reads_text)):
        return Beside(title, verb, problem=problem)
    if verb == "prune":
        assert work.teacher is not None
        own = stages.prune_bytes(work.teacher, shape, parallel, recipe.precision)
        return Beside(title, verb, host=min(world.local_size, parallel.replica_ranks) * own)
    sizes = {"score": recipe.importance.micro_batch_size, "evaluate": recipe.evaluate.micro_batch_size}
    size = sizes.get(verb, recipe.cache.micro_batch_size)
    precision = (recipe.teacher.precision if verb == "cache" else None) or recipe.precision
    run = Pass(verb, shape, parallel, precision, recipe.data.sequence_length, size, world.device == "cpu")
    parts: dict[str, Callable[[int], Parts]] = {
        "score": lambda stage: stages.score_parts(run, recipe.importance, stage),
        "evaluate": lambda stage: stages.evaluate_parts(run, stage),
        "cache": lambda stage: stages.cache_parts(run, recipe.cache, stage),
    }
    host = 0
    if verb == "score":
        kept = stages.kept_states(run, recipe.importance, world.size // parallel.replica_ranks)
        host = min(world.local_size, world.size // parallel.pipeline) * kept
    return Beside(title, verb, tuple(map(parts[verb], range(parallel.pipeline))), host)
