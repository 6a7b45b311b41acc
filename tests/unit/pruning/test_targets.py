"""What the recipe asks of a student -> its shape: sizes, ratios, divisors, explicit layers; what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.targets import TARGETS
from tests.plans import student_shape
from tests.refusals import refuses

NAN = float("nan")


def model(**changes: Any) -> Architecture:
    fields = {
        "num_layers": 8,
        "hidden_size": 96,
        "ffn_hidden_size": 160,
        "num_attention_heads": 12,
        "num_query_groups": 4,
        "kv_channels": 8,
        "vocab_size": 128,
    }
    return build_architecture({**fields, **changes})


MHA = {"num_query_groups": 12}


@pytest.mark.parametrize(
    ("teacher", "student", "ratios", "heads", "groups"),
    [
        ({}, {}, {}, 12, 4),
        ({}, {"num_attention_heads": 8}, {}, 8, 4),  # all groups stay
        ({}, {"num_query_groups": 2}, {}, 6, 2),  # a group keeps all its heads
        ({}, {"num_query_groups": 2, "num_attention_heads": 4}, {}, 4, 2),
        ({}, {}, {"num_query_groups": 0.5, "num_attention_heads": 0.3}, 4, 2),
        ({}, {}, {"num_attention_heads": 0.5}, 8, 4),  # 6 is as near to 4 as to 8: the larger
        ({}, {"num_query_groups": 1}, {"num_attention_heads": 1.0}, 3, 1),
        (MHA, {"num_attention_heads": 7}, {}, 7, 7),  # with one head in each group the two shrink together
        (MHA, {"num_query_groups": 7}, {}, 7, 7),
        (MHA, {}, {"num_attention_heads": 0.75}, 9, 9),
    ],
)
def test_heads_and_groups(
    teacher: dict[str, int], student: dict[str, int | None], ratios: dict[str, float], heads: int, groups: int
) -> None:
    shape = student_shape(model(**teacher), student, ratios=ratios)
    assert (shape.num_attention_heads, shape.num_query_groups) == (heads, groups)


@pytest.mark.parametrize(
    ("name", "ratio", "options", "size"),
    [
        ("hidden_size", 0.75, {}, 72),
        ("hidden_size", 0.75, {"divisible_by": 16}, 80),  # 72 is as near to 64 as to 80: the larger
        ("hidden_size", 0.74, {"divisible_by": 16}, 64),
        ("hidden_size", 0.99, {"divisible_by": 64}, 64),  # never beyond the teacher's 96
        ("hidden_size", 0.01, {"divisible_by": 32}, 32),  # never to none
        ("hidden_size", 1, {"divisible_by": 64}, 96),  # all of it stays, whatever divides it
        ("ffn_hidden_size", 0.55, {"tensor": 4}, 88),
        ("ffn_hidden_size", 0.55, {"tensor": 2, "divisible_by": 5}, 90),
        ("num_layers", 0.6, {}, 5),
        ("num_query_groups", 0.5, {"tensor": 2}, 2),
        ("num_query_groups", 0.7, {"tensor": 2}, 2),
    ],
)
def test_ratios_are_rounded_to_what_divides(name: str, ratio: float, options: dict[str, Any], size: int) -> None:
    assert getattr(student_shape(model(), {}, ratios={name: ratio}, **options), name) == size


@given(st.integers(8, 500), st.floats(0.01, 1), st.integers(1, 64), st.sampled_from([1, 2, 4]))
@settings(max_examples=100, deadline=None)
def test_no_other_multiple_is_nearer(ffn: int, ratio: float, divisor: int, tensor: int) -> None:
    teacher = model(ffn_hidden_size=ffn * tensor)
    multiples = [size for size in range(1, ffn * tensor + 1) if size % divisor == 0 and size % tensor == 0]
    options: dict[str, Any] = {"ratios": {"ffn_hidden_size": ratio}, "divisible_by": divisor, "tensor": tensor}
    if ratio == 1:
        assert student_shape(teacher, {}, **options).ffn_hidden_size == ffn * tensor
        return
    if not multiples:
        with refuses("student.ratios.ffn_hidden_size", ratio, "leaves no size"):
            student_shape(teacher, {}, **options)
        return
    size = student_shape(teacher, {}, **options).ffn_hidden_size
    nearest = min(abs(other - ratio * ffn * tensor) for other in multiples)
    assert size in multiples and abs(size - ratio * ffn * tensor) <= nearest + 1e-6


def test_sizes_that_stay_need_not_be_divided() -> None:
    shape = student_shape(model(), {"hidden_size": 64, "ffn_hidden_size": 160}, divisible_by=64)
    assert (shape.hidden_size, shape.ffn_hidden_size) == (64, 160)


def test_layers_one_by_one() -> None:
    assert student_shape(model(), {}, layers=[0, 1, 7]).num_layers == 3
    assert student_shape(model(), {"num_layers": 3}, layers=[0, 1, 7]).num_layers == 3


@pytest.mark.parametrize(
    ("student", "options", "refusal"),
    [
        ({"num_query_groups": 5}, {}, ("student.num_query_groups", 5, "is larger than the teacher's 4")),
        ({"num_query_groups": 0}, {}, ("student.num_query_groups", 0, "must be at least 1")),
        (
            {"num_query_groups": 3, "num_attention_heads": 8},
            {},
            ("student.num_attention_heads", 8, "is not a multiple of student.num_query_groups=3"),
        ),
        (
            {"num_query_groups": 2, "num_attention_heads": 12},
            {},
            ("student.num_attention_heads", 12, "puts 6 query heads in each of 2 KV groups", "choose at most 6"),
        ),
        ({"num_query_groups": 3}, {"tensor": 2}, ("student.num_query_groups", 3, "is not a multiple of parallel.te")),
        ({"num_layers": 2}, {"pipeline": 3}, ("student.num_layers", 2, "is fewer than the 3 stages of parallel.pipe")),
        ({}, {"layers": [0, 4], "pipeline": 3}, ("student.num_layers", 2, "is fewer than the 3 stages")),
        (
            {"hidden_size": 70},
            {"divisible_by": 16},
            ("student.hidden_size", 70, "is not a multiple of prune.divisible_by=16", "choose 64 or 80"),
        ),
        ({"ffn_hidden_size": 100}, {"divisible_by": 96}, ("student.ffn_hidden_size", 100, "not a multi", "choose 96")),
        ({"hidden_size": 8}, {"divisible_by": 64}, ("student.hidden_size", 8, "not a multiple", "choose 64")),
        ({"hidden_size": 8}, {"divisible_by": 128}, ("student.hidden_size", 8, "not a multiple", "choose 96")),
        ({}, {"divisible_by": 0}, ("prune.divisible_by", 0, "must be at least 1")),
        ({}, {"ratios": {"depth": 0.5}}, ("student.ratios.depth", 0.5, "cannot be pruned", "choose from num_layers")),
        ({}, {"ratios": {"hidden_size": 1.2}}, ("student.ratios.hidden_size", 1.2, "must be above 0 and at most 1")),
        ({}, {"ratios": {"hidden_size": 0.0}}, ("student.ratios.hidden_size", 0.0, "must be above 0")),
        ({}, {"ratios": {"hidden_size": NAN}}, ("student.ratios.hidden_size", NAN, "must be finite")),
        ({}, {"ratios": {"hidden_size": "half"}}, ("student.ratios.hidden_size", "half", "must be a number")),
        (
            {"hidden_size": 48},
            {"ratios": {"hidden_size": 0.5}},
            ("student.hidden_size", 48, "and student.ratios.hidden_size=0.5 are both given", "leave one"),
        ),
        ({}, {"layers": []}, ("student.layers", [], "must be a list of the teacher's layers that stay")),
        ({}, {"layers": [0, 8]}, ("student.layers", [0, 8], "must be among the teacher's layers 0 to 7")),
        ({}, {"layers": [-1, 3]}, ("student.layers", [-1, 3], "must be among the teacher's layers 0 to 7")),
        ({}, {"layers": [3, 1]}, ("student.layers", [3, 1], "must be in ascending order, each layer once")),
        ({}, {"layers": [3, 3]}, ("student.layers", [3, 3], "each layer once")),
        (
            {"num_layers": 4},
            {"layers": [0, 1, 2]},
            ("student.layers", [0, 1, 2], "names 3 layers, but student.num_layers=4", "leave one of them out"),
        ),
        (
            {},
            {"layers": [0, 1], "ratios": {"num_layers": 0.5}},
            ("student.layers", [0, 1], "and student.ratios.num_layers=0.5 are both given"),
        ),
    ],
)
def test_impossible_students_are_refused(
    student: dict[str, Any], options: dict[str, Any], refusal: tuple[str, Any, str]
) -> None:
    with refuses(*refusal):
        student_shape(model(), student, **options)


def test_every_target_is_a_key_of_the_recipe() -> None:
    assert {*TARGETS} <= {entry.name for entry in dataclasses.fields(StudentConfig)}
