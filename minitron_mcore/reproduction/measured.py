"""What one model loses on each held-out document, in a file. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from minitron_mcore.errors import InputError
from minitron_mcore.files import first_line, write_whole


@dataclass(frozen=True)
class Measured:
    """made_with: what the documents were drawn by. tokens, nats: scored tokens of each document, and their summed loss;
    of equal lengths."""

    made_with: dict[str, int]
    tokens: Sequence[int]
    nats: Sequence[float]

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(numpy.sum(self.nats) / numpy.sum(self.tokens))


def write_measured(path: Path, found: Measured) -> None:
    write_whole(
        path, json.dumps({"made_with": found.made_with, "tokens": [*found.tokens], "nats": [*found.nats]}) + "\n"
    )


def read_measured(path: Path, made_with: dict[str, int]) -> Measured | None:
    """None where there is none, or one of other documents. Raises InputError where the file is damaged."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = Measured(stored["made_with"], [*map(int, stored["tokens"])], [*map(float, stored["nats"])])
        if len(found.tokens) != len(found.nats) or not found.tokens:
            raise ValueError("its documents are not as many as their losses")
    except (ValueError, TypeError, KeyError) as error:
        rule = f"does not say what each document loses ({first_line(error)})"
        raise InputError("output", path, rule, "delete it: the model is measured again") from error
    return found if found.made_with == made_with else None
