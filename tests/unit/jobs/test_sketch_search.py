"""What `estimate` takes a search for: its trials as one distillation, and the largest candidate as the winner."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_mcore.checkpoint.folder import read_architecture
from minitron_mcore.jobs.sketch import sketch_road
from minitron_mcore.recipe import load_recipe
from minitron_mcore.search.config import HalvingConfig, SearchConfig
from minitron_mcore.search.halving import trial_tokens

ROOT = Path(__file__).parents[3]
STEPS = 1_887_436_800  # 400 steps of 1152 x 4096 tokens


@pytest.mark.parametrize(
    ("overrides", "trials"),
    [
        # The winner's own trial begins its distillation, so it is one of 18 that is not counted twice.
        ([], 17 * STEPS),
        (["search.schedule=search"], 18 * STEPS),
        (["search.most=5"], 4 * STEPS),
        # 18 to the rung, then 9.
        (["search.halving.rungs=[1B]"], 17 * ((18 * 10**9 + 9 * (STEPS - 10**9)) // 18)),
    ],
)
def test_trials_are_one_distillation_of_the_largest(overrides: list[str], trials: int) -> None:
    recipe = load_recipe(str(ROOT / "configs" / "search-nemotron-8b.yaml"), overrides)
    teacher = read_architecture(ROOT / "configs" / "models" / "nemotron-4-15b")
    works = sketch_road(recipe, teacher).works
    tried, winner = (work for work in works if work.verb == "distill")
    assert tried.recipe.distill.tokens == trials and tried.teacher == winner.teacher == teacher
    assert winner.recipe.distill.tokens == 94_000_000_000 and tried.model == winner.model
    # docs/search.md: the largest of the 18; of the five nearest to 8B one of 8.079B.
    assert round(tried.model.num_parameters / 1e9, 3) == (8.079 if "search.most=5" in overrides else 8.357)
    # What is tried, and why one is not counted.
    count = 5 if "search.most=5" in overrides else 18
    goes_on = "search.schedule=search" not in overrides
    assert tried.step.title == f"try {f'{count - 1} of {count}' if goes_on else count} candidates as large"
    assert ("the winner's trial counts as the first part of its distillation" in tried.note) == goes_on
    assert [work.verb for work in works if work.model != teacher] == [
        "distill",
        "evaluate",
        "distill",
        "evaluate",
        "export",
    ]


def test_tokens_of_halving_are_counted_candidate_by_candidate() -> None:
    """10, then the better 5, then 3: a candidate at a time."""
    search = SearchConfig(tokens=100, halving=HalvingConfig(rungs=[20, 50], keep=0.5))
    spent = [20] * 5 + [50] * 2 + [100] * 3
    assert trial_tokens(search, 10) == sum(spent) // 10
    assert trial_tokens(SearchConfig(tokens=100), 7) == 100
