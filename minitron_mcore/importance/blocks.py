"""The blocks of layers that are left out for the depth metrics: which, and at what cost. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.evaluation.questions import Task
from minitron_mcore.importance.config import TASK_METRICS

LOGIT_METRICS = ("logit_mse", "normalized_logit_mse")
TEXT_METRICS = ("lm_loss", *LOGIT_METRICS)


def check_blocks(metrics: Sequence[str], lengths: Sequence[int], num_layers: int) -> None:
    """Raise InputError for blocks that are empty or all of the model."""
    key = "importance.block_lengths"
    if metrics and not lengths:
        raise InputError(key, [], "is empty", "name the lengths of the blocks to leave out, as in [1]")
    for length in lengths if metrics else ():
        if not 1 <= length < num_layers:
            rule = f"holds {length}, but the model has {num_layers} layers"
            raise InputError(key, list(lengths), rule, f"choose lengths from 1 to {num_layers - 1}")


def measured(metrics: Iterable[str]) -> list[str]:
    """The metrics that need passes of their own; block influence comes with the activations."""
    return [metric for metric in metrics if metric != "block_influence"]


def blocks_of(lengths: Sequence[int], num_layers: int) -> list[range]:
    """Every block of every length, by length, then by first layer."""
    return [range(start, start + length) for length in lengths for start in range(num_layers - length + 1)]


def costs(
    metrics: Sequence[str], lengths: Sequence[int], num_layers: int, num_samples: int, task: Task | None = None
) -> list[str]:
    """The number of passes, one line for all metrics that share them; printed before they run."""
    passes = 1 + len(blocks_of(lengths, num_layers))
    terms = ["1 whole"] + [f"{num_layers - length + 1} without {length}" for length in lengths]
    shares: list[tuple[tuple[str, ...], int, str]] = [(TEXT_METRICS, num_samples, f"{num_samples:,} samples")]
    if task is not None:
        rows, questions = len(task.rows), len(task.questions)
        shares.append((TASK_METRICS, rows, f"{rows:,} choices of {questions:,} questions"))
    lines = []
    for kind, number, words in shares:
        if names := [metric for metric in metrics if metric in kind]:
            lines.append(
                f"{', '.join(names)}: {passes:,} passes ({' + '.join(terms)}) x {words} = {passes * number:,} forward "
                "passes"
            )
    return lines


def kept_bytes(
    architecture: Architecture, metrics: Sequence[str], precision: str, num_samples: int, sequence_length: int
) -> int:
    """Host memory for the whole model's final hidden states, summed over data-parallel ranks and, under sequence
    parallelism, over tensor-parallel ones: divide by their number for what a rank keeps."""
    wanted = any(metric in LOGIT_METRICS for metric in metrics)
    return wanted * num_samples * sequence_length * architecture.hidden_size * BYTES[precision]
