"""What several stages do in the same way: claim an output folder, read data, name a run."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.companions import carry_companions
from minitron_mcore.checkpoint.folder import (
    is_iteration,
    latest_iteration,
    read_lineage,
    write_description,
)
from minitron_mcore.data.corpus import check_folder
from minitron_mcore.data.dataset import build_training_datasets
from minitron_mcore.data.index_size import Wanted, check_index_size
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.cache.file import DESCRIPTION
from minitron_mcore.distillation.cache.teacher import PREFIX
from minitron_mcore.errors import InputError
from minitron_mcore.files import nearest_folder, read_mapping, refuse_closed
from minitron_mcore.layout import check_tensor_parallel, split_layers
from minitron_mcore.model.config import LEFT_OUT
from minitron_mcore.model.gpt import check_fp8
from minitron_mcore.model.recompute import check_recompute
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.plan import TARGETS, student_shape
from minitron_mcore.recipe import Recipe, to_yaml
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.runtime.layouts import check_sequence
from minitron_mcore.runtime.parallel import check_teacher_layout, of_teacher, use_layout
from minitron_mcore.runtime.start import Runtime, seed_everything
from minitron_mcore.training.budget import SIZES, Timetable, check_train, plan_timetable
from minitron_mcore.training.config import PhaseConfig, TrainConfig
from minitron_mcore.training.dashboard import check_wandb
from minitron_mcore.training.learning_rate import check_continuation, check_learning_rate
from minitron_mcore.training.reader import BatchReader, StepReader, batch_reader, data_order, step_reader

# Keys that may change between a run and its continuation: where and how it runs, not what it computes.
MAY_CHANGE = {
    "checkpoint",
    "save_interval",
    "eval_interval",
    "eval_iters",
    "micro_batch_size",
    "num_workers",
    "cache_path",
    "loss_chunk_tokens",
    "recompute_loss",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "teacher_window",
    "max_skipped_iterations",
    "check_teacher",
    "parallel",
    "placement",
}

# Of the section of a training: what may change with what is left of its budget.
BUDGET = {"tokens", "phases", "lr_wsd_decay_tokens"}


def lay_out(recipe: Recipe, runtime: Runtime) -> None:
    """Process groups and seeds of the recipe; every rank calls."""
    use_layout(recipe.parallel, runtime.world_size)
    seed_everything(recipe.seed)


def refuse_context(recipe: Recipe, verb: str) -> None:
    """Raise InputError where sequences are cut over ranks, for a verb that needs a whole one on a rank."""
    if recipe.parallel.context > 1:
        raise InputError(
            f"parallel.context={recipe.parallel.context} is not possible in `{verb}`, which needs a whole sequence on "
            "a rank: set parallel.context=1 and raise parallel.tensor"
        )


def output_folder(value: str | None, key: str) -> Path:
    """The folder to write to. Raises InputError where it is none, or could not be made or read. Makes nothing."""
    if not value:
        raise InputError(f"{key} is not given: name the folder to write to")
    if os.path.isfile(value):
        raise InputError(f"{key}={value} is a file: name a folder")
    check_folder(value, key)
    refuse_closed(f"{key}={value}", value)
    if is_iteration(Path(value)):
        raise InputError(f"{key}={value} is an iteration of a checkpoint: name another folder to write to")
    above = nearest_folder(value)
    if not os.statvfs(above).f_blocks:
        # Where there is no disk, as in /proc, root seems to have a right that does not help: it is tried.
        try:
            os.rmdir(tempfile.mkdtemp(dir=above))
        except OSError as error:
            raise InputError(f"{key}={value} cannot be written: no folder can be made in {above}") from error
    return Path(value)


def refuse_other_run(
    folder: Path,
    recipe: Recipe,
    sections: tuple[str, ...],
    key: str,
    stage: str | None = None,
    *,
    keeps_budget: bool = False,
) -> None:
    """Raise InputError where `folder` holds a run of another recipe: it would be overwritten or mixed.

    Compared are `sections` of the recipe and the seed, but for keys that do not change what is computed; and, where
    `stage`, a section of training, is given, that a checkpoint there is of that stage. Its budget may change where what
    is done, and the learning rate so far, would have been the same; not at all where it `keeps_budget`.
    """
    stored_file = folder / "recipe.yaml"
    if not stored_file.is_file():
        if folder.is_dir() and any(folder.glob("iter_*")):
            raise InputError(f"{key}={folder} holds checkpoints but no recipe.yaml: name another folder")
        if (folder / DESCRIPTION).is_file():
            raise InputError(f"{key}={folder} holds a cache of a teacher's targets: name another folder")
        return
    made_by = read_lineage(folder).get("stage")
    if stage and made_by and made_by != stage:
        raise InputError(f"{key}={folder} holds a checkpoint that `{made_by}` made, not `{stage}`: name another folder")
    stored = read_mapping(stored_file)
    for section in (*sections, "seed", "precision"):
        here: Any = getattr(recipe, section)
        there = stored.get(section, {})
        if dataclasses.is_dataclass(here) and there:
            # A key that an older version did not have was then as it is by default now.
            defaults = dataclasses.asdict(getattr(Recipe(), section))
            there = {**there, **{name: value for name, value in defaults.items() if name not in there}}
        here = dataclasses.asdict(here) if dataclasses.is_dataclass(here) else {"": here}  # type: ignore[arg-type]
        there = there if isinstance(there, dict) else {"": there}
        if section == "model":
            here, there = ({**said, **_meant(said)} for said in (here, there))
        may_change = MAY_CHANGE | BUDGET if section == stage and not keeps_budget else MAY_CHANGE
        for name in filter(here.__contains__, there):
            path, value = f"{section}.{name}".rstrip("."), here[name]
            if path == "distill.teacher" and all(str(each).startswith(PREFIX) for each in (there[name], value)):
                continue  # a cache is known by what it holds, not by where it lies
            if _settled(there[name]) != _settled(value) and (name not in may_change or path == "teacher.checkpoint"):
                may_phase = stage and not keeps_budget and name in SIZES
                hint = f"; to change it on the way, give {stage}.phases" if may_phase else ""
                raise InputError(
                    f"{key}={folder} holds another run: {path} is {there[name]!r} there and {value!r} here; "
                    f"name another folder, or delete that one{hint}"
                )
    if stage is not None and not keeps_budget:
        refuse_other_budget(folder, recipe, stored, stage)


def _meant(model: dict[str, Any]) -> dict[str, Any]:
    """What the keys that a recipe's section `model` leaves out mean, which once stood there as defaults."""
    return {name: value for name, value in LEFT_OUT.items() if model.get(name) is None}


def _settled(value: Any) -> Any:
    """A key's value without what may change at any time: the micro-batch sizes of phases."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return [{name: part for name, part in entry.items() if name not in MAY_CHANGE} for entry in value]
    return value


def refuse_other_budget(folder: Path, recipe: Recipe, stored: dict[str, Any], section: str) -> None:
    """Raise InputError where a run in `folder`, of the recipe `stored`, cannot go on to the budget of `section`."""
    iteration = latest_iteration(folder)
    if iteration is None or section not in stored:
        return
    train: TrainConfig = getattr(recipe, section)
    if all(stored[section].get(name, getattr(train, name)) == value for name, value in _budget(train).items()):
        return
    fields = {name: value for name, value in stored[section].items() if name in BUDGET}
    fields["phases"] = [PhaseConfig(**phase) for phase in fields.get("phases", [])]
    before = dataclasses.replace(train, **fields)
    length = recipe.data.sequence_length
    check_continuation((before, length), (train, length), iteration, section)


def _budget(train: TrainConfig) -> dict[str, Any]:
    return {name: dataclasses.asdict(train)[name] for name in BUDGET}


def describe_trained(
    folder: Path,
    recipe: Recipe,
    architecture: Architecture,
    tokenizer: Tokenizer,
    source: Path | None,
    lineage: dict[str, Any],
    tokens: int,
) -> None:
    """Write what lies beside the weights in `folder`, trained on `tokens` tokens; one rank calls.

    source: the checkpoint that the weights are from, whose companions go along.
    """
    facts = {**lineage, "tokens": tokens, "tokenizer": tokenizer.fingerprint}
    write_description(folder, architecture, lineage=facts, recipe=to_yaml(recipe), save_tokenizer=tokenizer.save)
    if source is not None:
        carry_companions(source, folder)


def asked_shape(recipe: Recipe, student: StudentConfig, teacher: Architecture) -> Architecture:
    """The teacher cut to what `student`, a section, asks for. Raises InputError naming student.<field>."""
    return student_shape(
        teacher,
        {name: getattr(student, name) for name in TARGETS},
        recipe.parallel.tensor,
        recipe.parallel.pipeline,
        ratios=student.ratios,
        layers=student.layers,
        divisible_by=recipe.prune.divisible_by,
    )


def check_model(
    architecture: Architecture, recipe: Recipe, section: str | None = None, *, reads_text: bool = True
) -> None:
    """Raise InputError where the recipe's layout, or its sequence length where text is read, does not suit the model.

    section: that of a training, whose phases may have lengths of their own.
    """
    parallel, lengths = recipe.parallel, {"data.sequence_length": recipe.data.sequence_length}
    check_tensor_parallel(architecture, parallel.tensor)
    split_layers(architecture.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    for number, phase in enumerate(getattr(recipe, section).phases if section else []):
        if phase.sequence_length is not None:
            lengths[f"{section}.phases[{number}].sequence_length"] = phase.sequence_length
    for key, length in lengths.items() if reads_text else ():
        if length > architecture.max_position_embeddings and "long_sequences" not in recipe.allow:
            raise InputError(
                f"{key}={length} is longer than the model's max_position_embeddings="
                f"{architecture.max_position_embeddings}: shorten it, or use a model of longer context "
                "(allow=[long_sequences] goes beyond it)"
            )
        check_sequence(length, parallel, key)


def check_trained_model(architecture: Architecture, recipe: Recipe, section: str) -> None:
    """Raise InputError where layout, lengths or recomputed layers do not suit a model that `section` trains."""
    check_model(architecture, recipe, section)
    check_recompute(getattr(recipe, section), architecture, recipe.parallel, section)


def teacher_layout(recipe: Recipe, teacher: Architecture, world_size: int) -> ParallelConfig:
    """How the teacher lies over the ranks beside the student of `distill`: `teacher.parallel`, else as the student.

    Raises InputError, naming the key, where it cannot lie so.
    """
    own = recipe.teacher.parallel
    if recipe.teacher.precision == "fp8":
        check_fp8(teacher, (own or recipe.parallel).tensor)
    if own is None or own == recipe.parallel:
        check_model(teacher, recipe, "distill")
        return recipe.parallel
    check_teacher_layout(own, recipe.parallel, world_size)
    with of_teacher():
        check_model(teacher, dataclasses.replace(recipe, parallel=own), "distill")
    return own


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a run reads, and when."""

    timetable: Timetable
    read_train: StepReader
    read_valid: dict[str, BatchReader]  # by the source's name, "" for the whole blend; none: no validation
    order: dict[int, str]  # of the samples, by reader.data_order


def read_data(
    recipe: Recipe, tokenizer: Tokenizer, train: TrainConfig, section: str, *, least_samples: int = 0
) -> TrainingData:
    """The timetable of `section`'s budget, a training set of each of its sequence lengths, and what validates.

    A run reads a training set of another sequence length from the sample on that the tokens so far correspond to.
    Validation is always of `data.sequence_length`. Megatron shuffles all passes over a text at once: for the order of
    `least_samples` samples, which may be more than the budget takes. Every rank calls. Raises InputError.
    """
    all_or_none(lambda: check_wandb(recipe.log))
    timetable = plan_timetable(train, recipe.data.sequence_length, section)
    check_train(train, recipe.parallel, data_group().size(), timetable, section)
    check_learning_rate(train, timetable, section)
    samples = {length: max(count, least_samples) for length, count in timetable.samples_needed().items()}
    valid_samples = train.eval_iters * train.global_batch_size
    wanted = [Wanted(count, length, f"{section}.tokens", train.tokens) for length, count in samples.items()]
    if valid_samples:
        key, length = f"{section}.eval_iters", recipe.data.sequence_length
        wanted.append(Wanted(valid_samples, length, key, train.eval_iters, is_validation=True))
    all_or_none(lambda: check_index_size(recipe.data, wanted))
    training, validation = build_training_datasets(recipe.data, tokenizer, wanted, seed=recipe.seed)
    sizes = {"global_batch_size": train.global_batch_size, "micro_batch_size": train.micro_batch_size}
    read_valid = {name: batch_reader(dataset, **sizes) for name, dataset in validation.items()}
    read_train = step_reader(training, num_workers=recipe.data.num_workers)
    return TrainingData(timetable, read_train, read_valid, data_order(training))
