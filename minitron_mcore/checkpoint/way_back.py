"""What Megatron-LM and Megatron-Bridge need in a checkpoint, beside tensors, to load it and continue training.

    common part        args: the shape, by Megatron-LM's options (--use-checkpoint-args reads it)
                       checkpoint_version: 3; from an older one Megatron-LM would reorder queries, keys and values
                       iteration, num_floating_point_operations_so_far
    .metadata          empty `…_extra_state` objects of each layer's modules: a load fails if one that it expects is
                       missing, but ignores extra ones at the default strictness
    run_config.yaml    the shape as a provider of Megatron-Bridge

None of it is read here, where `architecture.yaml` describes the model; a copy of that lies in the iteration as well, in
case the iteration is moved alone. docs/checkpoints.md has the flags to give there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from minitron_mcore.architecture import Architecture, RopeScaling, save_architecture
from minitron_mcore.files import as_yaml, write_whole
from minitron_mcore.layout import LAYERS

# Fields that Megatron-LM, Megatron-Bridge and an Architecture all call the same.
SAME = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("normalization", "add_qkv_bias", "qk_layernorm", "rotary_percent", "init_method_std"),
)
# Modules of a layer that have an `_extra_state`: the linear ones everywhere, attention and norms in some versions of
# Transformer Engine, where the norm before a linear module is named after it (see layout.py).
LINEAR = ("self_attention.linear_qkv.", "self_attention.linear_proj.", "mlp.linear_fc1.", "mlp.linear_fc2.")
NORMS = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")
HEAD_NORMS = ("self_attention.q_layernorm.", "self_attention.k_layernorm.")
ATTENTION, FINAL_NORM = "self_attention.core_attention.", "decoder.final_layernorm."

GPT_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
# The one whose four numbers of a scaled rotary embedding are all its own; megatron-core's switch fixes three of them.
LLAMA_PROVIDER = "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider"
FUNCTIONS = {"silu": "torch.nn.functional.silu", "squared_relu": "megatron.core.activations.squared_relu"}


def extra_states(architecture: Architecture) -> list[ShardedObject]:
    """Empty extra states of every layer and of the final norm, as megatron-core names them; for one rank to store."""
    heads = HEAD_NORMS if architecture.qk_layernorm else ()
    layers = architecture.num_layers
    return [
        ShardedObject(FINAL_NORM + "_extra_state", None, (1,), (0,)),
        *(
            ShardedObject(f"{LAYERS}{module}_extra_state", None, (layers,), (layer,))
            for layer in range(layers)
            for module in (*LINEAR, *NORMS, *heads, ATTENTION)
        ),
    ]


def common_part(architecture: Architecture, iteration: int) -> dict[str, Any]:
    """What Megatron-LM reads beside the sharded tensors; only plain values."""
    return {
        "args": argparse.Namespace(**arguments(architecture), iteration=iteration),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }


def arguments(architecture: Architecture) -> dict[str, Any]:
    """The architecture as Megatron-LM's options, which also say that no optimizer or random states are here."""
    a = architecture
    only_there = ("max_position_embeddings", "vocab_size", "padded_vocab_size", "untie_embeddings_and_output_weights")
    return {
        **_for_both(a),
        **{name: getattr(a, name) for name in only_there},
        "group_query_attention": True,
        "norm_epsilon": a.layernorm_epsilon,
        "apply_layernorm_1p": a.layernorm_zero_centered_gamma,
        "swiglu": a.gated_linear_unit,
        "squared_relu": a.activation == "squared_relu",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "use_rope_scaling": a.rope_scaling is not None,
        "rope_scaling_factor": a.rope_scaling.factor if a.rope_scaling else 8.0,
        "apply_query_key_layer_scaling": False,
        "no_save_optim": True,
        "no_save_rng": True,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def run_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The architecture as Megatron-Bridge's provider, with weights of `dtype`.

    Its vocabulary is the padded one, because the provider would pad differently at each tensor parallelism.
    """
    a = architecture
    only_there = ("layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit")
    model = {
        "_target_": GPT_PROVIDER,
        **_for_both(a),
        **{name: getattr(a, name) for name in only_there},
        "activation_func": _named(FUNCTIONS[a.activation]),
        "seq_length": a.max_position_embeddings,
        "share_embeddings_and_output_weights": not a.untie_embeddings_and_output_weights,
        "vocab_size": a.padded_vocab_size,
        "should_pad_vocab": False,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": _named(f"torch.{dtype}"),
        "pipeline_dtype": _named(f"torch.{dtype}"),
        **_scaling(a.rope_scaling),
    }
    return {"model": model, "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False}}


def _for_both(a: Architecture) -> dict[str, Any]:
    """What Megatron-LM's options and Megatron-Bridge's provider call the same."""
    return {
        **{name: getattr(a, name) for name in SAME},
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "position_embedding_type": "rope",
        # Megatron-LM's option takes whole numbers only.
        "rotary_base": int(a.rotary_base) if float(a.rotary_base).is_integer() else a.rotary_base,
        "rotary_interleaved": False,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }


def _scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_scaling": False}
    if scaling == RopeScaling(factor=scaling.factor):
        return {"rope_scaling": True, "rope_scaling_factor": float(scaling.factor)}
    return {
        "_target_": LLAMA_PROVIDER,
        "scale_factor": float(scaling.factor),
        "low_freq_factor": float(scaling.low_freq_factor),
        "high_freq_factor": float(scaling.high_freq_factor),
        "old_context_len": scaling.original_max_position_embeddings,
    }


def write_beside(place: Path, architecture: Architecture, dtype: str) -> None:
    """What lies in an iteration's folder beside the weights. One rank calls."""
    save_architecture(architecture, place / "architecture.yaml")
    write_whole(place / "run_config.yaml", as_yaml(run_config(architecture, dtype)))


def _named(target: str) -> dict[str, Any]:
    """A function or dtype by name, not to be called."""
    return {"_target_": target, "_call_": False}
