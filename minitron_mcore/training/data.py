"""What a training reads, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.dataset import build_datasets
from minitron_mcore.data.described import training_parts
from minitron_mcore.data.index_size import Wanted
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.training.config import TrainConfig
from minitron_mcore.training.reader import BatchReader, StepReader, batch_reader, data_order, step_reader


@dataclass(frozen=True)
class TrainingData:
    """datasets: the training sets by their sequence lengths.

    read_valid: by the source's name, "" for the whole blend; empty: no validation.
    order: of the samples, by reader.data_order.
    """

    datasets: dict[int, Any]
    read_train: StepReader
    read_valid: dict[str, BatchReader]
    order: dict[int, str]


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
    sizes = {"global_batch_size": train.global_batch_size, "micro_batch_size": train.micro_batch_size}
    return TrainingData(
        datasets=training,
        read_train=step_reader(training, num_workers=data.num_workers),
        read_valid={name: batch_reader(dataset, **sizes) for name, dataset in validation.items()},
        order=data_order(training),
    )
