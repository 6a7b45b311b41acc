"""From scores and a target shape to the global indices that stay on every axis, before any weight is touched. Pure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.families.find import find_family
from minitron_mcore.families.serving_limits import serving_warnings
from minitron_mcore.pruning.config import PruneConfig, StudentConfig
from minitron_mcore.pruning.plan_file import HeadResidual, PruningPlan, check_residual
from minitron_mcore.pruning.ranking import Cut, best, narrowest, residual_pairs, without_cheapest
from minitron_mcore.pruning.targets import DIVIDED, student_shape
from minitron_mcore.runtime.config import ParallelConfig

if TYPE_CHECKING:
    from minitron_mcore.importance.scores import Scores

TOLERANCE = 1e-5  # relative to an axis' largest score: how closely fp32 scores of two layouts agree
TENSOR_CORES = 8  # of bf16 elements: what a matrix product's sizes should be multiples of


def make_plan(
    scores: Scores,
    student: StudentConfig,
    prune: PruneConfig,
    parallel: ParallelConfig,
    sequence_length: int | None = None,
) -> PruningPlan:
    """Keep the most important indices of every axis; ties keep the lower index.

    `student`, `parallel`: see `student_shape`. KV groups are ranked within their layer; heads within their
    group, with equally many kept in each group that stays; neurons within their layer; hidden channels once for the
    whole network. `prune.layers`: "scattered" drops the layers that cost least to leave out, one by one; "contiguous"
    drops the block that costs least; `student.layers` names the layers instead. `prune.depth_metric` is that cost:
    block influence, or a metric that the scores hold (for blocks, at exactly the dropped length). `prune.variant`:
    which of the scores' aggregations ("BATCH/SEQUENCE/SITE") decides; by default the primary one.
    `prune.head_residual` and `prune.residual_matrices`: see HeadResidual. `sequence_length`: for the FLOPs.

    Raises InputError, naming student.<field>, prune.<field> or the axis of the scores. Source: arXiv 2407.14679,
    section 2.
    """
    teacher = scores.architecture
    target = student_shape(teacher, student, prune.divisible_by, parallel)
    check_residual(teacher, target, prune.head_residual, prune.residual_matrices)
    chosen = scores if prune.variant is None else scores.variant(prune.variant)
    of_groups = _group_scores(chosen, target)
    for axis, values in chosen.arrays():
        if not numpy.isfinite(values).all():
            raise InputError("scores", None, f"hold NaN or Inf in {axis}", "score again")
    tolerance = float(scores.settings.get("tolerance", TOLERANCE))
    kept_layers, cut, noise = _choose_layers(chosen, target.num_layers, prune, student.layers)
    by_axis = {"hidden": chosen.hidden, "ffn": chosen.ffn, "heads": chosen.heads, "groups": of_groups}
    kept, cuts = _choose_width(by_axis, teacher, target, kept_layers)
    cuts = {"layers": [cut], **cuts}
    spread = {"layers": noise, **{axis: (1, _largest(values)) for axis, values in by_axis.items()}}
    residual = None
    if prune.head_residual != "none":
        pairs = {
            layer: _residual_pairs(chosen.heads[layer], of_groups[layer], kept["groups"][layer], teacher, target)
            for layer in kept_layers
        }
        residual = HeadResidual(prune.head_residual, list(prune.residual_matrices), pairs)
    decided = {
        axis: [[cut.lowest_kept, cut.highest_dropped or 0.0] for cut in of_axis if cut.lowest_kept is not None]
        for axis, of_axis in cuts.items()
    }
    return PruningPlan(
        teacher=teacher,
        student=target,
        layers=kept_layers,
        **kept,
        residual=residual,
        cuts={axis: narrowest(of_axis) for axis, of_axis in cuts.items()},
        decided={axis: scores_at for axis, scores_at in decided.items() if scores_at},
        settings={
            "layers": prune.layers if student.layers is None else "given",
            "depth_metric": prune.depth_metric,
            "variant": prune.variant,
            "ratios": dict(student.ratios),
            "divisible_by": prune.divisible_by,
            "head_residual": prune.head_residual,
            "tolerance": tolerance,
            "sequence_length": sequence_length or teacher.max_position_embeddings,
            "scores_fingerprint": scores_fingerprint(scores),
            "scores": dict(chosen.settings),
        },
        warnings=[
            *_close_cuts(cuts, spread, tolerance),
            *_size_warnings(teacher, target),
            *(export_warnings(target) or serving_warnings(target, teacher)),
        ],
    )


def _choose_width(
    scores: Mapping[str, numpy.ndarray], teacher: Architecture, target: Architecture, layers: list[int]
) -> tuple[dict[str, Any], dict[str, list[Cut]]]:
    """What stays on every axis of `scores` by PruningPlan's names, and its cuts in the order of `layers`."""
    hidden, cut = best(scores["hidden"], target.hidden_size)
    kept: dict[str, Any] = {"hidden": hidden, "ffn": {}, "heads": {}, "groups": {}}
    cuts: dict[str, list[Cut]] = {"hidden": [cut], "ffn": [], "heads": [], "groups": []}
    for layer in layers:
        for axis, count in (("ffn", target.ffn_hidden_size), ("groups", target.num_query_groups)):
            kept[axis][layer], cut = best(scores[axis][layer], count, layer)
            cuts[axis].append(cut)
        kept["heads"][layer] = []
        for group in kept["groups"][layer]:
            first = group * teacher.heads_per_group
            of_group = scores["heads"][layer][first : first + teacher.heads_per_group]
            heads, cut = best(of_group, target.heads_per_group, layer, group)
            kept["heads"][layer] += [first + head for head in heads]
            cuts["heads"].append(cut)
    return kept, cuts


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
    scores: Scores, count: int, prune: PruneConfig, given: Sequence[int] | None
) -> tuple[list[int], Cut, tuple[int, float]]:
    """The layers that stay, the cut, and (of how many scores each of its values is the sum, the largest score)."""
    total = len(scores.layers)
    if given is not None or count == total:
        return list(range(total) if given is None else given), Cut(count, total), (1, 0.0)
    of_influence = prune.depth_metric == "block_influence"
    length = 1 if prune.layers == "scattered" else total - count
    costs = scores.layers if of_influence else scores.depth_of(prune.depth_metric, length)
    spread = (length if of_influence else 1, _largest(costs))
    if prune.layers == "scattered":
        return *best(costs, count), spread
    if of_influence:
        # fsum: a block's total does not depend on the order of its layers, so equal blocks are equal.
        costs = numpy.array([math.fsum(costs[start : start + length]) for start in range(count + 1)])
    return *without_cheapest(costs.tolist(), total), spread


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


def _largest(scores: numpy.ndarray) -> float:
    return float(numpy.abs(scores).max())


def _close_cuts(
    cuts: Mapping[str, list[Cut]], spread: Mapping[str, tuple[int, float]], tolerance: float
) -> Iterator[str]:
    """A warning for each axis with a cut that numerical noise could decide: either score there may be off by
    `tolerance` times the axis' largest, and a block's total by that for each of its layers."""
    for axis, (terms, largest) in spread.items():
        # The narrowest decision, all scores of an axis being known to the same accuracy.
        cut, noise = min(cuts[axis], key=Cut.gap), 2 * terms * tolerance * largest
        if cut.gap() <= noise:
            where = "" if cut.layer is None else f" in layer {cut.layer}"
            where += "" if cut.group is None else f", KV group {cut.group}"
            yield (
                f"{axis}: the lowest score kept{where} is {cut.gap():.1e} above the highest dropped, and scores of two "
                f"layouts may differ by {noise:.1e} there: scoring at another layout may keep another index"
            )


def _size_warnings(teacher: Architecture, student: Architecture) -> Iterator[str]:
    for name in DIVIDED:
        if getattr(student, name) % TENSOR_CORES and getattr(teacher, name) % TENSOR_CORES == 0:
            yield (
                f"{name}={getattr(student, name)} is not a multiple of {TENSOR_CORES}, while the teacher's "
                f"{getattr(teacher, name)} is: tensor cores are slower on such sizes (prune.divisible_by avoids them)"
            )


def export_warnings(student: Architecture) -> list[str]:
    """Why a Hugging Face folder of this shape could not be made, in words; nothing where it could."""
    try:
        find_family(student.family, "plan").refuse(student, "student")
    except InputError as error:
        return [f"{error}: export will refuse it"]
    return []
