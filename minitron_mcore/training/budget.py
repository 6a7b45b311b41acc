"""The token budget as a timetable: which iteration has which shape, and how much came before it. Pure.

Batch sizes grow as in Megatron's `num_microbatches_calculator`; phases change sequence length and batch size.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.config import PhaseConfig, TrainConfig

SIZES = ("sequence_length", "global_batch_size", "micro_batch_size")

# The least that each number of the section may be.
LEAST = {
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "loss_chunk_tokens": 1,
    "recompute_num_layers": 1,
    "max_skipped_iterations": 1,
    "lr_warmup_iters": 0,
    "lr_warmup_tokens": 0,
    "lr_wsd_decay_tokens": 0,
    "eval_interval": 0,
    "eval_iters": 0,
    "save_interval": 0,
    "lr": 0,
    "min_lr": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_eps": 1e-30,  # at 0, or what fp32 rounds to 0, a weight without a gradient becomes 0 / 0
    "clip_grad": 0,
}


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


@dataclass(frozen=True)
class Stretch:
    """`iterations` of one shape, from `first` on."""

    first: Step
    iterations: int

    def at(self, number: int) -> Step:
        """Its `number`-th step, from 0; the one after the last tells what there is after the stretch."""
        first, shape = self.first, self.first.shape
        samples = number * shape.global_batch_size
        return Step(
            shape,
            first.iteration + number,
            first.samples_before + samples,
            first.tokens_before + number * shape.tokens,
            first.first_sample + samples,
        )

    @property
    def end(self) -> Step:
        return self.at(self.iterations)


@dataclass(frozen=True)
class Timetable:
    """Every iteration of a budget, as stretches of the same shape."""

    stretches: tuple[Stretch, ...]

    @property
    def iterations(self) -> int:
        return self.stretches[-1].end.iteration

    @property
    def samples(self) -> int:
        return self.stretches[-1].end.samples_before

    @property
    def tokens(self) -> int:
        """What is really trained on: the budget, rounded up to a whole global batch."""
        return self.stretches[-1].end.tokens_before

    @cached_property
    def _starts(self) -> list[int]:
        return [stretch.first.iteration for stretch in self.stretches]

    def at(self, iteration: int) -> Step:
        """The step after `iteration` iterations; after the last, one more of its shape, which is not run."""
        stretch = self.stretches[bisect_right(self._starts, iteration) - 1]
        return stretch.at(iteration - stretch.first.iteration)

    def steps(self, iteration: int = 0) -> Iterator[Step]:
        """The steps that are left after `iteration` iterations."""
        for number in range(iteration, self.iterations):
            yield self.at(number)

    def samples_needed(self) -> dict[int, int]:
        """Sequence length -> how many samples its dataset must have."""
        needed: dict[int, int] = {}
        for stretch in self.stretches:
            needed[stretch.first.shape.sequence_length] = stretch.end.first_sample
        return needed

    def __str__(self) -> str:
        shapes = [stretch.first.shape for stretch in self.stretches]
        sizes, lengths = (
            list(dict.fromkeys(getattr(shape, name) for shape in shapes))
            for name in ("global_batch_size", "sequence_length")
        )
        words = f"{self.iterations} iterations of {_range(sizes)} x {_range(lengths)} tokens"
        return f"{words}, {self.tokens:,} in all"


def _range(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{min(values)}-{max(values)}"


def plan_timetable(train: TrainConfig, sequence_length: int, section: str) -> Timetable:
    """The iterations of `train.tokens`, rounded up to whole global batches; each phase ends with the first global batch
    that reaches the sum of the tokens up to its end.

    sequence_length: `data.sequence_length`, for phases that name none. A phase reads the dataset of its own length from
    the sample on that the tokens before it correspond to, rounded up. Raises InputError naming keys of `section`.
    """
    _check_numbers(train, sequence_length, section)
    stretches: list[Stretch] = []
    here = Step(Shape(0, sequence_length, 0, 0), 0, 0, 0, 0)
    for end, shape in _phases(train, sequence_length, section):
        first_sample = -(-here.tokens_before // shape.sequence_length)
        here = Step(shape, here.iteration, here.samples_before, here.tokens_before, first_sample)
        if shape.phase == 0 and train.rampup_batch_size is not None:
            for batch, iterations in ramp(train.rampup_batch_size, shape.global_batch_size, section):
                smaller = Shape(0, shape.sequence_length, batch, shape.micro_batch_size)
                stretches.append(Stretch(_with_shape(here, smaller), iterations))
                here = _with_shape(stretches[-1].end, shape)
        iterations = -(-(end - here.tokens_before) // shape.tokens)
        if iterations < 1 and shape.phase == 0:
            raise InputError(
                f"{section}.rampup_batch_size={train.rampup_batch_size} takes {here.tokens_before} tokens, and the "
                f"first phase has {end}: the batch size must have grown before it ends"
            )
        if iterations < 1:
            raise InputError(
                f"{section}.phases[{shape.phase}] has no iteration: the phases before it reach {here.tokens_before} "
                f"tokens in whole global batches, and it ends at {end}; give it more"
            )
        stretches.append(Stretch(here, iterations))
        here = stretches[-1].end
    return Timetable(tuple(stretches))


def _with_shape(step: Step, shape: Shape) -> Step:
    return Step(shape, step.iteration, step.samples_before, step.tokens_before, step.first_sample)


def ramp(rampup: list[int], global_batch_size: int, section: str) -> Iterator[tuple[int, int]]:
    """(batch size, iterations) until `global_batch_size` is reached, by Megatron's rule. Raises InputError."""
    key = f"{section}.rampup_batch_size={rampup}"
    if len(rampup) != 3 or any(number < 1 for number in rampup):
        raise InputError(f"{key} must be three numbers of at least 1: first batch size, increment, samples")
    start, increment, samples = rampup
    if start >= global_batch_size or (global_batch_size - start) % increment:
        raise InputError(
            f"{key} must grow from {start} to the global batch size {global_batch_size} in whole steps of {increment}"
        )
    samples_per_increment = samples / ((global_batch_size - start) // increment)

    def size_after(consumed: int) -> int:
        if consumed > samples:
            return global_batch_size
        return start + int(consumed / samples_per_increment) * increment

    consumed = 0
    while (size := size_after(consumed)) < global_batch_size:
        reached = (size - start) // increment + 1
        count = max(1, math.ceil((reached * samples_per_increment - consumed) / size))
        # Division in floating point, as Megatron's, may put the change one iteration to either side.
        while count > 1 and size_after(consumed + (count - 1) * size) != size:
            count -= 1
        while size_after(consumed + count * size) == size:
            count += 1
        yield size, count
        consumed += count * size


def _phases(train: TrainConfig, sequence_length: int, section: str) -> list[tuple[int, Shape]]:
    """(tokens at its end, shape) of each phase."""
    own = Shape(0, sequence_length, train.global_batch_size, train.micro_batch_size)
    if not train.phases:
        return [(train.tokens, own)]
    phases, end = [], 0
    for number, phase in enumerate(train.phases):
        key = f"{section}.phases[{number}]"
        values = {}
        for name in SIZES:
            given = getattr(phase, name)
            values[name] = getattr(own, name) if given is None else given
            if values[name] < 1:
                raise InputError(f"{key}.{name}={given} must be at least 1")
        if phase.tokens is not None and phase.tokens < 1:
            raise InputError(f"{key}.tokens={phase.tokens} must be at least 1")
        is_last = number == len(train.phases) - 1
        if phase.tokens is None and not is_last:
            raise InputError(f"{key}.tokens is not given: only the last phase may leave it out, for what is left")
        end = train.tokens if phase.tokens is None else end + phase.tokens
        phases.append((end, Shape(number, **values)))
    if end != train.tokens:
        raise InputError(
            f"{section}.phases have {end} tokens together and {section}.tokens={train.tokens}: make them equal, or "
            "leave the last phase's tokens out"
        )
    return phases


def _check_numbers(train: TrainConfig, sequence_length: int, section: str) -> None:
    if sequence_length < 1:
        raise InputError(f"data.sequence_length={sequence_length} must be at least 1")
    if train.tokens < 1:
        raise InputError(f"{section}.tokens={train.tokens} must be at least 1: it is the budget of training tokens")
    check_numbers(train, section)


def check_numbers(train: TrainConfig, section: str) -> None:
    """Raise InputError for numbers of `section` that are wrong whatever the budget."""
    for name, least in LEAST.items():
        value = getattr(train, name)
        if value is not None and not least <= value < math.inf:
            words = "finite and at least" if isinstance(value, float) else "at least"
            raise InputError(f"{section}.{name}={value} must be {words} {least}")
    if train.min_lr > train.lr:
        raise InputError(f"{section}.min_lr={train.min_lr} must lie between 0 and {section}.lr={train.lr}")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(train, name) >= 1:
            raise InputError(f"{section}.{name}={getattr(train, name)} must be below 1")


def check_train(
    train: TrainConfig, parallel: ParallelConfig, data_parallel: int, timetable: Timetable, section: str
) -> None:
    """Raise InputError for numbers that cannot be trained with, in any phase, or at any size of the ramp-up."""
    # Validation runs with the section's own sizes, whatever the phases'.
    own = Shape(0, 1, train.global_batch_size, train.micro_batch_size)
    batch_key, micro_key = f"{section}.global_batch_size={own.global_batch_size}", f"{section}.micro_batch_size"
    _check_shape(own, batch_key, micro_key, parallel, data_parallel)
    for stretch in timetable.stretches:
        shape = stretch.first.shape
        keys = size_keys(train, shape, section)
        _check_shape(shape, keys["global_batch_size"], keys["micro_batch_size"], parallel, data_parallel)


def size_keys(train: TrainConfig, shape: Shape, section: str) -> dict[str, str]:
    """Where the recipe gives a shape's batch size, with its value, and its micro-batch size."""
    phase = train.phases[shape.phase] if train.phases else PhaseConfig()
    inner = f"{section}.phases[{shape.phase}]"
    wheres = {name: section if getattr(phase, name) is None else inner for name in SIZES}
    size = f"{wheres['global_batch_size']}.global_batch_size={shape.global_batch_size}"
    if shape.global_batch_size != (phase.global_batch_size or train.global_batch_size):
        passed = shape.global_batch_size
        size = f"{section}.rampup_batch_size={train.rampup_batch_size} passes a batch size of {passed}, which"
    return {"global_batch_size": size, "micro_batch_size": f"{wheres['micro_batch_size']}.micro_batch_size"}


def _check_shape(shape: Shape, batch_key: str, micro_key: str, parallel: ParallelConfig, data_parallel: int) -> None:
    """Whole microbatches on every data-parallel rank, as many as the interleaved schedule needs."""
    share = shape.micro_batch_size * data_parallel
    if shape.global_batch_size % share:
        raise InputError(
            f"{batch_key} is no multiple of {micro_key}="
            f"{shape.micro_batch_size} x {data_parallel} data-parallel ranks = {share}"
        )
    microbatches = shape.global_batch_size // share
    if parallel.virtual_pipeline and microbatches % parallel.pipeline:
        raise InputError(
            f"{batch_key} makes {microbatches} microbatches, which the "
            f"interleaved schedule needs to be a multiple of parallel.pipeline={parallel.pipeline}"
        )
