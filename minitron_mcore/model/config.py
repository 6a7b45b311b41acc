"""Recipe section `model`: the architecture to train from random weights, and what a foreign checkpoint does not say;
Megatron's field names."""

from dataclasses import dataclass
from typing import Any, Optional


@dataclass
class ModelConfig:
    """What is left out follows from the family, or from other fields (see architecture.py).

    Of a checkpoint that another project wrote, what its own files lack is read here (see checkpoint/completion.py).
    """

    family: Optional[str] = None  # llama (where left out), mistral, nemotron, qwen2, qwen3
    num_layers: Optional[int] = None
    hidden_size: Optional[int] = None
    ffn_hidden_size: Optional[int] = None
    num_attention_heads: Optional[int] = None
    num_query_groups: Optional[int] = None
    kv_channels: Optional[int] = None
    vocab_size: Optional[int] = None  # the tokenizer's, where left out
    make_vocab_size_divisible_by: int = 128
    max_position_embeddings: Optional[int] = None
    rotary_base: Optional[float] = None
    rotary_percent: Optional[float] = None
    rope_scaling: Optional[dict[str, Any]] = None
    layernorm_epsilon: Optional[float] = None  # 1e-5 where left out
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02


# What the keys that may be left out mean then, for recipes that were stored when these stood in them as defaults.
LEFT_OUT = {"family": "llama", "layernorm_epsilon": 1e-5}
