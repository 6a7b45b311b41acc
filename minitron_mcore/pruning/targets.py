"""What the recipe asks of a student -> its exact shape: sizes, ratios and divisors, before any score is looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.layout import check_tensor_parallel

TARGETS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
# The matrix products' own dimensions, which prune.divisible_by is about.
DIVIDED = ("hidden_size", "ffn_hidden_size")


def student_shape(
    teacher: Architecture,
    student: Mapping[str, int | None],
    tensor: int = 1,
    pipeline: int = 1,
    *,
    ratios: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    divisible_by: int = 1,
) -> Architecture:
    """The teacher cut to the sizes asked for.

    `student`: TARGETS -> size or None; what is not asked for stays the teacher's, and where only one of query heads and
    KV groups is, a group keeps as many heads as it can: all of them where heads are not asked for, and where each group
    has but one head the two shrink together. `ratios`: TARGETS -> share of the teacher's size, above 0 and at most 1,
    rounded to the nearest multiple of what must divide the size, never to none and never beyond the teacher's.
    `layers`: the teacher's layers that stay, one by one. `divisible_by`: what must divide hidden_size and
    ffn_hidden_size where they shrink. `tensor` and `pipeline`: the layout the student is meant for.

    Raises InputError naming student.<field>, and prune.divisible_by or parallel.<field> where it is that.
    """
    wanted = {name: value for name, value in student.items() if value is not None}
    ratios = ratios or {}
    if isinstance(divisible_by, bool) or not isinstance(divisible_by, int) or divisible_by < 1:
        raise InputError(f"prune.divisible_by={divisible_by!r} must be a whole number of at least 1")
    _check_sizes(teacher, wanted)
    _check_ratios(ratios, wanted)
    if layers is not None:
        _check_layers(teacher, layers, wanted, ratios)
        wanted["num_layers"] = len(layers)
    for name, size in wanted.items():
        if name in DIVIDED and size != getattr(teacher, name):
            _check_divisible(name, size, getattr(teacher, name), divisible_by)
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
    if target.ffn_hidden_size % tensor:
        raise InputError(f"student.ffn_hidden_size={target.ffn_hidden_size} is no multiple of parallel.tensor={tensor}")
    if target.num_layers < pipeline:
        raise InputError(f"student.num_layers={target.num_layers} is fewer than parallel.pipeline={pipeline} stages")
    if "num_query_groups" in wanted and target.num_query_groups % tensor:
        raise InputError(
            f"student.num_query_groups={target.num_query_groups} is no multiple of parallel.tensor={tensor}"
        )
    check_tensor_parallel(target, tensor)
    return target


def _check_sizes(teacher: Architecture, wanted: Mapping[str, int]) -> None:
    for name, value in wanted.items():
        if name not in TARGETS:
            raise InputError(f"student.{name}={value!r} cannot be pruned to: choose from {', '.join(TARGETS)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"student.{name}={value!r} must be a whole number of at least 1")
        if value > getattr(teacher, name):
            raise InputError(
                f"student.{name}={value} is larger than the teacher's {getattr(teacher, name)}: "
                "pruning only makes a model smaller"
            )


def _check_ratios(ratios: Mapping[str, float], wanted: Mapping[str, int]) -> None:
    for name, ratio in ratios.items():
        if name not in TARGETS:
            raise InputError(f"student.ratios.{name}={ratio!r} is no axis to prune: choose from {', '.join(TARGETS)}")
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise InputError(f"student.ratios.{name}={ratio!r} must be above 0 and at most 1: the share that stays")
        if name in wanted:
            raise InputError(
                f"student.{name}={wanted[name]} and student.ratios.{name}={ratio} are both given: give one"
            )


def _check_layers(
    teacher: Architecture, layers: Sequence[int], wanted: Mapping[str, int], ratios: Mapping[str, float]
) -> None:
    said = f"student.layers={list(layers)}"
    if not layers or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise InputError(f"{said} must be a list of the teacher's layers that stay, as in [0,1,2]")
    if min(layers) < 0 or max(layers) >= teacher.num_layers:
        raise InputError(f"{said} must be among the teacher's layers 0 to {teacher.num_layers - 1}")
    if any(low >= high for low, high in pairwise(layers)):
        raise InputError(f"{said} must be in ascending order, each layer once")
    if wanted.get("num_layers", len(layers)) != len(layers):
        raise InputError(
            f"{said} are {len(layers)} layers, but student.num_layers={wanted['num_layers']}: leave one of them out"
        )
    if "num_layers" in ratios:
        raise InputError(f"{said} and student.ratios.num_layers={ratios['num_layers']} are both given: give one")


def _check_divisible(name: str, size: int, teacher: int, divisor: int) -> None:
    """A size that stays the teacher's is none that pruning chose."""
    if size % divisor == 0:
        return
    below = size - size % divisor
    near = [str(value) for value in (below, below + divisor) if 0 < value <= teacher] or [str(teacher)]
    raise InputError(
        f"student.{name}={size} is no multiple of prune.divisible_by={divisor}: the nearest are {' and '.join(near)}"
    )


def _share(name: str, ratio: float, teacher: int, divisor: int) -> int:
    """`ratio` of the teacher's size, to the nearest multiple of `divisor`; of two as near, the larger."""
    if ratio == 1:
        return teacher
    if divisor > teacher:
        raise InputError(
            f"student.ratios.{name}={ratio}: no multiple of {divisor}, which must divide the size, is within the "
            f"teacher's {teacher}"
        )
    # The tolerance is for products such as 0.35 * 10, a half that floating point puts just below.
    nearest = math.floor(ratio * teacher / divisor + 0.5 + 1e-9) * divisor
    return min(max(nearest, divisor), teacher - teacher % divisor)


def _resolve_heads(teacher: Architecture, wanted: dict[str, int], ratio: float | None, tensor: int) -> None:
    """Set what is not given of `wanted`'s query heads and KV groups. Raises InputError where they do not fit."""
    q, one_each = teacher.heads_per_group, teacher.heads_per_group == 1
    if one_each and "num_query_groups" not in wanted:
        if ratio is not None:
            wanted["num_query_groups"] = _share("num_attention_heads", ratio, teacher.num_query_groups, tensor)
        elif "num_attention_heads" in wanted:
            wanted["num_query_groups"] = wanted["num_attention_heads"]
    groups = wanted.get("num_query_groups", teacher.num_query_groups)
    if ratio is not None:
        share = _share("num_attention_heads", ratio, teacher.num_attention_heads, groups)
        wanted["num_attention_heads"] = min(share, groups * q)
    heads = wanted.setdefault("num_attention_heads", groups * q)
    if heads % groups:
        whose = "student.num_query_groups" if "num_query_groups" in wanted else "the teacher's num_query_groups"
        raise InputError(
            f"student.num_attention_heads={heads} is no multiple of {whose}={groups}: every KV group that stays keeps "
            "as many query heads as the others"
        )
    if heads > groups * q:
        raise InputError(
            f"student.num_attention_heads={heads} on student.num_query_groups={groups} are {heads // groups} query "
            f"heads in a group, but the teacher has {q}: at most {groups * q} heads can stay"
        )
