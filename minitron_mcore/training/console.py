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


# Order and format on the console; other names follow in the order given. A short line has what is marked ALWAYS, and as
# many of the unmarked losses and shares as fit; DETAIL is in metrics.jsonl alone, but for counts of skipped or NaN
# iterations above 0.
ALWAYS, DETAIL = "always", "detail"
COLUMNS: dict[str, tuple[Callable[[float], str], str]] = {
    "consumed samples": (_fixed(0), DETAIL),
    "tokens": (_count, ALWAYS),
    "elapsed time per iteration (ms)": (_fixed(1), ALWAYS),
    "time left": (_duration, ALWAYS),
    "throughput per GPU (TFLOP/s/GPU)": (_fixed(3), DETAIL),
    "student throughput per GPU (TFLOP/s/GPU)": (_fixed(3), DETAIL),
    "teacher throughput per GPU (TFLOP/s/GPU)": (_fixed(3), DETAIL),
    "model FLOPs utilization (%)": (_fixed(1), ""),
    "tokens per second": (_fixed(1), DETAIL),
    "tokens per second per GPU": (_fixed(1), DETAIL),
    "peak memory (GiB)": (_fixed(3), DETAIL),
    "learning-rate": ("{:.3E}".format, ALWAYS),
    "global batch size": (_fixed(0), DETAIL),
    "lm loss": (_fixed(6), ALWAYS),
    "logits distillation loss": (_fixed(6), ALWAYS),
    "teacher lm loss": (_fixed(6), ""),
    "top-1 agreement": (_fixed(4), ""),
    "grad-norm": (_fixed(3), ALWAYS),
    "number of skipped iterations": (_fixed(0), DETAIL),
    "number of nan iterations": (_fixed(0), DETAIL),
}
OTHER = (_fixed(6), "")


def train_line(iteration: int, iterations: int, row: dict[str, float], *, full: bool) -> str:
    """One line for a step, or for the mean of several."""
    head = f" iteration {iteration:>{len(str(iterations))}}/{iterations} |"
    if full:
        return _line(head, row, list(row))
    marks = {name: COLUMNS.get(name, OTHER)[1] for name in row}
    always = [name for name in row if marks[name] == ALWAYS or (row[name] and name.startswith("number of"))]
    return _line(head, row, always, [name for name in row if not marks[name]])


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
    cells = {name: f" {name}: {COLUMNS.get(name, OTHER)[0](row[name])} |" for name in row}
    chosen, length = set(always), len(head) + sum(len(cells[name]) for name in always)
    for name in where_it_fits or ():
        if length + len(cells[name]) <= WIDTH:
            chosen.add(name)
            length += len(cells[name])
    return head + "".join(cells[name] for name in dict.fromkeys([*COLUMNS, *row]) if name in chosen)
