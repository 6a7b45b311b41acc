"""`ablate`: a grid of importance settings, each pruned in memory and evaluated untrained. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.data.described import describe, held_out_part
from minitron_mcore.errors import InputError
from minitron_mcore.importance.config import TASK_METRICS, ImportanceConfig
from minitron_mcore.importance.scores import Scores
from minitron_mcore.jobs import inputs
from minitron_mcore.jobs.job import NOTHING, Item, Model, ModelJob, Promises
from minitron_mcore.jobs.plan import plan_at
from minitron_mcore.jobs.score import ScoreJob
from minitron_mcore.jobs.score import resolve as resolve_score
from minitron_mcore.pruning.config import PruneConfig, StudentConfig
from minitron_mcore.pruning.plan_file import PruningPlan
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World
from minitron_mcore.search.ablation import Row, Setting, grid_of, read_rows, shapes_of
from minitron_mcore.search.config import of_share

PARTS = "parts"  # tables of shares, which jobs beside each other write


@dataclass(frozen=True, kw_only=True)
class AblateJob(ModelJob):
    """A row of the table `target` for each setting of `grid`, whose shapes are `shapes`.

    done: the rows that are there. made_with: fingerprint of what all rows share. scoring: the pass that serves every
    setting that needs one. is_share: `grid` is that of ablate.share alone, and the table a part.
    """

    shapes: dict[str, Architecture]
    grid: tuple[Setting, ...]
    made_with: str
    done: dict[Setting, Row]
    scoring: ScoreJob | None
    is_share: bool


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING) -> AblateJob:
    """`teacher.checkpoint`, `student.*` and `ablate.*` -> the folder `output`. Raises InputError."""
    needed = {"teacher.checkpoint": "the teacher's folder", "output": "the folder to write to"}
    inputs.require(recipe, needed, inputs.TEXT)
    folder = inputs.output_folder(recipe.output, "output")
    teacher = inputs.find_reader(recipe, world, promises, "teacher.checkpoint", whole="ablate")
    student = inputs.asked_shape(recipe, recipe.student, teacher.architecture)
    shapes = shapes_of(teacher.architecture, student, recipe.ablate.per_axis)
    for shape in shapes.values():
        inputs.check_model(shape, recipe, world)
    given = recipe.student.layers is not None
    grid = grid_of(recipe.ablate, teacher.architecture, shapes, recipe.seed, layers_given=given)
    importance = importance_of(recipe, grid, teacher.architecture, shapes)
    made_with, share, parts = fingerprint(recipe, teacher), recipe.ablate.share, folder / PARTS
    path = folder / "ablation.csv"
    done = {row.setting: row for file in (path, *sorted(parts.glob("*.csv"))) for row in read_rows(file, made_with)}
    if share:
        grid = list(of_share(grid, share))
        path = parts / f"{share.replace('/', '-of-')}.csv"
    scoring = None
    if any(setting.method == "activation" and setting not in done for setting in grid):
        # A scores file of its own for every way of scoring.
        said = json.dumps(dataclasses.asdict(importance), sort_keys=True)
        scores = folder / f"scores-{hashlib.sha256(said.encode()).hexdigest()[:8]}.safetensors"
        named = dataclasses.replace(recipe, importance=importance, scores=str(scores))
        scoring = resolve_score(named, world, promises)
    part = held_out_part(recipe.data, recipe.evaluate.samples, promises.prefixes)
    held_out = describe(recipe.data, [part], teacher.tokenizer, promises.prefixes)
    return AblateJob(
        recipe,
        reads=(*(scoring.reads if scoring else (teacher,)), *inputs.data_items(held_out)),
        makes=(Item("output", str(path), f"table of {len(grid)} students"),),
        model=teacher,
        target=path,
        shapes=shapes,
        grid=tuple(grid),
        made_with=made_with,
        done=done,
        scoring=scoring,
        is_share=share is not None,
    )


def importance_of(
    recipe: Recipe, grid: Sequence[Setting], teacher: Architecture, shapes: dict[str, Architecture]
) -> ImportanceConfig:
    """The one scoring pass that serves every row of `grid`."""

    def named(choice: str) -> list[str]:
        return [*dict.fromkeys(filter(None, (getattr(row, choice) for row in grid)))]

    pairs, sites = named("aggregation") or ["l2/mean"], named("neuron_site") or [recipe.importance.neuron_site]
    metrics = [metric for metric in named("depth_metric") if metric != "block_influence"]
    lengths = {
        teacher.num_layers - shapes[row.shape].num_layers if row.layers == "contiguous" else 1
        for row in grid
        if row.depth_metric in metrics
    }
    batch, _, sequence = pairs[0].partition("/")
    try:
        return dataclasses.replace(
            recipe.importance,
            method="activation",
            batch_aggregation=batch,
            sequence_aggregation=sequence,
            neuron_site=sites[0],
            aggregations=pairs[1:],
            neuron_sites=sites[1:],
            depth_metrics=metrics,
            block_lengths=sorted(lengths) or [1],
            multiple_choice=recipe.importance.multiple_choice if {*metrics} & {*TASK_METRICS} else None,
        )
    except InputError as error:
        raise error.under("ablate") from error


def fingerprint(recipe: Recipe, teacher: Model) -> str:
    """Of everything that a row's loss depends on, except its own choices and the layout."""
    importance, student = recipe.importance, recipe.student
    text = {name: getattr(recipe.data, name) for name in ("train", "valid", "calibration", "split", "sequence_length")}
    said: dict[str, Any] = {
        "teacher": [str(teacher.folder.resolve()), teacher.iteration],
        "student": {**inputs.sizes_of(student), "layers": student.layers, "ratios": student.ratios},
        "divisible_by": recipe.prune.divisible_by,
        "data": text,
        "tokenizer": teacher.tokenizer and teacher.tokenizer.fingerprint,
        "num_samples": importance.num_samples,
        "multiple_choice": importance.multiple_choice,
        "evaluate": recipe.evaluate.samples,
        "seed": recipe.seed,
        "precision": recipe.precision,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def plan_of(recipe: Recipe, setting: Setting, scores: Scores, shape: Architecture) -> PruningPlan:
    """The plan of `setting` for `shape`."""
    if setting.aggregation:
        variants = [scores.primary, *scores.variants]
        wanted = [name for name in variants if name.startswith(f"{setting.aggregation}/{setting.neuron_site}")]
        scores = scores.variant(wanted[0])
    whole = shape.num_layers < scores.architecture.num_layers
    chosen: dict[str, Any] = {name: getattr(setting, name) for name in ("layers", "depth_metric", "head_residual")}
    chosen["residual_matrices"] = [*filter(None, setting.residual_matrices.split("+"))]
    student = StudentConfig(**inputs.sizes_of(shape), layers=recipe.student.layers if whole else None)
    return plan_at(recipe, scores, student, PruneConfig(**{name: value for name, value in chosen.items() if value}))
