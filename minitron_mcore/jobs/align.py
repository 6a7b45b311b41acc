"""`align`: supervised fine-tuning and preference optimisation, in one round or several (arXiv 2408.11796, the paper's
recipe of stages). Pure.

Each round starts from the model of the one before, which is its reference too. How many samples there are, and so how
many iterations `epochs` are, is known once their tokens are prepared: until then about.

align.checkpoint/                one round
                /NAME/           of several, the one align.stages.NAME
                     chats/      the samples' tokens (data/chat/prepared.py)
                     reference/  log-probabilities of the answers by the model that the round starts from
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.alignment.config import (
    BUDGETS,
    PREFERENCES,
    REFERENCED,
    REWARDED,
    AlignConfig,
    idle_with,
    in_tokens,
)
from minitron_mcore.checkpoint.folder import identify_weights, read_lineage, resumed_iteration
from minitron_mcore.data.chat.config import ChatConfig
from minitron_mcore.data.chat.prepared import Prepared
from minitron_mcore.errors import InputError
from minitron_mcore.jobs import inputs
from minitron_mcore.jobs.chats import Chats, samples_of
from minitron_mcore.jobs.continuation import read_so_far
from minitron_mcore.jobs.job import NOTHING, Item, Job, Model, Promises, absolute
from minitron_mcore.jobs.train import NOBODY, Teaching, TrainingJob, resolve_training
from minitron_mcore.reading import merged, read
from minitron_mcore.recipe import Recipe, unknown_key
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import Timetable, plan_timetable

COMPARED = ("align", "chat")


@dataclass(frozen=True)
class Round:
    """name: "" of the only one. recipe: with the round's own keys in `align` and `chat`."""

    name: str
    recipe: Recipe

    @property
    def key(self) -> str:
        return f"align.stages.{self.name}" if self.name else "align"

    @property
    def config(self) -> AlignConfig:
        return self.recipe.align

    @property
    def folder(self) -> Path:
        return Path(str(self.config.checkpoint))


@dataclass(frozen=True, kw_only=True)
class AlignJob(Job):
    """The rounds in order, and of each its training, as far as it is known before there are prepared samples, which say
    how long it is, and the model of the round before."""

    world: World
    promises: Promises
    rounds: tuple[Round, ...]
    trainings: tuple[TrainingJob, ...]

    def training(self, number: int, prepared: Prepared) -> TrainingJob:
        """The training of the round `number`, from 0, in full: its samples are prepared, the rounds before it done.
        Raises InputError."""
        this, later = self.rounds[number], self.rounds[number + 1 :]
        training = resolve_round(this, self.world, self.promises, prepared)
        done, last = resumed_iteration(this.folder), training.timetable.iterations
        begun = next((each for each in later if resumed_iteration(each.folder) is not None), None)
        if begun and done != last:
            rule = f"stands at iteration {done or 0} of {last}, but the round {begun.name} has begun from it already"
            remedy = f"give {this.key} the budget that it had, or name another align.checkpoint"
            raise InputError("align.checkpoint", this.folder, rule, remedy)
        return training


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> AlignJob:
    """Every round of `align`; the same command goes on where it was cut off. Raises InputError."""
    needed = {"align.load": "the folder of the model to align", "align.checkpoint": "the folder to write to"}
    inputs.require(recipe, needed)
    if absolute(str(recipe.align.load)) == absolute(str(recipe.align.checkpoint)):
        raise InputError("align.checkpoint", recipe.align.checkpoint, "is align.load's own folder", "name another")
    rounds, trainings, known = tuple(rounds_of(recipe)), [], promises
    for this in rounds:
        trainings.append(resolve_round(this, world, known))
        known = known.after(trainings[-1])
    # What one round makes for the next is not read from elsewhere.
    reads = [item for training in trainings for item in training.reads]
    given = [item for item in reads if isinstance(item, Item) or item.iteration is not None]
    return AlignJob(
        recipe,
        reads=tuple(given),
        makes=tuple(made for training in trainings for made in training.makes),
        notes=tuple(dict.fromkeys(note for training in trainings for note in training.notes)),
        world=world,
        promises=promises,
        rounds=rounds,
        trainings=tuple(trainings),
    )


def rounds_of(recipe: Recipe) -> Iterator[Round]:
    """The rounds that the recipe names, each with its own keys; raises InputError for a key that there is not."""
    if not recipe.align.stages:
        yield Round("", recipe)
        return
    load, under, template = recipe.align.load, str(recipe.align.checkpoint), recipe.chat.template
    for name, given in recipe.align.stages.items():
        key = f"align.stages.{name}"
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError("align.stages", name, "is to be a folder's name", "use letters, digits, dot, - and _")
        own = dict(given)
        for taken in ("load", "checkpoint", "stages"):
            if taken in own:
                rule = "is not given to one round: each starts from the one before, in a folder of its name"
                raise InputError(f"{key}.{taken}", own[taken], rule, f"leave it out, and give align.{taken}")
        chat = read(ChatConfig, merged(_plain(recipe.chat), own.pop("chat", {})), f"{key}.chat", unknown_key)
        template = chat.template or template  # it stays with the model, as between two commands
        chat = dataclasses.replace(chat, template=template)
        base = _plain(recipe.align) | {"load": load, "checkpoint": str(Path(under) / name), "stages": {}}
        if any(own.get(budget) for budget in BUDGETS):
            base |= {budget: type(base[budget])() for budget in BUDGETS}
        # What `align` says for rounds of other methods is not this one's.
        idle = idle_with(str(own.get("method", base["method"])))
        base |= {entry.name: entry.default for entry in dataclasses.fields(AlignConfig) if entry.name in idle}
        align = read(AlignConfig, merged(base, own), key, unknown_key)
        log = dataclasses.replace(recipe.log, wandb_group=recipe.log.wandb_group or recipe.name)
        yield Round(name, dataclasses.replace(recipe, name=f"{recipe.name}-{name}", align=align, chat=chat, log=log))
        load = align.checkpoint


def _plain(section: Any) -> dict[str, Any]:
    return dataclasses.asdict(section)


def resolve_round(this: Round, world: World, promises: Promises, prepared: Prepared | None = None) -> TrainingJob:
    """A round's training, of as many iterations as its `prepared` samples say, or about so many. Raises InputError."""
    recipe, config, method = this.recipe, this.config, this.config.method
    check_round(this)
    source = inputs.find_model(config.load, "align.load", promises)
    tokenizer = inputs.model_tokenizer(recipe, source, promises)
    if tokenizer is None:
        raise InputError("align.load", config.load, "is made by an earlier step", "align it by a command of its own")
    tokenizer = inputs.fit_tokenizer(tokenizer, source.architecture, recipe)
    asked: Any = {"pairs": method in PREFERENCES, "needs_rewards": method in REWARDED}
    asked["per_sample"] = config.mean == "samples"
    samples = samples_of(recipe, tokenizer, this.folder, {"parallel": recipe.parallel}, **asked)
    samples = dataclasses.replace(samples, prepared=prepared)
    lineage = {"stage": "align", "method": method, "load": str(source.folder), "lineage": dict(source.lineage)}
    teaching = NOBODY
    if method in REFERENCED:
        source, notes = same_reference(this, source)
        if source.iteration is not None:
            lineage["reference"] = identify_weights(*source.place)
        beside = config.reference == "resident"
        teaching = Teaching(tokenizer, {}, source if beside else None, recipe.parallel if beside else None, notes=notes)
    chats, shape = Chats.of(samples, config, "align"), source.architecture
    return resolve_training(
        recipe, world, promises, "align", source, shape, tokenizer, COMPARED, lineage, teaching, chats=chats
    )


def check_round(this: Round) -> None:
    """Raise InputError for a round without a budget, or with keys that do not go with chats."""
    if not any(getattr(this.config, budget) for budget in BUDGETS):
        names = ", ".join(f"{this.key}.{budget}" for budget in BUDGETS)
        raise InputError(names, None, "are not given", "give one of them: the budget of the round")
    if this.config.phases:
        rule = "does not go with chats, whose rows are of one length"
        raise InputError(f"{this.key}.phases", None, rule, "leave it out")


def timetable_of(config: AlignConfig, row_length: int, rows: int, units: int) -> Timetable:
    """The budget as whole global batches of rows of `row_length` tokens; a pass over the data is of so many `rows`, and
    of `units` chats or preferences. Raises InputError."""
    return plan_timetable(in_tokens(config, rows, units, row_length), row_length, "align")


def same_reference(this: Round, source: Model) -> tuple[Model, tuple[str, ...]]:
    """`source` at the iteration that a run in the round's folder began from, which is its reference, and what is to be
    said of that. Raises InputError where it is not there any more, or has changed."""
    if source.iteration is None or resumed_iteration(this.folder) is None:
        return source, ()
    before = read_lineage(this.folder).get("reference", {})
    began = read_so_far(before, source, "align.checkpoint", this.folder, "was aligned so far against", "reference")
    if began == source.iteration:
        return source, ()
    note = f"goes on from iteration {began} of align.load={source.folder}, its reference; the newest is"
    return dataclasses.replace(source, iteration=began), (f"{note} {source.iteration}",)
