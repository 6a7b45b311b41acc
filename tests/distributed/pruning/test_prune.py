"""Pruning of sharded checkpoints: every layout writes the same bits, which are those of plain slicing.

The reference slices the teacher's global tensors in the open (plain_slicing.py), and reads students back whole with
megatron-core's own `load_plain_tensors`; neither uses the package's tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.architecture import Architecture
from minitron_mcore.importance.scores import Scores
from minitron_mcore.pruning.plan_file import PruningPlan
from tests.distributed.models import assemble, gather_named, global_batch, start_layout, tiny
from tests.distributed.plain_slicing import sliced, teacher_tensors
from tests.distributed.ranks import run_on_ranks
from tests.plans import make_plan

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "fp32"),
    "nemotron": ("nemotron", {}, "fp32"),
    "qwen": ("qwen3", {"add_qkv_bias": True}, "fp32"),  # Qwen3's norms, and Qwen2's biases besides
    # Two query heads in each of four groups, so that it can be split four ways.
    "tied-bf16": (
        "llama",
        {"untie_embeddings_and_output_weights": False, "num_attention_heads": 8, "num_query_groups": 4},
        "bf16",
    ),
    # Four of six groups stay, and so do not always stay on their rank; with head residuals, in bf16 too.
    "groups": ("qwen3", {"add_qkv_bias": True, "num_attention_heads": 12, "num_query_groups": 6}, "fp32"),
    "one-each": ("qwen2", {"num_attention_heads": 6, "num_query_groups": 6}, "bf16"),
}
TARGET: dict[str, int | None] = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
FOUR_GROUPS: dict[str, int | None] = {**TARGET, "num_query_groups": 4}
# model -> what is asked of its plan
ASKED: dict[str, tuple[dict[str, int | None], dict[str, Any]]] = {
    "groups": (FOUR_GROUPS, {"head_residual": "paper"}),
    "one-each": (
        FOUR_GROUPS,
        {"head_residual": "laco", "residual_matrices": ["query", "key", "value", "output"]},
    ),
}
TP2, PP2, TP2_PP2 = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}
# world size -> student's name -> (parallel section, number of layers)
STUDENTS: dict[int, dict[str, tuple[dict[str, Any], int]]] = {
    1: {"TP1": ({}, 4)},
    2: {"TP2": (TP2, 4), "PP2": (PP2, 4), "DP2": ({}, 4), "PP2-uneven": (PP2, 5)},
    4: {"TP2-PP2": (TP2_PP2, 4), "TP4": ({"tensor": 4}, 4)},
}

LOADS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"1": {}},
    2: {"PP2-VPP2": {"pipeline": 2, "virtual_pipeline": 2}, "TP2-SP": {"tensor": 2, "sequence": True}, "PP2": PP2},
}


LOADED = ("llama", "nemotron", "qwen", "groups")


def architecture_of(model: str) -> Architecture:
    family, changes, _ = MODELS[model]
    return tiny(family, num_layers=6, **changes)


def students_of(model: str, world_size: int) -> dict[str, tuple[dict[str, Any], int]]:
    groups = plan_of(model).student.num_query_groups
    return {name: row for name, row in STUDENTS[world_size].items() if groups % row[0].get("tensor", 1) == 0}


def scores_of(architecture: Architecture) -> Scores:
    """Random, but in layer 1, where the better half of the neurons lies on the first of two shards."""
    draw = numpy.random.default_rng(5)
    a = architecture
    ffn = draw.random((a.num_layers, a.ffn_hidden_size)) + 1
    ffn[1] = numpy.linspace(2, 1, a.ffn_hidden_size)
    return Scores(
        a,
        draw.random(a.hidden_size) + 1,
        ffn,
        draw.random((a.num_layers, a.num_attention_heads)) + 1,
        numpy.array([0.3, 0.5, 0.1, 0.4, 0.2, 0.6]),
        groups=draw.random((a.num_layers, a.num_query_groups)) + 1,
    )


def plan_of(model: str, num_layers: int = 4) -> PruningPlan:
    target, options = ASKED.get(model, (TARGET, {}))
    return make_plan(scores_of(architecture_of(model)), {**target, "num_layers": num_layers}, **options)


# What runs on the ranks.


def save_teacher(model: str, folder: Path, parallel: dict[str, Any], world_size: int) -> None:
    """Through Megatron's own modules: GPTModel.sharded_state_dict says where each tensor lies."""
    from megatron.core import parallel_state

    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.layout import parameter_table
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import named_parameters, take_shard
    from minitron_mcore.runtime.start import start

    config = start_layout(parallel, world_size)
    runtime, architecture = start(), architecture_of(model)
    tensors = teacher_tensors(architecture)
    table = {parameter.key: parameter for parameter in parameter_table(architecture)}
    rank = parallel_state.get_tensor_model_parallel_rank()
    chunks = build_model(architecture, config, MODELS[model][2])
    for chunk in chunks:
        for key, layer, tensor in named_parameters(chunk):
            whole = tensors[key] if layer is None else tensors[key][layer]
            tensor.data.copy_(take_shard(whole, table[key], architecture, rank, config.tensor))
    state = model_state(as_chunks(chunks))
    save_state(folder, 0, state, runtime)
    if runtime.is_main:
        write_description(
            folder,
            architecture,
            lineage={"stage": "train", "tokens": 99, "tokenizer": "abc"},
            recipe="name: teacher\n",
            save_tokenizer=lambda path: Path(path).mkdir(),
        )
        (folder / "tokenizer" / "tokenizer.model").write_text("pieces")
    runtime.barrier()


def write_students(root: Path, world_size: int) -> None:
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.pruning.apply import prune_checkpoint
    from minitron_mcore.runtime.start import start

    for model in MODELS:
        if world_size == 4:
            save_teacher(model, root / model / "teacher", TP2_PP2, world_size)
        for name, (parallel, num_layers) in students_of(model, world_size).items():
            start_layout(parallel, world_size)
            runtime, plan = start(), plan_of(model, num_layers)
            target = root / model / name
            prune_checkpoint((root / model / "teacher", 0), plan, target, runtime)
            if runtime.is_main:
                write_description(target, plan.student, lineage={}, recipe="", save_tokenizer=None)


def read_whole(root: Path) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """(model, student) -> its global tensors, layers stacked."""
    from megatron.core import dist_checkpointing

    result = {}
    for model in MODELS:
        for folder in (root / model).iterdir():
            found = dist_checkpointing.load_plain_tensors(str(folder / "iter_0000000"))
            result[model, folder.name] = {key: found[key] for key in found if isinstance(found[key], torch.Tensor)}
    return result


def logits_at(
    folder: Path,
    architecture: Architecture,
    parallel: dict[str, Any],
    world_size: int,
    zeroed: PruningPlan | None = None,
    axes: tuple[str, ...] = (),
) -> torch.Tensor:
    """Logits [s, b, V] of the loaded model, on every rank. `zeroed`: what this plan drops of `axes` is masked."""
    from megatron.core import parallel_state

    from minitron_mcore.checkpoint.store import as_chunks, load_weights
    from minitron_mcore.model.gpt import build_model, unwrap
    from minitron_mcore.model.microbatch import Microbatch
    from minitron_mcore.model.schedule import final_hidden_states

    config = start_layout(parallel, world_size)
    chunks = build_model(architecture, config, "fp32", trainable=False)
    load_weights(folder, 0, as_chunks(chunks), architecture)
    if zeroed is not None:
        mask(chunks[0], zeroed, axes)
    batch = [
        Microbatch.of(part) for part in global_batch(architecture.vocab_size, microbatches=2)
    ]  # as few as PP2·VPP2 takes
    states = final_hidden_states(as_chunks(chunks), batch)
    group = parallel_state.get_tensor_model_parallel_group()
    box: list[Any] = [None]
    if states:
        local = unwrap(chunks[-1]).logits(torch.cat(states, dim=1)).contiguous()
        parts = [torch.empty_like(local) for _ in range(group.size())]
        torch.distributed.all_gather(parts, local, group=group)
        box = [torch.cat(parts, dim=-1)[..., : architecture.vocab_size]]
    torch.distributed.broadcast_object_list(box, src=world_size - 1)
    return box[0]


def mask(model: Any, plan: PruningPlan, axes: tuple[str, ...]) -> None:
    """Zero what leads out of everything that the plan drops."""
    d = plan.teacher.kv_channels
    with torch.no_grad():
        for index, layer in enumerate(model.decoder.layers):
            proj, fc2 = layer.self_attention.linear_proj.weight, layer.mlp.linear_fc2.weight
            if index not in plan.layers:
                if "layers" in axes:
                    proj.zero_()
                    fc2.zero_()
                continue
            if "ffn" in axes:
                fc2[:, sorted(set(range(plan.teacher.ffn_hidden_size)) - set(plan.ffn[index]))] = 0
            if "heads" in axes:
                for head in set(range(plan.teacher.num_attention_heads)) - set(plan.heads[index]):
                    proj[:, head * d : (head + 1) * d] = 0


def load_students(root: Path, world_size: int) -> dict[tuple[str, str], torch.Tensor]:
    """(model, layout it is loaded at) -> logits of a student that was written at another."""
    result = {}
    for model in LOADED:
        for name, parallel in LOADS[world_size].items():
            result[model, name] = logits_at(root / model / "TP2-PP2", plan_of(model).student, parallel, world_size)
        if world_size == 2:
            uneven = plan_of(model, 5).student
            result[model, "uneven"] = logits_at(root / model / "PP2-uneven", uneven, PP2, world_size)
            result[model, "even"] = logits_at(root / model / "PP2-uneven", uneven, TP2, world_size)
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers written at TP2·PP2, and their students at every layout."""
    path = tmp_path_factory.mktemp("prune")
    for world_size in (4, 2, 1):
        run_on_ranks(write_students, world_size, path, world_size)
    return path


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    return run_on_ranks(read_whole, 1, root)[0]


@pytest.mark.parametrize("model", MODELS)
def test_the_plan_is_uneven_over_tensor_parallel_shards(model: str) -> None:
    """Else the tests below would not exercise the exchange; one shard of layer 1 keeps nothing."""
    plan = plan_of(model)
    assert plan.layers == [0, 1, 3, 5]
    if model in ASKED:
        assert any(sum(group < 3 for group in plan.groups[layer]) != 2 for layer in plan.layers)
        assert plan.residual is not None and all(plan.residual.pairs.values())
    counts = [sum(neuron < 48 for neuron in plan.ffn[layer]) for layer in plan.layers]
    assert counts[1] == 48 and any(count not in (24, 48) for count in counts)


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_writes_the_bits_of_plain_slicing(
    model: str, whole: dict[tuple[str, str], dict[str, torch.Tensor]]
) -> None:
    dtype = torch.bfloat16 if MODELS[model][2] == "bf16" else torch.float32
    teacher = {key: value.to(dtype) for key, value in teacher_tensors(architecture_of(model)).items()}
    stored = whole[model, "teacher"]
    assert stored.keys() == teacher.keys()
    assert all(torch.equal(stored[key], teacher[key]) for key in teacher)
    for world_size in STUDENTS:
        for name, (_, num_layers) in students_of(model, world_size).items():
            expected = sliced(teacher, plan_of(model, num_layers))
            assert whole[model, name].keys() == expected.keys()
            for key, tensor in expected.items():
                actual = whole[model, name][key]
                assert actual.dtype == dtype and actual.shape == tensor.shape, (name, key)
                assert torch.equal(actual, tensor), (name, key)


def test_a_student_loads_at_every_other_layout(root: Path) -> None:
    """fp32 logits of order one; 1e-5 covers the order of the tensor-parallel sums."""
    found = run_on_ranks(load_students, 1, root, 1)[0] | run_on_ranks(load_students, 2, root, 2)[0]
    for model in LOADED:
        expected = found[model, "1"]
        assert expected.std() > 0.05
        for name in LOADS[2]:
            torch.testing.assert_close(found[model, name], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[model, "uneven"], found[model, "even"], rtol=0, atol=1e-5)


def prune_in_memory(world_size: int) -> dict[tuple[str, str], dict[str, Any]]:
    """(model, layout) -> this rank's part of the student, from its part of the teacher as it lies in memory."""
    from megatron.core import parallel_state

    from minitron_mcore.layout import parameter_table
    from minitron_mcore.model.initialize import take_shard
    from minitron_mcore.pruning.apply import prune_shard
    from minitron_mcore.runtime.start import start

    result = {}
    for model in MODELS:
        plan = plan_of(model)
        dtype = torch.bfloat16 if MODELS[model][2] == "bf16" else torch.float32
        teacher = {key: value.to(dtype) for key, value in teacher_tensors(plan.teacher).items()}
        for name, (parallel, _) in students_of(model, world_size).items():
            size = parallel.get("tensor", 1)
            if "pipeline" in parallel or plan.teacher.num_query_groups % size:
                continue
            start_layout(parallel, world_size)
            group, device, rows = parallel_state.get_tensor_model_parallel_group(), start().device, []
            for parameter in parameter_table(plan.student):
                for place, layer in enumerate(plan.layers) if parameter.per_layer else [(None, None)]:
                    whole = teacher[parameter.key] if layer is None else teacher[parameter.key][layer]
                    local = take_shard(whole, parameter, plan.teacher, group.rank(), size)
                    local = prune_shard(local, parameter, plan, layer, group=group, device=device)
                    rows.append((parameter.key, place, local))
            result[model, name] = gather_named(rows)
    return result


def test_weights_in_memory_become_the_same_student() -> None:
    """Where the teacher is sharded too, and rows must go from rank to rank; to the bit."""
    seen = set()
    for world_size in (1, 2, 4):
        ranks = run_on_ranks(prune_in_memory, world_size, world_size)
        for model, name in ranks[0]:
            plan = plan_of(model)
            dtype = torch.bfloat16 if MODELS[model][2] == "bf16" else torch.float32
            expected = sliced({key: value.to(dtype) for key, value in teacher_tensors(plan.teacher).items()}, plan)
            student = assemble([rank[model, name] for rank in ranks], plan.student)
            for (key, layer), tensor in student.items():
                assert torch.equal(tensor, (expected[key] if layer is None else expected[key][layer]).float()), (
                    name,
                    key,
                )
            seen.add((model, name))
    assert {("groups", "TP2"), ("one-each", "TP2"), ("llama", "TP2"), ("tied-bf16", "TP4")} <= seen


MASKS = {
    "ffn": ("ffn_hidden_size",),
    "heads": ("num_attention_heads",),
    "layers": ("num_layers",),
    "all": ("ffn_hidden_size", "num_attention_heads", "num_layers"),
    "groups": ("num_query_groups",),
    "all with groups": ("ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_layers"),
}


def masked_and_pruned(root: Path) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(model, axis) -> logits of the teacher, of the teacher with the dropped parts zeroed, and of the student."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.pruning.apply import prune_checkpoint
    from minitron_mcore.runtime.start import start

    result = {}
    for model in LOADED:
        teacher, architecture = root / model / "teacher", architecture_of(model)
        untouched = logits_at(teacher, architecture, {}, 1)
        target = ASKED.get(model, (TARGET, {}))[0]
        for name, fields in MASKS.items():
            if ("num_query_groups" in fields) != (model == "groups"):
                continue
            plan = make_plan(scores_of(architecture), {field: target[field] for field in fields})
            axes = ("ffn", "heads", "layers") if len(fields) > 1 else ("heads" if name == "groups" else name,)
            masked = logits_at(teacher, architecture, {}, 1, plan, axes)
            folder = root / model / "masked" / name
            prune_checkpoint((teacher, 0), plan, folder, start())
            write_description(folder, plan.student, lineage={}, recipe="", save_tokenizer=None)
            result[model, name] = untouched, masked, logits_at(folder, plan.student, {}, 1)
    return result


def test_pruned_is_masked_for_neurons_heads_groups_and_layers(root: Path, whole: Any) -> None:
    """fp32; the two add up the same terms but for exact zeros: 1e-5 on logits of order one."""
    for name, (untouched, masked, pruned) in run_on_ranks(masked_and_pruned, 1, root)[0].items():
        assert (untouched - masked).abs().max() > 1e-2, f"{name}: the mask does nothing"
        assert (pruned - masked).abs().max() <= 1e-5, name
