"""Tensors made straight from the layout table are those of GPTModel.sharded_state_dict."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.distributed.models import start_layout, tiny
from tests.distributed.ranks import run_on_ranks

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_layers": 4}),
    "nemotron": ("nemotron", {"num_layers": 4}),
    "tied": ("llama", {"num_layers": 4, "untie_embeddings_and_output_weights": False}),
    "qwen": ("qwen3", {"num_layers": 4, "add_qkv_bias": True}),
    "uneven": ("nemotron", {"num_layers": 5}),
}
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    4: [{"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}],
}


def both_forms(world_size: int) -> dict[tuple[str, str], tuple[set[Any], set[Any], bool]]:
    """(model, layout) -> this rank's main replicas by GPTModel and by our table; whether their values are equal too."""
    return {
        (name, str(parallel)): compare(name, parallel, world_size)
        for parallel in LAYOUTS[world_size]
        for name in MODELS
    }


def compare(name: str, parallel: dict[str, Any], world_size: int) -> tuple[set[Any], set[Any], bool]:
    import torch
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica

    from minitron_mcore.checkpoint.store import as_chunks, model_state
    from minitron_mcore.checkpoint.writer import Piece, pieces_of, shard_pieces
    from minitron_mcore.layout import parameter_table
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize, named_parameters

    def named(parts: list[tuple[Piece, torch.Tensor]]) -> dict[Piece, torch.Tensor]:
        rows = {piece: tensor.reshape(piece.shape) for piece, tensor in parts}
        assert len(rows) == len(parts), "one part twice"
        return rows

    family, changes = MODELS[name]
    architecture = tiny(family, **changes)
    config = start_layout(parallel, world_size)
    chunks = build_model(architecture, config, "fp32")
    initialize(chunks, architecture, seed=1)
    state = model_state(as_chunks(chunks))
    apply_factories(state)
    main = [part for part in nested_values(state) if is_main_replica(part.replica_id)]
    theirs = named(list(zip(pieces_of(main), (part.data for part in main), strict=True)))

    table = {parameter.key: parameter for parameter in parameter_table(architecture)}
    tied_copy = (
        parallel.get("pipeline", 1) > 1
        and name == "tied"
        and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    )
    rank = parallel_state.get_tensor_model_parallel_rank()
    ours = named(
        [
            (piece, part)
            for chunk in chunks
            for key, layer, tensor in named_parameters(chunk)
            # The first stage writes a tied embedding; the last stage's copy is a replica.
            if not (tied_copy and key == "embedding.word_embeddings.weight")
            and parallel_state.get_data_parallel_rank() == 0
            if (pieces := shard_pieces(table[key], architecture, tensor.dtype, layer, rank, config.tensor))
            for piece, part in zip(pieces, tensor.chunk(len(pieces), table[key].shard_axis or 0), strict=True)
        ]
    )
    same = all(torch.equal(ours[row], theirs[row]) for row in ours if row in theirs)
    return set(theirs), set(ours), same


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_both_forms_are_the_same(world_size: int) -> None:
    ranks = run_on_ranks(both_forms, world_size, world_size)
    for case in ranks[0]:
        for rank in ranks:
            theirs, ours, same = rank[case]
            assert ours == theirs and same, case
        parts = Counter(row for rank in ranks for row in rank[case][1])
        assert max(parts.values()) == 1, f"{case}: a part has two main replicas"
