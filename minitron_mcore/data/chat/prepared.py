"""Prepared samples: tokens in a folder, read as memory maps. Pure.

    FOLDER/facts.json           what they were made of and by what settings; counts
          /train, /valid        tokens.npy   int32 [tokens], segment behind segment
                                counted.npy  bool [tokens]: whether a token is learnt
                                starts.npy   int64 [segments + 1]: where each segment begins
                                rewards.npy  float64 [preferences, 2], of chosen and rejected, where there are any

A segment is a chat, or one side of a preference: of preference p, 2p is the chosen and 2p + 1 the rejected one. Token i
of a segment predicts token i + 1, which is counted or not, so a segment of n tokens takes n - 1 positions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy

from minitron_mcore.errors import InputError

FACTS = "facts.json"
TOKENS, COUNTED, STARTS, REWARDS = "tokens.npy", "counted.npy", "starts.npy", "rewards.npy"


@dataclass(frozen=True)
class Part:
    """The samples that train, or those that validate."""

    tokens: numpy.ndarray  # int32 [tokens]
    counted: numpy.ndarray  # bool [tokens]
    starts: numpy.ndarray  # int64 [segments + 1]
    rewards: Optional[numpy.ndarray]  # float64 [preferences, 2]
    sides: int  # segments of a sample: 2 of a preference, 1 of a chat

    @property
    def segments(self) -> int:
        return len(self.starts) - 1

    @property
    def units(self) -> int:
        """Chats or preferences."""
        return self.segments // self.sides

    def positions(self) -> numpy.ndarray:
        """int64 [segments]: how many positions each takes."""
        return numpy.diff(self.starts) - 1

    def learnt(self) -> numpy.ndarray:
        """int64 [segments]: how many labels of each are counted."""
        begins = self.starts[:-1]
        return numpy.add.reduceat(self.counted, begins, dtype=numpy.int64) - self.counted[begins]  # none is empty


@dataclass(frozen=True)
class Prepared:
    """parts: train, and valid where there is one. digest: of all that decided what is written."""

    folder: Path
    facts: dict[str, Any]
    parts: dict[str, Part]

    @property
    def digest(self) -> str:
        return str(self.facts["digest"])

    @property
    def ends_with(self) -> Optional[int]:
        """The mark with which every answer that trains ends; None where they differ, or end with ordinary text."""
        end = self.facts["parts"]["train"].get("ends_with")
        return None if end is None else int(end)

    @property
    def padding(self) -> int:
        """The id that fills rows up, which no loss and no other token sees."""
        return int(self.facts["padding"])


def load_prepared(folder: Path) -> Prepared:
    """Any rank may call. Raises InputError where the folder holds something else, or less."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        sides = 2 if facts["kind"] == "pairs" else 1
        parts = {name: _part(folder / name, sides) for name in facts["parts"]}
        Prepared(folder, facts, parts).padding  # noqa: B018  # that it is there
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError("", folder, f"does not hold prepared chats ({error})", "remove it: it is made anew") from error
    return Prepared(folder, facts, parts)


def _part(folder: Path, sides: int) -> Part:
    arrays: dict[str, Any] = {name: numpy.load(folder / name, mmap_mode="r") for name in (TOKENS, COUNTED)}
    starts = numpy.load(folder / STARTS)
    rewards = numpy.load(folder / REWARDS) if (folder / REWARDS).is_file() else None
    if starts[-1] != len(arrays[TOKENS]) or len(arrays[COUNTED]) != len(arrays[TOKENS]):
        raise ValueError("its files are of different lengths")
    return Part(arrays[TOKENS], arrays[COUNTED], starts, rewards, sides)
