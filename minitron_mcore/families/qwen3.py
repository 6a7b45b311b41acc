"""Qwen3: Llama's block with an RMSNorm over every head's query and key."""

from __future__ import annotations

from minitron_mcore.families import llama
from minitron_mcore.families.table import Family, layer_row

FAMILY = Family(
    model_type="qwen3",
    hugging_face_class="Qwen3ForCausalLM",
    tensors=(
        *llama.FAMILY.tensors,
        layer_row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
        layer_row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
    ),
    fields=llama.FAMILY.fields,
    fixed={**llama.FAMILY.fixed, "rope_scaling": None, "qk_layernorm": True},
    defaults={"rotary_base": 1000000.0},
    constants={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
)
