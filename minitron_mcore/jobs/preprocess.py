"""`preprocess`: text and JSON lines to Megatron's .bin/.idx. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minitron_mcore.data.config import PreprocessConfig
from minitron_mcore.data.texts import Texts, prefixes_of, texts_to_encode
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.jobs.inputs import require
from minitron_mcore.jobs.job import NOTHING, TOKENS, Item, Job, Promises
from minitron_mcore.jobs.tokenizers import recipe_tokenizer
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
    given, keys = recipe.preprocess, {}
    for name in ("input", "output_prefix"):
        keys[name] = name if getattr(given, name) is None else f"preprocess.{name}"
    require(
        recipe,
        {
            keys["input"]: "the text to read",
            keys["output_prefix"]: "the path that the files' names begin with",
            "tokenizer.model": "a SentencePiece .model file or a Hugging Face folder",
        },
    )
    prefix = given.output_prefix or recipe.output_prefix
    config = dataclasses.replace(given, input=given.input or recipe.input, output_prefix=prefix)
    texts = texts_to_encode(config, keys["input"])
    train, held_out = prefixes_of(config)
    return PreprocessJob(
        recipe=recipe,
        reads=(Item(keys["input"], str(config.input), f"text, {len(texts.files):,} files"),),
        makes=(
            *(Item("data.train", each, TOKENS) for each in train),
            *(Item("data.valid", each, TOKENS) for each in held_out),
        ),
        notes=texts.notes,
        config=config,
        texts=texts,
        tokenizer=recipe_tokenizer(recipe, promises),
    )
