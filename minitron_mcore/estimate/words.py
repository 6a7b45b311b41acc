"""An estimate in words, for the console. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from minitron_mcore.architecture import Architecture
from minitron_mcore.estimate.cost import Cost
from minitron_mcore.estimate.estimate import Estimate
from minitron_mcore.estimate.forecast import advice, bytes_text
from minitron_mcore.estimate.layouts import Layout
from minitron_mcore.estimate.loss_points import Outlook
from minitron_mcore.estimate.model import Setting
from minitron_mcore.estimate.work import Beside, Limits, Training
from minitron_mcore.pruning.targets import TARGETS
from minitron_mcore.tables import counted, table

SHOWN = 4  # titles of what a layout cannot do


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
    changed = [name for name in TARGETS if teacher and getattr(shape, name) != getattr(teacher, name)]
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
        if training.unknown:
            yield f"{training.title}: how long it takes is not known, since {training.unknown}"
        if training.note:
            yield f"{training.title}: {training.note}"
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
        more = [f"and {len(titles) - SHOWN} more"] if len(titles) > SHOWN else []
        yield f"not possible as the recipe lays it out: {problem} ({', '.join([*titles[:SHOWN], *more])})"


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
    return "" if not rows else table(rows, ("beside them", "a rank", "host of a node", "", "mostly"), left=(0, 3, 4))


def cost_lines(training: Training, cost: Cost, limits: Limits) -> Iterator[str]:
    """What a step is made of, and what all of them cost."""
    step, price, energy = cost.last, cost.cost, cost.energy
    found = training.forecast
    unfit = found is not None and limits.hold(found.total, found.host) is False
    timetable = f"iterations of {training.timetable.each}" if training.unknown else str(training.timetable)
    yield f"{training.title}: {timetable}{', if it fitted' if unfit else ''}"
    flops = f"{step.student_flops / step.tokens:.3g} a token"
    if step.teacher_flops:
        flops += f" of the student, {step.teacher_flops / step.tokens:.3g} of the teacher"
    whole = (step.student_flops + step.teacher_flops) / step.tokens * cost.tokens
    yield f"  FLOPs     {flops}" + ("" if training.unknown else f"; {whole:.3g} in all")
    parts = sorted(((seconds, name) for name, seconds in step.parts.items()), reverse=True)
    shown = [f"{name} {seconds_text(seconds)}" for seconds, name in parts if seconds >= 0.005 * step.total]
    yield f"  a step    {seconds_text(step.total)}: {', '.join(shown)}"
    rate = f"{count_text(step.tokens_per_second)} tokens/s, {step.tokens_per_second / step.gpus:,.0f} a GPU"
    yield f"  speed     {rate}; {step.flops_per_gpu / 1e12:,.1f} TFLOP/s a GPU, MFU {step.utilization:.1%}"
    if training.unknown:
        return
    if cost.before is not None:
        read = f"{count_text(cost.before.tokens)} tokens forward, {cost.before.flops:.3g} FLOPs"
        yield f"  reference {span_text(cost.before.seconds)} before the first step: {read}"
    spent = [span_text(cost.seconds), counted(round(cost.gpu_hours), "GPU-hour")]
    spent += [f"{price:,.0f} at {cost.price:g} an hour"] if price is not None else []
    spent += [f"{energy:,.0f} kWh"] if energy is not None else []
    yield f"  {'all steps' if cost.before is None else 'in all   '} {', '.join(spent)}"


def seconds_text(seconds: float) -> str:
    """0.0123 -> "12.3 ms"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def span_text(seconds: float) -> str:
    """Of minutes, hours or days."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def total_line(costs: Sequence[Cost], unknown: Sequence[str] = ()) -> str:
    """All trainings together. unknown: titles of those that are not counted."""
    words = [span_text(sum(cost.seconds for cost in costs))]
    words.append(counted(round(sum(cost.gpu_hours for cost in costs)), "GPU-hour"))
    if None not in (prices := [cost.cost for cost in costs]):
        words.append(f"{sum(price or 0 for price in prices):,.0f}")
    if None not in (energies := [cost.energy for cost in costs]):
        words.append(f"{sum(energy or 0 for energy in energies):,.0f} kWh")
    but = f" but {' and '.join(unknown)}" if unknown else ""
    return f"all trainings{but}: {', '.join(words)}"


def layout_text(layout: Layout) -> str:
    """ "tensor 2 x pipeline 4 x data 32"."""
    parallel = layout.parallel
    sizes = {name: getattr(parallel, name) for name in ("tensor", "pipeline", "virtual_pipeline", "context")}
    sizes["data"] = layout.data_parallel
    words = [f"{name.replace('_', ' ')} {size}" for name, size in sizes.items() if size and size > 1]
    return " x ".join(words) or ("one CPU rank" if layout.choices[0].setting.on_cpu else "one GPU")


def layout_table(layouts: Sequence[Layout], title: str, *, is_whole: bool = True) -> str:
    """A row a layout; where trainings of several sections differ, theirs in turn. is_whole: of Estimate."""

    def each(layout: Layout, of: Callable[[Setting], object]) -> str:
        words = [str(of(choice.setting)) for choice in layout.choices]
        return words[0] if len({*words}) == 1 else " / ".join(words)

    rows = []
    for layout in layouts:
        taught = next((choice.setting for choice in layout.choices if choice.setting.teacher), None)
        row = [layout_text(layout), bytes_text(layout.memory), each(layout, lambda s: s.micro_batch_size)]
        row += [each(layout, lambda s: s.recompute.granularity or "-"), taught.teacher_placement if taught else "-"]
        if layout.seconds is not None and is_whole:
            row += [span_text(layout.seconds), f"{layout.gpus * layout.seconds / 3600:,.0f}"]
        rows.append(row)
    header = [title, "memory", "micro batch", "recomputes", "teacher", "takes", "GPU-hours"]
    return table(rows, header[: len(rows[0])], left=(0, 3, 4))


def layout_blocks(e: Estimate) -> Iterator[str]:
    """The best layouts of as many GPUs, the fewest GPUs that would do, and twice as many."""
    if not e.trainings:
        return
    if e.layouts:
        order = "the fastest first" if e.costs else "the least recomputed and cut first, as no times are known"
        several = f"{len(e.layouts)} layouts of {e.gpus:,} fit, {order}"
        title = several if len(e.layouts) > 1 else f"the only layout of {e.gpus:,} that fits"
        yield layout_table(e.layouts[: e.shown], title, is_whole=e.is_whole)
        keys = e.layouts[0].keys(e.trainings)
        yield f"for the first of them set {' '.join(keys)}" if keys else "the first of them is the recipe's own"
    elif e.limits.usable is not None:
        yield f"no layout of {counted(e.gpus, e.rank)} fits"
    if e.fewest:
        yield layout_table(e.fewest[:1], f"the fewest {e.rank}s that would do: {e.fewest[0].gpus:,}")
    elif e.limits.usable is not None:
        yield f"no number of such {e.rank}s would do"
    best, twice = e.fastest, e.twice
    if best is not None and twice is not None and best.seconds and twice.seconds and e.is_whole:
        more = 2 * twice.seconds / best.seconds - 1
        yield (
            f"twice the {e.rank}s, at best {layout_text(twice)}: {span_text(best.seconds)} -> "
            f"{span_text(twice.seconds)}, GPU-hours {more:+.0%}"
        )


def outlook_lines(outlooks: Sequence[Outlook], most: int = 5) -> Iterator[str]:
    """What the loss may become, and what the curve takes for granted."""
    for each in outlooks[:most]:
        c, name = each.curve, f"{each.name}: " if each.name else ""
        interval = f"{each.best:.3f}, 95% from {each.low:.3f} to {each.high:.3f}"
        formula = f"L = {c.E:.3f} + {c.A:.3g} tokens^-{c.alpha:.3f}"
        alphas = f"alpha from {c.alpha_interval[0]:.2f} to {c.alpha_interval[1]:.2f}"
        points = f"{c.points} points from {count_text(c.first)} to {count_text(c.last)} tokens"
        yield f"{name}{each.what} after {count_text(each.tokens)} tokens: {interval} ({formula}, {alphas}; {points})"
    if outlooks:
        yield "as long as the learning rate, the data and the batch go on as they did"


def precision_text(e: Estimate) -> str:
    """In which precision the trainings are; of fp32, a recipe's default, how much faster bf16 would multiply."""
    precisions = dict.fromkeys(each.setting.products for each in e.trainings)
    words = f" in {' and '.join(precisions)}" if precisions else ""
    fp32, bf16 = e.machine.peak_flops_fp32, e.machine.peak_flops
    if "fp32" in precisions and fp32 and bf16 and bf16 > fp32:
        words += f" ({fp32 / 1e12:,.0f} TFLOP/s at most; with precision=bf16 {bf16 / 1e12:,.0f})"
    return words


def place_text(e: Estimate) -> str:
    """Where the estimate is for: "64 x H100", or the ranks of this machine's CPU."""
    if e.on_cpu:
        return f"{counted(e.gpus, e.rank)} of this machine"
    device = e.machine.device or "GPU"
    return f"{e.gpus:,} x {device}" if e.gpus > 1 else f"one {device}"


def report(estimate: Estimate) -> str:
    """All of it."""
    e = estimate
    lines = [f"estimate: {e.name} on {place_text(e)}{precision_text(e)}"]
    lines += [f"teacher  {shape_line(e.teacher)} ({e.where})"] if e.teacher else []
    students = dict.fromkeys(each.setting.student for each in e.trainings if each.section == "distill")
    lines += [f"student  {shape_line(student, e.teacher)}" for student in students]
    lines += [f"aligned  {shape_line(e.aligned[0])} ({e.aligned[1]})"] if e.aligned else []
    blocks = ["\n".join(lines), "\n".join(problem_lines(e))]
    if any(training.forecast for training in e.trainings):
        blocks.append(memory_table(e.trainings, e.limits))
    blocks += ["\n".join(training_lines(e.trainings, e.limits)), beside_table(e.beside, e.limits)]
    if e.left_out:
        what = "which needs the weights, and keys and values of a few prompts"
        blocks.append(f"left out: {', '.join(e.left_out)}, {what}")
    known = [(training, cost) for training, cost in zip(e.trainings, e.costs, strict=False) if cost is not None]
    blocks += ["\n".join(cost_lines(training, cost, e.limits)) for training, cost in known]
    whole = [cost for each, cost in known if not each.unknown]
    unknown = [each.title for each, _ in known if each.unknown]
    if whole and len(known) > 1:
        blocks.append(total_line(whole, unknown))
    if not e.trainings:
        blocks.append("no training: give it a budget of tokens, as distill.tokens=94B")
    elif not e.costs:
        blocks.append(
            "no times: name a device, as cluster.device=H100, or give cluster.peak_tflops and what is asked for"
        )
    return "\n\n".join(filter(None, [*blocks, *layout_blocks(e), "\n".join(outlook_lines(e.outlooks))]))
