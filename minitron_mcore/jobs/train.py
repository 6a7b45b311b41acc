"""`train`: next-token training, from random weights (`model.*`) or onward from a checkpoint (`train.load`). Pure."""

from __future__ import annotations

import dataclasses
from typing import Any

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import budget_and_text, find_model, require
from minitron_mcore.jobs.job import NOTHING, Promises, absolute
from minitron_mcore.jobs.tokenizers import fit_tokenizer, model_tokenizer, recipe_tokenizer
from minitron_mcore.jobs.training import TrainingJob, resolve_training
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World

# What random weights need besides.
NEW_MODEL = {
    "tokenizer.model": "a SentencePiece .model file or a Hugging Face folder",
    "model.num_layers": "the number of layers",
    "model.hidden_size": "the width of the residual stream",
    "model.ffn_hidden_size": "the number of neurons of an MLP",
    "model.num_attention_heads": "the number of query heads",
}


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
    own: str = getattr(recipe, section).checkpoint
    given = recipe.train.load if load == "train.load" else recipe.teacher.checkpoint
    later = budget_and_text(section) | ({} if given else NEW_MODEL)
    require(recipe, {f"{section}.checkpoint": "the folder to write to"}, later)
    source = find_model(given, load, promises) if given else None
    lineage: dict[str, Any] = {"stage": section, "load": given}
    if source is not None:
        tokenizer, architecture = model_tokenizer(recipe, source, promises), source.architecture
        lineage["lineage"] = dict(source.lineage)
        if absolute(own) == absolute(source.folder):
            raise InputError(f"{section}.checkpoint", own, f"is {load}'s own folder", "name another")
    else:
        tokenizer = recipe_tokenizer(recipe, promises)
        architecture = new_architecture(recipe, tokenizer, promises)
        tokenizer = tokenizer and fit_tokenizer(tokenizer, architecture, recipe)
    return resolve_training(
        TrainingJob,
        recipe,
        world,
        promises,
        section=section,
        source=source,
        architecture=architecture,
        tokenizer=tokenizer,
        compared=compared,
        lineage=lineage,
    )


def new_architecture(recipe: Recipe, tokenizer: Tokenizer | None, promises: Promises) -> Architecture:
    """The recipe's `model` section; its vocabulary is the tokenizer's, unless given. Raises InputError.

    tokenizer: None: promised.
    """
    fields = dataclasses.asdict(recipe.model)
    if fields["vocab_size"] is None:
        promised = tokenizer or promises.tokenizers[absolute(str(recipe.tokenizer.model))]
        fields["vocab_size"] = promised if isinstance(promised, int) else promised.vocab_size
    try:
        return build_architecture(fields)
    except InputError as error:
        raise error.under("model") from error
