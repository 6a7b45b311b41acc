"""How checkpoints of other projects are read for a recipe: what it says of them, and whether they are trusted. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

from minitron_mcore.checkpoint.stated import ASKED, Stated, stating
from minitron_mcore.data.tokenizer import load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe


@contextmanager
def reading_for(recipe: Recipe) -> Iterator[None]:
    """While it lasts, checkpoints are described with `model.*` and the tokenizer, and read as `trust` says."""
    with ExitStack() as stack:
        if recipe.trust:  # imports torch
            from minitron_mcore.checkpoint.unpickle import trusting

            stack.enter_context(trusting(True))
        stack.enter_context(stating(stated_by(recipe)))
        yield


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
