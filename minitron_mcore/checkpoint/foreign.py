"""What model a torch_dist checkpoint is that another project on megatron-core wrote.

Megatron-Bridge leaves `run_config.yaml` in every iteration, whose `model` section is its provider's fields (those of
megatron-core's TransformerConfig, and GPTModel's arguments). Megatron-LM leaves its parsed command line in the common
part, under `args`. Both become one mapping, `Fields`, of Megatron's names; features that this project's models lack are
refused by name, and every size is compared with the stored tensors. Pure.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.checkpoint.completion import FLOATS, UNSCALED, Fields, complete
from minitron_mcore.checkpoint.hybrid import as_gpt
from minitron_mcore.checkpoint.stated import said_by_user
from minitron_mcore.checkpoint.stored import StoredTensors
from minitron_mcore.checkpoint.unpickle import read_metadata
from minitron_mcore.checkpoint.versions import locate_common
from minitron_mcore.errors import InputError, shown
from minitron_mcore.files import read_mapping

# Megatron-LM's option -> the field it sets, where they are named differently.
OPTIONS = {
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "swiglu": "gated_linear_unit",
}
# Our fields of a scaled rotary embedding -> the provider's.
SCALING = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}
# Fields that change what a model computes, and the only values that are supported here. None: not set.
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

# Fields that are computed with before an Architecture checks them.
NUMBERS: dict[str, Any] = {**dict.fromkeys(FLOATS, (int, float)), "vocab_size": int}


def infer_architecture(place: Path) -> Architecture:
    """Architecture of the iteration in the folder `place`, from what its writer left there; any rank calls.

    What the description lacks is taken from the stored tensors, else from the user (stated.py); `padded_vocab_size` is
    what is stored. Raises InputError if neither file is there, if the model has features that ours lack, if a size
    contradicts the stored tensors, or, listing the keys to give, if something is said nowhere.
    """
    source = description_file(place)
    stored = StoredTensors(place)
    said = as_gpt(read_run_config(source) if source.name == "run_config.yaml" else read_arguments(stored), source)
    for name in FLOATS:
        with suppress(ValueError):  # YAML reads 1e-06 as a word
            said[name] = float(said[name]) if isinstance(said.get(name), str) else said.get(name)
    for name, kind in NUMBERS.items():
        if (value := said.get(name)) is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise InputError(name, value, f"in {source} must be a {'whole ' if kind is int else ''}number")
    for name, allowed in ONLY.items():
        given_none = said.get(name) is None and False in allowed  # a switch that is not set
        if name in said and said[name] not in allowed and not given_none:
            needed = " or ".join(shown(value) for value in allowed)
            value = "null" if said[name] is None else said[name]
            raise InputError(name, value, f"in {source} is not supported, only {needed} is")
    embedding, words = stored.shape("embedding.word_embeddings.weight"), said_by_user().fields.get("vocab_size")
    # A model exported from here to train there counts all rows: the user may know that some of them are padding.
    if embedding is not None and words is not None and words < embedding[0] == said.get("vocab_size"):
        said["vocab_size"] = None
    refuse_contradictions(said, source)
    if embedding is None:
        rule = "holds no embedding.word_embeddings.weight, so it is not a GPT model of megatron-core"
        raise InputError("", place, rule)
    try:
        architecture = build_architecture(complete(said, stored, source))
    except InputError as error:
        is_located = error.key.startswith("model.") or str(source) in str(error)
        raise error if is_located else error.found_in(source) from error
    except (TypeError, ValueError) as error:
        raise InputError("", source, f"does not describe an architecture: {error}") from error
    stored.check(architecture, str(source))
    return architecture


def refuse_contradictions(described: Fields, source: Any) -> None:
    """Raise InputError where the user contradicts the description in the file `source`."""
    for name, value in said_by_user().fields.items():
        if name == "family" or (there := described.get(name)) is None:
            continue
        pairs = {name: (value, there)}
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            pairs = {f"{name}.{inner}": (value[inner], there.get(inner)) for inner in value}
        for path, (here, said) in pairs.items():
            if said is not None and here != said:
                rule = f"contradicts {source}, which says {said}"
                raise InputError(f"model.{path}", here, rule, "leave it out: it is only for what a description lacks")


def description_file(place: Path) -> Path:
    """The file that describes the model in `place`. Raises InputError where there is none."""
    if (config := place / "run_config.yaml").is_file():
        return config
    if (common := locate_common(place, read_metadata(place))) is not None:
        return common.path
    theirs = "neither run_config.yaml (Megatron-Bridge) nor common.pt or its successor common_state (Megatron-LM)"
    ours = f"{place.parent / 'architecture.yaml'} is missing"
    raise InputError("", place, f"holds {theirs}, and {ours}: nothing describes the model")


def read_run_config(path: Path) -> Fields:
    """From the `model` section of Megatron-Bridge's run_config.yaml; nothing that it names is imported."""
    model = read_mapping(path).get("model")
    if not isinstance(model, dict):
        raise InputError("", path, "holds no section `model`, which would describe the model")
    # Newer ones keep megatron-core's part in a section of its own.
    inner = model.get("transformer")
    fields: Fields = {**model, **inner} if isinstance(inner, dict) else dict(model)
    fields["provider"] = model.get("_target_", "")
    fields["activation"] = _last_name(fields.get("activation_func"))
    if "share_embeddings_and_output_weights" in fields:
        fields["untie_embeddings_and_output_weights"] = not fields["share_embeddings_and_output_weights"]
    if fields.get("max_position_embeddings") is None:
        fields["max_position_embeddings"] = fields.get("seq_length")  # what the provider gives to the model
    four = {name: fields.get(theirs) for name, theirs in SCALING.items()}
    if fields.get("scale_factor") or ("scale_factor" not in fields and any(four.values())):
        fields["rope_scaling"] = four
    else:
        switch = "use_rope_scaling" if fields.get("rope_scaling") is None else "rope_scaling"
        none = dict(UNSCALED) if "scale_factor" in fields else None
        fields["rope_scaling"] = _switched_scaling(fields, switch, unset=1.0) or none
    return fields


def _switched_scaling(fields: Fields, switch: str, unset: float | None) -> Fields | None:
    """Scaling by a switch and a factor, with megatron-core's own other three numbers; None where nothing is said.

    A factor other than the writer's default (`unset`), without its switch, leaves open whether it applies.
    """
    factor = fields.get("rope_scaling_factor")
    if fields.get(switch) is not None:
        return {"factor": factor} if fields[switch] else dict(UNSCALED)
    return None if factor in (None, unset) else {"factor": None}


def read_arguments(stored: StoredTensors) -> Fields:
    """From Megatron-LM's `args` in the common part."""
    args = stored.common.get("args")
    if not isinstance(args, argparse.Namespace):
        if said_by_user().fields:  # which may be all that is needed; if not, the rest is asked for
            return {}
        others = "there is neither architecture.yaml nor run_config.yaml, so that nothing says what the model is"
        remedy = "give model.family (as model.family=llama), and then the keys asked for, which the tensors do not show"
        common = locate_common(stored.folder, stored.metadata)
        raise InputError("", common, f"holds no args of Megatron-LM, and {others}", remedy)
    # No option takes an array: as text it can be compared, and shown if it stands for an option that matters.
    words = {name: repr(value) if hasattr(value, "shape") else value for name, value in vars(args).items()}
    fields: Fields = {OPTIONS.get(name, name): value for name, value in words.items()}
    fields["is_megatron_lm"] = True
    gated, squared = fields.get("gated_linear_unit"), fields.get("squared_relu")
    plain = "gelu" if gated is not None and squared is not None else None  # its default, where both switches are off
    fields["activation"] = "silu" if gated else "squared_relu" if squared else plain
    if not fields.get("group_query_attention"):
        # Switched off, every head has its own group; not said, the tensors show it.
        said = fields.get("group_query_attention") is not None
        fields["num_query_groups"] = fields.get("num_attention_heads") if said else None
    if fields.get("use_rotary_position_embeddings"):
        fields["position_embedding_type"] = "rope"
    fields["rope_scaling"] = _switched_scaling(fields, "use_rope_scaling", unset=None)
    if fields.get("tokenizer_type") == "NullTokenizer" and isinstance(fields.get("vocab_size"), int):
        fields["vocab_size"] += 1  # its end of document comes on top
    return fields


def _last_name(function: Any) -> Any:
    """`torch.nn.functional.silu`, or the mapping whose `_target_` is that -> `silu`."""
    name = function.get("_target_") if isinstance(function, dict) else function
    return name.rpartition(".")[2] if isinstance(name, str) else name
