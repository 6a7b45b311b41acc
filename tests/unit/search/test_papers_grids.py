"""The papers' grids from Nemotron-4 15B: which candidates there are at which reading of the budget, as docs/search.md
says. Counted by a formula written out here, not by the table in layout.py."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from minitron_mcore.checkpoint.folder import read_architecture
from minitron_mcore.jobs.search import resolve
from minitron_mcore.recipe import load_recipe, with_keys
from minitron_mcore.runtime.world import World
from minitron_mcore.search.config import BudgetConfig

ROOT = Path(__file__).parents[3]
DOCS = (ROOT / "docs" / "search.md").read_text()
VOCAB, TOLERANCE = 256000, 0.05
Shape = tuple[int, int, float, int]  # layers, hidden, ffn / hidden, heads
# arXiv 2407.14679, section 2.3; facts of the released models.
GRIDS: dict[str, list[Shape]] = {
    "8b": [*itertools.product(range(29, 33), (4096, 4608, 5120, 5632, 6144), (2.5, 3, 3.5, 4), (32, 48))],
    "4b": [*itertools.product(range(29, 33), (2560, 3072, 3584, 4096, 4608), (2.5, 3, 3.5, 4), (24, 32, 48))],
}
CHOSEN: dict[str, Shape] = {"8b": (32, 4096, 4, 48), "4b": (32, 3072, 3, 24)}
TARGET = {"8b": 8_000_000_000, "4b": 4_000_000_000}


def parameters(
    shape: Shape, *, embeddings: int = 2, divisor: int = 1, groups: int | None = 8, head: int | None = 128
) -> float:
    """Without bias; two norms a layer and one at the end, each with weight and bias; embedding and output head."""
    layers, hidden, ratio, heads = shape
    ffn = math.floor(ratio * hidden / divisor + 0.5) * divisor
    dimension, kv = head or hidden / heads, groups or heads
    attention = 2 * hidden * heads * dimension + 2 * hidden * kv * dimension
    return layers * (attention + 2 * hidden * ffn + 4 * hidden) + 2 * hidden + embeddings * VOCAB * hidden


# As docs/search.md orders them: how a shape is counted; the target, where it is not 8B and 4B, is the chosen shape's.
READINGS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({}, True),
    ({"embeddings": 0}, False),
    ({"embeddings": 0}, True),
    ({"embeddings": 1}, False),
    ({"divisor": 512}, False),
    ({"groups": None}, False),
    ({"head": None}, False),
]
ROWS = re.findall(r"^\| (?:non-embedding|total).* \| (\d+) \| (yes|no) \| (\d+) \| (yes|no) \|$", DOCS, re.MULTILINE)


def within(grid: str, counted: dict[str, Any], own: bool) -> list[Shape]:
    target = parameters(CHOSEN[grid], **counted) if own else TARGET[grid]
    return [shape for shape in GRIDS[grid] if abs(parameters(shape, **counted) - target) <= TOLERANCE * target]


@pytest.mark.parametrize(("row", "reading"), [*zip(ROWS, READINGS, strict=True)])
def test_the_table_of_readings(row: tuple[str, ...], reading: tuple[dict[str, Any], bool]) -> None:
    for grid, count, chosen in (("8b", *row[:2]), ("4b", *row[2:])):
        found = within(grid, *reading)
        assert (str(len(found)), "yes" if CHOSEN[grid] in found else "no") == (count, chosen)


@pytest.mark.parametrize("name", ["total_parameters", "non_embedding_parameters"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_recipe_lists_the_candidates_of_a_reading(grid: str, own: bool, name: str) -> None:
    """With the same counts, to the last parameter."""
    counted = {} if name == "total_parameters" else {"embeddings": 0}
    target = int(parameters(CHOSEN[grid], **counted)) if own else TARGET[grid]
    recipe = load_recipe(str(ROOT / f"configs/search-nemotron-{grid}.yaml"), [])
    teacher = str(ROOT / str(recipe.teacher.checkpoint))
    given: dict[str, Any] = {name: target, "tolerance": TOLERANCE}
    budget = BudgetConfig(**given)
    if name == "total_parameters" and not own:
        assert recipe.search.budget == budget
    told = {"teacher.checkpoint": teacher, "search.budget": budget}
    found = resolve(with_keys(recipe, told), World()).candidates
    expected = {
        (L, h, int(ratio * h), heads): (L, h, ratio, heads) for L, h, ratio, heads in within(grid, counted, own)
    }
    assert {(*each.sizes.values(),)[:4] for each in found} == {*expected} and len(found) == len(expected)
    for each in found:
        shape = expected[(*each.sizes.values(),)[:4]]  # type: ignore[index]
        assert each.sizes["num_query_groups"] == 8
        assert each.figures["total_parameters"] == parameters(shape)
        assert each.figures["non_embedding_parameters"] == parameters(shape, embeddings=0)


def test_what_is_said_of_the_differences() -> None:
    first = sorted(abs(parameters(shape) - TARGET["8b"]) / TARGET["8b"] for shape in GRIDS["8b"])
    assert len([far for far in first if far <= 0.038]) == 15 and 0.038 < first[15] < first[17] < 0.0451
    fours = [abs(parameters(shape) - TARGET["4b"]) / TARGET["4b"] for shape in GRIDS["4b"]]
    assert len([far for far in fours if far <= 0.038]) == 14
    assert all(ratio * hidden % 256 == 0 for grid in GRIDS.values() for _, hidden, ratio, _ in grid)
    assert parameters((32, 4096, 4, 32)) == parameters((32, 4096, 3.5, 48)) == 7_734_829_056
    listed = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) \| ([\d.]+)B \| ([\d.]+)B \|$", DOCS, re.MULTILINE)
    rows = [(int(L), int(h), float(ratio), int(heads)) for L, h, ratio, heads, _, _ in listed]
    assert rows == within("8b", {}, False)
    for shape, (*_, total, rest) in zip(rows, listed, strict=True):
        assert (f"{parameters(shape) / 1e9:.3f}", f"{parameters(shape, embeddings=0) / 1e9:.3f}") == (total, rest)


@pytest.mark.parametrize(
    ("name", "total", "non_embedding"),
    [
        ("nemotron-4-15b", 15.63, 12.48),
        ("llama-3.1-8b", 8.03, 6.98),
        ("mistral-nemo-12b", 12.25, 10.91),
    ],
)
def test_the_teachers_without_weights_have_the_papers_sizes(name: str, total: float, non_embedding: float) -> None:
    """To the second digit of a billion, as arXiv 2407.14679 and 2408.11796 give them."""
    shape = read_architecture(ROOT / "configs" / "models" / name)
    assert round(shape.num_parameters / 1e9, 2) == total
    assert round(shape.num_non_embedding_parameters / 1e9, 2) == non_embedding
