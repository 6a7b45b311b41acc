"""The sections on what the models can do: tasks, texts, speed. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from minitron_mcore.report.figures.rows import dots
from minitron_mcore.report.gather.measured import Score
from minitron_mcore.report.gather.report import Report
from minitron_mcore.report.page.parts import NONE, Drawn, Part, Section, Table, Words, decimals, whole
from minitron_mcore.tables import counted

PROMPTS = 8  # more are in the file
# The share that is right, by the harness's names.
RIGHT = ("acc", "acc_norm", "exact_match", "pass@1", "f1")


def tasks(report: Report) -> Section | None:
    """Scores by task and model, each beside the first model's."""
    found = report.scores
    if not found:
        return None
    models = [*dict.fromkeys(each.model for each in found)]
    by_place = {(each.task, each.metric, each.model): each for each in found}
    known = {each.model for each in found if each.published is not None}
    compared = {each.model for each in found if each.difference is not None}
    rows = []
    for task, metric in dict.fromkeys((each.task, each.metric) for each in found):
        there = {model: by_place[task, metric, model] for model in models if (task, metric, model) in by_place}
        shots = next(iter(there.values())).shots
        cells = [task, metric, whole(shots)]
        for model in models:
            cells.append(_with_error(there.get(model)))
            if model in known:
                cells.append(decimals(there[model].published if model in there else None, 4))
            if model in compared:
                cells.append(_difference(there.get(model)))
        rows.append(tuple(cells))
    head = ["task", "metric", "shots"]
    for model in models:
        head += [model, *([f"{model}, published"] if model in known else [])]
        head += [f"{model} − {models[0]}"] if model in compared else []
    caption = "Scores on tasks, with standard errors, by the LM Evaluation Harness"
    parts: list[Part] = [Table(caption, tuple(head), tuple(rows), (1,), is_folded=len(rows) > 30)]
    shown: dict[str, dict[str, tuple[float, float | None]]] = {}
    for each in found:
        if each is _shown(each, found):
            error = None if each.error is None else 100 * each.error
            shown.setdefault(each.task, {})[each.model] = (100 * each.value, error)
    if shown:
        title = "Scores on tasks"
        svg = dots("tasks", title, shown, "right, %", report.shades, digits=1)
        parts.append(Drawn(svg, f"{title}; a bar is one standard error"))
    return Section("tasks", "Evaluation on tasks", parts)


def _shown(score: Score, found: Sequence[Score]) -> Score | None:
    """Of the scores of one model on one task, the one that a figure shows: the first of RIGHT that there is."""
    there = {each.metric: each for each in found if (each.task, each.model) == (score.task, score.model)}
    return next((there[metric] for metric in RIGHT if metric in there), None)


def _with_error(score: Score | None) -> str:
    if score is None:
        return NONE
    return decimals(score.value, 4) + (f" ± {score.error:.4f}" if score.error is not None else "")


def _difference(score: Score | None) -> str:
    if score is None or score.difference is None:
        return NONE
    error = f" ± {score.difference_error:.4f}" if score.difference_error is not None else ""
    return f"{score.difference:+.4f}{error}"


def speed(report: Report) -> Section | None:
    """Prefill and decode of each model in each engine."""
    found = report.speeds
    if found is None or not found.rows:
        return None
    rows = []
    for each in found.rows:
        sizes = f"{each.batch_size} × {each.prompt_tokens:,} + {each.output_tokens:,}"
        decode = decimals(each.decode, 1) + (f" ± {each.spread:,.1f}" if each.spread is not None else "")
        up = NONE if each.speed_up is None else f"{each.speed_up:.2f}×"
        first = NONE if each.latency is None else f"{1000 * each.latency:,.2f}"
        memory = decimals(each.memory / 2**20 if each.memory else None, 1)
        rows.append((each.model, each.engine, sizes, first, decimals(each.prefill, 0), decode, up, memory))
    first_model = found.rows[0].model
    sizes_of = "batch × prompt + output"
    rates = ("first token, ms", "prefill, tokens/s", "decode, tokens/s", f"to {first_model}")
    head = ("model", "engine", sizes_of, *rates, "memory, MiB")
    where = f" on {found.device}" if found.device else ""
    caption = f"Medians{where}; ± is half the distance of the quartiles"
    parts: list[Part] = [Table(caption, head, tuple(rows), (1, 2), is_folded=len(rows) > 30)]
    shown: dict[str, dict[str, tuple[float, float | None]]] = {}
    for each in found.rows:
        if each.speed_up is not None and each.model != first_model:
            row = f"{each.engine}\n{each.batch_size} × {each.prompt_tokens:,} + {each.output_tokens:,}"
            shown.setdefault(row, {})[each.model] = (each.speed_up, None)
    if shown:
        title = f"Decode speed over {first_model}'s"
        lines = {first_model: 1.0} | {f"paper, {name}": value for name, value in found.papers.items()}
        svg = dots("speed-ups", title, shown, "times as fast", report.shades, digits=2, lines=lines)
        parts.append(Drawn(svg, f"{title}, in the same engine at the same sizes: batch × prompt + output tokens"))
    parts += [Words(f"The papers' own, for reference: {found.said}.")] if found.said else []
    parts += [Words(f"Not measured: {who}: {said.rstrip('.')}.") for who, said in found.failures.items()]
    return Section("speed", "Speed", parts)


def written(report: Report) -> Section | None:
    """How each model goes on with the same prompts."""
    if not report.written:
        return None
    parts: list[Part] = [
        Table(f"After: {each.prompt.strip()}", ("model", "goes on"), tuple(each.texts.items()), (1,))
        for each in report.written[:PROMPTS]
    ]
    if (left := len(report.written) - len(parts)) > 0:
        parts.append(Words(f"{counted(left, 'more prompt')} in the file."))
    return Section("written", "What they write", parts)
