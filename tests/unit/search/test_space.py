"""The space of a search: which shapes of a grid there are, which of them are within a budget, and what is refused.

Counts are checked against a formula written out here, not against the table in layout.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.estimate.config import ServingConfig
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.targets import student_shape
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.search.candidates import Candidate, figures_of, table, to_csv
from minitron_mcore.search.config import BudgetConfig, SearchConfig
from minitron_mcore.search.space import Space, exceeded, find_space, nearest_to_middle
from tests.refusals import refuses

TEACHER = build_architecture(
    {
        "family": "llama",
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 16,
        "vocab_size": 1003,
    }
)


def space(
    parallel: dict[str, Any] | None = None, divisible_by: int = 1, budget: dict[str, Any] | None = None, **keys: Any
) -> Space:
    layout = ParallelConfig(**(parallel or {}))
    return find_space(
        SearchConfig(**keys, budget=BudgetConfig(**(budget or {}))),
        TEACHER,
        divisible_by,
        layout,
        lambda shape: figures_of(shape, 16, ServingConfig()),
    )


def plain_count(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> int:
    """Of a Llama with untied embeddings: what a layer holds, written out."""
    attention = hidden * heads * 16 + 2 * hidden * groups * 16 + heads * 16 * hidden
    return 2 * 1003 * hidden + hidden + layers * (attention + 3 * hidden * ffn + 2 * hidden)


def test_every_combination_within_the_budget_is_a_candidate() -> None:
    layers, hidden, ffn, heads = (2, 3, 4), (32, 40, 48), (64, 80, 96), (2, 4, 6)
    every = {sizes: plain_count(*sizes, 2) for sizes in itertools.product(layers, hidden, ffn, heads)}
    target = every[3, 40, 80, 4]
    within = [sizes for sizes, count in every.items() if abs(count - target) <= 0.1 * target]
    found = space(
        num_layers=["2-4"],
        hidden_size=["32-48:8"],
        ffn_hidden_size=[64, 80, 96],
        num_attention_heads=["2-6:2"],
        budget={"total_parameters": target, "tolerance": 0.1},
    )
    assert 1 < len(within) < len(every)
    assert [(*each.sizes.values(),) for each in found.candidates] == [(*sizes, 2) for sizes in within]
    assert [each.figures["total_parameters"] for each in found.candidates] == [every[sizes] for sizes in within]
    assert (found.combinations, found.shapes, found.dropped) == (81, 80, {"it is the teacher": 1})
    assert len({each.name for each in found.candidates}) == len(within)


def test_what_is_left_out_follows_the_rules_of_prune() -> None:
    """Each candidate is what `prune` makes of the same sizes."""
    found = space(num_query_groups=[1, 2], num_layers=[3])
    assert [each.name for each in found.candidates] == ["l3-h48-f96-q3-g1", "l3-h48-f96-q6-g2"]
    for each, groups in zip(found.candidates, (1, 2), strict=True):
        student = StudentConfig(num_layers=3, num_query_groups=groups)
        assert each.architecture == student_shape(TEACHER, student, 1, ParallelConfig())


def test_a_ratio_goes_to_the_nearest_size_that_its_divisors_allow() -> None:
    """1.3 x 40 = 52: with divisors 8 and 2, 56 (a tie goes up); 2.0 x 48 is the teacher's own 96, which 64 does not
    divide and need not."""
    assert [each.sizes["ffn_hidden_size"] for each in space(hidden_size=[40], ffn_ratio=[1.3]).candidates] == [52]
    cut = space({"tensor": 2}, 8, hidden_size=[40], ffn_ratio=[1.3])
    assert [each.sizes["ffn_hidden_size"] for each in cut.candidates] == [56]
    alone = space(divisible_by=64, num_layers=[2], ffn_ratio=[1.0, 2.0])
    assert [each.sizes["ffn_hidden_size"] for each in alone.candidates] == [64, 96]
    rounded = space(divisible_by=16, hidden_size=[48], ffn_ratio=[1.3, 1.4])
    assert (len(rounded.candidates), rounded.dropped) == (1, {"it is the shape of another": 1})


def test_what_cannot_be_is_counted_by_its_reason() -> None:
    found = space({"tensor": 2, "pipeline": 3}, hidden_size=[40, 56], num_layers=[2, 3], num_query_groups=[1, 2])
    assert [each.name for each in found.candidates] == ["l3-h40-f96-q6-g2"]
    assert found.combinations == 8 and found.shapes == 1
    assert sorted(found.dropped.values()) == [1, 2, 4] and sum(found.dropped.values()) == 7
    assert "search.hidden_size=56 is larger than the teacher's 48" in " ".join(found.dropped)


def test_a_space_that_holds_nothing_is_refused() -> None:
    with refuses("search", None, "is an empty grid, which names no sizes", "search.num_layers"):
        space()
    with refuses("search", None, "is a grid of 1,000,000 combinations", "larger steps"):
        space(num_layers=["1-1000"], hidden_size=["1-1000"])
    with refuses("search", None, "leaves none of 2 combinations", "2 because parallel.tensor=3 does not divide"):
        space({"tensor": 3}, num_layers=[2, 3])
    with refuses("search", None, "leaves none of 1 combination", "num_layers=2 is fewer than the 4 stages"):
        space({"pipeline": 2, "virtual_pipeline": 2}, num_layers=[2])
    with refuses("search", None, "leaves none", "1 because search.num_attention_heads=5 is not a multiple"):
        space(num_attention_heads=[5])


def test_a_budget_that_nothing_meets_names_the_nearest() -> None:
    sizes = {2: plain_count(2, 48, 96, 6, 2), 3: plain_count(3, 48, 96, 6, 2)}
    over = 100 * (sizes[2] / 52500 - 1)
    told = f"the nearest are l2-h48-f96-q6-g2 with total_parameters {sizes[2]:,} ({over:.1f}% above 52,500); l3-h48"
    with refuses("search.budget.total_parameters", 50000, "by none of 2 shapes (47,500 to 52,500)", told):
        space(num_layers=[2, 3], budget={"total_parameters": 50000})
    # 0.93 x 500,000 leaves a rest behind the point, 1.07 x 500,000 none; an open end is not shown.
    for asked, words in (
        ({"total_parameters": 500000, "tolerance": 0.07}, "by none of 2 shapes (465,000 to 535,000)"),
        ({"total_parameters": [None, 1500]}, "by none of 2 shapes (at most 1,500)"),
        ({"flops_per_token": [10**15, None]}, "by none of 2 shapes (at least 1,000,000,000,000,000)"),
    ):
        (name, *_) = asked
        with refuses(f"search.budget.{name}", asked[name], words, "the nearest are"):
            space(num_layers=[2, 3], budget=asked)
    # From the end that a shape is beyond, which is named; far beyond it, as a multiple.
    told = f"with total_parameters {sizes[2]:,} ({sizes[2] / 2100:,.0f} times 2,100)"
    with refuses("search.budget.total_parameters", 2000, "", told):
        space(num_layers=[2, 3], budget={"total_parameters": 2000})
    # Each budget has a shape of its own, none meets both.
    budget = {"total_parameters": [None, sizes[2]], "non_embedding_parameters": [sizes[3] - 2 * 1003 * 48, None]}
    told = f"l2-h48-f96-q6-g2 with non_embedding_parameters {sizes[2] - 2 * 1003 * 48:,} "
    with refuses("search.budget", str(budget), "is met as a whole by none of 2 shapes", told):
        space(num_layers=[2, 3], budget=budget)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_layers", [], "is empty"),
        ("num_layers", ["three"], "must be a whole number or a range: as 4096, 29-32 or 4096-6144:512"),
        ("num_layers", ["2-"], "must be a whole number or a range"),
        ("num_layers", ["4-2"], "must go up from at least 1"),
        ("num_layers", [0], "must go up from at least 1"),
        ("num_layers", ["2-4:0"], "in steps of at least 1"),
        ("hidden_size", ["32-48:12"], "does not end at 48 in steps of 12, and both ends of a range belong to it: end"),
        ("hidden_size", ["1-100000"], "names more than 1000 sizes"),
        ("most", 3, "and none is given"),
    ],
)
def test_axes_that_cannot_be_are_refused(key: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}(.0.)?=") as caught:
        SearchConfig(**{key: value})
    assert words in str(caught.value)


def test_ranges_are_written_out() -> None:
    config = SearchConfig(num_layers=[4, "1-3"], hidden_size=["4Ki-6Ki:1Ki", 5120])
    assert config.axes() == {"num_layers": [4, 1, 2, 3], "hidden_size": [4096, 5120, 6144]}
    with refuses("ffn_ratio", [2.0], "and ffn_hidden_size=[64] are both given"):
        SearchConfig(ffn_hidden_size=[64], ffn_ratio=[2.0])


@pytest.mark.parametrize("value", [[1, 2, 3], [None, None], [0, None], [5, 3], -4, 0, [-3, None]])
def test_budgets_that_cannot_be_are_refused(value: Any) -> None:
    with refuses("total_parameters", value, "must be"):
        BudgetConfig(total_parameters=value)


def test_bounds_hold_their_ends() -> None:
    budget = BudgetConfig(total_parameters=200, memory=[None, 5], latency=[0.5, None], tolerance=0.25)
    assert budget.bounds() == {
        "total_parameters": (150, 250),
        "memory": (0, 5),
        "latency": (0.5, float("inf")),
    }
    at_the_end = Candidate(TEACHER, {"total_parameters": 250, "memory": 5, "latency": 0.5})
    assert exceeded(at_the_end, budget.bounds()) == {}
    beyond = Candidate(TEACHER, {"total_parameters": 300, "memory": 5.5, "latency": 0.25})
    assert exceeded(beyond, budget.bounds()) == {"total_parameters": 0.2, "memory": 0.1, "latency": 0.5}


def test_those_nearest_to_the_middle_are_kept_in_their_order() -> None:
    def candidate(layers: int, total: int) -> Candidate:
        return Candidate(TEACHER.replace(num_layers=layers), {"total_parameters": total})

    every = [candidate(1, 90), candidate(2, 104), candidate(3, 99), candidate(4, 110)]
    middle = BudgetConfig(total_parameters=[80, 120])
    assert nearest_to_middle(every, middle, 2) == every[1:3]
    assert nearest_to_middle(every, middle, None) == every
    # Of one end alone, the middle is that end.
    assert nearest_to_middle(every, BudgetConfig(total_parameters=[None, 110]), 1) == every[3:]


def test_files_and_table_say_the_same() -> None:
    shape: Architecture = TEACHER.replace(num_layers=2)
    each = Candidate(shape, {**figures_of(shape, 16, ServingConfig()), "latency": 0.123456})
    count = plain_count(2, 48, 96, 6, 2)
    head, line = to_csv([each.row]).splitlines()
    assert head.split(",")[:7] == ["name", *each.sizes, "total_parameters"]
    assert line.split(",")[:7] == ["l2-h48-f96-q6-g2", "2", "48", "96", "6", "2", str(count)]
    assert line.endswith("0.123456")
    head, line = table([each], ["latency"]).splitlines()
    assert head.split() == [*each.sizes, "total_parameters", "non_embedding_parameters", "latency"]
    assert line.split() == ["2", "48", "96", "6", "2", f"{count:,}", f"{count - 2 * 1003 * 48:,}", "0.1235"]
