"""`ablate`: a grid of importance settings; each prunes the teacher in memory and is evaluated, untrained.

output/ablation.csv                  a line for each student; the same command computes none of them again
output/ablation.png                  the same, as bars
output/scores-DIGEST.safetensors     one scoring pass for all settings (by a fingerprint of what was scored)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.evaluation.held_out import held_out, held_out_batches
from minitron_mcore.evaluation.lm_loss import mean_loss
from minitron_mcore.files import writing
from minitron_mcore.importance.baselines import random_scores
from minitron_mcore.importance.config import ImportanceConfig
from minitron_mcore.importance.magnitude import magnitude_scores
from minitron_mcore.importance.scores import Scores, load_scores
from minitron_mcore.jobs.score import resolve as resolve_score
from minitron_mcore.jobs.tokenizers import checkpoint_tokenizer
from minitron_mcore.model.gpt import build_model
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.pruning.in_memory import prune_chunks
from minitron_mcore.pruning.plan import TARGETS, PruningPlan, make_plan
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.runtime.world import World
from minitron_mcore.search.ablation_grid import Setting, grid_of, shapes_of
from minitron_mcore.search.ablation_results import Row, read_rows, squares, table, write_plot, write_rows
from minitron_mcore.stages import score
from minitron_mcore.stages.common import asked_shape, check_model, lay_out, output_folder, refuse_context


def run(recipe: Recipe, runtime: Runtime) -> list[Row]:
    """Fill the table of `output`, print and plot it; every rank calls, and gets all rows."""
    refuse_context(recipe, "ablate")
    lay_out(recipe, runtime)
    folder = output_folder(recipe.output, "output")
    teacher, iteration = find_checkpoint(recipe.teacher.checkpoint, "teacher.checkpoint")
    architecture = read_architecture(teacher)
    check_model(architecture, recipe)
    shapes = shapes_of(architecture, asked_shape(recipe, recipe.student, architecture), recipe.ablate.per_axis)
    for shape in shapes.values():
        check_model(shape, recipe)
    given = recipe.student.layers is not None
    grid = grid_of(recipe.ablate, architecture, shapes, recipe.seed, layers_given=given)
    tokenizer = checkpoint_tokenizer(recipe, teacher)
    importance = importance_of(recipe, grid, architecture, shapes)

    path, made_with = folder / "ablation.csv", fingerprint(recipe, teacher, iteration, tokenizer)
    done = {row.setting: row for row in runtime.on_main(lambda: read_rows(path, made_with))}
    left = [setting for setting in grid if setting not in done]
    runtime.print(f"ablate: {len(grid)} students of {teacher}, {len(grid) - len(left)} done before -> {path}")
    scores = read_scores(recipe, runtime, importance, left, (teacher, iteration, architecture))
    chunks = as_chunks(build_model(architecture, recipe.parallel, recipe.precision, trainable=False))
    load_weights(teacher, iteration, chunks, architecture)
    groups = held_out_groups(recipe, tokenizer)

    def loss_of(model: list[torch.nn.Module]) -> dict[str, float]:
        return mean_loss(model, groups, Objective(LossSettings(architecture.vocab_size)))

    whole = loss_of(chunks)["lm loss"]
    runtime.print(f"ablate: the teacher's lm loss is {whole:.4f}")
    for number, setting in enumerate(left, start=1):
        plan = plan_of(recipe, setting, scores[setting.method, setting.seed], shapes[setting.shape])
        student = as_chunks(prune_chunks(chunks, plan))
        found = loss_of(student)
        done[setting] = Row(setting, found["lm loss"], found["ppl"], plan.student.num_parameters)
        del student
        runtime.on_main(partial(save, list(done.values()), path, made_with))
        runtime.print(f"ablate: [{number}/{len(left)}] {found['lm loss']:.4f}  {setting.label}")
    # Rows of earlier, larger grids stay in the file; shown are those of this one.
    rows = [done[setting] for setting in grid]
    picture = path.with_suffix(".png")

    def draw() -> None:
        with writing(f"output={folder}"):
            write_plot(rows, whole, picture)

    runtime.on_main(draw)
    runtime.print("\n\n".join(["", table(rows, whole), *squares(rows), f"ablate: -> {path}, {picture}"]))
    return rows


def importance_of(
    recipe: Recipe, grid: list[Setting], teacher: Architecture, shapes: dict[str, Architecture]
) -> ImportanceConfig:
    """The one scoring pass that serves every row of `grid`."""
    pairs = list(dict.fromkeys(row.aggregation for row in grid if row.aggregation)) or ["l2/mean"]
    sites = list(dict.fromkeys(row.neuron_site for row in grid if row.neuron_site)) or [recipe.importance.neuron_site]
    metrics = dict.fromkeys(row.depth_metric for row in grid if row.depth_metric)
    metrics.pop("block_influence", None)
    lengths = {
        teacher.num_layers - shapes[row.shape].num_layers if row.layers == "contiguous" else 1
        for row in grid
        if row.depth_metric in metrics
    }
    batch, _, sequence = pairs[0].partition("/")
    return dataclasses.replace(
        recipe.importance,
        method="activation",
        batch_aggregation=batch,
        sequence_aggregation=sequence,
        neuron_site=sites[0],
        aggregations=pairs[1:],
        neuron_sites=sites[1:],
        depth_metrics=list(metrics),
        block_lengths=sorted(lengths) or [1],
        multiple_choice=recipe.importance.multiple_choice if {*metrics} & {"accuracy", "normalized_accuracy"} else None,
    )


def fingerprint(recipe: Recipe, teacher: Path, iteration: int, tokenizer: Tokenizer) -> str:
    """Of everything that a row's loss depends on, but for its own choices and the layout."""
    importance = recipe.importance
    text = {name: getattr(recipe.data, name) for name in ("train", "valid", "calibration", "split", "sequence_length")}
    student = {name: getattr(recipe.student, name) for name in (*TARGETS, "layers", "ratios")}
    said: dict[str, Any] = {
        "teacher": [str(teacher.resolve()), iteration],
        "student": student,
        "divisible_by": recipe.prune.divisible_by,
        "data": text,
        "tokenizer": tokenizer.fingerprint,
        "num_samples": importance.num_samples,
        "multiple_choice": importance.multiple_choice,
        "evaluate": recipe.evaluate.samples,
        "seed": recipe.seed,
        "precision": recipe.precision,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def read_scores(
    recipe: Recipe,
    runtime: Runtime,
    importance: ImportanceConfig,
    left: list[Setting],
    teacher: tuple[Path, int, Architecture],
) -> dict[tuple[str, str], Scores]:
    """(method, seed) -> its scores, for every row that is left; activations in one pass. Every rank calls."""
    folder, iteration, architecture = teacher
    found: dict[tuple[str, str], Scores] = {}
    for method, seed in dict.fromkeys((row.method, row.seed) for row in left):
        if method == "random":
            found[method, seed] = random_scores(architecture, int(seed))
        elif method == "magnitude":
            found[method, seed] = magnitude_scores(folder, iteration, architecture)
        else:
            said = json.dumps(dataclasses.asdict(importance), sort_keys=True)
            name = f"scores-{hashlib.sha256(said.encode()).hexdigest()[:8]}.safetensors"
            scoring = dataclasses.replace(recipe, importance=importance, scores=str(Path(recipe.output or "") / name))
            job = resolve_score(scoring, World(size=runtime.world_size))
            found[method, seed] = load_scores(score.run(job, runtime))
    return found


def held_out_groups(recipe: Recipe, tokenizer: Tokenizer) -> list[list[Microbatch]]:
    """The held-out sequences of this data-parallel rank, read once for all students."""
    config = recipe.evaluate
    dataset = held_out(recipe.data, tokenizer, config.samples, seed=recipe.seed)
    samples = min(config.samples, len(dataset))
    size = config.micro_batch_size
    return list(held_out_batches(dataset, samples, micro_batch_size=size, parallel=recipe.parallel))


def plan_of(recipe: Recipe, setting: Setting, scores: Scores, shape: Architecture) -> PruningPlan:
    """What `setting` keeps for `shape`."""
    if setting.aggregation:
        variants = [scores.primary, *scores.variants]
        wanted = [name for name in variants if name.startswith(f"{setting.aggregation}/{setting.neuron_site}")]
        scores = scores.variant(wanted[0])
    whole = shape.num_layers < scores.architecture.num_layers
    return make_plan(
        scores,
        {name: getattr(shape, name) for name in TARGETS},
        layers=setting.layers or "scattered",
        keep_layers=recipe.student.layers if whole else None,
        tensor=recipe.parallel.tensor,
        pipeline=recipe.parallel.pipeline,
        sequence_length=recipe.data.sequence_length,
        depth_metric=setting.depth_metric or "block_influence",
        head_residual=setting.head_residual or "none",
        residual_matrices=setting.residual_matrices.split("+") if setting.residual_matrices else ["query", "output"],
    )


def save(rows: list[Row], path: Path, made_with: str) -> None:
    with writing(f"output={path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(rows, path, made_with)
