"""The forecast of memory against real tensors: what is held exactly, activations byte by byte of what autograd saves.

Activations within 3%: small vectors are not counted, and norms of queries and keys no closer than that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from minitron_mcore.distillation.teacher.blocks import pinned_bytes
from minitron_mcore.estimate.forecast import stage_parts
from minitron_mcore.estimate.model import Setting, layer_activations, local_parameters
from minitron_mcore.estimate.teacher import host_bytes, teacher_layers_at_work
from minitron_mcore.layout import parameter_table
from minitron_mcore.runtime.config import ParallelConfig
from tests.distributed.models import LAYOUTS, start_layout, tiny
from tests.distributed.ranks import run_on_ranks


def held_on_rank(parallel: dict[str, Any], world_size: int, precision: str, tied: bool) -> dict[str, Any]:
    """Bytes of weights, of gradients and of the optimizer's state after a step, and of a frozen model beside it."""
    from megatron.core import parallel_state

    from minitron_mcore.distillation.logits.settings import LossSettings
    from minitron_mcore.distillation.objective import Objective
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.training.budget import Shape, plan_timetable
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import Trained, build_optimizer, build_scheduler, train_step, wrap_model
    from tests.distributed.models import global_batch, my_batch

    layout = start_layout(parallel, world_size)
    architecture = tiny("llama", untie_embeddings_and_output_weights=not tied)
    models = build_model(architecture, layout, precision)
    initialize(models, architecture, seed=1)
    frozen = build_model(architecture.replace(hidden_size=64), layout, precision, trainable=False)
    train = TrainConfig(tokens=256, global_batch_size=8, micro_batch_size=2, lr_decay_style="constant")
    chunks = wrap_model(models)
    optimizer = build_optimizer(chunks, train, precision)
    scheduler = build_scheduler(optimizer, train, plan_timetable(train, 16, "train"))
    objective = Objective(LossSettings(vocab_size=architecture.vocab_size))
    shape = Shape(phase=0, sequence_length=16, global_batch_size=8, micro_batch_size=2)
    train_step(Trained(chunks, optimizer, scheduler), objective, shape, my_batch(global_batch(architecture.vocab_size)))

    parameters = [tensor for chunk in models for tensor in chunk.parameters()]
    state = [
        value
        for part in optimizer.chained_optimizers
        for values in part.optimizer.state.values()
        for name, value in values.items()
        if torch.is_tensor(value) and value.dim()
    ]
    main = [
        tensor
        for part in optimizer.chained_optimizers
        if precision == "bf16"
        for group in part.optimizer.param_groups
        for tensor in group["params"]
    ]

    def size(tensors: list[Any]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "weights": size(parameters),
        "gradients": size([tensor.main_grad for tensor in parameters]),
        "buffers": sum(buffer.grad_data.numel() * 4 for chunk in chunks for buffer in chunk.buffers),  # type: ignore[attr-defined]
        "optimizer state": size([*state, *main]),
        "teacher weights": size([tensor for chunk in frozen for tensor in chunk.parameters()]),
    }


def setting_of(parallel: dict[str, Any], data_parallel: int, precision: str, **changes: Any) -> Setting:
    architecture = tiny("llama", **changes)
    return Setting(
        student=architecture,
        teacher=architecture.replace(hidden_size=64),
        parallel=ParallelConfig(**parallel),
        precision=precision,
        data_parallel=data_parallel,
        sequence_length=16,
        global_batch_size=8,
        micro_batch_size=2,
        loss_chunk_tokens=512,
    )


@pytest.mark.parametrize(
    ("layout", "precision", "tied"),
    [
        ("1", "fp32", False),
        ("DP2", "fp32", False),
        ("DP2", "bf16", False),
        ("TP2", "bf16", False),
        ("PP2", "fp32", True),
        ("PP2-VPP2", "bf16", True),
        ("TP2-PP2", "fp32", False),
    ],
)
def test_what_is_held_is_exact(layout: str, precision: str, tied: bool) -> None:
    """Optimizer: the ranks of a data-parallel group share it out by Megatron's buckets; together they hold it all."""
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(held_on_rank, world_size, parallel, world_size, precision, tied)
    data_parallel = 2 if layout == "DP2" else 1
    setting = setting_of(parallel, data_parallel, precision, untie_embeddings_and_output_weights=not tied)
    for rank in ranks:
        parts = stage_parts(setting, rank["stage"])
        for name in ("weights", "gradients", "teacher weights"):
            assert parts[name] == rank[name], (name, rank["stage"])
        # Megatron pads every tensor to 64 elements and the whole to 128 a rank: a matter of kilobytes.
        assert 0 <= rank["buffers"] - parts["gradients"] < 4 * (64 * 60 + 256)
    total = sum(rank["optimizer state"] for rank in ranks)
    expected = sum(stage_parts(setting, rank["stage"])["optimizer state"] for rank in ranks)
    assert abs(total - expected) <= 12 * len(ranks), "a number or so of rounding a rank"


def placed_on_rank(parallel: dict[str, Any], world_size: int, placement: str) -> dict[str, Any]:
    """Bytes that a placed model keeps, embedding and head among them, those of its two buffers, its layers' blocks."""
    from megatron.core import parallel_state

    from minitron_mcore.distillation.teacher.placement import place
    from minitron_mcore.model.gpt import build_model

    layout = start_layout(parallel, world_size)
    chunks = build_model(tiny("llama", num_layers=5), layout, "bf16", trainable=False, bare_layers=True)
    placed = place(chunks, placement)
    assert placed is not None
    kept = 0
    for chunk in chunks:
        kept += sum(parameter.numel() * parameter.element_size() for parameter in chunk.parameters())
        for _, _, values in placed.rows(chunk):
            values.zero_()
    blocks = [part if isinstance(part, list) else [part] for part in placed.source.parts.values()]  # type: ignore[attr-defined]
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "blocks": [[block.numel() for block in layer] for layer in blocks],
        "kept": kept,
        "buffers": 2 * max(flat.nbytes for flat in placed.layers),
        "copies stay": not chunks[0].config.disable_parameter_transpose_cache,
    }


@pytest.mark.parametrize(("layout", "placement"), [("DP2", "sharded"), ("PP2", "offloaded"), ("TP2", "offloaded")])
def test_what_a_placed_teacher_keeps_is_exact(layout: str, placement: str) -> None:
    """On CPU all of it is in the device's forecast; on CUDA offloaded layers are in the host's, of pinned blocks."""
    world_size, parallel = LAYOUTS[layout]
    ranks = run_on_ranks(placed_on_rank, world_size, parallel, world_size, placement)
    setting = replace(
        setting_of(parallel, world_size if layout == "DP2" else 1, "bf16"),
        teacher=tiny("llama", num_layers=5),
        teacher_placement=placement,
        on_cpu=True,
        local_ranks=world_size,
    )
    for rank in ranks:
        kept = sum(map(sum, rank["blocks"]))
        assert stage_parts(setting, rank["stage"])["teacher weights"] == rank["kept"] + kept
        assert teacher_layers_at_work(setting) == rank["buffers"]
        assert not rank["copies stay"], "quantised weights of every layer would lie on the device"
    if placement == "offloaded":
        pinned = sum(pinned_bytes(block) for rank in ranks for layer in rank["blocks"] for block in layer)
        read = world_size * sum(ranks[0]["blocks"][0])
        assert host_bytes(replace(setting, on_cpu=False)) == pinned + read


def saved_by_autograd(
    family: str, changes: dict[str, Any], precision: str, parallel: dict[str, Any], world: int
) -> int:
    """Bytes of the distinct storages that one layer's forward keeps for backward, weights left out."""
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize

    layout = start_layout(parallel, world)
    architecture = tiny(family, max_position_embeddings=256, **changes)

    def kept(num_layers: int) -> int:
        shape = architecture.replace(num_layers=num_layers)
        (model,) = build_model(shape, layout, precision)
        initialize([model], shape, seed=1)
        weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        found: dict[int, int] = {}
        alive = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        ids = torch.zeros(2, 128, dtype=torch.long)
        positions = torch.arange(128).expand(2, 128).contiguous()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids, positions, None)
        return sum(found.values())

    return kept(3) - kept(2)


@pytest.mark.parametrize(
    ("family", "precision", "layout", "changes"),
    [
        ("llama", "fp32", "1", {}),
        ("llama", "bf16", "1", {}),
        ("nemotron", "fp32", "1", {}),
        ("qwen3", "fp32", "1", {}),
        ("llama", "fp32", "TP2", {}),
        ("llama", "fp32", "TP2-SP", {}),
        ("llama", "fp32", "1", {"ffn_hidden_size": 512, "num_query_groups": 6}),
    ],
)
def test_activations_of_a_layer(family: str, precision: str, layout: str, changes: dict[str, Any]) -> None:
    world_size, parallel = LAYOUTS[layout]
    measured = run_on_ranks(saved_by_autograd, world_size, family, changes, precision, parallel, world_size)[0]
    setting = replace(
        setting_of(parallel, 1, precision),
        student=tiny(family, max_position_embeddings=256, **changes),
        sequence_length=128,
        on_cpu=True,
    )
    expected = layer_activations(setting)
    assert measured == pytest.approx(expected, rel=0.03), f"{measured / expected:.4f}"


def test_all_stages_are_the_model() -> None:
    architecture = tiny("llama", num_layers=5)
    for config in (ParallelConfig(), ParallelConfig(pipeline=2), ParallelConfig(pipeline=2, virtual_pipeline=2)):
        counts = [local_parameters(architecture, config, stage) for stage in range(config.pipeline)]
        stored = (row.count(architecture, architecture.padded_vocab_size) for row in parameter_table(architecture))
        assert sum(counts) == sum(stored)
