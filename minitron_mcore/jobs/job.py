"""A job: what one verb will do, resolved from descriptions before anything is done. Pure.

`jobs/VERB.py: resolve(recipe, world, promises) -> Job` reads descriptions (the recipe, architecture.yaml, plans,
tokenizers, index headers) and raises InputError for all that is wrong with them. `stages/VERB.py: run(job, runtime)`
does the work. A job's inputs are found in folders or promised by an earlier job of the same run; before a job acts it
is resolved once more, so that a stage only ever sees inputs that are there.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.stated import ASKED, Stated
from minitron_mcore.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


@dataclass(frozen=True)
class Model:
    """A checkpoint that a job reads or makes.

    key: where the recipe names it.
    iteration: which is read; None: an earlier job will have made it.
    tokenizer: the one it goes with; None: it has none, or it is promised too.
    """

    key: str
    folder: Path
    architecture: Architecture
    iteration: int | None = None
    lineage: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None

    @property
    def place(self) -> tuple[Path, int]:
        """(folder, iteration), to read the weights from."""
        assert self.iteration is not None, f"{self.folder} is promised: resolve the job again before it acts"
        return self.folder, self.iteration

    def __str__(self) -> str:
        state = "made by an earlier step" if self.iteration is None else f"iteration {self.iteration}"
        return f"checkpoint, {state}, {self.architecture.num_parameters:,} parameters"


TOKENS, SCORES, PLAN = "tokens", "scores", "plan"


@dataclass(frozen=True)
class Item:
    """Something else that a job reads or makes. `what`: TOKENS, SCORES, PLAN, or other words. vocab_size: of a
    tokenizer."""

    key: str
    path: str
    what: str
    vocab_size: int | None = None


@dataclass(frozen=True)
class Promises:
    """What earlier jobs of the same run will have made. Paths are absolute."""

    models: dict[Path, Model] = field(default_factory=dict)
    items: dict[Path, Item] = field(default_factory=dict)  # files and token prefixes

    @property
    def prefixes(self) -> frozenset[str]:
        """Token files, as the recipe names them."""
        return frozenset(item.path for item in self.items.values() if item.what == TOKENS)

    def after(self, job: Job) -> Promises:
        """These, and what `job` makes."""
        models = {absolute(made.folder): replace(made, iteration=None) for made in job.makes if isinstance(made, Model)}
        items = {absolute(made.path): made for made in job.makes if isinstance(made, Item)}
        return Promises(self.models | models, self.items | items)

    def vocab_size(self, tokenizer: str | None) -> int | None:
        """That of a tokenizer that an earlier job will make; None where none will."""
        item = self.items.get(absolute(tokenizer)) if tokenizer else None
        return item.vocab_size if item else None


NOTHING = Promises()


@dataclass(frozen=True)
class Job:
    """What every verb's job has; each verb adds what its stage needs.

    notes: warnings that are known beforehand, printed before the job acts and by --dry-run.
    """

    recipe: Recipe
    reads: tuple[Model | Item, ...] = ()
    makes: tuple[Model | Item, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def needs_ranks(self) -> bool:
        """Whether it is done by ranks in a process group; if not, by the first process alone, without torch."""
        return True


@dataclass(frozen=True, kw_only=True)
class ModelJob(Job):
    """A job on the checkpoint `model`, which writes `target`."""

    model: Model
    target: Path


def absolute(path: str | Path) -> Path:
    """One name for a path, whether or not it is there."""
    return Path(path).expanduser().resolve()


def resolve(verb: str, recipe: Recipe, world: World, promises: Promises = NOTHING, **options: Any) -> Job:
    """The job of `verb`, with the options that its `resolve` takes besides. Any rank calls, before any process group.
    Raises InputError."""
    return importlib.import_module(f"minitron_mcore.jobs.{module_of(verb)}").resolve(recipe, world, promises, **options)


def module_of(verb: str) -> str:
    """`import` is a word of Python."""
    return "import_" if verb == "import" else verb


def stated_by(recipe: Recipe) -> Stated:
    """Which keys `model.*` are given, what the tokenizers found (the recipe's, or one at a path) count, and trust."""

    @cache
    def count_ids(path: str | None) -> tuple[str, int] | None:
        if path is None and not recipe.tokenizer.model:
            return None
        try:
            tokenizer = load_tokenizer(path or recipe.tokenizer)
        except (InputError, OSError):
            if path is None:
                raise
            return None
        return tokenizer.path, tokenizer.vocab_size

    given = {name: value for name in ASKED if (value := getattr(recipe.model, name)) is not None}
    return Stated(given, count_ids, recipe.trust)
