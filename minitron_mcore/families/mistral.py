"""Mistral and Mistral-NeMo: Llama's block, a head dimension of its own, full attention.

Mistral 7B v0.1's sliding window is not supported; later releases have none.
"""

from __future__ import annotations

from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.families import llama
from minitron_mcore.families.table import Family


def read(config: dict[str, Any]) -> dict[str, Any]:
    """A window that the whole length fits into is none. Raises InputError for a shorter one."""
    window, length = config["sliding_window"], config["max_position_embeddings"]
    if window is not None and window < length:
        rule = f"is shorter than max_position_embeddings={length}, and sliding-window attention is not supported"
        remedy = f"write null, and max_position_embeddings={window}, up to which full attention is the same"
        raise InputError("sliding_window", window, rule, remedy)
    return {**config, "sliding_window": None}


FAMILY = Family(
    model_type="mistral",
    hugging_face_class="MistralForCausalLM",
    tensors=llama.FAMILY.tensors,
    fields=llama.FAMILY.fields,
    fixed={**llama.FAMILY.fixed, "rope_scaling": None},
    defaults={"rotary_base": 1000000.0},
    constants={"hidden_act": "silu", "sliding_window": None},
    read=read,
)
