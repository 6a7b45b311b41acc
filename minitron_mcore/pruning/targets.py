"""From what the recipe asks of a student to its exact shape, and to those on the way there: sizes, ratios and
divisors, without scores. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.layout import check_tensor_parallel
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.runtime.config import ParallelConfig

TARGETS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
# Dimensions of the matrix products, to which prune.divisible_by applies.
DIVIDED = ("hidden_size", "ffn_hidden_size")


def student_shape(
    teacher: Architecture, student: StudentConfig, divisible_by: int, parallel: ParallelConfig
) -> Architecture:
    """The teacher cut to the sizes asked for.

    A size of `student` that is not given stays the teacher's. If only KV groups are given, each keeps all of its query
    heads; if each group has a single head, groups and heads shrink together. A ratio is rounded to the nearest multiple
    of what must divide the size, at least one such multiple and at most the teacher's size. `divisible_by`: what must
    divide hidden_size and ffn_hidden_size where they shrink. `parallel`: the student's layout.

    Raises InputError, naming student.<field>, prune.divisible_by or parallel.<field>.
    """
    wanted = {name: size for name in TARGETS if (size := getattr(student, name)) is not None}
    ratios, tensor, pipeline = student.ratios, parallel.tensor, parallel.pipeline
    _check_sizes(teacher, wanted, divisible_by)
    _check_ratios(ratios, wanted)
    if student.layers is not None:
        _check_layers(teacher, student.layers, wanted, ratios)
        wanted["num_layers"] = len(student.layers)
    divisors = {
        "hidden_size": divisible_by,
        "ffn_hidden_size": math.lcm(divisible_by, tensor),
        "num_query_groups": tensor,
        "num_layers": 1,
    }
    for name, divisor in divisors.items():
        if name in ratios:
            wanted[name] = _share(name, ratios[name], getattr(teacher, name), divisor)
    _resolve_heads(teacher, wanted, ratios.get("num_attention_heads"), tensor)
    target = teacher.replace(**wanted)
    for name in ("ffn_hidden_size", *({"num_query_groups"} & wanted.keys())):
        if (size := getattr(target, name)) % tensor:
            remedy = "choose a multiple, or lower parallel.tensor"
            raise InputError(f"student.{name}", size, f"is not a multiple of parallel.tensor={tensor}", remedy)
    if target.num_layers < pipeline:
        rule = f"is fewer than the {pipeline} stages of parallel.pipeline={pipeline}"
        raise InputError("student.num_layers", target.num_layers, rule, "keep more layers, or lower parallel.pipeline")
    check_tensor_parallel(target, tensor)
    return target


def step_shapes(
    teacher: Architecture, student: Architecture, steps: int, divisors: Mapping[str, int] | None = None
) -> list[Architecture]:
    """The model's shape after each of `steps` prunings; the last is `student`, and one step is one-shot pruning.

    Step i of T, counted from 0, takes every axis, layers included, from d_s − i (d_s − d_t) / T to
    d_s − (i + 1) (d_s − d_t) / T, rounded to the nearest multiple of its entry in `divisors` (by Megatron's field name,
    default 1; a tie goes up) and kept between the previous step and the student. Query heads follow from the KV groups
    and the heads in a group, which shrink in the same way. Source: arXiv 2407.14679,
    section 2.3.
    """
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


def no_target(teacher: Architecture) -> InputError:
    """For a student that is to be no smaller than the teacher."""
    example = f"student.ffn_hidden_size={teacher.ffn_hidden_size // 2}"
    remedy = f"set student.layers, student.ratios or one of student.{', student.'.join(TARGETS)}, as in {example}"
    return InputError("student", None, "asks for nothing smaller than the teacher", remedy)


def _check_sizes(teacher: Architecture, wanted: Mapping[str, int], divisor: int) -> None:
    for name, size in wanted.items():
        key, whole = f"student.{name}", getattr(teacher, name)
        if size > whole:
            rule = f"is larger than the teacher's {whole}, and pruning only makes a model smaller"
            raise InputError(key, size, rule, f"choose at most {whole}")
        if name in DIVIDED and size != whole and size % divisor:
            below = size - size % divisor
            near = [str(value) for value in (below, below + divisor) if 0 < value <= whole] or [str(whole)]
            rule = f"is not a multiple of prune.divisible_by={divisor}"
            raise InputError(key, size, rule, f"choose {' or '.join(near)}")


def _check_ratios(ratios: Mapping[str, float], wanted: Mapping[str, int]) -> None:
    for name, ratio in ratios.items():
        if name not in TARGETS:
            raise InputError(f"student.ratios.{name}", ratio, "cannot be pruned", f"choose from {', '.join(TARGETS)}")
        if not 0 < ratio <= 1:
            rule = "must be above 0 and at most 1, being the share that stays"
            raise InputError(f"student.ratios.{name}", ratio, rule)
        if name in wanted:
            rule = f"and student.ratios.{name}={ratio} are both given"
            raise InputError(f"student.{name}", wanted[name], rule, "leave one of them out")


def _check_layers(
    teacher: Architecture, layers: list[int], wanted: Mapping[str, int], ratios: Mapping[str, float]
) -> None:
    rule, remedy = "", ""
    if not layers:
        rule = "must be a list of the teacher's layers that stay, as in [0,1,2]"
    elif min(layers) < 0 or max(layers) >= teacher.num_layers:
        rule = f"must be among the teacher's layers 0 to {teacher.num_layers - 1}"
    elif any(low >= high for low, high in pairwise(layers)):
        rule = "must be in ascending order, each layer once"
    elif wanted.get("num_layers", len(layers)) != len(layers):
        rule = f"names {len(layers)} layers, but student.num_layers={wanted['num_layers']}"
        remedy = "leave one of them out"
    elif "num_layers" in ratios:
        rule, remedy = f"and student.ratios.num_layers={ratios['num_layers']} are both given", "leave one of them out"
    if rule:
        raise InputError("student.layers", layers, rule, remedy)


def _share(name: str, ratio: float, teacher: int, divisor: int) -> int:
    """`ratio` of the teacher's size, to the nearest multiple of `divisor`; a tie goes up."""
    if ratio == 1:
        return teacher
    if divisor > teacher:
        rule = f"leaves no size: it must be a multiple of {divisor}, and the teacher's is {teacher}"
        raise InputError(f"student.ratios.{name}", ratio, rule, "lower prune.divisible_by or parallel.tensor")
    return min(nearest_multiple(ratio * teacher, divisor), teacher - teacher % divisor)


def nearest_multiple(size: float, divisor: int) -> int:
    """The multiple of `divisor` that is nearest to `size`, at least one; a tie goes up."""
    # The tolerance is for products such as 0.35 * 10, a half that floating point puts just below.
    return max(math.floor(size / divisor + 0.5 + 1e-9), 1) * divisor


def _resolve_heads(teacher: Architecture, wanted: dict[str, int], ratio: float | None, tensor: int) -> None:
    """Fill in whichever of query heads and KV groups `wanted` lacks. Raises InputError where the two do not fit."""
    q = teacher.heads_per_group
    if q == 1 and "num_query_groups" not in wanted:
        if ratio is not None:
            wanted["num_query_groups"] = _share("num_attention_heads", ratio, teacher.num_query_groups, tensor)
        elif "num_attention_heads" in wanted:
            wanted["num_query_groups"] = wanted["num_attention_heads"]
    groups = wanted.get("num_query_groups", teacher.num_query_groups)
    if ratio is not None:
        share = _share("num_attention_heads", ratio, teacher.num_attention_heads, groups)
        wanted["num_attention_heads"] = min(share, groups * q)
    key, heads = "student.num_attention_heads", wanted.setdefault("num_attention_heads", groups * q)
    if heads % groups:
        whose = "student.num_query_groups" if "num_query_groups" in wanted else "the teacher's num_query_groups"
        rule = f"is not a multiple of {whose}={groups}, and every KV group keeps equally many query heads"
        raise InputError(key, heads, rule, "choose a multiple")
    if heads > groups * q:
        rule = f"puts {heads // groups} query heads in each of {groups} KV groups, but the teacher has {q}"
        raise InputError(key, heads, rule, f"choose at most {groups * q}")
