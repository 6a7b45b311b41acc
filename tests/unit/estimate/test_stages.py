"""Memory of the stages beside the trainings, by hand. Against measured peaks: tests/distributed/estimate."""

from __future__ import annotations

from dataclasses import replace

from minitron_mcore.distillation.config import CacheConfig
from minitron_mcore.estimate.stages import (
    Pass,
    cache_parts,
    evaluate_parts,
    forward_parts,
    kept_states,
    prune_bytes,
    score_parts,
)
from minitron_mcore.estimate.work import Beside, Limits
from minitron_mcore.importance.config import ImportanceConfig
from minitron_mcore.runtime.config import ParallelConfig
from tests.distributed.models import tiny

# 4 layers, hidden 48, ffn 96, 6 heads of 16 on 2 groups, 1,003 words padded to 1,024.
MODEL = tiny("llama")
RUN = Pass("score", MODEL, ParallelConfig(), "bf16", 64, 2)


def test_sums_of_scores() -> None:
    """Two fp64 sums a number of all samples, and of the microbatch one in fp32 on a GPU, in fp64 with a variance."""
    rows = 4 * (2 * 48 + 6 + 2 + 96)
    parts = score_parts(RUN, ImportanceConfig(), 0)
    assert parts["sums over samples"] == 16 * rows
    assert parts["sums of a microbatch"] == 4 * 2 * rows
    spread = score_parts(RUN, ImportanceConfig(aggregations=["l2/var"]), 0)
    assert spread["sums over samples"] == 2 * 16 * rows
    assert spread["sums of a microbatch"] == 8 * 2 * 3 * rows
    half = replace(RUN, parallel=ParallelConfig(tensor=2))
    assert score_parts(half, ImportanceConfig(), 0)["sums over samples"] == 16 * 4 * (2 * 48 + 3 + 1 + 48)


def test_logits_are_the_last_stages() -> None:
    long = replace(RUN, verb="evaluate", sequence_length=4096, parallel=ParallelConfig(pipeline=2))
    wide = replace(long, model=MODEL.replace(vocab_size=2**20, padded_vocab_size=2**20))
    assert "loss" not in evaluate_parts(wide, 0) and "layer at work" in evaluate_parts(wide, 0)
    # A 16th of 8,192 tokens in fp32, and the final states.
    assert evaluate_parts(wide, 1)["loss"] == 4 * 512 * 2**20 + 2 * 8192 * 48
    assert cache_parts(wide, CacheConfig(), 1)["targets"] == 40 * 128 * 2**20 + 2 * 8192 * 48
    assert "targets" not in cache_parts(wide, CacheConfig(), 0)


def test_layouts_share_a_pass_out() -> None:
    whole = sum(forward_parts(RUN, 0).values())
    for parallel in (ParallelConfig(tensor=2), ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2)):
        assert sum(forward_parts(replace(RUN, parallel=parallel), 0).values()) < whole


def test_final_states_are_kept_on_the_host_for_metrics_of_logits() -> None:
    asks = ImportanceConfig(depth_metrics=["logit_mse"], num_samples=10)
    assert kept_states(RUN, asks, data_parallel=4) == 3 * 64 * 48 * 2
    assert kept_states(RUN, ImportanceConfig(depth_metrics=["lm_loss"]), 4) == 0


def test_prune_holds_one_parameter() -> None:
    """Whatever the number of layers: here the embedding as it is stored, and a rank's half of it."""
    student = MODEL.replace(hidden_size=32)
    deep = MODEL.replace(num_layers=400)
    for teacher in (MODEL, deep):
        assert prune_bytes(teacher, student, ParallelConfig(tensor=2), "bf16") == 2 * 3 * 1024 * 48 // 2


def test_what_fits() -> None:
    """92% of a GPU; what is not known says nothing against it."""
    limits = Limits(device=1000, host=50)
    assert [limits.hold(device, host) for device, host in ((920, 50), (921, 0), (0, 51))] == [True, False, False]
    assert Limits().hold(10**15, 10**15) is None and Limits(host=50).hold(1, 51) is False
    assert Beside("prune", "prune", host=5).total == 0
