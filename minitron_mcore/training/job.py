"""What the loop is given: what it reads, and when, and the progress from which it resumes.

Datasets -> global batches of this data-parallel rank, on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from minitron_mcore.architecture import Architecture
from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.dataset import Batch, batches, batches_once, build_datasets
from minitron_mcore.data.described import training_parts
from minitron_mcore.data.index import Wanted
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.cache.file import token_checksum
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.model.microbatch import Microbatch, to_device, uncounted
from minitron_mcore.runtime.groups import data_group, data_place
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.budget import Shape, Step, Timetable
from minitron_mcore.training.config import LogConfig, TrainConfig
from minitron_mcore.training.teaching import TrainedTeacher

# (first sample, how many global batches) -> this rank's global batches, each a list of microbatches.
BatchReader = Callable[[int, int], Iterator[list[Microbatch]]]
# (timetable, finished iterations) -> the steps that are left, each with this rank's global batch.
StepReader = Callable[[Timetable, int], Iterator[tuple[Step, list[Microbatch]]]]
# Without a save interval, a run saves after each of PARTS equal parts, or every MOST_ITERATIONS if that is sooner.
PARTS, MOST_ITERATIONS = 10, 500


@dataclass
class Progress:
    """What a run resumes from, beside the tensors."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    skipped_iterations: int = 0  # without a step, because a loss or the gradient norm was NaN or Inf
    nan_iterations: int = 0  # those of them with such a loss
    skipped_in_a_row: int = 0  # up to now
    data_order: dict[int, str] = field(default_factory=dict)  # fingerprints of what was read (`data_order`)
    hidden_states_alpha: float | None = None  # dynamic weight of the hidden-state losses in the next step

    def advance(self, step: Step) -> None:
        """Count a step that is done."""
        self.iteration += 1
        self.consumed_samples += step.shape.global_batch_size
        self.consumed_tokens += step.shape.tokens


@dataclass(frozen=True)
class TrainingData:
    """datasets: the training sets by their sequence lengths.

    read_valid: by the source's name, "" for the whole blend; empty: no validation.
    order: of the samples, by `data_order`.
    sides: sequences that a row of training is, as a pair of answers is two: attention is counted within each.
    """

    datasets: dict[int, Any]
    read_train: StepReader
    read_valid: dict[str, BatchReader]
    order: dict[int, str]
    sides: int = 1


@dataclass
class Job:
    """What to train, on what, how, and where it is kept."""

    chunks: list[LanguageModel]
    architecture: Architecture
    objective: Objective
    train: TrainConfig
    log: LogConfig
    runtime: Runtime
    timetable: Timetable
    data: TrainingData
    precision: str
    folder: Path  # for checkpoints and metrics; the run resumes from its newest finished iteration
    describe: Callable[[Progress], None]  # writes what lies beside the weights; the first rank calls
    recipe: dict[str, Any]
    name: str
    stage: str = "train"  # the section of the recipe that trains
    documents: dict[str, str] = field(default_factory=dict)  # texts that dashboards keep beside the numbers, by kind
    teaching: TrainedTeacher | None = None  # the objective's teacher, if it is trained in the same job
    identity: Callable[[], str] = lambda: ""  # what tells this run's recipe and data from another's; one rank calls
    until: int | None = None  # the iteration to stop after, from which the same training may go on; None: the last

    @property
    def iterations(self) -> int:
        return self.timetable.iterations

    @property
    def ends_at(self) -> int:
        """The iteration after which `fit` returns."""
        return self.iterations if self.until is None else min(self.until, self.iterations)

    @property
    def save_interval(self) -> int:
        """Iterations between checkpoints, 0 for one at the end: by default a tenth of the run, at most 500."""
        given = self.train.save_interval
        return min(-(-self.ends_at // PARTS), MOST_ITERATIONS) if given is None else given

    @property
    def save_intervals(self) -> tuple[int, int]:
        """A checkpoint is due at the multiples of each; 0: of none."""
        return self.save_interval, self.train.keep_every or 0


def build_training_data(
    data: DataConfig, tokenizer: Tokenizer, wanted: Sequence[Wanted], train: TrainConfig, *, seed: int
) -> TrainingData:
    """The sets that `wanted` asks for, and what validates, always of `data.sequence_length`; every rank calls.

    A run reads a training set of another sequence length from the sample on that the tokens so far correspond to.
    """
    parts = training_parts(data, wanted)
    built = list(zip(parts, build_datasets(data, tokenizer, parts, seed=seed), strict=True))
    training = {part.sequence_length: dataset for part, dataset in built if part.name == "train"}
    validation = {part.source: dataset for part, dataset in built if part.name == "valid" and dataset is not None}
    shape = Shape(0, data.sequence_length, train.global_batch_size, train.micro_batch_size)
    read_valid = {name: batch_reader(dataset, shape) for name, dataset in validation.items()}
    read_train = step_reader(training, num_workers=data.num_workers)
    return TrainingData(training, read_train, read_valid, data_order(training))


def batch_reader(dataset: Any, shape: Shape) -> BatchReader:
    """Reads `dataset` in Megatron's order: which samples make a global batch is the same at every layout."""

    def read(first_sample: int, number: int) -> Iterator[list[Microbatch]]:
        stream = _stream(dataset, first_sample, shape, num_workers=0)
        return (_next_batch(stream, shape) for _ in range(number))

    return read


def once_reader(dataset: Any, shape: Shape, *, whole: bool) -> BatchReader:
    """Reads what `batch_reader` reads, but no sample twice: the last global batch is smaller, or none is left.

    whole: it is filled up with microbatches that do not count, for schedules that take no other number of them.
    """

    def read(first_sample: int, number: int) -> Iterator[list[Microbatch]]:
        end = min(first_sample + number * shape.global_batch_size, len(dataset))
        samples = range(min(first_sample, end), end)
        stream = map(to_device, batches_once(dataset, samples, micro_batch_size=shape.micro_batch_size, **data_place()))
        count = _microbatches(shape)
        while batch := list(itertools.islice(stream, count)):
            yield batch + [uncounted(batch[-1]) for _ in range(count - len(batch) if whole else 0)]

    return read


def step_reader(datasets: dict[int, Any], *, num_workers: int = 0) -> StepReader:
    """Reads each phase from the dataset of its sequence length, in Megatron's order."""

    def read(timetable: Timetable, iteration: int) -> Iterator[tuple[Step, list[Microbatch]]]:
        for _, steps in itertools.groupby(timetable.steps(iteration), key=lambda step: step.shape.phase):
            first = next(steps)
            # One stream for all batch sizes of a ramp-up: the order of samples does not depend on them.
            stream = _stream(datasets[first.shape.sequence_length], first.first_sample, first.shape, num_workers)
            for step in itertools.chain([first], steps):
                yield step, _next_batch(stream, step.shape)

    return read


def data_order(datasets: dict[int, Any]) -> dict[int, str]:
    """Of training sets by their sequence lengths, a fingerprint of the samples that each gives first. Any rank calls.

    Megatron shuffles all passes over a text at once, so that another number of them begins otherwise.
    """
    found = {}
    for length, dataset in datasets.items():
        first = [dataset[number]["tokens"].numpy() for number in range(min(8, len(dataset)))]
        found[length] = token_checksum(numpy.concatenate(first))
    return found


def _stream(dataset: Any, first_sample: int, shape: Shape, num_workers: int) -> Iterator[Batch]:
    sizes = {"global_batch_size": shape.global_batch_size, "micro_batch_size": shape.micro_batch_size}
    return batches(dataset, consumed_samples=first_sample, num_workers=num_workers, **sizes, **data_place())


def _next_batch(stream: Iterator[Batch], shape: Shape) -> list[Microbatch]:
    return [to_device(microbatch) for microbatch in itertools.islice(stream, _microbatches(shape))]


def _microbatches(shape: Shape) -> int:
    """Of a global batch, on each data-parallel rank."""
    return shape.global_batch_size // (shape.micro_batch_size * data_group().size())
