"""What the stored tensors of a checkpoint, whoever wrote it, show about its model: sizes, tying, biases, norms.

    word_embeddings.weight [V, h]     linear_qkv.weight  [L, (heads + 2 groups) d, h]
    linear_fc1.weight [L, f or 2f, h] linear_proj.weight [L, h, heads d]
    linear_fc2.weight [L, h, f]       q_layernorm.weight [L, d]

Of heads, groups and the head dimension d one must be known; the two others follow. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_mcore.checkpoint.stored import StoredTensors
from minitron_mcore.layout import LAYERS

QKV, PROJ = LAYERS + "self_attention.linear_qkv.weight", LAYERS + "self_attention.linear_proj.weight"
FC1, FC2 = LAYERS + "mlp.linear_fc1.weight", LAYERS + "mlp.linear_fc2.weight"
HEADS = ("num_attention_heads", "num_query_groups", "kv_channels")


def shown_fields(stored: StoredTensors) -> dict[str, Any]:
    """Fields of an Architecture that follow from the shapes and names of the tensors.

    Raises InputError if layers of one kind differ in shape.
    """
    embedding, fc1, fc2 = (stored.shape(key) for key in ("embedding.word_embeddings.weight", FC1, FC2))
    fields: dict[str, Any] = {
        "untie_embeddings_and_output_weights": stored.shape("output_layer.weight") is not None,
        "add_qkv_bias": stored.shape(LAYERS + "self_attention.linear_qkv.bias") is not None,
        "qk_layernorm": stored.shape(LAYERS + "self_attention.q_layernorm.weight") is not None,
        "normalization": "RMSNorm" if stored.shape("decoder.final_layernorm.bias") is None else "LayerNorm",
    }
    if embedding is not None:
        fields |= {"padded_vocab_size": embedding[0], "hidden_size": embedding[1]}
    if fc1 is not None and fc2 is not None:
        fields |= {"num_layers": fc2[0], "ffn_hidden_size": fc2[2], "gated_linear_unit": fc1[1] == 2 * fc2[2]}
    return fields


def shown_heads(stored: StoredTensors, known: Mapping[str, Any]) -> dict[str, int]:
    """All three of HEADS, from those that are `known` and the shapes; {} if they do not follow, or not evenly."""
    qkv, proj, norm = (stored.shape(key) for key in (QKV, PROJ, LAYERS + "self_attention.q_layernorm.weight"))
    if qkv is None or proj is None:
        return {}
    queries, keys = proj[2], (qkv[1] - proj[2]) // 2  # rows of all heads' queries, and of all groups' keys
    heads, groups, width = (known.get(name) for name in HEADS)
    if not width:
        whole, parts = (queries, heads) if heads else (keys, groups) if groups else (0, 0)
        width = norm[1] if norm is not None else _quotient(whole, parts)
    found = dict(zip(HEADS, (_quotient(queries, width), _quotient(keys, width), width), strict=True))
    return {name: value for name, value in found.items() if value} if all(found.values()) else {}


def _quotient(whole: int, parts: Any) -> int:
    """0 if it is not a whole number, or if `parts` is not a size."""
    sized = isinstance(parts, int) and parts > 0
    return whole // parts if sized and whole % parts == 0 else 0
