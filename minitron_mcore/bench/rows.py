"""What a file of measured speeds holds: a row for each engine, model and case (estimate/measured.py reads it). Pure."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.bench.engines import OURS
from minitron_mcore.bench.figures import Case, figures
from minitron_mcore.bench.measure import Measured, Seat
from minitron_mcore.runtime.config import ParallelConfig


def rows_of(
    measured: Measured,
    seats: Sequence[Seat],
    cases: Sequence[Case],
    architectures: Mapping[str, Architecture],
    *,
    device: str,
    precision: str,
    parallel: ParallelConfig,
    data: int,
) -> list[dict[str, Any]]:
    """Case by case, in the order of `seats`. data: data-parallel size. same_tokens: the share of sequences that are
    those of the model's first engine; null of that one."""
    rows = []
    for case in cases:
        for seat in seats:
            key = (seat.engine, seat.model), case
            if not measured.is_whole(*key):
                continue
            ours = seat.engine == OURS
            others = [(each.engine, each.model) for each in seats if each.model == seat.model]
            reference = next(measured.tokens[other, case] for other in others if (other, case) in measured.tokens)
            made = measured.tokens[key]
            layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": data} if ours else {"tensor": 1}
            rows.append(
                {
                    **{"engine": seat.engine, "version": seat.version, "model": seat.model, "device": device},
                    **{name: getattr(case, name) for name in ("batch_size", "prompt_tokens", "output_tokens")},
                    **{"weights": precision, "kv_cache": seat.kv_cache, **layout},
                    **figures(case, measured.runs[key]),
                    "same_tokens": None if made is reference else same_tokens(made, reference),
                    "parameters": architectures[seat.model].num_parameters,
                    "architecture": architectures[seat.model].to_dict(),
                }
            )
    return rows


def failures_of(measured: Measured) -> list[dict[str, Any]]:
    """What engines said where they failed with a model; with the sizes, where they failed at these alone."""
    return [
        {"engine": engine, "model": model, **(asdict(case) if case else {}), "said": said}
        for ((engine, model), case), said in measured.failures.items()
    ]


def same_tokens(tokens: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of sequences in which two engines made the same tokens."""
    return statistics.fmean(list(one) == list(two) for one, two in zip(tokens, others, strict=True))


def cpu_name() -> str:
    """As the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine() or "cpu"
