"""The timetable of a token budget: totals, phases, batch-size ramp-up against Megatron's own calculator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator

from minitron_mcore.errors import InputError
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.budget import Timetable, check_train, plan_timetable, ramp
from minitron_mcore.training.config import PhaseConfig, TrainConfig


def plan(sequence_length: int = 16, **fields: Any) -> Timetable:
    return plan_timetable(TrainConfig(**fields), sequence_length, "train")


phases = st.lists(
    st.builds(
        PhaseConfig,
        tokens=st.integers(500, 3000),
        sequence_length=st.none() | st.sampled_from([4, 8, 16, 24]),
        global_batch_size=st.none() | st.sampled_from([1, 2, 6]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(phases)
def test_every_step_follows_from_the_ones_before(parts: list[PhaseConfig]) -> None:
    """One by one: tokens and samples add up, each phase ends with the first global batch that reaches its end, and
    reads on in its dataset where its tokens correspond to."""
    budget = sum(part.tokens or 0 for part in parts)
    timetable = plan(12, tokens=budget, global_batch_size=4, phases=parts)
    samples = tokens = 0
    ends = [sum(part.tokens or 0 for part in parts[: number + 1]) for number in range(len(parts))]
    read: dict[int, int] = {}
    for iteration, step in enumerate(timetable.steps()):
        part, shape = parts[step.shape.phase], step.shape
        assert step == timetable.at(iteration) and step.iteration == iteration
        assert (step.samples_before, step.tokens_before) == (samples, tokens)
        assert shape.sequence_length == (part.sequence_length or 12)
        assert shape.global_batch_size == (part.global_batch_size or 4)
        assert tokens < ends[shape.phase] and (shape.phase == 0 or tokens >= ends[shape.phase - 1])
        assert step.first_sample >= read.get(shape.sequence_length, 0), "no sample is read twice"
        assert step.first_sample * shape.sequence_length >= tokens
        samples += shape.global_batch_size
        tokens += shape.tokens
        read[shape.sequence_length] = step.first_sample + shape.global_batch_size
    assert (timetable.samples, timetable.tokens) == (samples, tokens)
    assert budget <= tokens < budget + shape.tokens
    assert timetable.samples_needed() == read
    assert [step.iteration for step in timetable.steps(timetable.iterations - 1)] == [timetable.iterations - 1]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 12), st.integers(1, 700))
def test_the_ramp_is_megatrons(start: int, increment: int, steps: int, samples: int) -> None:
    """By the rule of Megatron-LM, written out, and by megatron-core's own class where it still has one (0.16)."""
    full = start + increment * steps
    theirs = getattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator", None)
    calculator = theirs and theirs(full, 1, 1, False, 1, start, increment, samples)
    sizes = [size for size, count in ramp([start, increment, samples], full, "train") for _ in range(count)]
    consumed = 0
    for size in [*sizes, full, full]:
        assert size == (start + int(consumed / (samples / steps)) * increment if consumed <= samples else full)
        if calculator is not None:
            calculator.update(consumed, consistency_check=True)
            assert calculator.get_current_global_batch_size() == size
        consumed += size
    assert sizes == sorted(sizes) and max(sizes) < full


def test_a_ramp_then_the_full_size() -> None:
    """By hand: 2, 4, 6 sequences, 24 samples over two increments of 12; then 8 of 16 tokens."""
    timetable = plan(tokens=16 * 64, global_batch_size=8, rampup_batch_size=[4, 2, 24])
    assert [step.shape.global_batch_size for step in timetable.steps()] == [4, 4, 4, 6, 6, 8, 8, 8, 8, 8]
    assert [step.tokens_before // 16 for step in timetable.steps()] == [0, 4, 8, 12, 18, 24, 32, 40, 48, 56]
    assert timetable.tokens == 16 * 64 and str(timetable) == "10 iterations of 4-8 x 16 tokens, 1,024 in all"
    assert str(plan(tokens=9)).startswith("1 iteration of ")


def test_phases_share_the_dataset_of_their_length() -> None:
    """8 x 8 and 4 x 20 tokens: 3 iterations reach 150, so the second phase starts at 192, sample 9.6 of 20 tokens."""
    parts = [PhaseConfig(150, 8, 8), PhaseConfig(200, 20, 4), PhaseConfig(None, 8, 2)]
    timetable = plan(16, tokens=400, phases=parts)
    starts = [(start.tokens_before, start.first_sample, start.iteration) for start in timetable.starts]
    assert starts == [(0, 0, 0), (192, 10, 3), (352, 44, 5)] and timetable.iterations == 8
    assert timetable.samples_needed() == {8: 50, 20: 18} and timetable.tokens == 400


def test_a_long_budget_is_not_walked() -> None:
    """94B tokens in 80 million iterations, with a thousand sizes on the way."""
    timetable = plan(1, tokens=94_000_000_000, global_batch_size=1152, rampup_batch_size=[2, 1, 10_000_000])
    assert len(timetable.starts) == 1151
    assert timetable.at(timetable.iterations - 1).tokens_before < 94_000_000_000 <= timetable.tokens


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rampup_batch_size": [2, 2]}, "rampup_batch_size=[2, 2] must be three numbers: first"),
        ({"rampup_batch_size": [2, 0, 9]}, "rampup_batch_size[1]=0 must be at least 1"),
        ({"rampup_batch_size": [2, 4, 9]}, "train.rampup_batch_size=[2, 4, 9] must grow from 2 to the global batch"),
        ({"rampup_batch_size": [8, 2, 9]}, "train.rampup_batch_size=[8, 2, 9] must grow from 8 to the global batch"),
        ({"rampup_batch_size": [2, 2, 90]}, "train.rampup_batch_size=[2, 2, 90] takes"),
        ({"phases": [PhaseConfig(), PhaseConfig()]}, "phases[0].tokens is missing: only the last phase may"),
        ({"phases": [PhaseConfig(400)]}, "train.phases have 400 tokens together, but train.tokens=1000: make them"),
        (
            {"phases": [PhaseConfig(999), PhaseConfig()]},
            "train.phases[1] has no iteration: the phases before it reach 1024 tokens in whole global batches, and it "
            "ends at 1000",
        ),
        ({"lr_warmup_tokens": -1}, "lr_warmup_tokens=-1 must be at least 0"),
    ],
)
def test_no_timetable(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(**{"tokens": 1000, "global_batch_size": 8, **fields})
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("fields", "parallel", "words"),
    [
        (
            {"rampup_batch_size": [1, 1, 14]},
            {},
            "train.rampup_batch_size=[1, 1, 14] passes a batch size of 1, which is not a multiple of train."
            "micro_batch_size=1 x 2 data-parallel ranks = 2",
        ),
        (
            {"rampup_batch_size": [2, 2, 12]},
            {"pipeline": 2, "virtual_pipeline": 2},
            "train.rampup_batch_size=[2, 2, 12] passes a batch size of 2, which makes 1 microbatch, "
            "but the interleaved schedule needs a multiple of parallel.pipeline=2: change one of them",
        ),
        (
            {"phases": [PhaseConfig(500), PhaseConfig(global_batch_size=6)]},
            {"pipeline": 2, "virtual_pipeline": 2},
            "train.phases[1].global_batch_size=6 makes 3 microbatches",
        ),
        (
            {"phases": [PhaseConfig(500), PhaseConfig(global_batch_size=6, micro_batch_size=2)]},
            {},
            "train.phases[1].global_batch_size=6 is not a multiple of train.phases[1].micro_batch_size=2 x 2",
        ),
        (
            {"phases": [PhaseConfig(500, micro_batch_size=3), PhaseConfig()]},
            {},
            "train.global_batch_size=8 is not a multiple of train.phases[0].micro_batch_size=3 x 2",
        ),
    ],
)
def test_every_size_must_suit_the_layout(fields: dict[str, Any], parallel: dict[str, Any], words: str) -> None:
    train = TrainConfig(tokens=1000, global_batch_size=8, **fields)
    timetable = plan_timetable(train, 16, "train")
    check_train(replace(train, phases=[], rampup_batch_size=None), ParallelConfig(**parallel), 2, plan(tokens=9), "a")
    with pytest.raises(InputError) as caught:
        check_train(train, ParallelConfig(**parallel), 2, timetable, "train")
    assert str(caught.value).startswith(words)
