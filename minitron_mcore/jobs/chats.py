"""Chats and preferences that a training reads in place of text: of what, in which rows, for how long. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from minitron_mcore.alignment.config import BUDGETS, AlignConfig, in_tokens
from minitron_mcore.data.chat.config import ChatConfig
from minitron_mcore.data.chat.described import Preparation, describe_chats
from minitron_mcore.data.chat.prepared import Prepared
from minitron_mcore.data.corpus import Texts, check_folder
from minitron_mcore.data.records import read_objects
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.jobs.job import Item
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import ParallelConfig, check_packing
from minitron_mcore.training.budget import Timetable, plan_timetable
from minitron_mcore.training.config import TrainConfig

if TYPE_CHECKING:
    from minitron_mcore.data.chat.dataset import ChatDataset

FIRST = 1000  # records that are looked at to say about how many there are


@dataclass(frozen=True)
class Samples:
    """What `preparation` makes, in a folder within `folder`.

    per_sample: every answer weighs the same, not every token. prepared: None: they are still to be made.
    """

    preparation: Preparation
    folder: Path
    per_sample: bool = False
    prepared: Optional[Prepared] = None

    @property
    def items(self) -> tuple[Item, ...]:
        """The files that are read."""
        parts = filter(None, (self.preparation.train, self.preparation.valid))
        return tuple(Item(part.key, file.path, f"{file.size:,} bytes") for part in parts for file in part.files)

    @property
    def sides(self) -> int:
        """Sequences that a row of pairs is; 0: a row of chats."""
        return sides_of(self.preparation.pairs, self.preparation.config)

    @property
    def row_length(self) -> int:
        """Positions of a row."""
        return self.preparation.sequence_length * (self.sides or 1)

    @property
    def ends_with(self) -> Optional[int]:
        """The mark at which the model's answers will end, where that is known."""
        return self.prepared.ends_with if self.prepared else None

    def dataset(self, part: str, size: Optional[int] = None) -> ChatDataset:
        """The rows of `train` or `valid`; `size`: of training, how many, in a random order."""
        from minitron_mcore.data.chat.dataset import ChatDataset  # torch, which `estimate` does without

        what, prepared = self.preparation, self.prepared
        assert prepared is not None, "the samples are not prepared"
        return ChatDataset(
            prepared.parts[part],
            what.sequence_length,
            padding=prepared.padding,
            seed=what.seed,
            size=size,
            packing=what.config.packing,
            per_sample=self.per_sample,
        )

    def counts(self) -> tuple[int, int]:
        """(rows of one pass, chats or preferences) that train; before they are prepared about: the first records of
        each file stand for the rest."""
        if self.prepared is not None:
            return self.dataset("train").rows, self.prepared.parts["train"].units
        return (about_units(self.preparation.train, self.preparation.config),) * 2


@dataclass(frozen=True)
class Chats:
    """`samples`, for the `timetable`."""

    samples: Samples
    timetable: Timetable

    @classmethod
    def of(cls, samples: Samples, train: TrainConfig, section: str) -> Chats:
        """For the budget of `section`, as whole global batches of rows: of as many iterations as the prepared samples
        say, or about so many. Raises InputError."""
        return cls(samples, plan_timetable(budget_in_tokens(train, samples), samples.row_length, section))


def budget_in_tokens(train: TrainConfig, samples: Samples) -> TrainConfig:
    """With the budget in tokens, whichever way it is given; about, before the samples are prepared."""
    if train.tokens or not isinstance(train, AlignConfig):
        return train
    return in_tokens(train, *samples.counts(), samples.row_length)


def budget_of(train: TrainConfig) -> tuple[str, int | float]:
    """The key by which the budget is given, and its value."""
    given = [(name, value) for name in BUDGETS if (value := getattr(train, name, 0))]
    return given[0] if given else ("tokens", train.tokens)


def samples_of(
    recipe: Recipe,
    tokenizer: Tokenizer,
    folder: Path,
    layouts: dict[str, ParallelConfig],
    *,
    pairs: bool = False,
    needs_rewards: bool = False,
    per_sample: bool = False,
) -> Samples:
    """What the recipe's `chat` section names, for a training into `folder`; `layouts`: by their names the sections that
    lay the models over the ranks. Raises InputError."""
    if recipe.chat.packing:
        check_packing(layouts)
    if recipe.chat.cache_path:
        check_folder(recipe.chat.cache_path, "chat.cache_path")
    what = describe_chats(
        recipe.chat,
        tokenizer,
        sequence_length=recipe.data.sequence_length,
        pairs=pairs,
        needs_rewards=needs_rewards,
        seed=recipe.seed,
    )
    return Samples(what, Path(recipe.chat.cache_path or folder / "chats"), per_sample)


def sides_of(pairs: bool, config: ChatConfig) -> int:
    """Sequences that a row of pairs is: one for each side, unless they are packed; 0: of no pairs."""
    return pairs * (1 if config.packing else 2)


def about_units(texts: Texts, config: ChatConfig) -> int:
    """About how many chats or preferences of `texts` train; a row for each is the most that packed ones take."""
    return max(1, round(about_records(texts) * (1 - config.valid_fraction)))


def about_records(texts: Texts) -> int:
    """How many records there are, from the first of each file."""
    found = 0.0
    for file in texts.files:
        read = [read for _, _, read in islice(read_objects(file), FIRST)]
        found += len(read) if len(read) < FIRST else len(read) * file.size / max(read[-1], 1)
    return round(found)
