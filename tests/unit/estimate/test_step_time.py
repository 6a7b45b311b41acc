"""The time of a step against hand arithmetic, its formulas at their limits, and what every change may do to it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.forecast import forecast
from minitron_mcore.estimate.model import Setting, local_parameters
from minitron_mcore.estimate.operations import Pass
from minitron_mcore.estimate.rates import gather
from minitron_mcore.estimate.step_time import PARTS, _add_schedule, reference_pass, step_time
from minitron_mcore.model.fp8 import Fp8
from minitron_mcore.model.recompute import Recompute
from minitron_mcore.runtime.config import ClusterConfig, ParallelConfig
from minitron_mcore.runtime.devices import Machine, machine_of
from minitron_mcore.training.adam_state import AdamState

FIELDS: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "vocab_size": 128256,
}
LLAMA = build_architecture(FIELDS)
STUDENT = LLAMA.replace(hidden_size=3072, ffn_hidden_size=9216)
NEMOTRON = build_architecture({**FIELDS, "family": "nemotron"})
H100 = machine_of(ClusterConfig(device="H100"))
PEAK = 989.4e12
# Products at the peak, attention too, and nothing else takes time.
IDEAL = replace(
    H100,
    efficiency=1.0,
    attention_efficiency=1.0,
    memory_bandwidth=1e30,
    intra_node_bandwidth=1e30,
    inter_node_bandwidth=1e30,
    host_bandwidth=1e30,
    kernel_latency=0.0,
    intra_node_latency=0.0,
    inter_node_latency=0.0,
)
LENGTH, BATCH = 8192, 64
ALONE = ParallelConfig()


def setting(parallel: ParallelConfig = ALONE, data_parallel: int = 8, **changes: Any) -> Setting:
    fields: dict[str, Any] = {"student": LLAMA, "precision": "bf16", "sequence_length": LENGTH}
    fields |= {"global_batch_size": BATCH, "micro_batch_size": 1, "loss_chunk_tokens": None, **changes}
    return Setting(parallel=parallel, data_parallel=data_parallel, **fields)


@pytest.mark.parametrize("shape", [LLAMA, NEMOTRON], ids=["gated", "plain"])
@pytest.mark.parametrize("tensor", [1, 8])
def test_products_are_those_of_the_architecture(shape: Any, tensor: int) -> None:
    """Of all layers and ranks, two operations for a multiply-add; without scores, which are no matrix of weights."""
    layer = Pass(H100, shape, ParallelConfig(tensor=tensor), "bf16", 512, LENGTH, False).matrices()
    flops = 2 * tensor * sum(inner * outer for inner, outer in layer) * shape.num_layers
    assert flops == shape.forward_flops_per_token(0, output_head=False)


def test_one_rank_by_hand() -> None:
    """Three passes of the layers and the head; causal attention once forward and 2.5 times backward. The teacher:
    one pass of each."""
    found = step_time(setting(student=STUDENT, teacher=LLAMA, data_parallel=1), IDEAL)
    tokens = BATCH * LENGTH
    scores = 32 * 2 * LENGTH * 4096  # 4 x width x half the sequence, for each layer
    student = 3 * STUDENT.forward_flops_per_token(0, output_head=False) + 3.5 * scores
    teacher = LLAMA.forward_flops_per_token(0, output_head=False) + scores
    heads = 2 * 128256 * (3 * 3072 + 4096)
    assert found.parts["student"] == pytest.approx(tokens * student / PEAK, rel=1e-9)
    assert found.parts["teacher"] == pytest.approx(tokens * teacher / PEAK, rel=1e-9)
    assert found.parts["loss"] == pytest.approx(tokens * heads / PEAK, rel=1e-9)
    assert found.total == pytest.approx(tokens * (student + teacher + heads) / PEAK, rel=1e-9)
    assert found.tokens_per_second == pytest.approx(tokens / found.total)
    assert set(found.parts) == set(PARTS)


def test_a_pair_is_two_sequences() -> None:
    """Both sides in a row take what two sequences take, in time and in memory, at every layout."""
    for parallel in (ALONE, ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2, context=2)):
        pair = setting(parallel, 2, sequence_length=2 * LENGTH, sides=2)
        two = setting(parallel, 2, micro_batch_size=2, global_batch_size=2 * BATCH)
        found, expected = step_time(pair, H100), step_time(two, H100)
        assert (found.parts, found.student_flops) == (expected.parts, expected.student_flops)
        assert forecast(pair).parts == forecast(two).parts


def test_preferences_sweep_over_the_logits_once_more() -> None:
    """Forward for the losses, before their weights are known: one product with the head more."""
    plain, found = (step_time(setting(preference=is_pair), IDEAL).parts for is_pair in (False, True))
    again = found.pop("loss") - plain.pop("loss")
    assert again == pytest.approx(BATCH * LENGTH / 8 * 2 * 128256 * 4096 / PEAK, rel=1e-9) and found == plain


def test_the_reference_by_hand() -> None:
    """Forward over ten sequences: layers, causal scores and the head. Over eight ranks that is as long as two take; two
    stages share the layers, and wait for each other once."""
    layers = LLAMA.forward_flops_per_token(0, output_head=False) + 32 * 2 * LENGTH * 4096
    head = 2 * 128256 * 4096
    pair = setting(data_parallel=1, sequence_length=2 * LENGTH, sides=2, preference=True)
    found = reference_pass(pair, IDEAL, 10)
    assert found.seconds == pytest.approx(10 * LENGTH * (layers + head) / PEAK, rel=1e-9)
    assert found.tokens == 10 * LENGTH and found.flops == 10 * LENGTH * LLAMA.forward_flops_per_token(LENGTH)
    ranks = reference_pass(replace(pair, data_parallel=8), IDEAL, 10)
    assert ranks.seconds == pytest.approx(2 * LENGTH * (layers + head) / PEAK, rel=1e-9)
    staged = reference_pass(replace(pair, parallel=ParallelConfig(pipeline=2)), IDEAL, 10)
    assert staged.seconds == pytest.approx(LENGTH * (10 * (layers / 2 + head) + layers / 2) / PEAK, rel=1e-9)


def test_operations_are_counted_as_in_training() -> None:
    """accounting.throughput: three passes of the student, one of the teacher, whole scores, the head among them."""
    found = step_time(setting(student=STUDENT, teacher=LLAMA), H100)
    tokens = BATCH * LENGTH
    assert found.tokens == tokens and found.gpus == 8
    assert found.student_flops == 3 * STUDENT.forward_flops_per_token(LENGTH) * tokens
    assert found.teacher_flops == LLAMA.forward_flops_per_token(LENGTH) * tokens
    rate = (found.student_flops + found.teacher_flops) / found.total / 8
    assert found.flops_per_gpu == pytest.approx(rate) and found.utilization == pytest.approx(rate / PEAK)
    taught = step_time(setting(student=STUDENT, teacher=LLAMA, teacher_trained=True), H100)
    assert taught.teacher_flops == 3 * found.teacher_flops


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_the_bubble_of_equal_stages(chunks: int) -> None:
    """(P - 1) / (v m) of the work (arXiv 2104.04473, section 2.2)."""
    parts = dict.fromkeys(PARTS, 0.0)
    _add_schedule(parts, [{"student": 0.5}] * 4, 16, 1, chunks)
    assert parts["student"] == 8
    assert parts["pipeline bubble"] / parts["student"] == pytest.approx(3 / 16 / chunks)


def test_unequal_stages_wait_for_the_slowest() -> None:
    """By hand, three microbatches: stages of 1, 3 and 2 seconds end after 1 + 3 x 3 + 2."""
    parts = dict.fromkeys(PARTS, 0.0)
    _add_schedule(parts, [{"student": 1.0}, {"student": 3.0}, {"student": 2.0}], 3, 1, 1)
    assert sum(parts.values()) == 12


def test_each_window_fills_the_pipeline_anew() -> None:
    own = setting(ParallelConfig(pipeline=4), 1, student=STUDENT, teacher=LLAMA)
    one, four = (step_time(replace(own, teacher_window=window), IDEAL) for window in (0, 16))
    assert four.parts["pipeline bubble"] == pytest.approx(4 * one.parts["pipeline bubble"])
    assert four.total - one.total == pytest.approx(3 * one.parts["pipeline bubble"])


def test_the_interleaved_schedule_sends_while_it_works() -> None:
    """Plain 1F1B waits: 8192 tokens of 4096 channels and two bytes, there and back; twice that for two chunks."""
    own = setting(ParallelConfig(pipeline=2), data_parallel=4)
    machine = replace(IDEAL, intra_node_bandwidth=450e9)
    plain = step_time(own, machine).parts["pipeline communication"]
    assert plain == pytest.approx(16 * 2 * LENGTH * 4096 * 2 / 450e9)
    chunks = replace(own, parallel=ParallelConfig(pipeline=2, virtual_pipeline=2))
    assert step_time(chunks, machine).parts["pipeline communication"] == 0
    bare = step_time(replace(chunks, on_cpu=True), machine).parts["pipeline communication"]
    assert bare == pytest.approx(2 * plain)


def test_data_parallel_volume() -> None:
    """fp32 gradients to their shards, bf16 weights back: 7/8 of each over the links of a node."""
    machine = replace(IDEAL, intra_node_bandwidth=450e9, overlap=0.0)
    found = step_time(setting(), machine).parts["data-parallel communication"]
    count = local_parameters(LLAMA, ParallelConfig(), 0)
    assert found == pytest.approx((4 + 2) * count * 7 / 8 / 450e9)
    assert step_time(setting(), replace(machine, overlap=1.0)).parts["data-parallel communication"] == 0
    half = step_time(setting(), replace(machine, overlap=0.5)).parts["data-parallel communication"]
    assert half == pytest.approx(found / 2)


def test_instances_of_the_optimizer_gather_each_in_its_own_node() -> None:
    """16 ranks as 2 instances of 8: 7/8 of gradients and weights within a node, and between the nodes an all-reduce of
    each rank's eighth of the gradients, at what one GPU sends, instead of 15/16 of all over all links."""
    machine = replace(IDEAL, intra_node_bandwidth=450e9, inter_node_bandwidth=50e9, overlap=0.0)
    two = ParallelConfig(num_distributed_optimizer_instances=2)
    own = setting(two, data_parallel=16)
    count = local_parameters(LLAMA, two, 0)
    within, between = 6 * count * 7 / 8 / 450e9, 2 * 4 * count / 8 * 1 / 2 / 50e9
    assert step_time(own, machine).parts["data-parallel communication"] == pytest.approx(within + between)
    held = forecast(own).parts["optimizer state"], forecast(replace(own, parallel=ALONE)).parts["optimizer state"]
    assert held[0] == pytest.approx(2 * held[1])


def test_a_ring_over_nodes_uses_all_their_links() -> None:
    """Of 32 ranks on 4 nodes, neighbours: 8 x 50 GB/s, below the 450 inside; every eighth rank: 50 GB/s."""
    machine = replace(IDEAL, inter_node_bandwidth=50e9, intra_node_bandwidth=450e9, inter_node_latency=1e-5)
    assert gather(machine, 1e9, 32) == pytest.approx(1e9 * 31 / 32 / 400e9 + 5e-5)
    assert gather(machine, 1e9, 4, stride=8) == pytest.approx(1e9 * 3 / 4 / 50e9 + 2e-5)
    assert gather(machine, 1e9, 1) == 0
    quick = replace(machine, inter_node_bandwidth=100e9)
    assert gather(quick, 1e9, 32) == pytest.approx(1e9 * 31 / 32 / 450e9 + 5e-5), "no faster than within a node"


def test_tensor_parallel_volume() -> None:
    """Two all-reduces a layer forward and two backward, of which backward's are hidden behind products where these
    take longer; sequence parallelism moves as much forward."""
    machine = replace(IDEAL, intra_node_bandwidth=450e9)
    own: dict[str, Any] = {"data_parallel": 1, "global_batch_size": 1}
    states = 2 * LENGTH * 4096
    layer, embedding = 4 * states * 3 / 4 / 450e9, 2 * states * 3 / 4 / 450e9
    loss = 2 * states * 3 / 4 / 450e9 + 64 * 4 * LENGTH * 3 / 4 / 450e9
    found = step_time(setting(ParallelConfig(tensor=4), **own), machine).parts["tensor-parallel communication"]
    assert found == pytest.approx(32 * layer + embedding + loss)
    quick = replace(machine, intra_node_bandwidth=900e9)
    same = step_time(setting(ParallelConfig(tensor=4, sequence=True), **own), quick)
    assert same.parts["tensor-parallel communication"] == pytest.approx(found / 2)
    bare = step_time(setting(ParallelConfig(tensor=4), **own, on_cpu=True), machine)
    assert bare.parts["tensor-parallel communication"] == pytest.approx(found + 32 * layer), "nothing hides it there"


def test_recomputation_is_another_forward_pass() -> None:
    plain, full, mlp, two = (
        step_time(setting(recompute=each, data_parallel=1), IDEAL)
        for each in (Recompute(), Recompute("full"), Recompute("selective"), Recompute("full", "block", 2))
    )
    scores = 32 * 2 * LENGTH * 4096
    forward = BATCH * LENGTH * (LLAMA.forward_flops_per_token(0, output_head=False) + scores) / PEAK
    assert full.parts["recomputation"] == pytest.approx(forward)
    assert two.parts["recomputation"] == pytest.approx(forward * 2 / 32)
    assert mlp.parts["recomputation"] == pytest.approx(BATCH * LENGTH * 32 * 2 * 3 * 4096 * 14336 / PEAK)
    assert full.total == pytest.approx(plain.total + forward)


def test_where_the_teacher_lies() -> None:
    """Layers that come while others run cost nothing until they take longer; states travel from another layout."""
    taught: dict[str, Any] = {"student": STUDENT, "teacher": LLAMA}
    resident = step_time(setting(**taught), H100)
    sharded = step_time(setting(**taught, teacher_placement="sharded"), H100)
    assert sharded.total == pytest.approx(resident.total)
    slow = replace(H100, host_bandwidth=1e9)
    offloaded = step_time(setting(**taught, teacher_placement="offloaded"), slow)
    layer = 2 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    fetched = offloaded.parts["teacher's layers fetched"] + offloaded.parts["teacher"]
    assert fetched == pytest.approx(8 * 32 * layer / 1e9, rel=0.01), "as long as its layers take over the bus"
    apart = step_time(setting(**taught, teacher_parallel=ParallelConfig(tensor=2)), H100)
    assert apart.parts["teacher's states sent"] == pytest.approx(8 * LENGTH * 4096 * 2 / 450e9, rel=0.01)
    assert apart.parts["teacher"] == pytest.approx(resident.parts["teacher"], rel=0.05), "the same work, divided"


def test_a_window_that_is_not_full_runs_no_further() -> None:
    """Of 64 microbatches on a rank 24 and 24 and 16, as many in all as in one window."""
    own = setting(student=STUDENT, teacher=LLAMA, data_parallel=1)
    one, three = (step_time(replace(own, teacher_window=window), H100).parts["teacher"] for window in (0, 24))
    assert three == pytest.approx(one)


def test_a_corrected_teacher_trains() -> None:
    """As a model of its shape alone."""
    own = setting(student=STUDENT, teacher=LLAMA, teacher_trained=True)
    found = step_time(own, H100)
    assert found.parts["teacher"] == 0
    assert found.parts["teacher's training"] == pytest.approx(step_time(setting(), H100).total)


def test_memory_bounds_small_steps() -> None:
    """One sequence of 128 tokens on one GPU reads and writes weights, gradients and states for longer than it
    multiplies: at least 2 bytes a weight three times, 10 of its gradient, 52 of the optimizer."""
    own = setting(sequence_length=128, global_batch_size=1, data_parallel=1)
    found = step_time(own, H100)
    assert found.total > LLAMA.num_parameters * 52 / 3350e9
    faster = step_time(own, replace(H100, efficiency=1.0))
    assert faster.total > 0.9 * found.total


@pytest.mark.parametrize("name", ["memory_bandwidth", "intra_node_bandwidth", "inter_node_bandwidth", "efficiency"])
def test_a_better_machine_is_never_slower(name: str) -> None:
    own = setting(ParallelConfig(tensor=4, pipeline=2, context=2), data_parallel=4, student=STUDENT, teacher=LLAMA)
    better = replace(H100, **{name: 1.2 * getattr(H100, name)})
    assert step_time(own, better).total < step_time(own, H100).total


def test_twice_the_gpus_at_the_same_batch() -> None:
    """Faster, but by less than two; at the whole batch's share of microbatches that they have."""
    one, two = (step_time(setting(data_parallel=size), H100) for size in (16, 32))
    assert 1.5 < one.total / two.total < 2
    assert two.flops_per_gpu < one.flops_per_gpu


def test_context_parallel_keys_are_gathered() -> None:
    """Hidden behind attention on a GPU at 8k, not where nothing is hidden."""
    own = setting(ParallelConfig(context=2), data_parallel=4)
    machine = replace(IDEAL, intra_node_bandwidth=450e9)
    assert step_time(own, machine).parts["context-parallel communication"] == 0
    keys = 2 * 1024 * 2 * LENGTH
    bare = step_time(replace(own, on_cpu=True), machine).parts["context-parallel communication"]
    assert bare == pytest.approx(16 * 32 * 2 * keys / 2 / 450e9)


def test_what_the_machine_lacks_is_refused_where_it_counts() -> None:
    alone = machine_of(ClusterConfig(device="L4"))
    assert math.isfinite(step_time(setting(), alone).total)
    with pytest.raises(InputError, match=r"^cluster\.inter_node_bandwidth is not given"):
        step_time(setting(data_parallel=16), alone)
    with pytest.raises(InputError, match=r"^cluster\.peak_tflops is not given"):
        step_time(setting(), Machine())


def test_a_student_in_fp8_by_hand() -> None:
    """Where nothing but operations takes time: the products of 30 of 32 layers at the fp8 peak, those of the first, the
    last, attention and the head at bf16's; and the peak that a utilization is a share of."""
    plain = step_time(setting(), IDEAL)
    fp8 = step_time(setting(fp8=Fp8(at_start=1, at_end=1)), IDEAL)
    weights = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    narrow = 3 * 2 * BATCH * LENGTH * weights * 30 / 8  # forward once, backward twice; of each of 8 GPUs
    faster = narrow * (1 / PEAK - 1 / H100.peak("fp8"))
    assert plain.total - fp8.total == pytest.approx(faster, rel=1e-9)
    assert plain.parts["loss"] == fp8.parts["loss"] and plain.parts["teacher"] == fp8.parts["teacher"] == 0
    assert (plain.peak, fp8.peak) == (PEAK, H100.peak("fp8"))
    assert fp8.student_flops == plain.student_flops


def test_casts_of_weights_and_a_narrow_state_by_hand() -> None:
    """Beside what both do: of each number of a matrix 2 bytes read and 2 written a step; of Adam's state 12 - 7 bytes
    read and written less, by each of 8 ranks of its share."""
    bytes_a_second = H100.need("memory_bandwidth") * H100.memory_efficiency
    plain, fp8 = (step_time(setting(fp8=fp8), H100).parts["optimizer"] for fp8 in (None, Fp8()))
    matrices = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    assert fp8 - plain == pytest.approx(4 * matrices / bytes_a_second, rel=1e-9)
    aware = AdamState(is_aware=True, exp_avg="bf16", exp_avg_sq="fp8")
    narrow = step_time(setting(adam=aware), H100).parts["optimizer"]
    share = local_parameters(LLAMA, ALONE, 0) / 8
    assert plain - narrow == pytest.approx(2 * 5 * share / bytes_a_second, rel=1e-9)


def test_recomputed_in_fp8_too() -> None:
    full: dict[str, Any] = {"recompute": Recompute("full")}
    plain, fp8 = (step_time(setting(fp8=fp8, **full), IDEAL).parts["recomputation"] for fp8 in (None, Fp8(at_end=8)))
    weights = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    faster = 2 * BATCH * LENGTH * weights * 24 / 8 * (1 / PEAK - 1 / H100.peak("fp8"))
    assert plain - fp8 == pytest.approx(faster, rel=1e-9)
