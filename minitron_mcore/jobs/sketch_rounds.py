"""The rounds of `align` from shapes alone, whether or not their data are there: what `estimate` looks at. Pure."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from minitron_mcore.alignment.config import PREFERENCES, REFERENCED
from minitron_mcore.architecture import Architecture
from minitron_mcore.data.chat.described import find_texts
from minitron_mcore.jobs import inputs
from minitron_mcore.jobs.align import Round, check_round, rounds_of, timetable_of
from minitron_mcore.jobs.chats import about_records, about_units, sides_of
from minitron_mcore.jobs.job import absolute
from minitron_mcore.jobs.run import Road
from minitron_mcore.jobs.shape import shape_at
from minitron_mcore.keys import Sources
from minitron_mcore.recipe import Recipe, with_keys
from minitron_mcore.tables import counted
from minitron_mcore.training.budget import Timetable


@dataclass(frozen=True)
class RoundSketch:
    """A round, and the shape of what it trains.

    timetable: of one iteration where `unknown` says why nobody knows how many there are. referenced: so many sequences
    are read by the reference before training. note: what the numbers rest on.
    """

    this: Round
    model: Architecture
    timetable: Timetable
    referenced: int = 0
    unknown: str = ""
    note: str = ""

    @property
    def title(self) -> str:
        return f"align {self.this.name or self.this.config.method}"

    @property
    def sides(self) -> int:
        """As `Samples.sides`."""
        return sides_of(self.this.config.method in PREFERENCES, self.this.recipe.chat)

    @property
    def reference(self) -> Architecture | None:
        """What stays beside the trained model."""
        is_resident = self.this.config.reference == "resident" and self.this.config.method in REFERENCED
        return self.model if is_resident else None

    @property
    def reads_before(self) -> bool:
        """Whether the reference's log-probabilities are worked out before training."""
        return self.this.config.method in REFERENCED and self.reference is None


def has_rounds(recipe: Recipe) -> bool:
    return bool(recipe.align.stages or recipe.align.tokens or recipe.align.samples or recipe.align.epochs)


def sketch_rounds(recipe: Recipe, made: Mapping[Path, Architecture]) -> list[RoundSketch]:
    """Every round of `align`. made: shapes by the absolute path of what the steps before it make. Raises InputError."""
    inputs.require(recipe, {"align.load": "the folder of the model to align"})
    load = str(recipe.align.load)
    shape = made.get(absolute(load)) or shape_at(load, "align.load", recipe)
    whole = with_keys(recipe, {"align.checkpoint": recipe.align.checkpoint or "aligned"})
    return [sketch_round(this, shape) for this in rounds_of(whole)]


def made_by(recipe: Recipe, road: Road) -> dict[Path, Architecture]:
    """What the steps of `run` make, also by the names that the recipe has for it where they are typed one by one."""
    found = {path: model.architecture for path, model in road.promises.models.items()}
    own = road.folder / "students" / "student"
    names = {
        "train.checkpoint": road.folder / "teacher",
        "correct.checkpoint": road.folder / "corrected",
        "student.checkpoint": own / "pruned",
        "distill.checkpoint": own / "distilled",
    }
    for key, folder in names.items():
        if (named := inputs.value_at(recipe, key)) and (shape := found.get(absolute(folder))):
            found.setdefault(absolute(named), shape)
    return found


def sketch_round(this: Round, model: Architecture) -> RoundSketch:
    """How long it takes, and how much its reference reads, as far as that can be known. Raises InputError."""
    check_round(this)
    config, chat = this.config, this.recipe.chat
    sides = sides_of(config.method in PREFERENCES, chat)
    row_length = this.recipe.data.sequence_length * (sides or 1)
    texts = find_texts(chat.train, "chat.train", chat) if is_there(chat.train) else None
    units = about_units(texts, chat) if texts else 0
    unknown = missing(this) if config.epochs and not units else ""
    one = with_keys(config, {"tokens": 1, "epochs": 0.0}) if unknown else config
    # A row for each sample, however many of them a pass has: the most where rows are packed.
    timetable = timetable_of(one, row_length, units or 1, units or 1)
    notes = [f"about {counted(units, 'sample')}, as the first records of each file say"] if units else []
    if chat.packing and not config.tokens and not unknown:
        notes.append("packed, it takes at most a row for each sample, and fewer the shorter they are")
    pairs = 0
    if config.method in REFERENCED and config.reference == "precomputed" and not unknown:
        if texts:
            valid = find_texts(chat.valid, "chat.valid", chat) if is_there(chat.valid) else None
            pairs = about_records(texts) + (about_records(valid) if valid else 0)
        else:
            trained = config.samples or ceil(config.tokens / row_length)
            pairs = ceil(trained / (1 - chat.valid_fraction))
            notes.append("its reference reads as many pairs as are trained on, and fewer where these come again")
    return RoundSketch(this, model, timetable, pairs * (sides or 1), unknown, "; ".join(notes))


def is_there(sources: Sources) -> bool:
    """Whether every file, folder or glob is on this machine."""
    paths = [sources] if isinstance(sources, str) else list(sources or ())
    return bool(paths) and all(os.path.exists(path) or glob.glob(path, recursive=True) for path in paths)


def missing(this: Round) -> str:
    """Why a budget in epochs says nothing yet."""
    train = this.recipe.chat.train
    named = f"chat.train={train}" if isinstance(train, str) else "chat.train"
    why = "is not given" if train is None else "is not on this machine"
    return f"{this.key}.epochs counts passes over {named}, which {why}; give {this.key}.samples in its place"
