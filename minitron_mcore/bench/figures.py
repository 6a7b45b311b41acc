"""From the times of steps to what a table shows, and the file that `search` reads. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from minitron_mcore.tables import table

# The papers' own speed-ups, for reference: arXiv 2408.11796.
PAPERS = {"depth": 2.7, "width": 1.8}
PAPERS_LINE = (
    "the paper's students (arXiv 2408.11796; Llama-3.1-Minitron 4B over Llama 3.1 8B, TensorRT-LLM, FP8, one H100): "
    "depth 2.7x, width 1.8x"
)


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    batch_size: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.prompt_tokens} prompt and {self.output_tokens} output tokens"


@dataclass(frozen=True)
class Run:
    """One request of a batch. seconds: from its start until every sequence had its first, second, … token. memory: see
    worker.py."""

    seconds: Sequence[float]
    memory: int | None

    @property
    def steps(self) -> list[float]:
        """Seconds of each decode step: every one but the first, which is the prefill."""
        return [after - before for before, after in zip(self.seconds, self.seconds[1:], strict=False)]


def figures(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """What `runs` of one case say: medians over the runs, and their spread, half the distance of the quartiles.

    prefill_latency: seconds until all sequences have their first token. decode_latency: of a step, the median of a
    run's, which lies half-way through the output. Percentiles are of all steps of all runs, and of whole requests.
    """
    prefill = [run.seconds[0] for run in runs]
    decode = [statistics.median(run.steps) for run in runs]
    steps = [step for run in runs for step in run.steps]
    memory = [run.memory for run in runs if run.memory is not None]
    rates = {
        "prefill_latency": prefill,
        "decode_latency": decode,
        "prefill_throughput": [case.batch_size * case.prompt_tokens / each for each in prefill],
        "decode_throughput": [case.batch_size / each for each in decode],
    }
    return {
        **{name: statistics.median(values) for name, values in rates.items()},
        "spread": {name: spread(values) for name, values in rates.items()} if len(runs) > 1 else {},
        "step_percentiles": percentiles(steps),
        "request_percentiles": percentiles([run.seconds[-1] for run in runs]),
        "memory": max(memory) if memory else None,
        "repeats": len(runs),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99, between two values in proportion."""
    return {f"p{share}": float(numpy.percentile(values, share)) for share in (50, 90, 99)}


def spread(values: Sequence[float]) -> float:
    """Half the way from the lower quartile to the upper: half of the values lie about as near to the median."""
    lower, upper = numpy.percentile(values, (25, 75))
    return float(upper - lower) / 2


def with_ratios(rows: Sequence[dict[str, Any]], first: str) -> list[dict[str, Any]]:
    """`rows` with their speed over that of the model `first` in the same engine, at the same sizes."""
    sizes = ("engine", "batch_size", "prompt_tokens", "output_tokens")
    of_first = {tuple(row[name] for name in sizes): row for row in rows if row["model"] == first}
    done = []
    for row in rows:
        base = of_first.get(tuple(row[name] for name in sizes))
        names = ("prefill_throughput", "decode_throughput") if base else ()
        done.append({**row, "speed_up": {name.split("_")[0]: row[name] / base[name] for name in names if base}})
    return done


def what_is_shown(repeats: int) -> str:
    """Of the speeds in `tables`, in words."""
    return "one run" if repeats == 1 else f"medians of {repeats} runs ± half the distance of their quartiles"


def tables(rows: Sequence[dict[str, Any]], first: str) -> str:
    """A table for each case, in the order measured."""
    cases: dict[Case, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(Case(row["batch_size"], row["prompt_tokens"], row["output_tokens"]), []).append(row)
    header = (
        *("engine", "model", "first token", "prefill", "decode tokens/s", f"of {first}", "step p50", "p90", "p99"),
        *("request p50", "p99", "memory"),
    )
    return "\n\n".join(
        f"{case}\n{table([_line(row) for row in of], header, left={0, 1})}" for case, of in cases.items()
    )


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    step, request = row["step_percentiles"], row["request_percentiles"]
    ratio = row["speed_up"].get("decode")
    decode = f"{row['decode_throughput']:,.1f}"
    if (around := row["spread"].get("decode_throughput")) is not None:
        decode += f" ± {around:,.1f}"
    return (
        row["engine"],
        row["model"],
        _ms(row["prefill_latency"]),
        f"{row['prefill_throughput']:,.0f}/s",
        decode,
        "" if ratio is None else f"{ratio:.2f}x",
        *(_ms(step[name]) for name in ("p50", "p90", "p99")),
        *(_ms(request[name]) for name in ("p50", "p99")),
        "" if row["memory"] is None else f"{row['memory'] / 2**20:,.1f} MiB",
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.2f} ms"
