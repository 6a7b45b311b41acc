"""What overlap hides of data-parallel communication, by hand and at its limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.estimate.model import Setting, local_parameters
from minitron_mcore.estimate.overlap import Bucket, buckets, gathering_wait, reduction_wait
from minitron_mcore.estimate.rates import gather
from minitron_mcore.estimate.step_time import step_time
from minitron_mcore.runtime.config import ClusterConfig, ParallelConfig
from minitron_mcore.runtime.devices import machine_of

# A layer of 10 x (4 + 2 x 2) x 10 of QKV, 40 x 10 of projection, 2 x 10 x 90 and 90 x 10 of the MLP, two norms.
FIELDS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 10,
    "ffn_hidden_size": 90,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 10,
    "vocab_size": 128,
}
SMALL = build_architecture(FIELDS)
LAYER, TABLE = 800 + 400 + 1800 + 900 + 20, 1280
H100 = machine_of(ClusterConfig(device="H100"))
# A byte takes 2 seconds between two ranks, of which each moves a half.
SLOW = replace(H100, intra_node_bandwidth=0.5, intra_node_latency=0.0)


def setting(parallel: ParallelConfig | None = None, **changes: Any) -> Setting:
    fields: dict[str, Any] = {"student": SMALL, "precision": "bf16", "sequence_length": 64, "data_parallel": 2}
    fields |= {"global_batch_size": 8, "micro_batch_size": 1, "loss_chunk_tokens": None, "ddp_bucket_size": 5000}
    return Setting(parallel=parallel or ParallelConfig(), **{**fields, **changes})


def test_buckets_by_hand() -> None:
    """From the head on, each as soon as it has 5,000: head, layer 3 and the end of layer 2, ...; the embedding last."""
    found = buckets(SMALL, 1, (4,), (True, True), 5000)
    assert sum(bucket.parameters for bucket in found) == local_parameters(SMALL, ParallelConfig(), 0)
    assert all(bucket.parameters >= 5000 for bucket in found[:-1])
    assert [bucket.place for bucket in found] == sorted((bucket.place for bucket in found), reverse=True)
    assert found[-1].place == 0 and found[-1].parameters >= TABLE
    assert buckets(SMALL, 1, (4,), (True, True), 10**9) == (Bucket(4 * LAYER + 2 * TABLE + 10, 0),)
    assert len(buckets(SMALL, 1, (4,), (True, True), 1)) > 20
    # A later stage has one, and so has the second chunk; copies of a tied table are apart.
    assert buckets(SMALL, 1, (2,), (False, True), 5000) == (Bucket(2 * LAYER + TABLE + 10, 0),)
    chunks = buckets(SMALL, 1, (1, 1), (True, False), 10**9)
    assert chunks == (Bucket(LAYER, 1), Bucket(LAYER + TABLE, 0))
    tied = build_architecture({**FIELDS, "untie_embeddings_and_output_weights": False})
    assert buckets(tied, 1, (2,), (True, False), 10**9) == (Bucket(2 * LAYER, 0), Bucket(TABLE, 0))
    assert buckets(tied, 1, (2,), (False, True), 10**9) == (Bucket(TABLE, 2), Bucket(2 * LAYER + 10, 0))


def test_a_reduction_waits_for_the_last_bucket_or_for_the_links() -> None:
    own, found = setting(), buckets(SMALL, 1, (4,), (True, True), 5000)
    last = 4 * sum(bucket.parameters for bucket in found if bucket.place == 0)
    whole = 4 * sum(bucket.parameters for bucket in found)
    assert gather(SLOW, 1, 2) == 1
    assert reduction_wait(own, SLOW, 1e9) == pytest.approx(last), "backward takes so long that layer 0's are left"
    assert reduction_wait(own, SLOW, 0.0) == pytest.approx(whole), "nothing to hide under"
    # Neither: the head's bucket, which holds layer 3, goes when that one's backward has passed, and the rest in a row.
    assert found[0].place == 3 and reduction_wait(own, SLOW, 100.0) == pytest.approx(whole - 3 * 100.0)
    one = replace(own, ddp_bucket_size=10**9)
    assert reduction_wait(one, SLOW, 1e9) == pytest.approx(whole), "a single bucket hides nothing"
    assert reduction_wait(replace(own, data_parallel=1), SLOW, 100.0) == 0


def test_weights_are_gathered_before_the_layers_that_need_them() -> None:
    own, found = setting(), buckets(SMALL, 1, (4,), (True, True), 5000)
    first = 2 * sum(bucket.parameters for bucket in found if bucket.place == 0)
    whole = 2 * sum(bucket.parameters for bucket in found)
    assert gathering_wait(own, SLOW, 1e9) == pytest.approx(first), "the first layer waits for its own buckets"
    assert gathering_wait(own, SLOW, 0.0) == pytest.approx(whole)
    assert gathering_wait(own, SLOW, 1.0) == pytest.approx(whole - found[0].place)


def test_later_stages_have_what_the_earlier_take() -> None:
    """By hand: two stages of two layers and one bucket. The second ends its backward two layers before the first."""
    own = setting(ParallelConfig(pipeline=2), ddp_bucket_size=10**9)
    slow = replace(SLOW, gpus_per_node=4)
    first, second = 4 * (2 * LAYER + TABLE), 4 * (2 * LAYER + TABLE + 10)
    assert reduction_wait(own, slow, 1.0) == pytest.approx(second - 2)
    assert reduction_wait(own, slow, 100.0) == pytest.approx(first)
    assert gathering_wait(own, slow, 1.0) == pytest.approx((second - 4) / 2)


def communication(machine: Any = H100, **changes: Any) -> float:
    fields: dict[str, Any] = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "vocab_size": 128256}
    large = build_architecture(
        {**FIELDS, **fields, "num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128}
    )
    given = {"student": large, "sequence_length": 8192, "data_parallel": 8, "global_batch_size": 64}
    own = setting(**{**given, "ddp_bucket_size": None, **changes})
    return step_time(own, machine).parts["data-parallel communication"]


def test_the_keys_say_what_is_hidden() -> None:
    neither = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    whole = communication(**neither)
    assert communication(replace(H100, overlap=0.0)) == pytest.approx(whole), "a share that is given counts"
    assert communication(replace(H100, overlap=0.75)) == pytest.approx(whole / 4)
    assert communication(on_cpu=True) == pytest.approx(whole), "on the CPU nothing is hidden"
    reduces, gathers = (communication(**{**neither, name: True}) for name in neither)
    both = communication()
    assert both < gathers < whole and both < reduces < whole
    assert reduces + gathers == pytest.approx(whole + both), "each hides its own"
    assert both < 0.15 * whole


def test_a_teacher_that_runs_ahead_hides_the_gathering() -> None:
    """Its pass over eight microbatches is longer than what the weights take; a reduction is as it was."""
    teacher = build_architecture({**FIELDS, "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336})
    alone, taught = communication(overlap_grad_reduce=False), communication(overlap_grad_reduce=False, teacher=teacher)
    reduced = communication(overlap_grad_reduce=False, overlap_param_gather=True, teacher=teacher)
    assert taught < alone and reduced == pytest.approx(taught)
    bare = communication(overlap_grad_reduce=False, overlap_param_gather=False, teacher=teacher)
    assert taught == pytest.approx(bare * 4 / 6, rel=1e-3), "of 4 + 2 bytes those of the gradients are left"
