"""Qwen2 and Qwen2.5: Llama's block with biases on queries, keys and values."""

from __future__ import annotations

from minitron_mcore.families import llama
from minitron_mcore.families.table import Family, layer_row

FAMILY = Family(
    model_type="qwen2",
    hugging_face_class="Qwen2ForCausalLM",
    tensors=(
        *llama.FAMILY.tensors,
        layer_row("self_attention.linear_qkv.bias", *(f"self_attn.{part}_proj.bias" for part in "qkv"), layout="qkv"),
    ),
    fields=llama.FAMILY.fields,
    fixed={**llama.FAMILY.fixed, "rope_scaling": None, "add_qkv_bias": True},
    defaults={"rotary_base": 1000000.0},
    constants={"hidden_act": "silu", "use_sliding_window": False},
)
