"""Candidates of a search: shapes with what they cost, and the files and the table that list them. Pure."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.estimate.config import ServingConfig
from minitron_mcore.estimate.roofline import serving_figures, serving_memory
from minitron_mcore.pruning.targets import TARGETS
from minitron_mcore.runtime.devices import Machine
from minitron_mcore.search.config import BudgetConfig
from minitron_mcore.tables import table as tabulate

# What a budget may be on: everything but the tolerance.
FIGURES = tuple(entry.name for entry in dataclasses.fields(BudgetConfig) if entry.name != "tolerance")  # type: ignore[arg-type]
# Known of every shape, whatever it is served by.
COUNTS = ("total_parameters", "non_embedding_parameters")
# Known only with a machine.
TIMED = FIGURES[FIGURES.index("prefill_latency") :]
_LETTERS = dict(zip(TARGETS, "lhfqg", strict=True))


@dataclass(frozen=True)
class Candidate:
    """A shape that the teacher can be pruned to. figures: what it costs, by names of FIGURES."""

    architecture: Architecture
    figures: dict[str, float]

    @property
    def sizes(self) -> dict[str, int]:
        """What is pruned, by Megatron's names."""
        return {name: getattr(self.architecture, name) for name in TARGETS}

    @property
    def name(self) -> str:
        """Of its folder: layers, hidden, ffn, query heads and KV groups, as l32-h4096-f16384-q48-g8."""
        return "-".join(f"{_LETTERS[name]}{size}" for name, size in self.sizes.items())

    @property
    def row(self) -> dict[str, Any]:
        """What a file says of it."""
        return {"name": self.name, **self.sizes, **self.figures}


def figures_of(
    architecture: Architecture, sequence_length: int, serving: ServingConfig, machine: Machine | None = None
) -> dict[str, float]:
    """What a shape costs: parameters, FLOPs of a token's forward pass in a sequence of `sequence_length`, bytes to
    serve it; where `machine` is given, its latencies and throughputs there (estimate/roofline.py).

    Raises InputError where `machine` lacks a figure that they need.
    """
    figures: dict[str, float] = {
        "total_parameters": architecture.num_parameters,
        "non_embedding_parameters": architecture.num_non_embedding_parameters,
        "memory": serving_memory(architecture, serving),
        "flops_per_token": architecture.forward_flops_per_token(sequence_length),
    }
    return figures | (serving_figures(architecture, serving, machine) if machine else {})


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each of `rows`; the first has every column, which a later one may leave blank."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(candidates: Sequence[Candidate], budgets: Sequence[str] = ()) -> str:
    """A line for each candidate: its sizes, its parameters, and the figure that each of `budgets` is on."""
    columns = [*dict.fromkeys((*COUNTS, *budgets))]
    cells = [[*each.sizes.values(), *(in_words(each.figures[name]) for name in columns)] for each in candidates]
    return tabulate(cells, (*TARGETS, *columns), left=())


def in_words(figure: float) -> str:
    """A count, and any number from 1,000 on, by its digits before the point; another one by four digits."""
    return f"{figure:,.0f}" if isinstance(figure, int) or abs(figure) >= 1000 else f"{figure:.4g}"
