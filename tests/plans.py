"""Plans and students' shapes by plain sizes and choices, and whole parameters cut by a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.importance.scores import Scores
from minitron_mcore.keys import section_at
from minitron_mcore.layout import Parameter
from minitron_mcore.pruning import plan, targets
from minitron_mcore.pruning.axes import part_of, take_kept
from minitron_mcore.pruning.config import PruneConfig, StudentConfig
from minitron_mcore.pruning.plan_file import PruningPlan
from minitron_mcore.runtime.config import ParallelConfig


def make_plan(
    scores: Scores,
    sizes: Mapping[str, int | None],
    *,
    keep_layers: Sequence[int] | None = None,
    ratios: Mapping[str, float] | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_length: int | None = None,
    **choices: Any,
) -> PruningPlan:
    """`minitron_mcore.pruning.plan.make_plan` of sizes and choices by name."""
    student, prune = student_of(sizes, keep_layers, ratios), section_at("prune", PruneConfig, choices)
    return plan.make_plan(scores, student, prune, ParallelConfig(tensor=tensor, pipeline=pipeline), sequence_length)


def student_shape(
    teacher: Architecture,
    sizes: Mapping[str, int | None],
    *,
    layers: Sequence[int] | None = None,
    ratios: Mapping[str, float] | None = None,
    divisible_by: int = 1,
    tensor: int = 1,
    pipeline: int = 1,
) -> Architecture:
    """`minitron_mcore.pruning.targets.student_shape` of sizes by name."""
    divisor = section_at("prune", PruneConfig, {"divisible_by": divisible_by}).divisible_by
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    return targets.student_shape(teacher, student_of(sizes, layers, ratios), divisor, parallel)


def student_of(
    sizes: Mapping[str, int | None], layers: Sequence[int] | None, ratios: Mapping[str, float] | None
) -> StudentConfig:
    given = {**sizes, "layers": None if layers is None else [*layers], "ratios": dict(ratios or {})}
    return section_at("student", StudentConfig, given)


def prune_dense(tensor: torch.Tensor, parameter: Parameter, plan: PruningPlan, layer: int | None) -> torch.Tensor:
    """The student's whole parameter from the teacher's; `layer` is the teacher's (None where it has none)."""
    part = part_of(parameter, plan, layer)
    return part.made_from(take_kept(tensor, parameter, plan, layer, part.axis, part.needed), plan)
