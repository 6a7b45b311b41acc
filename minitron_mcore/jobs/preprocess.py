"""`preprocess`: text and JSON lines to Megatron's .bin/.idx. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minitron_mcore.data.config import PreprocessConfig
from minitron_mcore.data.corpus import Texts, prefixes_of, texts_to_encode
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.jobs.inputs import A_TOKENIZER, recipe_tokenizer, require, value_at
from minitron_mcore.jobs.job import NOTHING, TOKENS, Item, Job, Promises
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class PreprocessJob(Job):
    """`texts` as token files, as `config` says. tokenizer: None: promised."""

    config: PreprocessConfig
    texts: Texts
    tokenizer: Tokenizer | None


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> PreprocessJob:
    """`preprocess.input` -> token files under `preprocess.output_prefix`; the recipe's `input` and `output_prefix`
    stand in for keys that are not given. Raises InputError."""
    given = recipe.preprocess
    source, prefix = (
        name if getattr(given, name) is None else f"preprocess.{name}" for name in ("input", "output_prefix")
    )
    needed = {source: "the text to read", prefix: "the path that the files' names begin with"}
    require(recipe, {**needed, "tokenizer.model": A_TOKENIZER})
    config = dataclasses.replace(given, input=value_at(recipe, source), output_prefix=value_at(recipe, prefix))
    texts = texts_to_encode(config, source)
    train, held_out = prefixes_of(config)
    reads = (Item(source, str(config.input), f"text, {len(texts.files):,} files"),)
    made = {"data.train": train, "data.valid": held_out}
    makes = tuple(Item(key, each, TOKENS) for key, prefixes in made.items() for each in prefixes)
    tokenizer = recipe_tokenizer(recipe, promises)
    return PreprocessJob(recipe, reads, makes, texts.notes, config=config, texts=texts, tokenizer=tokenizer)
