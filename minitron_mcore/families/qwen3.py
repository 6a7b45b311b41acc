"""Qwen3: Llama's block with an RMSNorm over every head's query and key."""

from __future__ import annotations

from minitron_mcore.families import llama
from minitron_mcore.families.table import LAYER, THEIRS, Family, Row

FAMILY = Family(
    model_type="qwen3",
    hugging_face_class="Qwen3ForCausalLM",
    tensors=(
        *llama.FAMILY.tensors,
        Row(LAYER + "self_attention.q_layernorm.weight", (THEIRS + "self_attn.q_norm.weight",)),
        Row(LAYER + "self_attention.k_layernorm.weight", (THEIRS + "self_attn.k_norm.weight",)),
    ),
    fields=llama.FAMILY.fields,
    fixed={**llama.FAMILY.fixed, "rope_scaling": None, "qk_layernorm": True},
    defaults={"rotary_base": 1000000.0},
    constants={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
)
