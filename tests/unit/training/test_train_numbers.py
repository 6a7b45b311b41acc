"""The numbers of a training run: iterations of a token budget, and what cannot be trained with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minitron_mcore.data.config import DataConfig
from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.budget import Timetable, check_train, plan_timetable
from minitron_mcore.training.config import LogConfig, TrainConfig
from minitron_mcore.training.learning_rate import check_learning_rate

GOOD = TrainConfig(tokens=1000, global_batch_size=8, micro_batch_size=2)


@pytest.mark.parametrize(
    ("tokens", "iterations"), [(1, 1), (128, 1), (129, 2), (1000, 8), (1024, 8), (94_000_000_000, 734_375_000)]
)
def test_the_budget_in_whole_global_batches(tokens: int, iterations: int) -> None:
    """8 sequences of 16 tokens an iteration; never fewer tokens than asked for."""
    assert plan_timetable(replace(GOOD, tokens=tokens), 16, "train").iterations == iterations


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0}, "distill.tokens=0 must be at least 1: it is the budget of training tokens"),
        ({"tokens": -5}, "tokens=-5 must be at least 0"),
        ({"global_batch_size": 0}, "global_batch_size=0 must be at least 1"),
        ({"micro_batch_size": -1}, "micro_batch_size=-1 must be at least 1"),
        ({"loss_chunk_tokens": 0}, "loss_chunk_tokens=0 must be at least 1"),
        ({"lr_warmup_iters": -1}, "lr_warmup_iters=-1 must be at least 0"),
        ({"lr": -1e-4}, "lr=-0.0001 must be finite and at least 0"),
        ({"lr": float("inf")}, "lr=inf must be finite and at least 0"),
        ({"lr": float("nan")}, "lr=nan must be finite and at least 0"),
        ({"min_lr": float("nan")}, "min_lr=nan must be finite and at least 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be finite and at least 0"),
        ({"clip_grad": -1.0}, "clip_grad=-1.0 must be finite and at least 0"),
        ({"adam_beta1": -0.1}, "adam_beta1=-0.1 must be at least 0 and below 1"),
        ({"adam_eps": 0.0}, "adam_eps=0.0 must be finite and at least 1e-30"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_timetable(replace(GOOD, **changes), 16, "distill")
    assert str(caught.value).startswith(words)


def test_a_sequence_has_a_token() -> None:
    with pytest.raises(InputError, match=r"sequence_length=0 must be at least 1"):
        DataConfig(sequence_length=0)


def check(data_parallel: int = 1, parallel: dict[str, Any] | None = None, **changes: Any) -> Timetable:
    """Everything that is checked before the first step; 8 iterations unless `changes` say otherwise."""
    train = replace(GOOD, **changes)
    timetable = plan_timetable(train, 16, "train")
    check_train(train, ParallelConfig(**(parallel or {})), data_parallel, timetable, "train")
    check_learning_rate(train, timetable, "train")
    return timetable


def test_numbers_that_can_be_trained_with() -> None:
    check()
    check(data_parallel=4)
    check(lr=1e-3, min_lr=1e-3, lr_warmup_iters=7)
    check(lr=0.0, min_lr=0.0)
    check(parallel={"pipeline": 2, "virtual_pipeline": 2})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data_parallel": 3},
            "train.global_batch_size=8 is not a multiple of train.micro_batch_size=2 x 3 data-parallel ranks = 6",
        ),
        ({"micro_batch_size": 3}, "train.global_batch_size=8 is not a multiple of train.micro_batch_size=3 x 1"),
        ({"min_lr": 1e-2}, "min_lr=0.01 must lie between 0 and lr=0.0003"),
        ({"lr": 0.0}, "min_lr=3e-05 must lie between 0 and lr=0.0"),
        ({"lr_warmup_iters": 8}, "train.lr_warmup_iters=8 must be less than the 8 iterations of train.tokens=1000"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 must be at least 0 and below 1"),
        (
            {"parallel": {"pipeline": 3, "virtual_pipeline": 2}},
            "train.global_batch_size=8 makes 4 microbatches, but the interleaved schedule needs a multiple of "
            "parallel.pipeline=3",
        ),
    ],
)
def test_numbers_that_do_not_go_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        check(**changes)
    assert str(caught.value).startswith(words)


def test_lines_of_the_log() -> None:
    LogConfig(interval=1)
    with pytest.raises(InputError, match="interval=0 must be at least 1"):
        LogConfig(interval=0)
    with pytest.raises(InputError, match="timing_log_level=3 must lie between 0 and 2"):
        LogConfig(timing_log_level=3)
    with pytest.raises(InputError, match=r"peak_tflops=-1\.0 must be finite and above 0"):
        LogConfig(peak_tflops=-1.0)
