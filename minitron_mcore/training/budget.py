"""The token budget as a timetable: which iteration has which shape, and how much came before it. Pure.

Batch sizes grow as in Megatron's `num_microbatches_calculator`; phases change sequence length and batch size.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.tables import counted
from minitron_mcore.training.config import PhaseConfig, TrainConfig

SIZES = ("sequence_length", "global_batch_size", "micro_batch_size")


@dataclass(frozen=True)
class Shape:
    """What an iteration is made of."""

    phase: int  # from 0
    sequence_length: int
    global_batch_size: int  # sequences
    micro_batch_size: int

    @property
    def tokens(self) -> int:
        """Of one iteration."""
        return self.global_batch_size * self.sequence_length


@dataclass(frozen=True)
class Step:
    """One iteration: its shape, and what came before it."""

    shape: Shape
    iteration: int  # iterations before it
    samples_before: int  # sequences, of whatever length
    tokens_before: int
    first_sample: int  # number of its first sample in the dataset of its sequence length

    def after(self, number: int) -> Step:
        """The step that comes after `number` of this shape, counted from this one."""
        samples, tokens = number * self.shape.global_batch_size, number * self.shape.tokens
        before = self.iteration + number, self.samples_before + samples, self.tokens_before + tokens
        return Step(self.shape, *before, self.first_sample + samples)


@dataclass(frozen=True)
class Timetable:
    """Every iteration of a budget: the first of each stretch of one shape, and what there is after the last."""

    starts: tuple[Step, ...]
    end: Step

    @property
    def iterations(self) -> int:
        return self.end.iteration

    @property
    def samples(self) -> int:
        return self.end.samples_before

    @property
    def tokens(self) -> int:
        """What is really trained on: the budget, rounded up to a whole global batch."""
        return self.end.tokens_before

    @cached_property
    def _first_iterations(self) -> list[int]:
        return [first.iteration for first in self.starts]

    def at(self, iteration: int) -> Step:
        """The step after `iteration` iterations; after the last, one more of its shape, which is not run."""
        first = self.starts[bisect_right(self._first_iterations, iteration) - 1]
        return first.after(iteration - first.iteration)

    def steps(self, iteration: int = 0) -> Iterator[Step]:
        """The steps that are left after `iteration` iterations."""
        return map(self.at, range(iteration, self.iterations))

    def samples_needed(self) -> dict[int, int]:
        """Sequence length -> how many samples its dataset must have."""
        stretches = pairwise([*self.starts, self.end])
        ends = ((first.shape, first.after(then.iteration - first.iteration)) for first, then in stretches)
        return {shape.sequence_length: end.first_sample for shape, end in ends}

    @property
    def each(self) -> str:
        """What an iteration is, in words."""
        sizes = _range([start.shape.global_batch_size for start in self.starts])
        lengths = _range([start.shape.sequence_length for start in self.starts])
        return f"{sizes} x {lengths} tokens"

    def __str__(self) -> str:
        return f"{counted(self.iterations, 'iteration')} of {self.each}, {self.tokens:,} in all"


def _range(values: list[int]) -> str:
    return "-".join(map(str, sorted({min(values), max(values)})))


def plan_timetable(train: TrainConfig, sequence_length: int, section: str) -> Timetable:
    """The iterations of `train.tokens`, rounded up to whole global batches; each phase ends with the first global batch
    that reaches the sum of the tokens up to its end.

    sequence_length: `data.sequence_length`, for phases that name none. A phase reads the dataset of its own length from
    the sample on that the tokens before it correspond to, rounded up. Raises InputError naming keys of `section`.
    """
    if train.tokens < 1:
        raise InputError(f"{section}.tokens", train.tokens, "must be at least 1", "it is the budget of training tokens")
    starts: list[Step] = []
    here = Step(Shape(0, sequence_length, 0, 0), 0, 0, 0, 0)
    for end, shape in _phases(train, sequence_length, section):
        first_sample = -(-here.tokens_before // shape.sequence_length)
        here = replace(here, shape=shape, first_sample=first_sample)
        if shape.phase == 0 and train.rampup_batch_size is not None:
            for batch, iterations in ramp(train.rampup_batch_size, shape.global_batch_size, section):
                starts.append(replace(here, shape=replace(shape, global_batch_size=batch)))
                here = replace(starts[-1].after(iterations), shape=shape)
        iterations = -(-(end - here.tokens_before) // shape.tokens)
        if iterations < 1 and shape.phase == 0:
            rule = f"takes {here.tokens_before} tokens, but the first phase has {end}"
            remedy = "make the batch size grow faster, or the phase longer"
            raise InputError(f"{section}.rampup_batch_size", train.rampup_batch_size, rule, remedy)
        if iterations < 1:
            rule = f"has no iteration: the phases before it reach {here.tokens_before} tokens in whole global batches"
            raise InputError(f"{section}.phases[{shape.phase}]", None, f"{rule}, and it ends at {end}", "give it more")
        starts.append(here)
        here = here.after(iterations)
    return Timetable(tuple(starts), here)


def ramp(rampup: list[int], global_batch_size: int, section: str) -> Iterator[tuple[int, int]]:
    """(batch size, iterations) until `global_batch_size` is reached, by Megatron's rule. Raises InputError."""
    start, increment, samples = rampup
    if start >= global_batch_size or (global_batch_size - start) % increment:
        rule = f"must grow from {start} to the global batch size {global_batch_size} in whole steps of {increment}"
        raise InputError(f"{section}.rampup_batch_size", rampup, rule, "change one of the three")
    samples_per_increment = samples / ((global_batch_size - start) // increment)

    def size_after(consumed: int) -> int:
        if consumed > samples:
            return global_batch_size
        return start + int(consumed / samples_per_increment) * increment

    def lasts(consumed: int, size: int) -> int:
        # Asked and not worked out: division in floating point, as Megatron's, may be one iteration to either side.
        counts = range(1, samples // size + 2)
        return counts[bisect_left(counts, True, key=lambda count: size_after(consumed + count * size) > size)]

    consumed = 0
    while (size := size_after(consumed)) < global_batch_size:
        count = lasts(consumed, size)
        yield size, count
        consumed += count * size


def _phases(train: TrainConfig, sequence_length: int, section: str) -> list[tuple[int, Shape]]:
    """(tokens at its end, shape) of each phase."""
    own = Shape(0, sequence_length, train.global_batch_size, train.micro_batch_size)
    phases, end = [], 0
    for number, phase in enumerate(train.phases or [PhaseConfig()]):
        given = {name: value for name in SIZES if (value := getattr(phase, name)) is not None}
        end = train.tokens if phase.tokens is None else end + phase.tokens
        phases.append((end, replace(own, phase=number, **given)))
    if end != train.tokens:
        rule = f"have {end} tokens together, but {section}.tokens={train.tokens}"
        raise InputError(f"{section}.phases", None, rule, "make them equal, or leave the last phase's tokens out")
    return phases


def check_train(
    train: TrainConfig, parallel: ParallelConfig, data_parallel: int, timetable: Timetable, section: str
) -> None:
    """Raise InputError for numbers that cannot be trained with, in any phase, or at any size of the ramp-up."""
    # Validation runs with the section's own sizes, whatever the phases'.
    own = Shape(0, 1, train.global_batch_size, train.micro_batch_size)
    _check_shape(own, {name: f"{section}.{name}" for name in SIZES}, train, parallel, data_parallel)
    for start in timetable.starts:
        _check_shape(start.shape, size_keys(train, start.shape, section), train, parallel, data_parallel)


def size_keys(train: TrainConfig, shape: Shape, section: str) -> dict[str, str]:
    """Where the recipe gives a shape's batch size, and its micro-batch size."""
    phase = train.phases[shape.phase] if train.phases else PhaseConfig()
    inner = f"{section}.phases[{shape.phase}]"
    keys = {name: f"{section if getattr(phase, name) is None else inner}.{name}" for name in SIZES}
    if shape.global_batch_size != (phase.global_batch_size or train.global_batch_size):
        keys["global_batch_size"] = f"{section}.rampup_batch_size"
    return keys


def _check_shape(shape: Shape, keys: dict[str, str], train: TrainConfig, parallel: ParallelConfig, data: int) -> None:
    """Whole microbatches on each of `data` data-parallel ranks, as many as the interleaved schedule needs."""
    share, key, value, subject = shape.micro_batch_size * data, keys["global_batch_size"], shape.global_batch_size, ""
    if key.endswith(".rampup_batch_size"):
        subject = f"passes a batch size of {value}, which "
    given = train.rampup_batch_size if subject else value
    if value % share:
        ranks = f"{keys['micro_batch_size']}={shape.micro_batch_size} x {data} data-parallel ranks = {share}"
        raise InputError(key, given, f"{subject}is not a multiple of {ranks}", "change one of them")
    microbatches = value // share
    if parallel.virtual_pipeline and microbatches % parallel.pipeline:
        needed = f"the interleaved schedule needs a multiple of parallel.pipeline={parallel.pipeline}"
        raise InputError(
            key, given, f"{subject}makes {counted(microbatches, 'microbatch')}, but {needed}", "change one of them"
        )
