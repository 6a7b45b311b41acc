"""Recipe section `model`: the architecture to train from random weights, and what a foreign checkpoint does not say;
Megatron's field names."""

from typing import Any, Optional

from minitron_mcore.keys import key, section

_COUNTED = "Megatron's; null: from the family or other keys"


@section
class ModelConfig:
    """What is left out follows from the family, or from other fields (see architecture.py).

    Of a checkpoint that another project wrote, what its own files lack is read here (see checkpoint/completion.py).
    """

    family: Optional[str] = key(None, "llama (where left out), mistral, nemotron, qwen2, qwen3")
    num_layers: Optional[int] = key(None, "transformer layers")
    hidden_size: Optional[int] = key(None, "width of the residual stream")
    ffn_hidden_size: Optional[int] = key(None, "neurons of an MLP")
    num_attention_heads: Optional[int] = key(None, "query heads")
    num_query_groups: Optional[int] = key(None, "KV heads; null: as many as query heads")
    kv_channels: Optional[int] = key(None, "channels of a head; null: hidden_size / num_attention_heads")
    vocab_size: Optional[int] = key(None, "null: the tokenizer's")
    make_vocab_size_divisible_by: int = key(128, "rows of embedding and head are padded to a multiple", at_least=1)
    max_position_embeddings: Optional[int] = key(None, "longest sequence")
    rotary_base: Optional[float] = key(None, _COUNTED)
    rotary_percent: Optional[float] = key(None, _COUNTED)
    rope_scaling: Optional[dict[str, Any]] = key(None, "as in a Hugging Face configuration")
    layernorm_epsilon: Optional[float] = key(None, "null: 1e-5")
    untie_embeddings_and_output_weights: bool = key(True, "an output head of its own")
    init_method_std: float = key(0.02, "standard deviation of random weights", at_least=0)


# What the keys that may be left out mean then, for recipes that were stored when these stood in them as defaults.
LEFT_OUT = {"family": "llama", "layernorm_epsilon": 1e-5}
