"""The forecast of memory, by hand: one shape whose every number can be multiplied out, and Megatron's schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minitron_mcore.architecture import build_architecture
from minitron_mcore.distillation.teacher.blocks import host_blocks, pinned_bytes
from minitron_mcore.estimate.forecast import advice, bytes_text, forecast, stage_parts
from minitron_mcore.estimate.model import Setting, activations, passes_in_flight
from minitron_mcore.estimate.teacher import host_bytes
from minitron_mcore.model.fp8 import Fp8
from minitron_mcore.model.recompute import Recompute
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.training.adam_state import AdamState

STUDENT = build_architecture(
    {
        "family": "llama",
        "num_layers": 8,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "vocab_size": 1024,
    }
)
TEACHER = STUDENT.replace(num_layers=16, hidden_size=128)
LAYER = 64 * (3 * 64) + 64 * 64 + 3 * 64 * 128 + 2 * 64  # qkv, proj, a gated MLP, two norms
TEACHER_LAYER = 128 * (3 * 64) + 64 * 128 + 3 * 128 * 128 + 2 * 128


def setting(parallel: dict[str, Any] | None = None, **changes: Any) -> Setting:
    base = Setting(
        student=STUDENT,
        parallel=ParallelConfig(**(parallel or {})),
        precision="bf16",
        data_parallel=1,
        sequence_length=64,
        global_batch_size=32,
        micro_batch_size=2,
        loss_chunk_tokens=32,
        section="distill",
        teacher=TEACHER,
    )
    return replace(base, **changes)


def test_by_hand() -> None:
    """bf16 on one GPU: 2 bytes a weight, 4 a gradient, 12 / DP of Adam with fp32 weights; 18 in all at DP 1."""
    count = 8 * LAYER + 2 * 1024 * 64 + 64
    parts = stage_parts(setting(), 0)
    assert parts["weights"] == 2 * count and parts["gradients"] == 4 * count
    assert parts["optimizer state"] == 12 * count
    assert stage_parts(setting(data_parallel=4), 0)["optimizer state"] == 3 * count
    assert stage_parts(setting({"context": 2}, data_parallel=2), 0)["optimizer state"] == 3 * count
    assert stage_parts(setting(precision="fp32"), 0)["optimizer state"] == 8 * count
    assert parts["teacher weights"] == 2 * (16 * TEACHER_LAYER + 2 * 1024 * 128 + 128)
    # 16 microbatches of 128 tokens, 128 channels of 2 bytes; with a window of 4, a quarter.
    assert parts["teacher hidden states"] == 16 * 128 * 128 * 2
    assert stage_parts(setting(teacher_window=4), 0)["teacher hidden states"] == 4 * 128 * 128 * 2
    # Two fp32 buffers and a bf16 one of a chunk's logits; the gradient of the states in bf16.
    assert parts["loss"] == (2 * 4 + 2) * 32 * 1024 + 2 * 64 * 128
    assert stage_parts(setting(teacher=None), 0).keys() & {"teacher weights", "teacher hidden states"} == set()


def test_where_the_teacher_lies() -> None:
    rest = 2 * 1024 * 128 + 128
    quarter = -(-2 * TEACHER_LAYER // (4 * 256)) * 256  # a shard lies at a multiple of 256 bytes
    for placement, kept in (("resident", 2 * TEACHER_LAYER), ("sharded", quarter), ("offloaded", 0)):
        parts = stage_parts(setting(teacher_placement=placement, data_parallel=4), 0)
        assert parts["teacher weights"] == 16 * kept + 2 * rest
    assert stage_parts(setting(teacher_precision="fp32"), 0)["teacher weights"] == 4 * (16 * TEACHER_LAYER + rest)


def test_quantised_copies() -> None:
    """In fp8 a byte more for each number of a matrix, where the layers are resident; none for norms, nor elsewhere."""
    rest = 2 * 1024 * 128 + 128
    resident = stage_parts(setting(teacher_precision="fp8"), 0)["teacher weights"]
    assert resident == 2 * (16 * TEACHER_LAYER + rest) + 16 * (TEACHER_LAYER - 2 * 128)
    for placement in ("sharded", "offloaded"):
        quantised, plain = (
            stage_parts(setting(teacher_precision=precision, teacher_placement=placement, data_parallel=4), 0)
            for precision in ("fp8", "bf16")
        )
        assert quantised["teacher weights"] == plain["teacher weights"]


def test_on_cpu_the_host_is_the_device() -> None:
    """Offloaded layers are held there, and two more while the teacher runs: nothing is saved, and it is not advised."""
    on_cpu: dict[str, Any] = {"on_cpu": True, "teacher": TEACHER.replace(num_layers=64)}
    resident, offloaded = (stage_parts(setting(teacher_placement=at, **on_cpu), 0) for at in ("resident", "offloaded"))
    assert offloaded["teacher weights"] == resident["teacher weights"]
    assert host_bytes(setting(teacher_placement="offloaded", **on_cpu)) == 0
    assert not any("offloaded" in line for line in advice(forecast(setting(**on_cpu)), 9))
    assert any("offloaded" in line for line in advice(forecast(setting(teacher=on_cpu["teacher"])), 9))


@pytest.mark.parametrize(
    "nbytes", [1, 63, 256, 65536, 65537, 436 * 10**6, 2**30 - 1, 2**30, 2**30 + 1, 1744830464, 3 * 2**28 + 256]
)
def test_blocks_of_pinned_memory(nbytes: int) -> None:
    """All of a layer in a few blocks, of which PyTorch's rounding to powers of two takes a 64th more at most."""
    blocks = host_blocks(nbytes)
    assert sum(blocks) == nbytes and len(blocks) <= 6
    assert all(block & (block - 1) == 0 for block in blocks[:-1])
    taken = sum(map(pinned_bytes, blocks))
    assert nbytes <= taken <= nbytes + nbytes // 64


def test_pinned_memory_is_in_powers_of_two() -> None:
    assert [pinned_bytes(nbytes) for nbytes in (0, 1, 2, 3, 4, 5, 436 * 10**6)] == [0, 1, 2, 4, 4, 8, 2**29]


def test_host_memory_of_a_node() -> None:
    """Every rank keeps its own stage's layers, and reads one beside them; ranks of a stage follow one another."""
    layer = 2 * TEACHER_LAYER
    pinned = sum(map(pinned_bytes, host_blocks(layer)))
    eight = setting(teacher_placement="offloaded", data_parallel=8, local_ranks=8)
    assert host_bytes(eight) == 8 * (16 * pinned + layer)
    assert host_bytes(replace(eight, local_ranks=4)) == 4 * (16 * pinned + layer)
    assert host_bytes(replace(eight, teacher_placement="sharded")) == 0
    # 7 layers on two stages: one node has the four of the first twice, or both have seven.
    uneven = setting(
        {"pipeline": 2}, data_parallel=2, teacher_placement="offloaded", teacher=TEACHER.replace(num_layers=7)
    )
    assert host_bytes(replace(uneven, local_ranks=2)) == 2 * (4 * pinned + layer)
    assert host_bytes(replace(uneven, local_ranks=4)) == 14 * pinned + 4 * layer
    own = setting(
        data_parallel=4, local_ranks=2, teacher_placement="offloaded", teacher_parallel=ParallelConfig(pipeline=4)
    )
    assert host_bytes(own) == 2 * (4 * pinned + layer)
    assert forecast(eight).host == host_bytes(eight) and "host memory of a node" in forecast(eight).table()


def test_a_checkpoint_that_is_written_while_training_goes_on() -> None:
    """On the CPU a fork, whose memory is copied as it is written to; from GPUs, each rank's copy on the host."""
    count = 8 * LAYER + 2 * 1024 * 64 + 64
    saving = setting(async_save=True, local_ranks=4, teacher=None)
    assert forecast(saving).snapshot == 4 * (2 + 12) * count
    assert forecast(replace(saving, data_parallel=4)).snapshot == 4 * (2 * count + 12 * count // 4)
    assert forecast(replace(saving, async_save=False)).snapshot == 0
    assert "checkpoint being written" not in stage_parts(saving, 0)
    assert "checkpoint, in a node's host memory" in forecast(saving).table()
    on_cpu = replace(saving, on_cpu=True, data_parallel=4)
    assert stage_parts(on_cpu, 0)["checkpoint being written"] == (2 + 4 + 3) * count
    assert forecast(on_cpu).snapshot == 0
    assert any("distill.async_save=false saves" in line for line in advice(forecast(on_cpu), 9))
    trained = replace(on_cpu, teacher=TEACHER, teacher_trained=True)
    teacher_count = 16 * TEACHER_LAYER + 2 * 1024 * 128 + 128
    assert stage_parts(trained, 0)["checkpoint being written"] == (2 + 4 + 3) * (count + teacher_count)


def test_what_the_host_cannot_hold_is_not_advised() -> None:
    heavy = setting(teacher=TEACHER.replace(num_layers=64), data_parallel=2, local_ranks=2)
    needed = host_bytes(replace(heavy, teacher_placement="offloaded"))
    for free, is_said in ((None, True), (needed, True), (needed - 1, False)):
        lines = advice(forecast(replace(heavy, host_free=free)), 9)
        assert any("teacher.placement=offloaded" in line for line in lines) == is_said
        assert any("teacher.placement=" in line for line in lines)


def test_a_teacher_of_its_own_layout() -> None:
    """The student at DP 2, the teacher at PP 2: half its layers, and its head in the student's shards."""
    own = setting(data_parallel=2, teacher_parallel=ParallelConfig(pipeline=2))
    expected = 8 * TEACHER_LAYER + 1024 * 128 + 1024 * 128  # the first stage's embedding, and the head
    assert stage_parts(own, 0)["teacher weights"] == 2 * expected


@pytest.mark.parametrize(
    ("pipeline", "own", "layers"), [(2, 4, [4, 4]), (4, 2, [8, 8, 8, 8]), (1, 4, [4]), (4, 1, 4 * [16])]
)
def test_the_teachers_stages_beside_a_stage(pipeline: int, own: int, layers: list[int]) -> None:
    """Of 8 ranks, ordered by stage in both layouts: a rank of a stage may hold some of the teacher's stages only."""
    here = setting({"pipeline": pipeline}, data_parallel=8 // pipeline, teacher_parallel=ParallelConfig(pipeline=own))
    for stage, count in enumerate(layers):
        beside = {rank * own // 8 for rank in range(8) if rank * pipeline // 8 == stage}
        rest = {place: 1024 * 128 * (place == 0) + 128 * (place == own - 1) for place in beside}
        head = 1024 * 128 * (stage == pipeline - 1)
        expected = 2 * (count * TEACHER_LAYER + max(rest.values()) + head)
        assert stage_parts(here, stage)["teacher weights"] == expected


def warm_up(pipeline: int, stage: int, chunks: int, microbatches: int) -> int:
    """Warm-up forwards as Megatron's schedules count them, then one forward and one backward in turn, step by step:
    how many forwards wait at once, at most."""
    total = microbatches * chunks
    warm = min((pipeline - stage - 1) * 2 + (chunks - 1) * pipeline, total) if chunks > 1 else pipeline - stage - 1
    waiting = most = 0
    for step in range(total):
        waiting += 1
        most = max(most, waiting)
        waiting -= step >= warm
    return most


@pytest.mark.parametrize(
    ("pipeline", "chunks", "microbatches"),
    [(1, 1, 8), (2, 1, 8), (4, 1, 8), (4, 1, 2), (2, 2, 4), (4, 2, 8), (4, 4, 4)],
)
def test_microbatches_under_way(pipeline: int, chunks: int, microbatches: int) -> None:
    for stage in range(pipeline):
        expected = warm_up(pipeline, stage, chunks, microbatches)
        assert passes_in_flight(pipeline, stage, chunks, microbatches) == expected


def test_layouts_share_the_model_out() -> None:
    whole = forecast(setting(teacher=None))
    for parallel in ({"tensor": 2}, {"pipeline": 4}, {"tensor": 2, "pipeline": 2}, {"tensor": 2, "sequence": True}):
        assert forecast(setting(parallel, teacher=None)).static < whole.static
    narrow, sequence = (
        forecast(setting({"tensor": 2, "sequence": flag})).parts["activations"] for flag in (False, True)
    )
    assert sequence < narrow < whole.parts["activations"]
    assert forecast(setting({"pipeline": 2})).setting.parallel.pipeline == 2


def test_advice_is_what_saves_most() -> None:
    """Each line's key, set as it says, saves what it says; the largest comes first, and none is named twice."""
    heavy_teacher = setting(teacher=TEACHER.replace(num_layers=64), data_parallel=2)
    first = advice(forecast(heavy_teacher))[0]
    assert first.startswith(("teacher.placement=offloaded", "parallel.pipeline=2", "parallel.tensor=2"))
    assert sum("teacher.placement" in line for line in advice(forecast(heavy_teacher), 9)) == 1

    long = setting(sequence_length=8192, micro_batch_size=4, teacher_window=4)
    lines = advice(forecast(long), 9)
    saving = forecast(long).total - forecast(replace(long, micro_batch_size=1)).total
    assert f"distill.micro_batch_size=1 saves {bytes_text(saving)}" in lines
    in_phase = advice(forecast(replace(long, micro_batch_key="distill.phases[1].micro_batch_size")), 9)
    assert f"distill.phases[1].micro_batch_size=1 saves {bytes_text(saving)}" in in_phase
    assert not any("parallel.sequence" in line for line in lines), "there is nothing to share it over"
    assert len(advice(forecast(long))) == 3

    window = setting(global_batch_size=4096, micro_batch_size=1, sequence_length=64)
    assert "distill.teacher_window=1" in advice(forecast(window))[0]


def test_a_teacher_that_is_trained_too() -> None:
    """Its pass keeps activations as a student of its shape does; what it cannot be given is not advised."""
    trained = setting(teacher_trained=True, global_batch_size=64, teacher_chunk_tokens=32)
    alone = forecast(replace(trained, student=TEACHER, teacher=None)).parts
    parts = forecast(trained).parts
    held = ("weights", "gradients", "optimizer state", "batch")
    passing = sum(value for name, value in alone.items() if name not in held)
    assert parts["teacher's training pass"] == passing
    long = replace(trained, micro_batch_size=8, teacher_chunk_tokens=512)
    wide, narrow = (forecast(replace(long, teacher_chunk_tokens=tokens)).total for tokens in (512, 128))
    assert wide - narrow == (4 + 2) * 384 * 1024, "fp32 and bf16 logits of 384 tokens, whatever the student's chunk"
    assert f"correct.loss_chunk_tokens=128 saves {bytes_text(wide - narrow)}" in advice(forecast(long), 9)
    lines = advice(forecast(trained), 9)
    assert lines and not any(key in line for line in lines for key in ("teacher.placement", "teacher_window"))


def test_advice_that_can_be_taken() -> None:
    """Three replicas are no two of twice the size; a sequence is cut over context ranks' two chunks too."""
    odd = setting(data_parallel=3, global_batch_size=36, micro_batch_size=1)
    assert not any(line.startswith("parallel.") for line in advice(forecast(odd), 9))
    for length, is_said in ((72, False), (64, True)):
        cut = setting({"tensor": 2, "context": 4}, sequence_length=length, micro_batch_size=8)
        assert any("parallel.sequence=true" in line for line in advice(forecast(cut), 9)) == is_said


def test_a_loss_chunk_that_is_all_of_it() -> None:
    wide = setting(student=STUDENT.replace(vocab_size=131072, padded_vocab_size=131072), loss_chunk_tokens=4096)
    wide = replace(wide, teacher=None, sequence_length=4096)
    assert any("distill.loss_chunk_tokens=128" in line for line in advice(forecast(wide)))


def test_the_table_adds_up() -> None:
    found = forecast(setting())
    assert found.total == sum(found.parts.values())
    lines = found.table().splitlines()
    assert lines[-1].split() == ["together", *bytes_text(found.total).split()]
    assert bytes_text(found.total) in str(found)


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3072.0 GiB")]
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert bytes_text(count) == words


def test_a_student_in_fp8() -> None:
    """By hand, in bytes for each token: copies of a byte in place of bf16 inputs, and one more of attention's output;
    two copies of each matrix. The first and the last two of 8 layers are in bf16."""
    alone: dict[str, Any] = {"teacher": None, "micro_batch_size": 2}
    plain = stage_parts(setting(**alone), 0)
    fp8 = Fp8(at_start=1, at_end=2)
    found = stage_parts(setting(**alone, fp8=fp8), 0)
    matrices = LAYER - 2 * 64
    assert found["fp8 weights"] == 5 * 2 * matrices and "fp8 weights" not in plain
    assert {name: found[name] for name in ("weights", "gradients", "optimizer state")} == {
        name: plain[name] for name in ("weights", "gradients", "optimizer state")
    }
    # Two normed inputs of 64 and fc2's of 128 in a byte each, not two; attention's output of 64 once more in a byte.
    saved = 2 * 64 + 128 - 64
    assert _kept(alone, None) - _kept(alone, fp8) == 5 * 128 * saved
    # One pipeline stage has 4 layers, of which the first is in bf16, the other the two last.
    cut: dict[str, Any] = {"parallel": {"pipeline": 2}, "teacher": None}
    copies = [stage_parts(setting(**cut, fp8=fp8), stage)["fp8 weights"] for stage in (0, 1)]
    assert copies == [3 * 2 * matrices, 2 * 2 * matrices]
    sharded = stage_parts(setting({"tensor": 2}, teacher=None, fp8=Fp8()), 0)["fp8 weights"]
    assert sharded == 8 * matrices  # two copies of half of each


def _kept(fields: dict[str, Any], fp8: Fp8 | None) -> int:
    return activations(setting(**fields, fp8=fp8), 0)


@pytest.mark.parametrize("how", ["uniform", "block"])
def test_recomputed_layers_in_fp8(how: str) -> None:
    """Layers that keep their input alone keep it in bf16; of the others fp8 saves what it saves."""
    again = {"recompute": Recompute("full", how, 2), "teacher": None}
    saved = _kept(again, None) - _kept(again, Fp8(at_end=1))
    assert saved == (0 if how == "uniform" else 5 * 128 * (2 * 64 + 128 - 64))


def test_a_narrow_optimizer() -> None:
    """An fp32 main weight, and moments of a byte and of two; four ranks share them."""
    count = 8 * LAYER + 2 * 1024 * 64 + 64
    aware = AdamState(is_aware=True, exp_avg="fp8", exp_avg_sq="bf16")
    assert stage_parts(setting(adam=aware), 0)["optimizer state"] == (4 + 1 + 2) * count
    assert stage_parts(setting(adam=aware, data_parallel=4), 0)["optimizer state"] == 7 * -(-count // 4)


def test_a_corrected_teacher_in_fp8() -> None:
    """Its own section says of what type its training is."""
    own: dict[str, Any] = {"teacher_fp8": Fp8(), "teacher_adam": AdamState(is_aware=True, exp_avg="bf16")}
    plain, narrow = (
        stage_parts(setting(teacher_trained=True, **changes), 0)["teacher's training"] for changes in ({}, own)
    )
    count = 16 * TEACHER_LAYER + 2 * 1024 * 128 + 128
    assert plain == (4 + 12) * count
    assert narrow == (4 + 10) * count + 16 * 2 * (TEACHER_LAYER - 2 * 128)
