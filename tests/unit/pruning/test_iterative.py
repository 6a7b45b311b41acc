"""The shapes of iterative pruning: the paper's formula, monotone, ending exactly at the student."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_mcore.pruning.config import PruneConfig
from minitron_mcore.pruning.targets import TARGETS, step_shapes
from tests.distributed.models import tiny
from tests.refusals import refuses

TEACHER = tiny(
    "llama", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8
)


def sizes(shape: object) -> tuple[int, ...]:
    return tuple(getattr(shape, name) for name in TARGETS)


def test_one_step_is_one_shot() -> None:
    student = TEACHER.replace(hidden_size=3072, ffn_hidden_size=9216)
    assert step_shapes(TEACHER, student, 1) == [student]


def test_the_papers_formula_worked_by_hand() -> None:
    """Steps of 4 layers, 256 hidden channels and 1280 neurons; half a head in each group, which rounds up."""
    student = TEACHER.replace(num_layers=16, hidden_size=3072, ffn_hidden_size=9216, num_attention_heads=16)
    assert [sizes(shape) for shape in step_shapes(TEACHER, student, 4)] == [
        (28, 3840, 13056, 32, 8),  # 3.5 heads in a group round up
        (24, 3584, 11776, 24, 8),
        (20, 3328, 10496, 24, 8),  # 2.5
        (16, 3072, 9216, 16, 8),
    ]


def test_divisors() -> None:
    student = TEACHER.replace(num_layers=17, hidden_size=3072, ffn_hidden_size=9216)
    divisors = {"hidden_size": 512, "ffn_hidden_size": 1024, "num_layers": 4}
    # Exactly 3584, 11776 (11.5 x 1024) and 24.5 layers.
    assert sizes(step_shapes(TEACHER, student, 2, divisors)[0])[:3] == (24, 3584, 12288)


@pytest.mark.parametrize(
    ("steps", "rule"),
    [(0, "at least 1"), (-1, "at least 1"), (True, "must be a whole number"), (1.5, "must be a whole number")],
)
def test_steps_that_are_none(steps: int, rule: str) -> None:
    with refuses("steps", steps, rule):
        PruneConfig(steps=steps)


@given(data=st.data())
def test_monotone_and_divisible_and_exact_at_the_end(data: st.DataObject) -> None:
    draw = data.draw
    groups, in_group = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    divisor = draw(st.integers(1, 8))
    teacher = tiny(
        "llama",
        num_layers=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 60)) * divisor,
        ffn_hidden_size=draw(st.integers(1, 600)),
        num_attention_heads=groups * in_group,
        num_query_groups=groups,
    )
    kept_groups, kept_in_group = draw(st.integers(1, groups)), draw(st.integers(1, in_group))
    student = teacher.replace(
        num_layers=draw(st.integers(1, teacher.num_layers)),
        hidden_size=draw(st.integers(1, teacher.hidden_size // divisor)) * divisor,
        ffn_hidden_size=draw(st.integers(1, teacher.ffn_hidden_size)),
        num_attention_heads=kept_groups * kept_in_group,
        num_query_groups=kept_groups,
    )
    steps = draw(st.integers(1, 7))
    shapes = step_shapes(teacher, student, steps, {"hidden_size": divisor})
    assert len(shapes) == steps and shapes[-1] == student
    for before, after in pairwise([teacher, *shapes]):
        assert all(large >= small for large, small in zip(sizes(before), sizes(after), strict=True))
        assert after.num_attention_heads % after.num_query_groups == 0
        assert after.heads_per_group <= before.heads_per_group
        assert after.hidden_size % divisor == 0
    for number, shape in enumerate(shapes, start=1):
        exact = teacher.ffn_hidden_size - number * (teacher.ffn_hidden_size - student.ffn_hidden_size) / steps
        assert abs(shape.ffn_hidden_size - exact) <= 0.5
