"""What `train`, `correct` and `distill` resolve alike: layout, budget, data, memory, the folder to go on in. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import check_architecture, latest_iteration
from minitron_mcore.data.described import Described, describe_training
from minitron_mcore.data.index_size import Wanted
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.estimate.forecast import Forecast
from minitron_mcore.estimate.run import forecast_run
from minitron_mcore.jobs.continuation import refuse_other_run, sources
from minitron_mcore.jobs.inputs import output_folder
from minitron_mcore.jobs.job import Item, Job, Model, Promises
from minitron_mcore.jobs.layouts import check_model
from minitron_mcore.model.recompute import check_recompute
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World
from minitron_mcore.training.budget import Timetable, check_train, plan_timetable
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.dashboard import check_wandb
from minitron_mcore.training.learning_rate import check_learning_rate


@dataclass(frozen=True, kw_only=True)
class TrainingJob(Job):
    """A training by the recipe's `section` into `folder`.

    source: the checkpoint that the first weights come from; None: they are drawn.
    tokenizer: None: promised.
    resumes: `folder` holds a checkpoint, from which the run goes on.
    wanted: the sample sets to build.
    lineage: what lineage.yaml says of where the weights come from.
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

    @property
    def config(self) -> TrainConfig:
        return getattr(self.recipe, self.section)

    @cached_property
    def sources(self) -> dict[str, Any]:
        """What the recipe reads, for lineage.yaml of every save: files are looked at once."""
        return sources(self.recipe)


_Job = TypeVar("_Job", bound=TrainingJob)


def resolve_training(
    kind: type[_Job],
    recipe: Recipe,
    world: World,
    promises: Promises,
    *,
    section: str,
    source: Model | None,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    compared: tuple[str, ...],
    lineage: dict[str, Any],
    teacher: Architecture | None = None,
    least_samples: int = 0,
    beside: tuple[Model | Item, ...] = (),
    makes: tuple[Model, ...] = (),
    notes: tuple[str, ...] = (),
    **own: Any,
) -> _Job:
    """The job of `kind` that follows from the recipe's `section`; raises InputError.

    compared: the sections in which a run that goes on must agree with the one in the folder.
    teacher: that of a model that runs beside the student; None: none does.
    least_samples: Megatron shuffles all passes over a text at once, so that the order of samples depends on how many
    are asked for: for the order of so many, which may be more than the budget takes.
    beside, makes, notes: what is read beside `source` and the data, and what is made and said beside the rest.
    own: the fields that `kind` has beside those of a TrainingJob.
    """
    train: TrainConfig = getattr(recipe, section)
    key = f"{section}.checkpoint"
    folder = output_folder(train.checkpoint, key)
    check_model(architecture, recipe, world, section)
    check_recompute(train, architecture, recipe.parallel, section)
    refuse_other_run(folder, recipe, compared, key, section)
    resumes = latest_iteration(folder) is not None
    if resumes:
        check_architecture(folder, architecture)
    check_wandb(recipe.log, world.rank)
    timetable = plan_timetable(train, recipe.data.sequence_length, section)
    check_train(train, recipe.parallel, world.size // recipe.parallel.replica_ranks, timetable, section)
    check_learning_rate(train, timetable, section)
    wanted = wanted_samples(recipe, section, timetable, least_samples)
    described = describe_training(recipe.data, tokenizer, wanted, promises.prefixes)
    return kind(
        recipe=recipe,
        section=section,
        folder=folder,
        architecture=architecture,
        source=source,
        tokenizer=tokenizer,
        timetable=timetable,
        wanted=wanted,
        forecast=forecast_run(recipe, section, architecture, timetable, world, teacher),
        resumes=resumes,
        lineage=lineage,
        reads=(*([source] if source else []), *beside, *data_items(described)),
        makes=(Model(key, folder, architecture, None, tokenizer=tokenizer), *makes),
        notes=(*notes, *no_validation(recipe, section, described)),
        **own,
    )


def wanted_samples(recipe: Recipe, section: str, timetable: Timetable, least_samples: int = 0) -> tuple[Wanted, ...]:
    """A training set for each of the budget's sequence lengths, and what validates, of `data.sequence_length`."""
    train: TrainConfig = getattr(recipe, section)
    wanted = [
        Wanted(max(count, least_samples), length, f"{section}.tokens", train.tokens)
        for length, count in timetable.samples_needed().items()
    ]
    if samples := train.eval_iters * train.global_batch_size:
        key, length = f"{section}.eval_iters", recipe.data.sequence_length
        wanted.append(Wanted(samples, length, key, train.eval_iters, is_validation=True))
    return tuple(wanted)


def data_items(described: Described) -> tuple[Item, ...]:
    """The token files a job reads, for --dry-run."""
    items = []
    for part in described.parts:
        for prefix in part.blend.prefixes:
            what = "tokens, made by an earlier step"
            if source := described.sources.get(prefix):
                what = f"{source.stored_tokens:,} tokens, {source.sequences:,} documents"
            items.append(Item(part.blend.key, prefix, what))
    return tuple(dict.fromkeys(items))


def no_validation(recipe: Recipe, section: str, described: Described) -> tuple[str, ...]:
    """A note where validation is asked for and there is no text for it."""
    data = recipe.data
    if not getattr(recipe, section).eval_iters or described.has_validation:
        return ()
    return (
        f"there is no validation of the whole blend, because data.valid is not set and data.split={data.split} holds "
        f"out less than one sample of {data.sequence_length + 1} tokens: preprocess.valid_fraction can hold out more, "
        f"and {section}.eval_iters=0 says that none is wanted",
    )
