"""Verb `tokenizer`: train a SentencePiece model on text files."""

from __future__ import annotations

import dataclasses

from minitron_mcore.data.tokenizer import train_tokenizer
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime


def run(recipe: Recipe, runtime: Runtime) -> str:
    """Writes `tokenizer.model` and returns its path, on every rank. The first rank works; the others wait."""
    config = recipe.tokenizer
    if config.input is None:
        config = dataclasses.replace(config, input=recipe.input)
    runtime.on_main(lambda: train_tokenizer(config, seed=recipe.seed, report=runtime.print) and None)
    assert config.model, "train_tokenizer refuses a recipe without tokenizer.model"
    return config.model
