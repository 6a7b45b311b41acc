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
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.data.tokenizer import Tokenizer
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
    """Something else that a job reads or makes. `what`: TOKENS, SCORES, PLAN, or other words."""

    key: str
    path: str
    what: str


@dataclass(frozen=True)
class Promises:
    """What earlier jobs of the same run will have made. Paths are absolute."""

    models: dict[Path, Model] = field(default_factory=dict)
    items: dict[Path, Item] = field(default_factory=dict)  # files and token prefixes
    tokenizers: dict[Path, int] = field(default_factory=dict)  # a tokenizer's file -> its vocabulary's size

    @property
    def prefixes(self) -> frozenset[str]:
        """Token files, as the recipe names them."""
        return frozenset(item.path for item in self.items.values() if item.what == TOKENS)

    def after(self, job: Job) -> Promises:
        """These, and what `job` makes."""
        models = {absolute(made.folder): replace(made, iteration=None) for made in job.makes if isinstance(made, Model)}
        items = {absolute(made.path): made for made in job.makes if isinstance(made, Item)}
        return Promises(self.models | models, self.items | items, self.tokenizers | job.makes_tokenizers)


NOTHING = Promises()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every verb's job has; each verb adds what its stage needs.

    notes: warnings that are known beforehand, printed before the job acts and by --dry-run.
    """

    recipe: Recipe
    reads: tuple[Model | Item, ...] = ()
    makes: tuple[Model | Item, ...] = ()
    notes: tuple[str, ...] = ()
    makes_tokenizers: dict[Path, int] = field(default_factory=dict)


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
