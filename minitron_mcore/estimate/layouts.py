"""Which layouts of a number of GPUs hold a recipe's trainings, how much memory they need, and which are best. Pure.

A recipe has one `parallel` for all its steps; micro batch size, recomputation, where the teacher lies and how far it
runs ahead may differ from training to training, and leave results as they are. For each `parallel` every training gets
those of its choices that fit and take least, the same for all trainings that follow one section.
"""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

from minitron_mcore.architecture import BYTES, Architecture
from minitron_mcore.errors import InputError, shown
from minitron_mcore.estimate.forecast import Forecast, fullest, holds_models, is_whole_batch, largest_of
from minitron_mcore.estimate.model import Setting
from minitron_mcore.estimate.work import Limits, Training
from minitron_mcore.layout import check_tensor_parallel, split_layers
from minitron_mcore.model.recompute import KEEP_ALL, Recompute
from minitron_mcore.runtime.config import ParallelConfig, check_sequence

# A training's time in a layout, in seconds; None where nothing says what a device does.
Seconds = Callable[[Training, Sequence[Setting]], float] | None
# An order of choices, the least first where no time is known: how much is recomputed, where the teacher lies, and the
# size of a microbatch, negative; and the changed fields of Setting.
Arranged = tuple[tuple[int, ...], dict[str, Any]]

MICRO_BATCHES = (1, 2, 4, 8, 16)
MOST_TOKENS = 2**15  # of a microbatch on a rank that is tried: beyond, products gain nothing
MOST_CONTEXT = 8
MOST_NODES = 1024
MOST_NEAR = 50  # numbers of GPUs that are tried on either side of one that no layout holds
# Without a time: what costs a forward pass more comes after what costs less.
RECOMPUTED = (KEEP_ALL, Recompute("selective"), Recompute("full"))


@dataclass(frozen=True)
class Choice:
    """The trainings of one section of the recipe in a layout: for each its settings, one for each shape of its
    timetable; what the fullest rank needs in any of them, and how long they take. rank: of Arranged."""

    section: str
    settings: tuple[tuple[Setting, ...], ...]
    forecast: Forecast
    seconds: float | None
    rank: tuple[int, ...]

    @property
    def setting(self) -> Setting:
        """Of the first training, the shape that it ends with."""
        return self.settings[0][-1]

    @property
    def order(self) -> tuple[float, ...]:
        return self.rank if self.seconds is None else (self.seconds, *self.rank)


@dataclass(frozen=True)
class Layout:
    """`parallel` on `gpus` GPUs, with the best choice for each section."""

    parallel: ParallelConfig
    gpus: int
    choices: tuple[Choice, ...]

    @property
    def data_parallel(self) -> int:
        return self.gpus // self.parallel.replica_ranks

    @property
    def memory(self) -> int:
        """Bytes of the rank that needs most, in any of the trainings."""
        return max(choice.forecast.total for choice in self.choices)

    @property
    def seconds(self) -> float | None:
        times = [choice.seconds for choice in self.choices]
        return None if None in times else sum(time for time in times if time is not None)

    def keys(self, trainings: Sequence[Training]) -> list[str]:
        """What to set for it, as key=value: where it is not what the recipe of these `trainings` has."""
        own = dataclasses.asdict(trainings[0].setting.parallel)
        found = {f"parallel.{key}": (value, own[key]) for key, value in dataclasses.asdict(self.parallel).items()}
        for choice, group in zip(self.choices, groups(trainings), strict=True):
            section = choice.section
            for setting, recipes in zip(choice.settings[0], group[0].settings, strict=True):
                sizes = setting.micro_batch_size, recipes.micro_batch_size
                found[recipes.micro_batch_key or f"{section}.micro_batch_size"] = sizes
                again = setting.recompute, recipes.recompute
                found[f"{section}.recompute_granularity"] = again[0].granularity or None, again[1].granularity or None
                if again[0] != again[1] and again[1].granularity == "full":
                    found |= {f"{section}.recompute_{name}": (None, "") for name in ("method", "num_layers")}
            taught = next((pair for pair in zip(choice.settings, group, strict=True) if pair[0][0].teacher), None)
            if taught is not None and not taught[1].setting.preference:
                setting, recipes = taught[0][0], taught[1].setting
                found["teacher.placement"] = setting.teacher_placement, recipes.teacher_placement
                found["distill.teacher_window"] = setting.teacher_window, recipes.teacher_window
        return [f"{key}={shown(value)}" for key, (value, before) in found.items() if value != before]

    @property
    def order(self) -> tuple[float, ...]:
        """The fastest first; without times that which recomputes least, then that which cuts the model least."""
        if self.seconds is not None:
            return (self.seconds, self.parallel.replica_ranks, self.memory)
        worst = max(choice.rank for choice in self.choices)
        return (*worst[:2], self.parallel.replica_ranks, self.parallel.pipeline, self.memory)


def best_layouts(
    trainings: Sequence[Training], gpus: int, per_node: int, limits: Limits, seconds: Seconds = None
) -> list[Layout]:
    """Every `parallel` of `gpus` GPUs in which all trainings fit, the best first; none: there is none."""
    found = []
    for parallel in parallels(trainings, gpus, per_node):
        choices = [choose(group, parallel, gpus, per_node, limits, seconds) for group in groups(trainings)]
        if all(choices):
            found.append(Layout(parallel, gpus, tuple(choice for choice in choices if choice)))
    return sorted(found, key=lambda layout: layout.order)


def groups(trainings: Sequence[Training]) -> list[list[Training]]:
    """The trainings by the section that says their sizes."""
    found: dict[str, list[Training]] = {}
    for training in trainings:
        found.setdefault(training.sizes, []).append(training)
    return [*found.values()]


def is_possible(trainings: Sequence[Training], gpus: int, per_node: int) -> bool:
    """Whether any layout of so many GPUs holds the trainings, whatever their memory."""
    return any(
        all(choose(group, parallel, gpus, per_node, Limits(), None) for group in groups(trainings))
        for parallel in parallels(trainings, gpus, per_node)
    )


def nearest(trainings: Sequence[Training], gpus: int, per_node: int) -> list[int]:
    """The next numbers of GPUs below and above `gpus` that some layout holds, of those that batches, layers and heads
    have as products; of far more GPUs than any layout takes, the most that one does."""
    shapes = [shape for training in trainings for shape in shapes_of(training)]
    batches = [setting.global_batch_size for training in trainings for setting in training.settings]
    sides = [
        [each for each in range(1, per_node + 1) if all(_possible(check_tensor_parallel, one, each) for one in shapes)],
        range(1, min(shape.num_layers for shape in shapes) + 1),
        contexts_of(trainings),
        divisors(gcd(*batches), min(batches)),
    ]
    products = sorted({*map(prod, itertools.product(*sides))})
    at = bisect(products, gpus)
    found: list[int] = []
    for side in (products[:at][::-1], products[at:]):
        found += itertools.islice((each for each in side[:MOST_NEAR] if is_possible(trainings, each, per_node)), 1)
    return found


def smallest(trainings: Sequence[Training], per_node: int, limits: Limits) -> list[Layout]:
    """The layouts of the fewest GPUs in which all trainings fit; none: they fit in none of up to MOST_NODES nodes."""
    nodes = [*range(1, 17), *(2**power for power in range(5, MOST_NODES.bit_length()))]
    for gpus in (*range(1, per_node), *(per_node * count for count in nodes)):
        enough = limits.usable is None or all(least_share(each, gpus) <= limits.usable for each in trainings)
        if enough and (found := best_layouts(trainings, gpus, per_node, limits)):
            return found
    return []


def least_share(training: Training, gpus: int) -> int:
    """What every rank of `gpus` needs at least: its part of weights, gradients and optimizer, were all cut evenly."""
    setting = training.setting
    return (BYTES[setting.precision] + 12) * setting.student.num_parameters // gpus


def parallels(trainings: Sequence[Training], gpus: int, per_node: int) -> Iterator[ParallelConfig]:
    """The layouts that the shapes, their sequences and the number of GPUs allow: tensor parallelism within a node, with
    sequence parallelism wherever it is possible; contexts in powers of two, where the recipe cuts sequences."""
    shapes = dict.fromkeys(shape for training in trainings for shape in shapes_of(training))
    lengths = {setting.length for training in trainings for setting in training.settings}
    layers = min(shape.num_layers for shape in shapes)
    apart = [own for training in trainings if (own := training.setting.teacher_parallel)]
    for tensor in divisors(gpus, per_node):
        if not all(_possible(check_tensor_parallel, shape, tensor) for shape in shapes):
            continue
        for pipeline, context in itertools.product(divisors(gpus // tensor, layers), contexts_of(trainings)):
            if (gpus // tensor // pipeline) % context:
                continue
            if any(gpus % own.replica_ranks or own.context != context for own in apart):
                continue
            for chunks in chunk_counts(layers, pipeline):
                count = instances_of(trainings, gpus // tensor // pipeline)
                plain = ParallelConfig(tensor, pipeline, chunks, context, num_distributed_optimizer_instances=count)
                wanted = [replace(plain, sequence=True)] if tensor > 1 else []
                cut = [p for p in (*wanted, plain) if all(_possible(check_sequence, length, p) for length in lengths)]
                fits = all(_possible(split_layers, shape.num_layers, pipeline, chunks) for shape in shapes)
                yield from cut[:1] if fits else ()


def instances_of(trainings: Sequence[Training], alike: int) -> int:
    """As many instances of the optimizer as the recipe has, where they divide the `alike` ranks of a shard in all
    trainings; else one."""
    count = trainings[0].setting.parallel.num_distributed_optimizer_instances
    return count if all(alike % (count * each.side_by_side) == 0 for each in trainings) else 1


def contexts_of(trainings: Sequence[Training]) -> list[int]:
    """Context-parallel sizes to try: more than one where the recipe cuts sequences."""
    return [1, 2, 4, MOST_CONTEXT] if any(each.setting.parallel.context > 1 for each in trainings) else [1]


def shapes_of(training: Training) -> tuple[Architecture, ...]:
    teacher = training.setting.teacher
    own = training.setting.teacher_parallel  # a layout of its own is not this one
    return (training.setting.student, *([teacher] if teacher is not None and own is None else []))


def divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def chunk_counts(layers: int, pipeline: int) -> list[int | None]:
    """Model chunks a stage: none, powers of two, and one layer each."""
    if pipeline == 1:
        return [None]
    most = layers // pipeline
    counts = {2**power for power in range(1, most.bit_length()) if 2**power <= most} | ({most} if most > 1 else set())
    return [None, *sorted(counts)]


def choose(
    group: Sequence[Training], parallel: ParallelConfig, gpus: int, per_node: int, limits: Limits, seconds: Seconds
) -> Choice | None:
    """The best choice for the trainings of a section; None where none fits. For each micro batch size that which
    recomputes least, since every forward pass more costs more than what else could be changed."""
    best: Choice | None = None
    laid_out: dict[str, Any] = {"parallel": parallel, "data_parallel": gpus // parallel.replica_ranks}
    laid_out["local_ranks"] = min(gpus, per_node)
    for size in micro_batches(group, parallel):
        found = least(group, arranged(group, laid_out, size), limits, seconds)
        if found is None and best is None:
            continue
        if found is None or (best is not None and best.order < found.order):
            return best  # what does not fit does not fit twice as large; and times have one lowest point
        best = found
    return best


def least(group: Sequence[Training], arranged: Iterable[Arranged], limits: Limits, seconds: Seconds) -> Choice | None:
    """The first arrangement that is possible and fits."""
    for rank, changes in arranged:
        if not all(is_whole(training, changes) for training in group):
            continue
        # What needs most decides; a ramp-up has many sizes beside it.
        most = [changed(training, largest_of(training.settings), changes) for training in group]
        if not all(holds_models(settings[0]) for settings in most):
            continue
        needed = max(map(fullest, most), key=lambda found: found.total)
        if limits.hold(needed.total, needed.host) is not False:
            settings = tuple(changed(training, training.settings, changes) for training in group)
            time = sum(itertools.starmap(seconds, zip(group, settings, strict=True))) if seconds else None
            return Choice(group[0].sizes, settings, needed, time, rank)
    return None


def is_whole(training: Training, changes: dict[str, Any]) -> bool:
    """Whether the ranks can be divided among the trainings side by side, and every batch size among theirs."""
    ranks, rest = divmod(changes["data_parallel"], training.side_by_side)
    return not rest and all(
        is_whole_batch(
            each.global_batch_size, changes.get("micro_batch_size", each.micro_batch_size), ranks, changes["parallel"]
        )
        for each in training.settings
    )


def changed(training: Training, settings: Iterable[Setting], changes: dict[str, Any]) -> tuple[Setting, ...]:
    """Some settings of `training`, laid out anew on its share of the ranks."""
    own = {**changes, "data_parallel": changes["data_parallel"] // training.side_by_side}
    return tuple(replace(each, **own) for each in settings)


def micro_batches(group: Sequence[Training], parallel: ParallelConfig) -> list[int | None]:
    """Sizes to try, in rising order; None: the recipe's own, where its phases have several."""
    own = {setting.micro_batch_size for training in group for setting in training.settings}
    most = MOST_TOKENS * parallel.context // group[0].setting.sequence_length
    return [each for each in sorted({*MICRO_BATCHES, *own}) if each <= max(most, *own)] if len(own) == 1 else [None]


def arranged(group: Sequence[Training], laid_out: dict[str, Any], size: int | None) -> Iterator[Arranged]:
    """What may be chosen for the trainings of a section, in the order in which it costs more. laid_out: the fields of
    Setting that the layout gives."""
    parallel, data_parallel = laid_out["parallel"], laid_out["data_parallel"]
    own = next((each.setting for each in group if each.setting.teacher), group[0].setting)
    recomputed = [*RECOMPUTED, *([own.recompute] if own.recompute.method == "block" else [])]
    for (again, recompute), (kept, teacher) in itertools.product(
        enumerate(recomputed), enumerate(teachers(own, parallel, data_parallel))
    ):
        changes = laid_out | teacher | {"recompute": recompute}
        yield (again, kept, -(size or 1)), changes | ({} if size is None else {"micro_batch_size": size})


def teachers(setting: Setting, parallel: ParallelConfig, data_parallel: int) -> list[dict[str, Any]]:
    """Where a teacher may lie and how far it may run ahead, in the order in which they cost more. One that is trained,
    or has a layout of its own, or is a reference, stays as the recipe has it."""
    if setting.teacher is None or setting.teacher_trained or setting.teacher_parallel or setting.preference:
        return [{}]
    own = setting.teacher_window - setting.teacher_window % parallel.pipeline
    windows = dict.fromkeys([own, *([4 * parallel.pipeline] if own == 0 else []), parallel.pipeline])
    places = ["resident", *(["sharded"] if data_parallel > 1 else []), "offloaded"]
    return [
        {"teacher_placement": place, "teacher_window": window}
        for place, window in itertools.product(places, windows)
        if place != "offloaded" or setting.teacher_placement == "offloaded" or setting.host_free is not None
    ]


def _possible(check: Callable[..., object], *given: Any) -> bool:
    try:
        check(*given)
    except InputError:
        return False
    return True
