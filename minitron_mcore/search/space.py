"""The space of a search: a grid of shapes, of which those within the budgets are candidates. Pure.

Source: arXiv 2407.14679, section 2.3: the architectures of a grid whose parameters are within a budget.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.errors import InputError
from minitron_mcore.layout import split_layers
from minitron_mcore.pruning.config import StudentConfig
from minitron_mcore.pruning.targets import nearest_multiple, student_shape
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.search.candidates import Candidate, in_words
from minitron_mcore.search.config import AXES, BudgetConfig, SearchConfig
from minitron_mcore.tables import counted

MOST_COMBINATIONS = 50_000  # some seconds
SHOWN = 3  # candidates or reasons that an error names

Bounds = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Space:
    """candidates: within every budget, in the order of the grid. shapes: how many can be pruned and laid out.
    combinations: of the grid. dropped: why the others cannot be, and how many."""

    candidates: tuple[Candidate, ...]
    shapes: int
    combinations: int
    dropped: dict[str, int]

    @property
    def summary(self) -> str:
        """In one line."""
        tried, shapes = counted(self.combinations, "combination"), counted(self.shapes, "shape")
        return f"{tried}, {shapes} that can be pruned and laid out, {len(self.candidates):,} within the budgets"


def find_space(
    config: SearchConfig,
    teacher: Architecture,
    divisible_by: int,
    parallel: ParallelConfig,
    figures: Callable[[Architecture], dict[str, float]],
) -> Space:
    """The candidates of the section `search`: just what `prune` makes of `teacher` with these sizes.

    divisible_by: prune.divisible_by. parallel: the candidates' layout. figures: what a shape costs, by names of
    `candidates.FIGURES`. Raises InputError, naming a key of search, where nothing is left.
    """
    combinations = list(combinations_of(config))
    found: dict[Architecture, None] = {}
    dropped: Counter[str] = Counter()
    for sizes in combinations:
        try:
            shape = shape_of(sizes, teacher, divisible_by, parallel)
        except InputError as error:
            dropped[_reason(error)] += 1
            continue
        if shape == teacher:
            dropped["it is the teacher"] += 1
        elif shape in found:
            dropped["it is the shape of another"] += 1
        found |= {shape: None} if shape != teacher else {}
    if not found:
        reasons = dropped.most_common()
        told = [f"{count} because {reason}" for reason, count in reasons[:SHOWN]] + ["…"] * (len(reasons) > SHOWN)
        raise InputError("search", None, f"leaves none of {counted(len(combinations), 'combination')}", "; ".join(told))
    every = [Candidate(shape, figures(shape)) for shape in found]
    within = within_budgets(every, config.budget)
    return Space(tuple(within), len(every), len(combinations), dict(dropped))


def has_grid(config: SearchConfig) -> bool:
    """Whether any axis is given."""
    return bool(config.axes() or config.ffn_ratio)


def combinations_of(config: SearchConfig) -> Iterator[dict[str, float]]:
    """Every combination of the grid: sizes by name, `ffn_ratio` among them where it is given. Raises InputError where
    no axis is given, or far too many combinations."""
    axes: dict[str, Sequence[float]] = {**config.axes()}
    if config.ffn_ratio:
        axes["ffn_ratio"] = config.ffn_ratio
    if not has_grid(config):
        remedy = f"give at least one of search.{', search.'.join([*AXES, 'ffn_ratio'])}"
        raise InputError("search", None, "is an empty grid, which names no sizes", remedy)
    if (count := math.prod(map(len, axes.values()))) > MOST_COMBINATIONS:
        rule = f"is a grid of {count:,} combinations, more than {MOST_COMBINATIONS:,}"
        raise InputError("search", None, rule, "take larger steps, or fewer axes")
    # As Megatron's fields are ordered, with the ratio in its size's place.
    order = [name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "ffn_ratio", *AXES[3:]) if name in axes]
    for values in itertools.product(*(axes[name] for name in order)):
        yield dict(zip(order, values, strict=True))


def shape_of(
    sizes: Mapping[str, float], teacher: Architecture, divisible_by: int, parallel: ParallelConfig
) -> Architecture:
    """The teacher pruned to `sizes`; `ffn_ratio` x hidden_size goes to the nearest multiple of what must divide
    ffn_hidden_size, divisible_by and the tensor-parallel size; a tie goes up.

    Raises InputError where pruning cannot make it, or the layout cannot hold it.
    """
    wanted: dict[str, Any] = {name: int(size) for name, size in sizes.items() if name != "ffn_ratio"}
    if "ffn_ratio" in sizes:
        asked = sizes["ffn_ratio"] * wanted.get("hidden_size", teacher.hidden_size)
        multiple = nearest_multiple(asked, math.lcm(divisible_by, parallel.tensor))
        # The teacher's own size needs no divisor.
        wanted["ffn_hidden_size"] = teacher.ffn_hidden_size if asked == teacher.ffn_hidden_size else multiple
    shape = student_shape(teacher, StudentConfig(**wanted), divisible_by, parallel)
    split_layers(shape.num_layers, parallel.pipeline, parallel.virtual_pipeline)
    return shape


def within_budgets(candidates: Sequence[Candidate], budget: BudgetConfig) -> list[Candidate]:
    """Those that meet every budget. Raises InputError, naming the nearest, where none does."""
    bounds = budget.bounds()
    within = [each for each in candidates if not exceeded(each, bounds)]
    if within:
        return within
    alone = [name for name in bounds if all(exceeded(each, {name: bounds[name]}) for each in candidates)]
    bounds = {name: bounds[name] for name in alone[:1]} or bounds
    nearest = sorted(candidates, key=lambda each: max(exceeded(each, bounds).values(), default=0))
    told = "; ".join(_how_far(each, bounds) for each in nearest[:SHOWN])
    of = f"of {counted(len(candidates), 'shape')}"
    if not alone:
        raise InputError("search.budget", budget.given(), f"is met as a whole by none {of}", f"the nearest are {told}")
    rule, value = f"is met by none {of} ({_between(*bounds[alone[0]])})", budget.given()[alone[0]]
    raise InputError(f"search.budget.{alone[0]}", value, rule, f"the nearest are {told}")


def exceeded(candidate: Candidate, bounds: Bounds) -> dict[str, float]:
    """By how much a candidate misses each budget that it misses, as a share of the end that it is beyond."""
    missed = {}
    for name, (least, most) in bounds.items():
        value = candidate.figures[name]
        if value < least:
            missed[name] = (least - value) / least
        elif value > most:
            missed[name] = (value - most) / most
    return missed


def nearest_to_middle(candidates: Sequence[Candidate], budget: BudgetConfig, most: int | None) -> list[Candidate]:
    """The `most` candidates whose farthest figure is nearest to the middle of its budget, in the order of the grid;
    None: all."""
    middles = {name: value for name, value in map(_middle, budget.bounds().items())}

    def distance(each: Candidate) -> float:
        return max((abs(each.figures[name] - value) / value for name, value in middles.items()), default=0)

    kept = sorted(candidates, key=distance)[:most]
    return [each for each in candidates if each in kept]


def _middle(budget: tuple[str, tuple[float, float]]) -> tuple[str, float]:
    name, (least, most) = budget
    return name, least if math.isinf(most) else most if not least else (least + most) / 2


def _how_far(candidate: Candidate, bounds: Bounds) -> str:
    """As "l2-h64-f128-q4-g2 with total_parameters 1,234 (5.0% above 1,175)": how far it is from the end that it is
    beyond, and what that is."""
    told = []
    for name, share in exceeded(candidate, bounds).items():
        value, (least, most) = candidate.figures[name], bounds[name]
        side, end = ("below", least) if value < least else ("above", most)
        far = f"{100 * share:.1f}% {side}" if share < 10 else f"{value / end:,.0f} times"
        told.append(f"{name} {in_words(value)} ({far} {in_words(_whole(end))})")
    return f"{candidate.name} with {', '.join(told)}"


def _between(least: float, most: float) -> str:
    """Both ends in one number format, or the one that there is."""
    if math.isinf(most):
        return f"at least {in_words(_whole(least))}"
    ends = f"{in_words(_whole(least))} to " if least else "at most "
    return ends + in_words(_whole(most))


def _whole(end: float) -> float:
    """Without what arithmetic leaves behind the point of a count."""
    return round(end) if end >= 1000 or end.is_integer() else end


def _reason(error: InputError) -> str:
    """Why a shape cannot be, by the keys of the grid."""
    key = error.key.replace("student.", "search.") if error.key != "num_layers" else "search.num_layers"
    return f"{key}={error.value} {error.rule}"
