"""`train`: next-token training, from random weights (`model.*`) or onward from a checkpoint (`train.load`); and what
`train`, `correct` and `distill` resolve alike: layout, budget, data, memory, the folder to go on in. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.folder import check_architecture, resumed_iteration
from minitron_mcore.data.described import describe_training
from minitron_mcore.data.index import Wanted
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.forecast import Forecast, forecast_run
from minitron_mcore.files import as_yaml
from minitron_mcore.jobs import inputs
from minitron_mcore.jobs.chats import Chats
from minitron_mcore.jobs.continuation import identity_of, refuse_other_run, sources
from minitron_mcore.jobs.exchange import exchange_of
from minitron_mcore.jobs.job import NOTHING, Item, Job, Model, Promises, absolute
from minitron_mcore.jobs.local_checkpoints import check_local
from minitron_mcore.jobs.narrow import check_narrow, check_teacher
from minitron_mcore.model.fp8 import passes_of
from minitron_mcore.model.recompute import check_recompute
from minitron_mcore.recipe import Recipe, to_yaml
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.user_buffers import Exchange
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import Timetable, check_train, plan_timetable
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.dashboard import check_wandb
from minitron_mcore.training.learning_rate import check_learning_rate
from minitron_mcore.training.prometheus import check_prometheus

# What random weights need besides.
NEW_MODEL = {
    "tokenizer.model": inputs.A_TOKENIZER,
    "model.num_layers": "the number of layers",
    "model.hidden_size": "the width of the residual stream",
    "model.ffn_hidden_size": "the number of neurons of an MLP",
    "model.num_attention_heads": "the number of query heads",
}


@dataclass(frozen=True)
class Teaching:
    """A teacher that is fit for the student of `distill`.

    model: the one that runs beside the student, at the iteration that the run began with; None: none does.
    layout: how it lies over the ranks.
    corrected: what a model that is trained while it teaches becomes.
    cache: the folder of its targets; samples: how many it was asked for.
    """

    tokenizer: Tokenizer | None
    lineage: dict[str, Any]
    model: Model | None = None
    layout: ParallelConfig | None = None
    corrected: Model | None = None
    cache: Path | None = None
    samples: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.model is None:
            return str(self.cache)
        corrected = f", corrected into {self.corrected.folder}," if self.corrected else ""
        return f"teacher {self.model.architecture.num_parameters:,}{corrected}"


NOBODY = Teaching(None, {})


@dataclass(frozen=True, kw_only=True)
class TrainingJob(Job):
    """A training by the recipe's `section` into `folder`.

    source: the checkpoint that the first weights come from, of `distill` the pruned student; None: they are drawn.
    tokenizer: None: promised.
    resumes: `folder` holds a checkpoint, from which the run goes on.
    wanted: the sample sets to build.
    lineage: what lineage.yaml says of where the weights come from.
    teaching: of `distill`.
    compared: the sections in which a run that goes on must agree with the one in `folder`.
    chats: what is read in place of data.train.
    exchange: what tensor-parallel ranks exchange states through during products; None: nothing is asked for.
    """

    section: str
    folder: Path
    architecture: Architecture
    source: Model | None
    tokenizer: Tokenizer | None
    timetable: Timetable
    wanted: tuple[Wanted, ...]
    forecast: Forecast
    resumes: bool
    lineage: dict[str, Any]
    teaching: Teaching
    compared: tuple[str, ...] = ()
    chats: Chats | None = None
    exchange: Exchange | None = None

    @property
    def config(self) -> TrainConfig:
        return getattr(self.recipe, self.section)

    @property
    def passes(self) -> dict[str, Any]:
        """How the model's training passes go, by the names of `build_model`."""
        return {**passes_of(self.config), "tp_comm_overlap": self.config.tp_comm_overlap}

    @property
    def draws_weights(self) -> bool:
        """Whether the first weights are random."""
        return self.source is None or (self.section == "distill" and self.recipe.distill.random_weights)

    @property
    def sides(self) -> int:
        """Sequences that a row of pairs is; 0: no pairs are read."""
        return self.chats.samples.sides if self.chats else 0

    def check_types(self, world: World) -> None:
        """Raise InputError where products in fp8, or a narrow optimizer's state, are not to be had on `world`, of the
        model and of a teacher beside it."""
        recipe, teaching = self.recipe, self.teaching
        check_narrow(recipe, self.section, self.architecture, world, self.timetable)
        if teaching.corrected is not None:
            check_narrow(recipe, "correct", teaching.corrected.architecture, world, self.timetable, self.section)
        if teaching.model and teaching.layout and self.section == "distill" and recipe.teacher.precision == "fp8":
            check_teacher(teaching.model.architecture, teaching.layout.tensor, world, recipe.cluster)

    def forecast_on(self, world: World) -> Forecast:
        """What the ranks of `world`, whose memory and GPUs are known, will need. Raises InputError."""
        self.check_types(world)
        teacher = self.forecast.setting.teacher
        return forecast_run(self.recipe, self.section, self.architecture, self.timetable, world, teacher, self.sides)

    @cached_property
    def sources(self) -> dict[str, Any]:
        """What the recipe reads, for lineage.yaml of every save: files are looked at once."""
        return sources(self.recipe, self.folder)

    def identity(self) -> str:
        """A checksum of what decides what the run computes, its budget included, and of the files it reads."""
        return identity_of(self.recipe, self.compared, self.sources)

    @property
    def documents(self) -> dict[str, str]:
        """What dashboards keep: the resolved recipe, where the weights come from, and the plan they were cut by, where
        one lies beside them."""
        plan = self.source and self.source.folder / "plan.json"
        cut_by = {"plan": plan.read_text(encoding="utf-8")} if plan and plan.is_file() else {}
        return {"recipe": to_yaml(self.recipe), "lineage": as_yaml(self.lineage), **cut_by}


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> TrainingJob:
    """A training to `train.tokens`; the same command goes on where it was cut off. Raises InputError."""
    return resolve_section(recipe, world, promises, "train", "train.load", ("model", "data", "train"))


def resolve_section(
    recipe: Recipe, world: World, promises: Promises, section: str, load: str, compared: tuple[str, ...]
) -> TrainingJob:
    """Next-token training by the recipe's `section`.

    load: the key of the checkpoint the weights come from; where it is not given, the model is the recipe's `model`,
    from random weights. compared: the sections in which a run that goes on must agree.
    """
    own, given = getattr(recipe, section).checkpoint, inputs.value_at(recipe, load)
    later = inputs.budget_and_text(section) | ({} if given else NEW_MODEL)
    inputs.require(recipe, {f"{section}.checkpoint": "the folder to write to"}, later)
    lineage: dict[str, Any] = {"stage": section, "load": given}
    if source := inputs.find_model(given, load, promises) if given else None:
        model, tokenizer = source.architecture, inputs.model_tokenizer(recipe, source, promises)
        lineage["lineage"] = dict(source.lineage)
        if absolute(own) == absolute(source.folder):
            raise InputError(f"{section}.checkpoint", own, f"is {load}'s own folder", "name another")
    else:
        tokenizer = inputs.recipe_tokenizer(recipe, promises)
        model = new_architecture(recipe, tokenizer, promises)
        tokenizer = tokenizer and inputs.fit_tokenizer(tokenizer, model, recipe)
    return resolve_training(recipe, world, promises, section, source, model, tokenizer, compared, lineage)


def new_architecture(recipe: Recipe, tokenizer: Tokenizer | None, promises: Promises) -> Architecture:
    """The recipe's `model` section; its vocabulary is the tokenizer's, unless given. Raises InputError.

    tokenizer: None: promised.
    """
    fields = dataclasses.asdict(recipe.model)
    if fields["vocab_size"] is None:
        fields["vocab_size"] = tokenizer.vocab_size if tokenizer else promises.vocab_size(recipe.tokenizer.model)
    try:
        return build_architecture(fields)
    except InputError as error:
        raise error.under("model") from error


def resolve_training(
    recipe: Recipe,
    world: World,
    promises: Promises,
    section: str,
    source: Model | None,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    compared: tuple[str, ...],
    lineage: dict[str, Any],
    teaching: Teaching = NOBODY,
    *,
    chats: Chats | None = None,
) -> TrainingJob:
    """The job that follows from the recipe's `section`; raises InputError.

    compared: the sections in which a run that goes on must agree with the one in the folder. chats: what is read in
    place of data.train.
    """
    train: TrainConfig = getattr(recipe, section)
    key = f"{section}.checkpoint"
    folder = inputs.output_folder(train.checkpoint, key)
    inputs.check_model(architecture, recipe, world, section)
    check_recompute(train, architecture, recipe.parallel, section)
    refuse_other_run(folder, recipe, compared, key, section, chats=chats)
    resumes = resumed_iteration(folder) is not None
    if resumes:
        check_architecture(folder, architecture)
    check_local(train, folder, section, world)
    check_wandb(recipe.log, world.rank)
    check_prometheus(recipe.log, world.rank)
    timetable = chats.timetable if chats else plan_timetable(train, recipe.data.sequence_length, section)
    check_train(train, recipe.parallel, world.size // recipe.parallel.replica_ranks, timetable, section)
    check_learning_rate(train, timetable, section)
    teacher = teaching.model
    wanted = () if chats else wanted_samples(recipe, section, timetable, teaching.samples)
    if chats and train.keep_best and chats.samples.preparation.valid is None and not recipe.chat.valid_fraction:
        refuse_best(section, train, "chat.valid, or chat.valid_fraction,")
    read, said = (chats.samples.items, []) if chats else text_items(recipe, section, tokenizer, wanted, promises)
    reads: list[Model | Item] = [each for each in (source, teacher) if each]
    if teaching.cache:
        reads.append(Item("distill.teacher", str(teaching.cache), f"{teaching.samples:,} samples' targets"))
    shape, sides = teacher.architecture if teacher else None, chats.samples.sides if chats else 0
    job = TrainingJob(
        recipe,
        reads=(*reads, *read),
        makes=tuple(filter(None, [Model(key, folder, architecture, None, tokenizer=tokenizer), teaching.corrected])),
        notes=(*teaching.notes, *said),
        section=section,
        folder=folder,
        architecture=architecture,
        source=source,
        tokenizer=tokenizer,
        timetable=timetable,
        wanted=wanted,
        forecast=forecast_run(recipe, section, architecture, timetable, world, shape, sides),
        resumes=resumes,
        lineage=lineage,
        teaching=teaching,
        compared=compared,
        chats=chats,
        exchange=exchange_of(recipe, section, architecture, world, timetable),
    )
    job.check_types(world)
    return job


def text_items(
    recipe: Recipe, section: str, tokenizer: Tokenizer | None, wanted: tuple[Wanted, ...], promises: Promises
) -> tuple[tuple[Item, ...], list[str]]:
    """The token files of the recipe's `data`, and what is to be said of them. Raises InputError."""
    data, notes = recipe.data, []
    described = describe_training(data, tokenizer, wanted, promises.prefixes)
    train: TrainConfig = getattr(recipe, section)
    if train.keep_best and not described.has_validation:
        refuse_best(section, train, "data.valid, or a data.split that holds out enough of the text,")
    if train.eval_iters and not described.has_validation:
        notes.append(
            f"there is no validation of the whole blend, because data.valid is not set and data.split={data.split} "
            f"holds out less than one sample of {data.sequence_length + 1} tokens: preprocess.valid_fraction can hold "
            f"out more, and {section}.eval_iters=0 says that none is wanted"
        )
    return inputs.data_items(described), notes


def refuse_best(section: str, train: TrainConfig, given: str) -> NoReturn:
    """Raise InputError where nothing is held out by which checkpoints could be compared."""
    rule = "compares validation losses, but nothing is held out to validate on"
    raise InputError(f"{section}.keep_best", train.keep_best, rule, f"give {given} or leave keep_best out")


def wanted_samples(recipe: Recipe, section: str, timetable: Timetable, least: int) -> tuple[Wanted, ...]:
    """A training set for each of the budget's sequence lengths, and what validates, of `data.sequence_length`.

    least: Megatron shuffles all passes over a text at once, so that the order of samples depends on how many are asked
    for: for the order of so many, which may be more than the budget takes.
    """
    train: TrainConfig = getattr(recipe, section)
    wanted = [
        Wanted(max(count, least), length, f"{section}.tokens", train.tokens)
        for length, count in timetable.samples_needed().items()
    ]
    if samples := train.eval_iters * train.global_batch_size:
        key, length = f"{section}.eval_iters", recipe.data.sequence_length
        wanted.append(Wanted(samples, length, key, train.eval_iters, is_validation=True))
    return tuple(wanted)
