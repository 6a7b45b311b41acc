"""The part of `score` that leaves layers out: importance.depth_metrics, beside the pass over the activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from minitron_mcore.architecture import Architecture
from minitron_mcore.data.corpus import check_file
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.files import writing
from minitron_mcore.importance.depth import check_blocks, costs, kept_bytes, measure_depth, measured
from minitron_mcore.importance.depth_report import depth_text, write_csv, write_plot
from minitron_mcore.importance.multiple_choice import Task, load_task
from minitron_mcore.importance.scores import Scores
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.runtime.pace import Pace
from minitron_mcore.runtime.start import Runtime


def beside(scores: Path) -> tuple[Path, Path]:
    """scores.safetensors -> scores.depth.csv, scores.depth.png"""
    return scores.with_name(f"{scores.stem}.depth.csv"), scores.with_name(f"{scores.stem}.depth.png")


def prepare(recipe: Recipe, runtime: Runtime, architecture: Architecture, tokenizer: Tokenizer | None) -> Task | None:
    """Refuse what cannot be measured, before a model is built, and read the questions, if any. Every rank calls."""
    importance = recipe.importance
    metrics = measured(importance.depth_metrics)
    check_blocks(metrics, importance.block_lengths, architecture.num_layers)
    if metrics and recipe.scores:
        for path in beside(Path(recipe.scores)):
            check_file(str(path), "scores")
    file = importance.multiple_choice
    if file is None or tokenizer is None:
        return None
    return runtime.on_main(lambda: load_task(file, tokenizer, architecture.max_position_embeddings))


def with_depth(
    recipe: Recipe,
    runtime: Runtime,
    chunks: Sequence[LanguageModel],
    batches: Callable[[], Iterable[Microbatch]],
    task: Task | None,
    scores: Scores,
    path: Path,
) -> Scores:
    """`scores` with the depth metrics of the recipe; the table is printed, CSV and plot are written beside `path`.

    `batches()` gives this rank's calibration microbatches, on the device; read once, the same for every block. Every
    rank calls.
    """
    importance, architecture = recipe.importance, scores.architecture
    metrics, lengths = measured(importance.depth_metrics), importance.block_lengths
    if not metrics:
        return scores
    for line in costs(metrics, lengths, architecture.num_layers, importance.num_samples, task):
        runtime.print(f"score: depth: {line}")
    kept = (
        kept_bytes(architecture, metrics, recipe.precision, importance.num_samples, recipe.data.sequence_length)
        // data_group().size()
    )
    if kept:
        kept //= recipe.parallel.tensor if recipe.parallel.sequence else 1
        runtime.print(
            f"score: depth: final hidden states are kept, {kept / 2**20:,.1f} MiB of a last rank's host memory"
        )
    pace = Pace()

    def report(done: int, total: int) -> None:
        if pace.is_due(done, total):
            runtime.print(f"score: depth: {pace.line(done, total, 'blocks')}")

    table = measure_depth(
        chunks,
        list(batches()),
        architecture,
        metrics,
        lengths,
        task=task,
        micro_batch_size=importance.micro_batch_size,
        report=report,
    )
    scores = dataclasses.replace(scores, depth={**scores.depth, **table.damage})
    as_csv, as_plot = beside(path)

    def write() -> None:
        with writing(f"scores={path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_csv(scores, table, as_csv)
            write_plot(scores, table, as_plot)

    runtime.on_main(write)
    runtime.print(f"{depth_text(scores, table)}\nscore: depth -> {as_csv}, {as_plot}")
    return scores
