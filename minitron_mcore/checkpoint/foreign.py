"""What model a torch_dist checkpoint is that another project on megatron-core wrote.

Megatron-Bridge leaves `run_config.yaml` in every iteration, whose `model` section is its provider's fields (those of
megatron-core's TransformerConfig, and GPTModel's arguments). Megatron-LM leaves its parsed command line in the common
part, under `args`. Both are turned into one mapping, `Fields`, of Megatron's names; what this project's models do not
have is refused by name, and every size is held against the stored tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.hybrid import as_gpt
from minitron_mcore.checkpoint.reader import TensorReader
from minitron_mcore.checkpoint.unpickle import find_common, read_common
from minitron_mcore.errors import InputError
from minitron_mcore.families.find import known_families
from minitron_mcore.files import read_mapping

Fields = dict[str, Any]

# Megatron-LM's option -> the field it sets, where they are named differently.
OPTIONS = {
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "swiglu": "gated_linear_unit",
}
# Fields that are an Architecture's own, under the same name.
SAME = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "normalization",
    "layernorm_zero_centered_gamma",
    "layernorm_epsilon",
    "gated_linear_unit",
    "activation",
    "add_qkv_bias",
    "qk_layernorm",
    "rotary_percent",
    "rotary_base",
    "rope_scaling",
    "untie_embeddings_and_output_weights",
    "init_method_std",
)
# megatron-core's defaults, for what an older writer did not know of.
UNSAID: Fields = {
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_percent": 1.0,
    "rotary_base": 10000.0,
    "rope_scaling": None,
}
NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "normalization")
# Fields that change what a model computes, and the only values that leave it one of ours. None: not set.
ONLY: dict[str, tuple[Any, ...]] = {
    "add_bias_linear": (False,),
    "position_embedding_type": ("rope",),
    "rotary_interleaved": (False,),
    "seq_len_interpolation_factor": (None,),
    "no_rope_freq": (None,),
    "num_moe_experts": (None, 0),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "attention_output_gate": (False,),
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (None,),
    "heterogeneous_block_specs": (False,),
    "heterogeneous_layers_config_path": (None,),
    "is_hybrid_model": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "quick_geglu": (False,),
    "normalization": ("RMSNorm", "LayerNorm"),
}


def infer_architecture(place: Path) -> Architecture:
    """Architecture of the iteration in the folder `place`, from what its writer left there; any rank calls.

    `padded_vocab_size` is what is stored. Raises InputError where neither file is there, where the model has what ours
    have not, or where a size disagrees with the stored tensors.
    """
    source = description_file(place)
    fields = read_run_config(source) if source.name == "run_config.yaml" else read_arguments(place)
    fields = as_gpt(fields, source)
    for name in NEEDED:
        if fields.get(name) is None:
            raise InputError(f"{source} does not say {name}, which every architecture needs")
    for name, allowed in ONLY.items():
        given_none = fields.get(name) is None and False in allowed  # a switch that is not set
        if name in fields and fields[name] not in allowed and not given_none:
            needed = " or ".join(repr(value) for value in allowed)
            raise InputError(f"{source}: {name}={fields[name]!r} is no model that can be read here, only {needed} is")
    given = {**UNSAID, **{name: fields[name] for name in SAME if fields.get(name) is not None}}
    family = find_by_fields(given, str(fields.get("provider", "")), source)

    reader = TensorReader(place, 0)
    stored = reader.shape("embedding.word_embeddings.weight")
    if stored is None:
        raise InputError(f"{place} holds no embedding.word_embeddings.weight: it is no GPT model of megatron-core")
    vocab_size = fields.get("vocab_size")
    if vocab_size is None:
        vocab_size = stored[0]
        _say(f"{source} does not say vocab_size: all {stored[0]:,} stored rows, padding included, count as vocabulary")
    try:
        architecture = build_architecture(
            {
                **given,
                "rotary_base": float(given["rotary_base"]),
                "family": family,
                "vocab_size": vocab_size,
                "padded_vocab_size": stored[0],
            }
        )
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{source} describes no architecture: {error}") from error
    reader.check(architecture, str(source))
    return architecture


def description_file(place: Path) -> Path:
    """The file that says what the model in `place` is. Raises InputError where there is none."""
    if (config := place / "run_config.yaml").is_file():
        return config
    if (common := find_common(place)) is not None:
        return common.path
    raise InputError(
        f"{place.parent / 'architecture.yaml'} is missing, and {place} holds neither run_config.yaml (Megatron-Bridge) "
        "nor common.pt or its successor common_state (Megatron-LM), one of which says what the model is"
    )


def read_run_config(path: Path) -> Fields:
    """From the `model` section of Megatron-Bridge's run_config.yaml; nothing that it names is imported."""
    model = read_mapping(path).get("model")
    if not isinstance(model, dict):
        raise InputError(f"{path} has no section model, which says what the model is")
    # Newer ones keep megatron-core's part in a section of its own.
    inner = model.get("transformer")
    fields: Fields = {**model, **inner} if isinstance(inner, dict) else dict(model)
    fields["provider"] = model.get("_target_", "")
    fields["activation"] = _last_name(fields.get("activation_func"))
    if "share_embeddings_and_output_weights" in fields:
        fields["untie_embeddings_and_output_weights"] = not fields["share_embeddings_and_output_weights"]
    fields.setdefault("max_position_embeddings", fields.get("seq_length"))
    scaling = None
    if fields.get("scale_factor"):
        theirs = {"factor": "scale_factor", "original_max_position_embeddings": "old_context_len"}
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        read = {name: fields.get(theirs.get(name, name)) for name in names}
        scaling = {name: value for name, value in read.items() if value is not None}
    elif fields.get("rope_scaling") or fields.get("use_rope_scaling"):
        scaling = {"factor": fields.get("rope_scaling_factor", 8.0)}
    fields["rope_scaling"] = scaling
    return fields


def read_arguments(place: Path) -> Fields:
    """From Megatron-LM's `args` in the common part."""
    args = read_common(place).get("args")
    if not isinstance(args, argparse.Namespace):
        raise InputError(
            f"{find_common(place)} holds no args of Megatron-LM, and neither architecture.yaml nor run_config.yaml "
            "lies there: nothing says what the model is"
        )
    fields: Fields = {OPTIONS.get(name, name): value for name, value in vars(args).items()}
    gated, squared = fields.get("gated_linear_unit"), fields.get("squared_relu")
    fields["activation"] = "silu" if gated else "squared_relu" if squared else "gelu"
    if not fields.get("group_query_attention"):
        fields["num_query_groups"] = None
    if fields.get("use_rotary_position_embeddings"):
        fields["position_embedding_type"] = "rope"
    scaled = fields.get("use_rope_scaling")
    fields["rope_scaling"] = {"factor": fields.get("rope_scaling_factor") or 8.0} if scaled else None
    return fields


def find_by_fields(given: Mapping[str, Any], provider: str, source: Path) -> str:
    """The family whose fixed fields are those `given`; of several, the one that `provider` names, else Llama's.

    Raises InputError, naming what is unlike the nearest family, where there is none.
    """
    unlike = {
        name: {field: needed for field, needed in family.fixed.items() if given.get(field) != needed}
        for name, family in known_families().items()
    }
    fitting = [name for name, differences in unlike.items() if not differences]
    if fitting:
        named = [name for name in fitting if f".{name}." in provider.lower()]
        return (named or [name for name in fitting if name == "llama"] or fitting)[0]
    nearest = min(unlike, key=lambda name: (len(unlike[name]), name != "llama"))
    field, needed = next(iter(unlike[nearest].items()))
    raise InputError(
        f"{source}: {field}={given.get(field)!r} fits none of the families {', '.join(unlike)}: a {nearest} model has "
        f"{needed!r}"
    )


def _last_name(function: Any) -> Any:
    """`torch.nn.functional.silu`, or the mapping whose `_target_` is that -> `silu`."""
    name = function.get("_target_") if isinstance(function, dict) else function
    return name.rpartition(".")[2] if isinstance(name, str) else name


@cache
def _say(text: str) -> None:
    """Once, by the first rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text, file=sys.stderr)
