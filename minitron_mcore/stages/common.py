"""What several stages do in the same way: claim an output folder, read data, name a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import is_iteration, read_architecture, read_lineage, tokenizer_folder
from minitron_mcore.data.corpus import check_folder
from minitron_mcore.data.dataset import build_datasets
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.files import read_mapping
from minitron_mcore.layout import check_tensor_parallel, split_layers
from minitron_mcore.plan import TARGETS, student_shape
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.parallel import use_layout
from minitron_mcore.runtime.start import Runtime, seed_everything
from minitron_mcore.training.budget import check_train, count_iterations
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.metrics import check_log
from minitron_mcore.training.reader import BatchReader, batch_reader

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
}


def lay_out(recipe: Recipe, runtime: Runtime) -> None:
    """Process groups and seeds of the recipe; every rank calls."""
    use_layout(recipe.parallel, runtime.world_size)
    seed_everything(recipe.seed)


def output_folder(value: str | None, key: str) -> Path:
    if not value:
        raise InputError(f"{key} is not given: name the folder to write to")
    if Path(value).is_file():
        raise InputError(f"{key}={value} is a file: name a folder")
    if is_iteration(Path(value)):
        raise InputError(f"{key}={value} is an iteration of a checkpoint: name another folder to write to")
    check_folder(value, key)
    return Path(value)


def refuse_other_run(
    folder: Path, recipe: Recipe, sections: tuple[str, ...], key: str, stage: str | None = None
) -> None:
    """Raise InputError where `folder` holds a run of another recipe: it would be overwritten or mixed.

    Compared are `sections` of the recipe and the seed, but for keys that do not change what is computed; and, where
    `stage` is given, that a checkpoint there is of that stage.
    """
    stored_file = folder / "recipe.yaml"
    if not stored_file.is_file():
        if folder.is_dir() and any(folder.glob("iter_*")):
            raise InputError(f"{key}={folder} holds checkpoints but no recipe.yaml: name another folder")
        return
    made_by = read_lineage(folder).get("stage")
    if stage and made_by and made_by != stage:
        raise InputError(f"{key}={folder} holds a checkpoint that `{made_by}` made, not `{stage}`: name another folder")
    stored = read_mapping(stored_file)
    for section in (*sections, "seed", "precision"):
        here: Any = getattr(recipe, section)
        here = dataclasses.asdict(here) if dataclasses.is_dataclass(here) else {"": here}  # type: ignore[arg-type]
        there = stored.get(section, {})
        there = there if isinstance(there, dict) else {"": there}
        for name, value in here.items():
            path = f"{section}.{name}".rstrip(".")
            if name in there and there[name] != value and (name not in MAY_CHANGE or path == "teacher.checkpoint"):
                raise InputError(
                    f"{key}={folder} holds another run: {path} is {there[name]!r} there and {value!r} here; "
                    f"name another folder, or delete that one"
                )


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


def check_model(architecture: Architecture, recipe: Recipe) -> None:
    """Raise InputError where the recipe's layout or sequence length does not suit the model."""
    parallel, length = recipe.parallel, recipe.data.sequence_length
    check_tensor_parallel(architecture, parallel.tensor)
    split_layers(architecture.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    if length > architecture.max_position_embeddings:
        raise InputError(
            f"data.sequence_length={length} is longer than the model's max_position_embeddings="
            f"{architecture.max_position_embeddings}: shorten it, or use a model of longer context"
        )
    if parallel.sequence and length % parallel.tensor:
        raise InputError(
            f"data.sequence_length={length} is no multiple of parallel.tensor={parallel.tensor} "
            f"({length} / {parallel.tensor} = {length / parallel.tensor:g}), as parallel.sequence=true needs"
        )


def read_data(
    recipe: Recipe, tokenizer: Tokenizer, train: TrainConfig, section: str
) -> tuple[int, BatchReader, BatchReader | None]:
    """(iterations of the budget, reader of training batches, of validation batches if any). Every rank calls."""
    check_log(recipe.log)
    iterations = count_iterations(train, recipe.data.sequence_length, section)
    check_train(train, recipe.parallel, parallel_state.get_data_parallel_world_size(), iterations, section)
    training, validation, _ = build_datasets(
        recipe.data,
        tokenizer,
        train_samples=iterations * train.global_batch_size,
        valid_samples=train.eval_iters * train.global_batch_size,
        seed=recipe.seed,
    )
    shape: dict[str, Any] = {
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size,
        "num_workers": recipe.data.num_workers,
    }
    read_valid = batch_reader(validation, **{**shape, "num_workers": 0}) if validation is not None else None
    return iterations, batch_reader(training, **shape), read_valid


def checkpoint_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """The tokenizer that lies beside the checkpoint in `folder`, else the recipe's. Any rank calls.

    Raises InputError where there is neither, where the recipe names another one, or where it does not fit the model.
    """
    beside = tokenizer_folder(folder)
    given = load_tokenizer(recipe.tokenizer) if recipe.tokenizer.model or beside is None else None
    tokenizer = load_tokenizer(str(beside)) if beside is not None else given
    assert tokenizer is not None
    if given is not None and given.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"tokenizer.model={recipe.tokenizer.model} is not the tokenizer that {folder} was trained with, which lies "
            f"in {beside}: leave tokenizer.model out"
        )
    check_lineage(tokenizer, folder)
    check_tokenizer(tokenizer, read_architecture(folder))
    return tokenizer


def check_lineage(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise InputError where the lineage of the checkpoint in `folder` names another tokenizer."""
    stated = read_lineage(folder).get("tokenizer")
    if isinstance(stated, str) and not tokenizer.is_named_by(stated):
        raise InputError(
            f"tokenizer.model={tokenizer.path} is not the tokenizer that {folder} was made with: its fingerprint is "
            f"{tokenizer.fingerprint[:12]}, lineage.yaml says {stated[:12]}; give that one"
        )


def check_same_tokenizer(teacher: Tokenizer, student_folder: Path, key: str) -> None:
    """Raise InputError where the checkpoint `key`=`student_folder` has another tokenizer than its teacher."""
    beside = tokenizer_folder(student_folder)
    student = load_tokenizer(str(beside)).fingerprint if beside else read_lineage(student_folder).get("tokenizer")
    if isinstance(student, str) and not teacher.is_named_by(student):
        raise InputError(
            f"{key}={student_folder} has another tokenizer ({student[:12]}) than its teacher ({teacher.path}, "
            f"{teacher.fingerprint[:12]}): a student is distilled from a teacher of the same tokenizer"
        )


def check_tokenizer(tokenizer: Tokenizer, architecture: Architecture) -> None:
    """Raise InputError where the tokenizer has ids the model has no embedding for."""
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"tokenizer.model={tokenizer.path} has {tokenizer.vocab_size} ids and the model vocab_size="
            f"{architecture.vocab_size}: use the tokenizer the model was trained with"
        )
