"""Nemotron-4 and Minitron: LayerNorm1P, squared ReLU, rotary embedding on part of each head, no biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minitron_mcore.families.rotary import plain_from_config, plain_to_config
from minitron_mcore.families.table import LAYER, THEIRS, Family, Row

if TYPE_CHECKING:
    from minitron_mcore.architecture import Architecture


def rotary_to_config(a: Architecture) -> dict[str, Any]:
    return {**plain_to_config(a), "partial_rotary_factor": a.rotary_percent}


def rotary_from_config(config: dict[str, Any]) -> dict[str, Any]:
    return {**plain_from_config(config), "rotary_percent": config["rope_parameters"]["partial_rotary_factor"]}


FAMILY = Family(
    model_type="nemotron",
    hugging_face_class="NemotronForCausalLM",
    tensors=(
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
        Row(LAYER + "self_attention.linear_qkv.layer_norm_weight", (THEIRS + "input_layernorm.weight",)),
        Row(LAYER + "self_attention.linear_qkv.layer_norm_bias", (THEIRS + "input_layernorm.bias",)),
        Row(
            LAYER + "self_attention.linear_qkv.weight",
            tuple(f"{THEIRS}self_attn.{part}_proj.weight" for part in "qkv"),
            "qkv",
        ),
        Row(LAYER + "self_attention.linear_proj.weight", (THEIRS + "self_attn.o_proj.weight",)),
        Row(LAYER + "mlp.linear_fc1.layer_norm_weight", (THEIRS + "post_attention_layernorm.weight",)),
        Row(LAYER + "mlp.linear_fc1.layer_norm_bias", (THEIRS + "post_attention_layernorm.bias",)),
        Row(LAYER + "mlp.linear_fc1.weight", (THEIRS + "mlp.up_proj.weight",)),
        Row(LAYER + "mlp.linear_fc2.weight", (THEIRS + "mlp.down_proj.weight",)),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
        Row("decoder.final_layernorm.bias", ("model.norm.bias",)),
        Row("output_layer.weight", ("lm_head.weight",), "vocab"),
    ),
    fields={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "layernorm_epsilon": "norm_eps",
        "init_method_std": "initializer_range",
    },
    fixed={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "gated_linear_unit": False,
        "activation": "squared_relu",
        "rope_scaling": None,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    },
    defaults={"rotary_base": 10000.0, "rotary_percent": 0.5},
    constants={"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    to_config=rotary_to_config,
    from_config=rotary_from_config,
)
