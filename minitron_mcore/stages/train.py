"""`train`: next-token training, from random weights (`model.*`) or onward from a checkpoint (`train.load`)."""

from __future__ import annotations

import dataclasses

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, latest_iteration, read_architecture, read_lineage
from minitron_mcore.checkpoint.store import as_chunks, check_architecture, load_weights
from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.exhausted import explaining_memory
from minitron_mcore.jobs.tokenizers import checkpoint_tokenizer, fit_tokenizer
from minitron_mcore.model.gpt import build_model
from minitron_mcore.model.initialize import initialize
from minitron_mcore.model.recompute import recompute_of
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import check_trained_model, lay_out, output_folder, read_data, refuse_other_run
from minitron_mcore.stages.fitting import fit_model, forecast_here
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.job import Progress


def run(recipe: Recipe, runtime: Runtime) -> Progress:
    """Train to the token budget `train.tokens`; the same command goes on where it was cut off."""
    sections = ("model", "data", "train")
    return train_section(recipe, runtime, "train", (recipe.train.load, "train.load"), sections)


def train_section(
    recipe: Recipe, runtime: Runtime, section: str, load: tuple[str | None, str], compared: tuple[str, ...]
) -> Progress:
    """Next-token training by the recipe's `section`; every rank calls.

    load: (folder the weights come from, its key); None: the model that the recipe describes, from random weights.
    compared: the sections in which a run that is resumed must agree.
    """
    lay_out(recipe, runtime)
    train: TrainConfig = getattr(recipe, section)
    folder = output_folder(train.checkpoint, f"{section}.checkpoint")

    # The model and its tokenizer: as they were stored, or as the recipe describes them.
    source = find_checkpoint(*load) if load[0] else None
    tokenizer = checkpoint_tokenizer(recipe, source[0]) if source else load_tokenizer(recipe.tokenizer)
    if source and folder.resolve() == source[0].resolve():
        raise InputError(f"{section}.checkpoint={folder} is {load[1]}'s own folder: name another")
    architecture = read_architecture(source[0]) if source else new_architecture(recipe, tokenizer.vocab_size)
    tokenizer = fit_tokenizer(tokenizer, architecture, recipe)
    check_trained_model(architecture, recipe, section)
    refuse_other_run(folder, recipe, compared, f"{section}.checkpoint", section)
    resuming = latest_iteration(folder) is not None
    if resuming:
        check_architecture(folder, architecture)
    data = read_data(recipe, tokenizer, train, section)
    memory = forecast_here(recipe, runtime, section, architecture, data.timetable)

    with explaining_memory(memory, "while loading"):
        chunks = build_model(architecture, recipe.parallel, recipe.precision, recompute=recompute_of(train))
        if not resuming and source:
            load_weights(*source, as_chunks(chunks), architecture)
        elif not resuming:
            initialize(chunks, architecture, recipe.seed)
    runtime.print(f"{section}: {architecture.num_parameters:,} parameters, {data.timetable} -> {folder}")
    return fit_model(
        recipe,
        runtime,
        section=section,
        folder=folder,
        chunks=chunks,
        architecture=architecture,
        objective=Objective(LossSettings(architecture.vocab_size, chunk_tokens=train.loss_chunk_tokens)),
        tokenizer=tokenizer,
        data=data,
        source=source[0] if source else None,
        memory=memory,
        lineage=lambda: {
            "stage": section,
            "load": load[0],
            **({"lineage": read_lineage(source[0])} if source else {}),
        },
    )


def new_architecture(recipe: Recipe, vocab_size: int) -> Architecture:
    """The recipe's `model` section; its vocabulary is `vocab_size`, the tokenizer's, unless given."""
    fields = dataclasses.asdict(recipe.model)
    if fields["vocab_size"] is None:
        fields["vocab_size"] = vocab_size
    try:
        return build_architecture(fields)
    except InputError as error:
        raise InputError(f"model: {error}") from error
