"""Recomputed layers: what is refused, and what the forecast of memory makes of it, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minitron_mcore.errors import InputError
from minitron_mcore.estimate.forecast import advice, bytes_text, forecast, stage_parts
from minitron_mcore.estimate.model import activations, recomputed_activations
from minitron_mcore.model.recompute import KEEP_ALL, Recompute, check_recompute, recompute_of
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.config import TrainConfig
from tests.unit.estimate.test_memory import STUDENT, setting

FULL = {"recompute_granularity": "full"}
BOUNDARY = 2 * 128 * 64  # a layer's input: 128 tokens of 64 channels, in bf16
MLP = 2 * 128 * 3 * 128  # fc1's output and fc2's input, of a gated MLP of 128


def saved(recompute: Recompute, parallel: dict[str, Any] | None = None) -> tuple[int, int]:
    """(bytes kept on the first stage, bytes worked out again at a time)"""
    found = setting(parallel, recompute=recompute)
    return activations(found, 0), recomputed_activations(found, 0)


def test_by_hand() -> None:
    """Beside the layers the final norm's input and output."""
    layer = (saved(KEEP_ALL)[0] - 2 * BOUNDARY) // 8
    assert saved(KEEP_ALL) == (8 * layer + 2 * BOUNDARY, 0)
    expected = {
        Recompute("full"): (8 * BOUNDARY, layer),
        Recompute("full", "uniform", 4): (2 * BOUNDARY, 4 * layer),
        Recompute("full", "block", 3): (3 * BOUNDARY + 5 * layer, layer),
        Recompute("full", "block", 99): (8 * BOUNDARY, layer),
        Recompute("selective"): (8 * (layer - MLP), MLP),
    }
    for recompute, (stays, again) in expected.items():
        assert saved(recompute) == (stays + 2 * BOUNDARY, again), recompute


def test_over_stages() -> None:
    """Two chunks of two layers a stage: five passes of a chunk are under way on the first one (2 + 2 + 1), of which one
    is not sent yet; on CPU the output of each waits for its backward."""
    parallel = {"pipeline": 2, "virtual_pipeline": 2}
    assert saved(Recompute("full"), parallel)[0] == (5 * 2 + 1) * BOUNDARY
    assert saved(Recompute("full", "uniform", 2), parallel)[0] == (5 * 1 + 1) * BOUNDARY
    on_cpu = setting(parallel, recompute=Recompute("full"), on_cpu=True)
    assert activations(on_cpu, 0) == 5 * (2 + 1) * BOUNDARY


def test_the_loss_comes_before_what_is_recomputed() -> None:
    """Of the two, the larger is in the forecast."""
    large = setting(sequence_length=8192, teacher=None)
    for chunk, name in ((1, "recomputed layers"), (16384, "loss")):
        parts = stage_parts(replace(large, recompute=Recompute("full"), loss_chunk_tokens=chunk), 0)
        assert name in parts and len(parts.keys() & {"recomputed layers", "loss"}) == 1


def test_advice_offers_it() -> None:
    """At the price it has; and no more where it is taken already."""
    long = setting(sequence_length=8192, micro_batch_size=1)
    saving = forecast(long).total - forecast(replace(long, recompute=Recompute("full"))).total
    line = f"distill.recompute_granularity=full, at the cost of one more forward pass, saves {bytes_text(saving)}"
    assert line in advice(forecast(long), 9)
    taken = replace(long, recompute=Recompute("full"))
    assert not any("recompute" in words for words in advice(forecast(taken), 9))
    trained = replace(setting(teacher_trained=True, sequence_length=8192, micro_batch_size=1), teacher_chunk_tokens=128)
    assert any(words.startswith("correct.recompute_granularity=full") for words in advice(forecast(trained), 9))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, KEEP_ALL),
        (FULL, Recompute("full", "uniform", 1)),
        ({**FULL, "recompute_method": "block", "recompute_num_layers": 3}, Recompute("full", "block", 3)),
        ({"recompute_granularity": "selective"}, Recompute("selective")),
    ],
)
def test_of_a_section(changes: dict[str, Any], expected: Recompute) -> None:
    train = TrainConfig(**changes)
    check_recompute(train, STUDENT, ParallelConfig(), "train")
    assert recompute_of(train) == expected


@pytest.mark.parametrize(
    ("changes", "parallel", "words"),
    [
        (
            {"recompute_method": "block"},
            {},
            "recompute_method=block has no effect with recompute_granularity=null, which recomputes no whole layer: "
            "leave it out, or set recompute_granularity=full",
        ),
        (
            {"recompute_granularity": "selective", "recompute_num_layers": 2},
            {},
            "recompute_num_layers=2 has no effect with recompute_granularity=selective",
        ),
        (
            {**FULL, "recompute_num_layers": 3},
            {},
            "train.recompute_num_layers=3 does not divide the 8 layers that a pipeline stage runs at a time, as "
            "recompute_method=uniform needs: choose a divisor, or set train.recompute_method=block",
        ),
        # 8 layers on 3 stages: 3, 3 and 2.
        (
            {**FULL, "recompute_num_layers": 2},
            {"pipeline": 3},
            "train.recompute_num_layers=2 does not divide the 2 or",
        ),
        ({**FULL, "recompute_num_layers": 4}, {"pipeline": 2, "virtual_pipeline": 2}, "train.recompute_num_layers=4"),
    ],
)
def test_refused(changes: dict[str, Any], parallel: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_recompute(TrainConfig(**changes), STUDENT, ParallelConfig(**parallel), "train")
    assert str(caught.value).startswith(words)
