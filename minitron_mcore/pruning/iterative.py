"""The shapes on the way from teacher to student when pruning takes several steps. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError


def step_shapes(
    teacher: Architecture, student: Architecture, steps: int, divisors: Mapping[str, int] | None = None
) -> list[Architecture]:
    """The model's shape after each of `steps` prunings; the last is `student`, and one step is one-shot pruning.

    Step i of T, counted from 0, takes every axis, layers included, from d_s − i (d_s − d_t) / T to
    d_s − (i + 1) (d_s − d_t) / T, rounded to the nearest multiple of its entry in `divisors` (by Megatron's field name,
    default 1; a tie goes up) and kept between the previous step and the student. Query heads follow from the KV groups
    and the heads in a group, which shrink in the same way. Raises InputError for fewer than one step. Source: arXiv
    2407.14679, section 2.3.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError("prune.steps", steps, "must be a whole number of at least 1")
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
