"""`tokenizer`: a SentencePiece model trained on text files. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minitron_mcore.data.config import TokenizerConfig
from minitron_mcore.data.corpus import Texts, texts_to_train_on
from minitron_mcore.jobs.inputs import require
from minitron_mcore.jobs.job import NOTHING, Item, Job, Promises
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class TokenizerJob(Job):
    """A model trained as `config` says, on `texts`."""

    config: TokenizerConfig
    texts: Texts


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> TokenizerJob:
    """`tokenizer.input`, or the recipe's `input`, -> the new file `tokenizer.model`. Raises InputError."""
    key = "input" if recipe.tokenizer.input is None else "tokenizer.input"
    require(recipe, {key: "the text to train on", "tokenizer.model": "the file to write"})
    config = dataclasses.replace(recipe.tokenizer, input=recipe.tokenizer.input or recipe.input)
    texts = texts_to_train_on(config, key)
    reads = (Item(key, str(config.input), f"text, {len(texts.files):,} files"),)
    pieces = config.vocab_size
    makes = (Item("tokenizer.model", str(config.model), f"SentencePiece model of {pieces:,} pieces", pieces),)
    return TokenizerJob(recipe, reads, makes, texts.notes, config=config, texts=texts)
