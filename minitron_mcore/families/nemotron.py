"""Nemotron-4 and Minitron: LayerNorm1P, squared ReLU, rotary embedding on part of each head, no biases."""

from __future__ import annotations

from minitron_mcore.families import llama
from minitron_mcore.families.table import Family, Row, layer_row

FAMILY = Family(
    model_type="nemotron",
    hugging_face_class="NemotronForCausalLM",
    tensors=(
        *(row for row in llama.FAMILY.tensors if row.layout != "gate_up"),
        layer_row("mlp.linear_fc1.weight", "mlp.up_proj.weight"),
        layer_row("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias"),
        layer_row("mlp.linear_fc1.layer_norm_bias", "post_attention_layernorm.bias"),
        Row("decoder.final_layernorm.bias", ("model.norm.bias",)),
    ),
    fields={**llama.FAMILY.fields, "layernorm_epsilon": "norm_eps", "rotary_percent": "partial_rotary_factor"},
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
)
