"""From scores and a target shape to the global indices that stay on every axis, before any weight is touched. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.families.find import find_family
from minitron_mcore.pruning.config import LAYER_CHOICES
from minitron_mcore.pruning.plan_file import HeadResidual, PruningPlan, check_residual
from minitron_mcore.pruning.ranking import (
    Cut,
    best,
    best_in_groups,
    closest,
    narrowest,
    residual_pairs,
    without_block,
    without_cheapest,
)
from minitron_mcore.pruning.targets import student_shape

if TYPE_CHECKING:
    from minitron_mcore.importance.scores import Scores

TOLERANCE = 1e-5  # relative to an axis' largest score: how closely fp32 scores of two layouts agree
TENSOR_CORES = 8  # of bf16 elements: what a matrix product's sizes should be multiples of


@dataclass
class _Axis:
    """How one axis was cut: every cut, the axis' largest score, and of how many scores each value is the sum."""

    largest: float
    cuts: list[Cut] = field(default_factory=list)
    terms: int = 1

    def add(self, cuts: Iterable[Cut], layer: int | None = None) -> None:
        self.cuts += [replace(cut, layer=layer) for cut in cuts]


def make_plan(
    scores: Scores,
    student: Mapping[str, int | None],
    *,
    layers: str = "scattered",
    tensor: int = 1,
    pipeline: int = 1,
    sequence_length: int | None = None,
    keep_layers: Sequence[int] | None = None,
    ratios: Mapping[str, float] | None = None,
    divisible_by: int = 1,
    variant: str | None = None,
    depth_metric: str = "block_influence",
    head_residual: str = "none",
    residual_matrices: Sequence[str] = ("query", "output"),
) -> PruningPlan:
    """Keep the most important indices of every axis; ties keep the lower index.

    `student`, `ratios`, `divisible_by`, `tensor`, `pipeline`: see `student_shape`. KV groups are ranked within their
    layer; heads within their group, with equally many kept in each group that stays; neurons within their layer; hidden
    channels once for the whole network. `layers`: "scattered" drops the layers that cost least to leave out, one by
    one; "contiguous" drops the block that costs least; `keep_layers` names the layers instead. `depth_metric` is that
    cost: block influence, or a metric that the scores hold (for blocks, at exactly the dropped length).
    `variant`: which of the scores' aggregations ("BATCH/SEQUENCE/SITE") decides; by default the primary one.
    `head_residual` (none, paper or laco) and `residual_matrices`: see HeadResidual. `sequence_length`: for the FLOPs.

    Raises InputError, naming student.<field>, prune.<field> or the axis of the scores. Source: arXiv 2407.14679,
    section 2.
    """
    teacher = scores.architecture
    target = student_shape(
        teacher, student, tensor, pipeline, ratios=ratios, layers=keep_layers, divisible_by=divisible_by
    )
    check_residual(teacher, target, head_residual, residual_matrices)
    chosen = scores if variant is None else scores.variant(variant)
    of_groups = _group_scores(chosen, target)
    for axis, values in chosen.arrays():
        if not numpy.isfinite(values).all():
            raise InputError("scores", None, f"hold NaN or Inf in {axis}", "score again")
    kept_layers, layer_axis = _choose_layers(chosen, target.num_layers, layers, depth_metric, keep_layers)
    kept, axes = _choose_width(chosen, of_groups, target, kept_layers)
    axes = {"layers": layer_axis, **axes}
    residual = None
    if head_residual != "none":
        pairs = {
            layer: _residual_pairs(chosen.heads[layer], of_groups[layer], kept["groups"][layer], teacher, target)
            for layer in kept_layers
        }
        residual = HeadResidual(head_residual, list(residual_matrices), pairs)
    tolerance = float(scores.settings.get("tolerance", TOLERANCE))
    return PruningPlan(
        teacher=teacher,
        student=target,
        layers=kept_layers,
        **kept,
        residual=residual,
        cuts={axis: narrowest(found.cuts) for axis, found in axes.items()},
        decided={axis: decided for axis, found in axes.items() if (decided := _decided(found.cuts))},
        settings={
            "layers": layers if keep_layers is None else "given",
            "depth_metric": depth_metric,
            "variant": variant,
            "ratios": dict(ratios or {}),
            "divisible_by": divisible_by,
            "head_residual": head_residual,
            "tolerance": tolerance,
            "sequence_length": sequence_length or teacher.max_position_embeddings,
            "scores_fingerprint": scores_fingerprint(scores),
            "scores": dict(chosen.settings),
        },
        warnings=[*_close_cuts(axes, tolerance), *_size_warnings(teacher, target), *_export_warnings(target)],
    )


def _choose_width(
    scores: Scores, of_groups: numpy.ndarray, target: Architecture, layers: list[int]
) -> tuple[dict[str, Any], dict[str, _Axis]]:
    """What stays on every axis except the layers, by PruningPlan's names, and how it was cut."""
    groups_of_teacher = scores.architecture.num_query_groups
    named = {"hidden": scores.hidden, "ffn": scores.ffn, "heads": scores.heads, "groups": of_groups}
    axes = {axis: _Axis(float(numpy.abs(values).max())) for axis, values in named.items()}
    kept: dict[str, Any] = {"ffn": {}, "heads": {}, "groups": {}}
    kept["hidden"], cut = best(scores.hidden, target.hidden_size)
    axes["hidden"].add([cut])
    for layer in layers:
        kept["ffn"][layer], cut = best(scores.ffn[layer], target.ffn_hidden_size)
        axes["ffn"].add([cut], layer)
        kept["groups"][layer], cut = best(of_groups[layer], target.num_query_groups)
        axes["groups"].add([cut], layer)
        kept["heads"][layer], cuts = best_in_groups(
            scores.heads[layer], groups_of_teacher, target.heads_per_group, kept["groups"][layer]
        )
        axes["heads"].add(cuts, layer)
    return kept, axes


def _group_scores(scores: Scores, target: Architecture) -> numpy.ndarray:
    """[num_layers, num_query_groups]; if groups were not scored, a group of one head has its head's score."""
    teacher = scores.architecture
    if scores.groups is not None:
        return scores.groups
    if teacher.heads_per_group == 1:
        return scores.heads
    if target.num_query_groups < teacher.num_query_groups:
        rule = f"is fewer than the teacher's {teacher.num_query_groups}, but the scores have none for KV groups"
        raise InputError("student.num_query_groups", target.num_query_groups, rule, "score again")
    return numpy.zeros((teacher.num_layers, teacher.num_query_groups))


def _choose_layers(
    scores: Scores, count: int, choice: str, metric: str, given: Sequence[int] | None
) -> tuple[list[int], _Axis]:
    total = len(scores.layers)
    if choice not in LAYER_CHOICES:
        raise InputError("prune.layers", choice, "is not allowed", f"choose one of {', '.join(LAYER_CHOICES)}")
    if given is not None or count == total:
        return list(range(total) if given is None else given), _Axis(0.0, [Cut(count, total)])
    length = 1 if choice == "scattered" else total - count
    costs = scores.layers if metric == "block_influence" else scores.depth_of(metric, length)
    if choice == "scattered":
        kept, cut = best(costs, count)
    elif metric == "block_influence":
        kept, cut = without_block(costs, count)
    else:
        kept, cut = without_cheapest(costs.tolist(), total)
    terms = length if metric == "block_influence" else 1
    return kept, _Axis(float(numpy.abs(costs).max()), [cut], terms)


def _residual_pairs(
    heads: numpy.ndarray, groups: numpy.ndarray, kept_groups: list[int], teacher: Architecture, target: Architecture
) -> list[tuple[int, int]]:
    """(kept, dropped) heads of one layer: within each kept group, or among groups of one head each."""
    q = teacher.heads_per_group
    if q == 1:
        return residual_pairs(groups, target.num_query_groups)
    return [
        (group * q + kept, group * q + dropped)
        for group in kept_groups
        for kept, dropped in residual_pairs(heads[group * q : (group + 1) * q], target.heads_per_group)
    ]


def scores_fingerprint(scores: Scores) -> str:
    """sha256 of the scored architecture and all its scores."""
    digest = hashlib.sha256(json.dumps(scores.architecture.to_dict(), sort_keys=True).encode())
    for name, values in scores.arrays():
        if name not in ("hidden", "ffn", "heads", "layers"):  # which every file holds, in this order
            digest.update(name.encode())
        digest.update(numpy.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.hexdigest()


def _decided(cuts: list[Cut]) -> list[list[float]]:
    return [[cut.lowest_kept, cut.highest_dropped or 0.0] for cut in cuts if cut.lowest_kept is not None]


def _close_cuts(axes: Mapping[str, _Axis], tolerance: float) -> Iterator[str]:
    """A warning for each axis with a cut that numerical noise could decide: either score there may be off by
    `tolerance` times the axis' largest, and a block's total by that for each of its layers."""
    for axis, found in axes.items():
        cut, noise = closest(found.cuts), 2 * found.terms * tolerance * found.largest
        if cut.gap() <= noise:
            where = "" if cut.layer is None else f" in layer {cut.layer}"
            where += "" if cut.group is None else f", KV group {cut.group}"
            yield (
                f"{axis}: the lowest score kept{where} is {cut.gap():.1e} above the highest dropped, and scores of two "
                f"layouts may differ by {noise:.1e} there: scoring at another layout may keep another index"
            )


def _size_warnings(teacher: Architecture, student: Architecture) -> Iterator[str]:
    for name in ("hidden_size", "ffn_hidden_size"):
        if getattr(student, name) % TENSOR_CORES and getattr(teacher, name) % TENSOR_CORES == 0:
            yield (
                f"{name}={getattr(student, name)} is not a multiple of {TENSOR_CORES}, while the teacher's "
                f"{getattr(teacher, name)} is: tensor cores are slower on such sizes (prune.divisible_by avoids them)"
            )


def _export_warnings(student: Architecture) -> Iterator[str]:
    try:
        find_family(student.family, "plan").refuse(student, "student")
    except InputError as error:
        yield f"{error}: export will refuse it"
