"""Mistral and Mistral-NeMo: Llama's block, a head dimension of its own, full attention.

Mistral 7B v0.1's sliding window is not supported; later releases have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minitron_mcore.errors import InputError
from minitron_mcore.families import llama
from minitron_mcore.families.rotary import plain_from_config, plain_to_config
from minitron_mcore.families.table import Family

if TYPE_CHECKING:
    from minitron_mcore.architecture import Architecture


def to_config(a: Architecture) -> dict[str, Any]:
    return {**plain_to_config(a), "sliding_window": None}


def from_config(config: dict[str, Any]) -> dict[str, Any]:
    window, length = config["sliding_window"], config["max_position_embeddings"]
    if window is not None and window < length:
        raise InputError(
            "sliding_window",
            window,
            f"is shorter than max_position_embeddings={length}, and sliding-window attention is not supported",
            f"write null, and max_position_embeddings={window}, up to which full attention is the same",
        )
    return plain_from_config(config)


FAMILY = Family(
    model_type="mistral",
    hugging_face_class="MistralForCausalLM",
    tensors=llama.FAMILY.tensors,
    fields=llama.FAMILY.fields,
    fixed={**llama.FAMILY.fixed, "rope_scaling": None},
    defaults={"rotary_base": 1000000.0},
    constants={"hidden_act": "silu"},
    to_config=to_config,
    from_config=from_config,
)
