"""The ranking half of `search`: each candidate cut by the same scores and distilled for `search.tokens`. Pure.

output/scores.safetensors                     unless the recipe names `scores`
output/candidates/NAME/plan.json, distilled   every candidate; its training resumes from there
output/candidates/NAME/result.json            what is known of it (search/halving.py)
output/winner/plan.json, pruned, distilled    the best one; `distill` goes on from there
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.data.described import describe, held_out_part
from minitron_mcore.errors import InputError
from minitron_mcore.jobs import inputs
from minitron_mcore.jobs.distill import resolve as resolve_distill
from minitron_mcore.jobs.job import NOTHING, Item, Model, Promises, absolute
from minitron_mcore.jobs.local_checkpoints import NO_LOCAL
from minitron_mcore.jobs.plan import plan_from_scores
from minitron_mcore.jobs.score import NO_MATTER, ScoreJob
from minitron_mcore.jobs.score import resolve as resolve_score
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.keys import flat
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.recipe import Recipe, with_keys
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.world import World
from minitron_mcore.search.candidates import Candidate
from minitron_mcore.search.config import SearchConfig, of_share
from minitron_mcore.search.halving import RESULT, loss_at, read_result, survivors
from minitron_mcore.tables import counted
from minitron_mcore.training.budget import Timetable

CANDIDATES = "candidates"


@dataclass(frozen=True)
class Trial:
    """A candidate: the whole recipe of its distillation. Its `folder` stands for the pruned student, with all that lies
    beside one but the weights, which are in memory alone."""

    name: str
    architecture: Architecture
    folder: Path
    recipe: Recipe

    @property
    def result(self) -> Path:
        return self.folder / RESULT

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def distilled(self) -> Path:
        return self.folder / "distilled"


@dataclass(frozen=True)
class Trials:
    """What ranks the candidates.

    teacher: as it is evaluated with, its tokenizer included.
    world: the ranks of one candidate; side_by_side: so many candidates at a time.
    scoring: the pass that serves all plans.
    largest: the candidate's training that needs most memory.
    stops: (iteration, tokens) after which candidates are compared; the last one ends the search.
    made_with: fingerprint of what all results share.
    stop: number of the one stop that `trials` are to reach, a share of the candidates that are left for it; None: all
    candidates go from stop to stop, and the best one is found.
    """

    recipe: Recipe
    folder: Path
    teacher: Model
    world: World
    scoring: ScoreJob
    trials: tuple[Trial, ...]
    largest: TrainingJob
    stops: tuple[tuple[int, int], ...]
    made_with: str
    reads: tuple[Model | Item, ...]
    makes: tuple[Model | Item, ...]
    notes: tuple[str, ...]
    stop: int | None = None

    @property
    def side_by_side(self) -> int:
        return self.recipe.search.side_by_side

    @property
    def winner(self) -> Path:
        return self.folder / "winner"

    def training(
        self, trial: Trial, promises: Promises = NOTHING, lineage: Mapping[str, Any] | None = None
    ) -> TrainingJob:
        """The distillation of `trial`; lineage: where its student comes from. Raises InputError."""
        return _training(trial, self.teacher, self.world, promises, lineage or {})


def resolve_trials(
    recipe: Recipe, world: World, promises: Promises, candidates: Sequence[Candidate], folder: Path
) -> Trials | None:
    """How `candidates` are ranked in `folder`; None where search.train=false. Raises InputError."""
    search = recipe.search
    if not search.train:
        return None
    needed = {"teacher.checkpoint": "the teacher's folder", "search.tokens": "the tokens of each candidate, as 100M"}
    inputs.require(recipe, needed, inputs.budget_and_text("distill") if search.schedule == "distill" else inputs.TEXT)
    recipe = _with_budget(recipe, folder)
    own = own_world(world, search.side_by_side)
    check_lanes(recipe.parallel, world, search.side_by_side)
    scoring = resolve_score(recipe, world, promises)
    teacher = inputs.find_reader(recipe, own, promises, "teacher.checkpoint")
    trials = tuple(_trial(recipe, candidate, folder) for candidate in candidates)
    scored = promises.after(scoring)
    for trial in trials:
        plan_from_scores(trial.recipe, teacher.architecture, scored)
    jobs = [_training(trial, teacher, own, promises, {}) for trial in trials]
    stops = _stops(recipe, jobs[0].timetable)
    made_with = fingerprint(recipe, teacher, scoring)
    _check_results(folder, made_with, stops[-1][1])
    part = held_out_part(recipe.data, recipe.evaluate.samples, promises.prefixes)
    held_out = inputs.data_items(describe(recipe.data, [part], teacher.tokenizer, promises.prefixes))
    read = [*scoring.reads, *jobs[0].reads, *held_out]
    everyone = len(trials)
    if search.stop is not None:
        trials = share_left(trials, search, stops)
    winner = Item(
        "output", str(folder / "winner"), f"the best of {counted(everyone, 'candidate')}, pruned and distilled"
    )
    return Trials(
        recipe,
        folder=folder,
        teacher=teacher,
        world=own,
        scoring=scoring,
        trials=trials,
        largest=max(jobs, key=lambda job: job.forecast.total),
        stops=stops,
        made_with=made_with,
        # Each once; not the pruned students, which are nowhere to be read.
        reads=tuple({_place(item): item for item in reversed(read) if item.key != "student.checkpoint"}.values()),
        makes=scoring.makes if search.stop else (*scoring.makes, winner),
        notes=tuple(dict.fromkeys(note for job in jobs for note in job.notes)),
        stop=search.stop,
    )


def left_at(trials: Sequence[Trial], stop: int, stops: Sequence[tuple[int, int]], keep: float) -> list[Trial] | Trial:
    """The trials that go on to the stop with this number, as those before have left them in files; or one that has not
    been at one of these yet."""
    alive = list(trials)
    for _, tokens in stops[: stop - 1]:
        losses = {}
        for trial in alive:
            result = read_result(trial.result)
            if result is None or not (result["diverged"] or result["tokens"] >= tokens):
                return trial
            losses[trial.name] = loss_at(result, tokens)
        kept = survivors(losses, keep)
        alive = [trial for trial in alive if trial.name in kept]
    return alive


def share_left(trials: tuple[Trial, ...], search: SearchConfig, stops: Sequence[tuple[int, int]]) -> tuple[Trial, ...]:
    """Those of search.share that go on to search.stop. Raises InputError where that is no stop, or the one before has
    not been reached."""
    assert search.stop is not None
    if search.stop > len(stops):
        rule = f"is beyond the last stop, {len(stops)}"
        raise InputError("search.stop", search.stop, rule, "search.halving.rungs and search.tokens are the stops")
    left = left_at(trials, search.stop, stops, search.halving.keep)
    if isinstance(left, Trial):
        rule = f"needs all candidates at the stop before, where {left.name} has not been"
        raise InputError("search.stop", search.stop, rule, f"train to search.stop={search.stop - 1} first")
    return tuple(of_share(left, search.share) if search.share else left)


def _place(item: Model | Item) -> tuple[str, str]:
    return item.key, str(item.folder if isinstance(item, Model) else item.path)


def _with_budget(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of every candidate's distillation, and of the scores. Raises InputError for keys that do not go
    together."""
    search, distill = recipe.search, recipe.distill
    scores = recipe.scores or str(folder / "scores.safetensors")
    # A candidate that stopped by itself would leave those beside it waiting.
    told: dict[str, Any] = {"scores": scores, "distill.load": None, "distill.exit_interval": None}
    told |= {f"distill.{name}": value for name, value in NO_LOCAL.items()}
    if distill.correct_teacher:
        rule = "would give every candidate another teacher, and candidates are compared under one"
        remedy = "correct the teacher first (`minitron correct`), and search with that one"
        raise InputError("distill.correct_teacher", True, rule, remedy)
    if search.schedule == "search":
        if distill.phases:
            rule = "has a budget of its own, which distill.phases do not divide"
            raise InputError("search.schedule", "search", rule, "set search.schedule=distill, or leave the phases out")
        told["distill.tokens"] = search.tokens
    elif search.tokens > distill.tokens:
        rule = (
            f"is more than distill.tokens={distill.tokens:,}, of which search.schedule=distill makes it the first part"
        )
        remedy = "lower it, raise distill.tokens, or set search.schedule=search"
        raise InputError("search.tokens", search.tokens, rule, remedy)
    return with_keys(recipe, told)


def own_world(world: World, count: int) -> World:
    """The ranks of one of `count` candidates that train side by side. Raises InputError where the ranks cannot be
    divided so."""
    if world.size % count:
        rule = f"does not divide the {counted(world.size, 'rank')}"
        raise InputError("search.side_by_side", count, rule, "each candidate trains on as many ranks as the others")
    size = world.size // count
    return dataclasses.replace(world, rank=world.rank % size, size=size)


def check_lanes(parallel: ParallelConfig, world: World, count: int) -> None:
    """Raise InputError where the ranks of one of `count` candidates side by side cannot hold a copy of the model,
    though all ranks of `world` could."""
    own, needed = world.size // count, parallel.replica_ranks
    if count == 1 or own % needed == 0 or world.size % needed:
        return
    layout = f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}"
    layout += f" x parallel.context={parallel.context}" if parallel.context > 1 else ""
    rule = f"leaves each candidate {own:,} of the {counted(world.size, 'rank')}, and one copy takes {layout} = {needed}"
    fewer = max(each for each in range(1, count) if world.size % (each * needed) == 0)
    remedy = f"set search.side_by_side={fewer}, start a multiple of {count * needed} ranks, or change parallel.*"
    raise InputError("search.side_by_side", count, rule, remedy)


def _trial(recipe: Recipe, candidate: Candidate, folder: Path) -> Trial:
    trial = Trial(candidate.name, candidate.architecture, folder / CANDIDATES / candidate.name, recipe)
    told = {
        "name": f"{recipe.name}-{candidate.name}",
        "log.wandb_group": recipe.log.wandb_group or recipe.name,
        "log.prometheus": None,  # they may run side by side
        "plan": str(trial.plan),
        "student": StudentConfig(**inputs.sizes_of(candidate.architecture), checkpoint=str(trial.folder)),
        "distill.checkpoint": str(trial.distilled),
    }
    return dataclasses.replace(trial, recipe=with_keys(recipe, told))


def _training(
    trial: Trial, teacher: Model, world: World, promises: Promises, lineage: Mapping[str, Any]
) -> TrainingJob:
    key, tokenizer = "student.checkpoint", teacher.tokenizer
    student = Model(key, trial.folder, trial.architecture, lineage=lineage, tokenizer=tokenizer)
    models = promises.models | {absolute(trial.folder): student}
    return resolve_distill(trial.recipe, world, Promises(models, promises.items))


def _stops(recipe: Recipe, timetable: Timetable) -> tuple[tuple[int, int], ...]:
    """(iteration, tokens) of every rung and of the end, in whole global batches. Raises InputError."""
    search, rungs = recipe.search, recipe.search.halving.rungs
    found = []
    for tokens in (*rungs, search.tokens):
        iteration = bisect_left(range(timetable.iterations), tokens, key=lambda each: timetable.at(each).tokens_before)
        found.append((iteration, timetable.at(iteration).tokens_before))
    if any(later <= earlier for earlier, later in pairwise(found)):
        *iterations, end = (str(iteration) for iteration, _ in found)
        rule = (
            f"must rise, in whole global batches, to below search.tokens={search.tokens:,}, which ends at iteration "
            f"{end}: the rungs are at {', '.join(iterations)}"
        )
        raise InputError("search.halving.rungs", rungs, rule, "name others")
    return tuple(found)


def fingerprint(recipe: Recipe, teacher: Model, scoring: ScoreJob) -> str:
    """Of everything that the results of candidates depend on, except their shapes, the layout, and how long they
    train."""
    halving = recipe.search.halving

    def kept(section: Any, *left_out: str) -> dict[str, Any]:
        counts = {entry.name for entry in dataclasses.fields(section) if not entry.metadata["may_change"]}
        return {name: value for name, value in dataclasses.asdict(section).items() if name in counts - {*left_out}}

    said: dict[str, Any] = {
        "weights": [str(teacher.folder.resolve()), teacher.iteration],
        "teacher": kept(recipe.teacher, "checkpoint"),
        "scores": {name: value for name, value in flat(scoring.settings).items() if name not in NO_MATTER},
        "prune": kept(recipe.prune, "overwrite"),
        "data": kept(recipe.data, "calibration"),  # that is in the scores
        "tokenizer": teacher.tokenizer and teacher.tokenizer.fingerprint,
        "distill": kept(recipe.distill),
        # Without rungs a longer search goes on with the candidates as they are.
        "rungs": [*halving.rungs, halving.keep, recipe.search.tokens] if halving.rungs else [],
        "evaluate": recipe.evaluate.samples,
        "seed": recipe.seed,
        "precision": recipe.precision,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def _check_results(folder: Path, made_with: str, tokens: int) -> None:
    """Raise InputError where `folder` holds candidates of another search, of this grid or not, or some that have gone
    further."""
    for file in sorted((folder / CANDIDATES).glob(f"*/{RESULT}")):
        result = read_result(file)
        if result is None:
            continue
        if result["made_with"] != made_with:
            rule = "was ranked by another search: other scores, text, teacher, distillation or rungs"
            raise InputError("output", file.parent, rule, "name another folder as output, or delete that one")
        if result["tokens"] > tokens:
            rule = f"is less than the {result['tokens']:,} that {file.parent} was trained for"
            raise InputError("search.tokens", tokens, rule, "raise it, or name another folder as output")
