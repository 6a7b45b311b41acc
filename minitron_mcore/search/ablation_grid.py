"""The students that an ablation prunes: every combination of the recipe's choices that matters, once. Pure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.pruning.plan_file import check_residual
from minitron_mcore.pruning.targets import TARGETS, no_target
from minitron_mcore.search.config import AblateConfig

# name of a shape that prunes one axis alone -> the fields it takes from the student
ALONE = {
    "depth": ("num_layers",),
    "hidden": ("hidden_size",),
    "ffn": ("ffn_hidden_size",),
    "attention": ("num_attention_heads", "num_query_groups"),
}
WHOLE = "student"


@dataclass(frozen=True)
class Setting:
    """One row: what is pruned, and how it is chosen. A choice that has no effect on the row is ""."""

    shape: str  # WHOLE or a name of ALONE
    method: str
    aggregation: str = ""
    neuron_site: str = ""
    depth_metric: str = ""
    layers: str = ""
    head_residual: str = ""
    residual_matrices: str = ""
    seed: str = ""

    @property
    def label(self) -> str:
        """The choices in words, without those that have no effect."""
        aggregation = self.aggregation and f"{self.aggregation} (batch/sequence)"
        residual = "" if self.head_residual in ("", "none") else f"{self.head_residual} in {self.residual_matrices}"
        seed = self.seed and f"seed {self.seed}"
        parts = [self.shape, self.method, seed, aggregation, self.neuron_site, self.depth_metric, self.layers, residual]
        return ", ".join(part for part in parts if part)


def shapes_of(teacher: Architecture, student: Architecture, per_axis: bool) -> dict[str, Architecture]:
    """The shapes to prune to, by name. Raises InputError unless the student is smaller than the teacher."""
    smaller = {
        name: fields
        for name, fields in ALONE.items()
        if any(getattr(student, field) < getattr(teacher, field) for field in fields)
    }
    if not smaller:
        raise no_target(teacher)
    shapes = {WHOLE: student}
    if per_axis and len(smaller) > 1:
        for name, fields in smaller.items():
            shapes[name] = teacher.replace(**{field: getattr(student, field) for field in fields})
    return shapes


def grid_of(
    config: AblateConfig, teacher: Architecture, shapes: dict[str, Architecture], seed: int, *, layers_given: bool
) -> list[Setting]:
    """Every row, in the order of the recipe's lists. `layers_given`: the student's layers are named, not chosen.

    Raises InputError for head residuals that a shape cannot have.
    """
    choices = itertools.product(
        shapes,
        config.methods,
        config.aggregations,
        config.neuron_sites,
        config.depth_metrics,
        config.layers,
        config.head_residuals,
        config.residual_matrices,
        [str(seed + number) for number in range(config.random_seeds)],
    )
    rows: dict[Setting, None] = {}
    for shape, *values in choices:
        setting = without_idle(Setting(shape, *values), teacher, shapes[shape], layers_given=layers_given)
        if setting.head_residual:
            matrices = setting.residual_matrices.split("+") if setting.residual_matrices else []
            check_residual(teacher, shapes[shape], setting.head_residual, matrices)
        rows[setting] = None
    return list(rows)


def without_idle(setting: Setting, teacher: Architecture, shape: Architecture, *, layers_given: bool) -> Setting:
    """`setting` with "" for every choice that this shape or method does not look at."""
    fewer = {name: getattr(shape, name) < getattr(teacher, name) for name in TARGETS}
    heads = fewer["num_attention_heads"] or fewer["num_query_groups"]
    idle: dict[str, Any] = {}
    if setting.method != "random":
        idle["seed"] = ""
    if setting.method != "activation" or not (fewer["hidden_size"] or fewer["ffn_hidden_size"] or heads):
        idle |= {"aggregation": "", "neuron_site": ""}
    if not fewer["ffn_hidden_size"]:
        idle["neuron_site"] = ""
    if setting.method != "activation":
        idle["depth_metric"] = ""
    if not fewer["num_layers"] or layers_given:
        idle |= {"depth_metric": "", "layers": ""}
    if teacher.num_layers - shape.num_layers == 1:  # a block of one
        idle["layers"] = ""
    if not heads:
        idle |= {"head_residual": "", "residual_matrices": ""}
    elif setting.head_residual == "none":
        idle["residual_matrices"] = ""
    return replace(setting, **idle)
