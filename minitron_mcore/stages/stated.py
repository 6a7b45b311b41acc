"""What a recipe says of a checkpoint that another project wrote, for its description to be completed with."""

from __future__ import annotations

from functools import cache

from minitron_mcore.checkpoint.stated import ASKED, Stated
from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe


def stated_by(recipe: Recipe) -> Stated:
    """The keys `model.*` that may be asked for, and the tokenizers that are found: the recipe's, or one at a path."""
    fields = {name: getattr(recipe.model, name) for name in ASKED}

    @cache
    def count_ids(path: str | None) -> tuple[str, int] | None:
        if path is None:
            if not recipe.tokenizer.model:
                return None
            tokenizer = load_tokenizer(recipe.tokenizer)
        else:
            try:
                tokenizer = load_tokenizer(path)
            except (InputError, OSError):
                return None
        return tokenizer.path, tokenizer.vocab_size

    return Stated({name: value for name, value in fields.items() if value is not None}, count_ids)
