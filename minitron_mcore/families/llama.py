"""Llama 2, 3, 3.1 and 3.2: RMSNorm, SwiGLU, rotary embedding with or without Llama-3.1's scaling, grouped queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minitron_mcore.errors import InputError
from minitron_mcore.families.table import Family, Row, layer_row

if TYPE_CHECKING:
    from minitron_mcore.architecture import Architecture


def refuse(a: Architecture, where: str) -> None:
    if a.hidden_size % a.num_attention_heads:
        rule = f"of {where} is not a multiple of num_attention_heads={a.num_attention_heads}"
        why = "which transformers refuses in a Llama config even with head_dim"
        remedy = "choose another student.hidden_size or student.num_attention_heads"
        raise InputError("hidden_size", a.hidden_size, f"{rule}, {why}", remedy)


FAMILY = Family(
    model_type="llama",
    hugging_face_class="LlamaForCausalLM",
    tensors=(
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
        layer_row("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        layer_row(
            "self_attention.linear_qkv.weight", *(f"self_attn.{part}_proj.weight" for part in "qkv"), layout="qkv"
        ),
        layer_row("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        layer_row("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
        layer_row("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", layout="gate_up"),
        layer_row("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
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
        "layernorm_epsilon": "rms_norm_eps",
        "init_method_std": "initializer_range",
        "rotary_base": "rope_theta",
    },
    fixed={
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "gated_linear_unit": True,
        "activation": "silu",
        "rotary_percent": 1.0,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    },
    defaults={"rotary_base": 500000.0},
    constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    refuse=refuse,
)
