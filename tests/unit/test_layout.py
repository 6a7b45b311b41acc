"""layout.py: every axis is held exactly once, every layer lies on one stage, names lead to keys."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.layout import (
    check_tensor_parallel,
    checkpoint_key,
    local_shape,
    parameter_table,
    shard_slices,
    split_layers,
)
from tests.refusals import refuses


def model(**changes: Any) -> Architecture:
    fields = {
        "num_layers": 3,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 16,
        "vocab_size": 103,
    }
    return build_architecture({**fields, **changes})


@pytest.mark.parametrize("family", ["llama", "nemotron", "qwen2", "qwen3"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_cover_the_sharded_axis_exactly_once(family: str, size: int) -> None:
    architecture = model(family=family)
    for parameter in parameter_table(architecture):
        parts = [shard_slices(parameter, architecture, rank, size) for rank in range(size)]
        if parameter.shard_axis is None:
            assert parts == [[]] * size and local_shape(parameter, architecture, size) == parameter.shape(architecture)
            continue
        rows = [[row for part in rank for row in range(part.start, part.stop)] for rank in parts]
        full = parameter.shape(architecture)[parameter.shard_axis]
        assert sorted(row for rank in rows for row in rank) == list(range(full))
        assert {len(rank) for rank in rows} == {local_shape(parameter, architecture, size)[parameter.shard_axis]}


def test_a_gated_shard_is_its_gate_then_its_up_part() -> None:
    architecture = model()
    (fc1,) = [parameter for parameter in parameter_table(architecture) if parameter.gated]
    assert shard_slices(fc1, architecture, 1, 2) == [slice(48, 96), slice(96 + 48, 192)]


def test_table_of_both_families() -> None:
    llama, nemotron = (parameter_table(model(family=family)) for family in ("llama", "nemotron"))
    assert not [row.key for row in llama if row.key.endswith("bias")]
    assert len([row.key for row in nemotron if row.key.endswith("bias")]) == 3
    tied = parameter_table(model(untie_embeddings_and_output_weights=False))
    assert [row.key for row in llama if row not in tied] == ["output_layer.weight"]


@pytest.mark.parametrize(
    ("name", "key", "layer"),
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight", None),
        ("decoder.final_layernorm.bias", "decoder.final_layernorm.bias", None),
        ("decoder.layers.12.mlp.linear_fc2.weight", "decoder.layers.mlp.linear_fc2.weight", 12),
        ("decoder.layers.0.input_layernorm.weight", "decoder.layers.self_attention.linear_qkv.layer_norm_weight", 0),
        ("decoder.layers.3.pre_mlp_layernorm.bias", "decoder.layers.mlp.linear_fc1.layer_norm_bias", 3),
        # Transformer Engine's own names are the checkpoint's already.
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight", 3),
    ],
)
def test_module_names_lead_to_checkpoint_keys(name: str, key: str, layer: int | None) -> None:
    assert checkpoint_key(name) == (key, layer)
    assert key in [row.key for row in parameter_table(model(family="nemotron"))]


@given(st.integers(1, 40), st.integers(1, 8))
def test_every_layer_lies_on_one_stage_in_order(num_layers: int, pipeline: int) -> None:
    if num_layers < pipeline:
        with refuses("num_layers", num_layers, f"is fewer than the {pipeline} stages", "use fewer stages"):
            split_layers(num_layers, pipeline)
        return
    stages = split_layers(num_layers, pipeline)
    assert [layer for (chunk,) in stages for layer in chunk] == list(range(num_layers))
    counts = [len(chunk) for (chunk,) in stages]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


def test_virtual_stages_take_turns() -> None:
    assert split_layers(8, 2, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert split_layers(6, 2, 2) == [[[0, 1], [4]], [[2, 3], [5]]]
    with refuses("num_layers", 3, "is fewer than the 4 stages of parallel.pipeline=2 x parallel.virtual_pipeline=2"):
        split_layers(3, 2, 2)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_query_groups": 2}, "does not divide num_query_groups=2 (2 / 4 = 0.5)"),
        ({"ffn_hidden_size": 90}, "does not divide ffn_hidden_size=90"),
        ({"padded_vocab_size": 106}, "does not divide padded_vocab_size=106"),
    ],
)
def test_tensor_parallel_must_divide_what_it_shards(changes: dict[str, int], rule: str) -> None:
    with refuses("parallel.tensor", 4, rule, f"choose a divisor of {next(iter(changes.values()))}"):
        check_tensor_parallel(model(**changes), 4)
    check_tensor_parallel(model(), 4)
