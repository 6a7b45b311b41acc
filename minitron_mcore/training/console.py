"""Lines on the console: short enough to read, with Megatron's names. metrics.jsonl has everything, as has the console
with log.console=full."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta

WIDTH = 200  # of a short line, in characters
LARGE = 1e8


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))).replace(" days, ", "d ").replace(" day, ", "d ")


def _count(number: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f}{letter}"
    return f"{number:,.0f}"


def _fixed(digits: int) -> Callable[[float], str]:
    """`digits` decimals, or an exponent for very large numbers, such as the perplexity of a diverged model."""
    return lambda number: f"{number:.3E}" if LARGE <= abs(number) < math.inf else f"{number:.{digits}f}"


# Order and format on the console; other names follow in the order given.
FORMATS: dict[str, Callable[[float], str]] = {
    "consumed samples": _fixed(0),
    "tokens": _count,
    "elapsed time per iteration (ms)": _fixed(1),
    "time left": _duration,
    "throughput per GPU (TFLOP/s/GPU)": _fixed(3),
    "student throughput per GPU (TFLOP/s/GPU)": _fixed(3),
    "teacher throughput per GPU (TFLOP/s/GPU)": _fixed(3),
    "model FLOPs utilization (%)": _fixed(1),
    "tokens per second": _fixed(1),
    "tokens per second per GPU": _fixed(1),
    "peak memory (GiB)": _fixed(3),
    "learning-rate": "{:.3E}".format,
    "global batch size": _fixed(0),
    "lm loss": _fixed(6),
    "logits distillation loss": _fixed(6),
    "teacher lm loss": _fixed(6),
    "top-1 agreement": _fixed(4),
    "grad-norm": _fixed(3),
    "number of skipped iterations": _fixed(0),
    "number of nan iterations": _fixed(0),
}
# A short line has these, and as many of the other losses and shares as fit.
ALWAYS = {
    "tokens",
    "elapsed time per iteration (ms)",
    "time left",
    "learning-rate",
    "lm loss",
    "logits distillation loss",
    "grad-norm",
}
# Shown only in metrics.jsonl, except counts of skipped or NaN iterations above 0.
DETAILS = {
    "consumed samples",
    "throughput per GPU (TFLOP/s/GPU)",
    "student throughput per GPU (TFLOP/s/GPU)",
    "teacher throughput per GPU (TFLOP/s/GPU)",
    "tokens per second",
    "tokens per second per GPU",
    "peak memory (GiB)",
    "global batch size",
    "number of skipped iterations",
    "number of nan iterations",
}


def train_line(iteration: int, iterations: int, row: dict[str, float], *, full: bool) -> str:
    """One line for a step, or for the mean of several."""
    head = f" iteration {iteration:>{len(str(iterations))}}/{iterations} |"
    if full:
        return _line(head, row, list(row))
    always = [name for name in row if name in ALWAYS or (row[name] and name.startswith("number of"))]
    return _line(head, row, always, [name for name in row if name not in DETAILS | {*always}])


def validation_line(iteration: int, row: dict[str, float], *, full: bool) -> str:
    """One line per source, whose name follows `validation` in the names of its losses."""
    sources: dict[str, list[str]] = {}
    for name in row:
        sources.setdefault(name.partition(" validation")[2], []).append(name)
    lines = []
    for source, names in sources.items():
        always = [f"{loss} validation{source}" for loss in ("lm loss", "ppl", "logits distillation loss")]
        first = names if full else [name for name in always if name in names]
        rest = [name for name in names if name not in first]
        lines.append(_line(f" validation at iteration {iteration} |", row, first, rest))
    return "\n".join(lines)


def _line(head: str, row: dict[str, float], always: list[str], where_it_fits: list[str] | None = None) -> str:
    cells = {name: f" {name}: {FORMATS.get(name, _fixed(6))(row[name])} |" for name in row}
    chosen, length = set(always), len(head) + sum(len(cells[name]) for name in always)
    for name in where_it_fits or ():
        if length + len(cells[name]) <= WIDTH:
            chosen.add(name)
            length += len(cells[name])
    known = list(FORMATS)
    order = sorted(chosen, key=lambda name: known.index(name) if name in known else len(known) + list(row).index(name))
    return head + "".join(cells[name] for name in order)
