"""Tiny models and batches for the multi-rank tests, and global tensors put together from what ranks return.

Functions here run inside `run_on_ranks` workers, or in the test on what those returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.layout import parameter_table, shard_slices
from minitron_mcore.runtime.config import ParallelConfig

# name -> (world size, parallel section)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2-VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP2-SP": (2, {"tensor": 2, "sequence": True}),
    "DP2": (2, {}),
    "TP2-PP2": (4, {"tensor": 2, "pipeline": 2}),
}
if TYPE_CHECKING:
    from minitron_mcore.model.microbatch import Microbatch

SEQUENCE, MICRO_BATCH, MICROBATCHES = 16, 2, 4


def tiny(family: str, **changes: Any) -> Architecture:
    """Odd shapes on purpose: 6 heads on 2 groups, head_dim unlike hidden / heads, a vocabulary with padding."""
    fields = {
        "family": family,
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 16,
        "vocab_size": 1003,
        "max_position_embeddings": 64,
        "init_method_std": 0.08,
    }
    if family == "llama":
        fields["rope_scaling"] = {"factor": 4.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 32}
    return build_architecture({**fields, **changes})


def start_layout(parallel: dict[str, Any], world_size: int) -> ParallelConfig:
    """Adapter, process groups and seeds inside a worker."""
    from minitron_mcore.runtime.parallel import seed_everything, use_layout
    from minitron_mcore.runtime.start import start

    config = ParallelConfig(**parallel)
    start()
    use_layout(config, world_size)
    seed_everything(7)
    return config


def global_batch(vocab_size: int, seed: int = 3, microbatches: int = MICROBATCHES) -> list[dict[str, torch.Tensor]]:
    """The whole global batch: random ids, a quarter of the tokens not counted."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for _ in range(microbatches):
        ids = torch.randint(0, vocab_size, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
        mask = (torch.rand(MICRO_BATCH, SEQUENCE, generator=generator) > 0.25).float()
        positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, SEQUENCE).contiguous()
        batch.append(
            {
                "tokens": ids[:, :-1].contiguous(),
                "labels": ids[:, 1:].contiguous(),
                "loss_mask": mask,
                "position_ids": positions,
            }
        )
    return batch


def my_batch(batch: list[dict[str, torch.Tensor]]) -> list[Microbatch]:
    """This data-parallel rank's microbatches, in Megatron's order, on the device."""
    from megatron.core import parallel_state

    from minitron_mcore.model.microbatch import Microbatch

    rank, device = parallel_state.get_data_parallel_rank(), torch.cuda.current_device()
    mine = batch[rank :: parallel_state.get_data_parallel_world_size()]
    return [Microbatch.of(part).to(device) for part in mine]


def steady(train: Any, iterations: int, sequence_length: int = SEQUENCE) -> Any:
    """The timetable of that many iterations of the section's own shape."""
    from minitron_mcore.training.budget import plan_timetable

    tokens = iterations * train.global_batch_size * sequence_length
    return plan_timetable(replace(train, tokens=tokens), sequence_length, "train")


def gather_named(rows: Sequence[tuple[str, int | None, torch.Tensor]]) -> dict[str, Any]:
    """What a rank returns for `assemble`: its place, and its local tensors by (key, layer)."""
    from megatron.core import parallel_state

    return {
        "tensor_rank": parallel_state.get_tensor_model_parallel_rank(),
        "tensor_size": parallel_state.get_tensor_model_parallel_world_size(),
        "tensors": {(key, layer): tensor.detach().float().cpu().clone() for key, layer, tensor in rows},
    }


def assemble(parts: list[dict[str, Any]], architecture: Architecture) -> dict[tuple[str, int | None], torch.Tensor]:
    """Global tensors from every rank's `gather_named`; replicas must agree to the last bit."""
    table = {parameter.key: parameter for parameter in parameter_table(architecture)}
    result: dict[tuple[str, int | None], torch.Tensor] = {}
    filled: dict[tuple[str, int | None], torch.Tensor] = {}
    for part in parts:
        for name, local in part["tensors"].items():
            parameter = table[name[0]]
            whole = result.setdefault(name, torch.full(parameter.shape(architecture), float("nan")))
            done = filled.setdefault(name, torch.zeros(parameter.shape(architecture), dtype=torch.bool))
            axis = parameter.shard_axis or 0
            pieces = shard_slices(parameter, architecture, part["tensor_rank"], part["tensor_size"])
            chunks = local.chunk(len(pieces), dim=axis) if pieces else [local]
            for piece, chunk in zip(pieces or [slice(0, local.shape[0])], chunks, strict=True):
                where = (slice(None),) * axis + (piece,)
                if done[where].any():
                    torch.testing.assert_close(whole[where], chunk, rtol=0, atol=0, msg=f"replicas of {name} differ")
                whole[where], done[where] = chunk, True
    assert all(done.all() for done in filled.values())
    return result


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))


def save_teacher(folder: Path, value: float | None) -> None:
    """A small teacher, one weight of its second layer set to `value`."""
    from minitron_mcore.checkpoint.folder import write_description
    from minitron_mcore.checkpoint.store import as_chunks, model_state, save_state
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize
    from minitron_mcore.runtime.start import start

    config, architecture, runtime = start_layout({}, 2), tiny("llama"), start()
    chunks = build_model(architecture, config, "fp32")
    initialize(chunks, architecture, seed=1)
    if value is not None:
        with torch.no_grad():
            chunks[0].decoder.layers[1].mlp.linear_fc2.weight[0, 0] = value
    save_state(folder, 3, model_state(as_chunks(chunks)), runtime)
    if runtime.is_main:
        write_description(folder, architecture, lineage={"stage": "train"}, recipe="", save_tokenizer=None)
    runtime.barrier()
