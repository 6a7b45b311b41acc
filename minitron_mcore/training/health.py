"""Steps whose loss or gradients are NaN or Inf: counted and logged; too many in a row end the run."""

from __future__ import annotations

from minitron_mcore.errors import DivergedError
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.runtime.agree import gathered
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.training.job import Job, Progress
from minitron_mcore.training.metrics import MetricsLog
from minitron_mcore.training.step import not_finite


def count_skipped(
    job: Job, progress: Progress, row: dict[str, float], batch: list[Microbatch], metrics: MetricsLog
) -> dict[str, float]:
    """What to log of `row`, a step just done: its finite values, and how many steps were skipped so far.

    A skipped step is logged as an event, with the numbers of its samples. Every rank calls, before `progress.advance`.
    Raises DivergedError at the `max_skipped_iterations`-th skipped step in a row.
    """
    bad = not_finite(row)
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if bad else 0
    if bad:
        progress.skipped_iterations += 1
        progress.nan_iterations += any(not name.endswith("grad-norm") for name in bad)
        iteration, limit = progress.iteration + 1, job.train.max_skipped_iterations
        samples = global_samples(batch)
        where = f"samples {in_ranges(samples)}" if samples else f"samples from {progress.consumed_samples} on"
        reason = ", ".join(f"{name} is {row[name]}" for name in bad)
        metrics.event(
            iteration,
            "skipped",
            {"reason": {name: str(row[name]) for name in bad}, "samples": samples},
            f" iteration {iteration:>8}/{job.iterations:>8} | skipped: {reason} | {where} | "
            f"{progress.skipped_in_a_row} in a row, of {limit} at most |",
        )
        if progress.skipped_in_a_row >= limit:
            raise DivergedError(
                f"iteration {iteration}, {where}: {reason}; {progress.skipped_in_a_row} iterations in a row were "
                f"skipped, so max_skipped_iterations={limit} ends the run; the newest checkpoint is from before them"
            )
    return {
        **{name: value for name, value in row.items() if name not in bad},
        "number of skipped iterations": progress.skipped_iterations,
        "number of nan iterations": progress.nan_iterations,
    }


def global_samples(batch: list[Microbatch]) -> list[int]:
    """Numbers of the samples in the global batch, in order; empty if the data have none. Every rank calls."""
    mine = [number for part in batch if part.samples is not None for number in part.samples.tolist()]
    return sorted(number for rank in gathered(mine, data_group()) for number in rank)


def in_ranges(numbers: list[int]) -> str:
    """[3, 4, 5, 9] -> "3-5, 9"."""
    words: list[str] = []
    start = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            first, last = numbers[start], numbers[index - 1]
            words.append(str(first) if first == last else f"{first}-{last}")
            start = index
    return ", ".join(words)
