"""The part of `score` that leaves layers out: importance.depth_metrics, beside the pass over the activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.evaluation.questions import Task
from minitron_mcore.files import writing
from minitron_mcore.importance.config import LOGIT_METRICS, TASK_METRICS, TEXT_METRICS, blocks_of, measured
from minitron_mcore.importance.depth import measure_depth
from minitron_mcore.importance.depth_report import depth_text, write_csv, write_plot
from minitron_mcore.importance.scores import Scores
from minitron_mcore.jobs.score import ScoreJob, beside
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.runtime.start import Runtime


def with_depth(
    job: ScoreJob,
    runtime: Runtime,
    chunks: Sequence[LanguageModel],
    batches: Callable[[], Iterable[Microbatch]],
    scores: Scores,
) -> Scores:
    """`scores` with the depth metrics of the recipe; the table is printed, CSV and plot are written beside the target.

    `batches()` gives this rank's calibration microbatches, on the device; read once, the same for every block.
    Every rank calls.
    """
    recipe, importance, architecture = job.recipe, job.recipe.importance, scores.architecture
    metrics, lengths = measured(importance.depth_metrics), importance.block_lengths
    if not metrics:
        return scores
    for line in costs(metrics, lengths, architecture.num_layers, importance.num_samples, job.task):
        runtime.print(f"score: depth: {line}")
    kept = kept_bytes(architecture, metrics, recipe.precision, importance.num_samples, recipe.data.sequence_length)
    kept //= data_group().size() * (recipe.parallel.tensor if recipe.parallel.sequence else 1)
    if kept:
        words = "each rank of the last pipeline stage keeps final hidden states"
        runtime.print(f"score: depth: {words}, {kept / 2**20:,.1f} MiB of host memory")
    with runtime.progress(len(blocks_of(metrics, lengths, architecture.num_layers)), "blocks", "score: depth") as bar:
        table = measure_depth(
            chunks,
            list(batches()),
            architecture,
            metrics,
            lengths,
            task=job.task,
            micro_batch_size=importance.micro_batch_size,
            report=lambda done, _: bar.reach(done),
        )
    scores = dataclasses.replace(scores, depth={**scores.depth, **table.damage})
    as_csv, as_plot = beside(job.target)

    @writing(f"scores={job.target}")
    def write() -> None:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        write_csv(scores, table, as_csv)
        write_plot(scores, table, as_plot)

    runtime.on_main(write)
    runtime.print(f"{depth_text(scores, table)}\nscore: depth -> {as_csv}, {as_plot}")
    return scores


def costs(
    metrics: Sequence[str], lengths: Sequence[int], num_layers: int, num_samples: int, task: Task | None = None
) -> list[str]:
    """The number of passes, one line for all metrics that share them; printed before they run."""
    passes = 1 + len(blocks_of(metrics, lengths, num_layers))
    terms = ["1 whole"] + [f"{num_layers - length + 1} without {length}" for length in lengths]
    shares: list[tuple[tuple[str, ...], int, str]] = [(TEXT_METRICS, num_samples, f"{num_samples:,} samples")]
    if task is not None:
        rows, questions = len(task.rows), len(task.questions)
        shares.append((TASK_METRICS, rows, f"{rows:,} choices of {questions:,} questions"))
    return [
        f"{', '.join(names)}: {passes:,} passes ({' + '.join(terms)}) x {words} = {passes * number:,} forward passes"
        for kind, number, words in shares
        if (names := [metric for metric in metrics if metric in kind])
    ]


def kept_bytes(
    architecture: Architecture, metrics: Sequence[str], precision: str, num_samples: int, sequence_length: int
) -> int:
    """Host memory for the whole model's final hidden states, summed over data-parallel ranks and, under sequence
    parallelism, over tensor-parallel ones: divide by their number for what a rank keeps."""
    wanted = any(metric in LOGIT_METRICS for metric in metrics)
    return wanted * num_samples * sequence_length * architecture.hidden_size * BYTES[precision]
