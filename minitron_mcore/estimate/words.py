"""An estimate in words, for the console. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minitron_mcore.architecture import Architecture
from minitron_mcore.estimate.forecast import advice, bytes_text
from minitron_mcore.estimate.work import Beside, Estimate, Limits, Training
from minitron_mcore.tables import table

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def count_text(count: float) -> str:
    """8030261248 -> "8.03B"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.{2 if count < 100 * size else 0}f}{unit}"
    return f"{count:.0f}"


def shape_line(shape: Architecture, teacher: Architecture | None = None) -> str:
    """The parameters of a model, and where it differs from its teacher."""
    counts = f"{count_text(shape.num_parameters)} parameters"
    counts += f", {count_text(shape.num_non_embedding_parameters)} without embeddings"
    changed = [name for name in SIZES if teacher and getattr(shape, name) != getattr(teacher, name)]
    words = [f"{name} {getattr(teacher, name)} -> {getattr(shape, name)}" for name in changed]
    return ": ".join([counts, *([", ".join(words)] if words else [])])


def fits_text(limits: Limits, device: int, host: int) -> str:
    """Whether so much fits; "" where nobody knows."""
    return {True: "fits", False: "DOES NOT FIT", None: ""}[limits.hold(device, host)]


def memory_table(trainings: Sequence[Training], limits: Limits) -> str:
    """A row a part, a column a training: of the rank that needs most."""
    shown = [(training, training.forecast) for training in trainings if training.forecast is not None]
    names = dict.fromkeys(name for _, found in shown for name, value in found.parts.items() if value)
    rows = [(name, *(_bytes(found.parts.get(name, 0)) for _, found in shown)) for name in names]
    rows.append(("together", *(bytes_text(found.total) for _, found in shown)))
    if any(found.host for _, found in shown):
        rows.append(("host memory of a node", *(_bytes(found.host) for _, found in shown)))
    if limits.usable is not None:
        usable = f"of {bytes_text(limits.usable)}"
        rows.append((usable, *(fits_text(limits, found.total, found.host) for _, found in shown)))
    return table(rows, ("memory of a rank", *(training.title for training, _ in shown)))


def _bytes(count: int) -> str:
    return bytes_text(count) if count else "-"


def training_lines(trainings: Sequence[Training], limits: Limits) -> Iterator[str]:
    """What the table of memory has no place for: the pipeline's stages, and what helps."""
    for training in trainings:
        totals = [bytes_text(sum(parts.values())) for parts in training.stages()]
        if len(totals) > 1:
            yield f"{training.title}: a rank of each pipeline stage needs {', '.join(totals)}"
        found = training.forecast
        if found is not None and limits.hold(found.total, found.host) is False and (helpful := advice(found)):
            yield f"{training.title}: what helps most: {'; '.join(helpful)}"


def problem_lines(estimate: Estimate) -> Iterator[str]:
    """Why the recipe's layout is not possible, for all that say so with the same words."""
    problems: dict[str, list[str]] = {}
    for title, problem in estimate.problems:
        problems.setdefault(problem, []).append(title)
    for problem, titles in problems.items():
        yield f"not possible as the recipe lays it out: {problem} ({', '.join(titles)})"


def beside_table(stages: Sequence[Beside], limits: Limits) -> str:
    """A row a stage: what a rank needs, the largest parts, and the host's memory."""
    rows = []
    for stage in stages:
        if stage.problem:
            continue
        largest = sorted(stage.parts.items(), key=lambda row: -row[1])[:3]
        mostly = ", ".join(f"{name} {bytes_text(value)}" for name, value in largest if value)
        fits = fits_text(limits, stage.total, stage.host) if stage.total else ""
        rows.append((stage.title, _bytes(stage.total), _bytes(stage.host), fits, mostly))
    return table(rows, ("beside them", "a rank", "host of a node", "", "mostly"), left=(0, 3, 4))


def report(estimate: Estimate) -> str:
    """All of it."""
    e = estimate
    gpus = f"{e.gpus:,} x {e.machine.device or 'GPU'}" if e.gpus > 1 else f"one {e.machine.device or 'GPU'}"
    lines = [f"estimate: {e.name} on {gpus}", f"teacher  {shape_line(e.teacher)} ({e.where})"]
    students = dict.fromkeys(each.setting.student for each in e.trainings if each.section == "distill")
    lines += [f"student  {shape_line(student, e.teacher)}" for student in students]
    blocks = ["\n".join(lines), "\n".join(problem_lines(e))]
    if any(training.forecast for training in e.trainings):
        blocks.append(memory_table(e.trainings, e.limits))
    blocks += ["\n".join(training_lines(e.trainings, e.limits)), beside_table(e.beside, e.limits)]
    return "\n\n".join(filter(None, blocks))
