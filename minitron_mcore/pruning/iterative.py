"""The shapes on the way from teacher to student, where pruning goes in several steps. Numbers alone."""

from __future__ import annotations

from collections.abc import Mapping

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError


def step_shapes(
    teacher: Architecture, student: Architecture, steps: int, divisors: Mapping[str, int] | None = None
) -> list[Architecture]:
    """What the model is after each of `steps` prunings; the last is `student`, one step is one shot.

    Step i of T (from 0 on) takes every axis, layers too, from d_s − i (d_s − d_t) / T to d_s − (i + 1) (d_s − d_t) / T,
    rounded to the nearest multiple of its `divisors` (by Megatron's field name, default 1; of two as near the larger)
    and kept between the step before and the student. Query heads follow from the KV groups and the heads in a group,
    which shrink alike. Raises InputError for fewer steps than one. Source: arXiv 2407.14679, section 2.3.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"prune.steps={steps!r} must be a whole number of at least 1")
    divisors = divisors or {}
    shapes: list[Architecture] = []
    before = teacher
    for step in range(1, steps):

        def part_way(first: int, last: int, divisor: int, previous: int, step: int = step) -> int:
            # In whole numbers: d = (first steps − step (first − last)) / steps, to the nearest multiple, half up.
            twice = 2 * (first * steps - step * (first - last)) + divisor * steps
            return min(previous, max(last, twice // (2 * divisor * steps) * divisor))

        sizes = {
            name: part_way(getattr(teacher, name), getattr(student, name), divisors.get(name, 1), getattr(before, name))
            for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups")
        }
        in_group = part_way(teacher.heads_per_group, student.heads_per_group, 1, before.heads_per_group)
        before = teacher.replace(**sizes, num_attention_heads=sizes["num_query_groups"] * in_group)
        shapes.append(before)
    return [*shapes, student]
