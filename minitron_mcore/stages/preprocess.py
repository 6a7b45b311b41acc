"""Verb `preprocess`: text and JSON lines to Megatron's .bin/.idx."""

from __future__ import annotations

import dataclasses

from minitron_mcore.data.preprocess import preprocess
from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime


def run(recipe: Recipe, runtime: Runtime) -> list[str]:
    """Writes the token files and returns their prefixes, held-out ones last, on every rank.

    The recipe's `input` and `output_prefix` fill in for `preprocess.input` and `preprocess.output_prefix`. The first
    rank and its worker processes work; the other ranks wait.
    """
    config = recipe.preprocess
    if config.input is None:
        config = dataclasses.replace(config, input=recipe.input)
    if config.output_prefix is None:
        config = dataclasses.replace(config, output_prefix=recipe.output_prefix)
    return runtime.on_main(
        lambda: preprocess(config, load_tokenizer(recipe.tokenizer), seed=recipe.seed, report=runtime.print)
    )
