"""Checkpoints as other projects on megatron-core write them: GPTModel, `dist_checkpointing.save`, and what lies beside.

Nothing of the package decides here how a tensor is named, sharded or stored: `GPTModel.sharded_state_dict` does. Values
are drawn by (key, layer) in the checkpoint's own global shapes.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from minitron_mcore.architecture import Architecture, RopeScaling
from minitron_mcore.layout import parameter_table
from tests.distributed.models import start_layout

ITERATION = 100
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 48,
    "ffn_hidden_size": 96,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 16,
}
VOCAB, PADDED, CONTEXT = 1003, 1024, 64
# What the command line of Megatron-LM says that is not its default.
LLAMA: dict[str, Any] = {"swiglu": True, "normalization": "RMSNorm", "use_rope_scaling": True, "rotary_base": 500000}
NEMOTRON: dict[str, Any] = {
    "squared_relu": True,
    "normalization": "LayerNorm",
    "apply_layernorm_1p": True,
    "rotary_percent": 0.5,
}
QWEN2: dict[str, Any] = {"swiglu": True, "normalization": "RMSNorm", "add_qkv_bias": True, "rotary_base": 1000000}
QWEN3: dict[str, Any] = {"swiglu": True, "normalization": "RMSNorm", "qk_layernorm": True, "rotary_base": 1000000}
LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
TIED = {"untie_embeddings_and_output_weights": False}


TP2, PP2 = {"tensor": 2}, {"pipeline": 2}
WIDER = {"padded_vocab_size": 1280}  # padded to a multiple of 256, as Megatron-LM does where it runs at TP2
# name -> (changed arguments, layout it was saved at, how)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, TP2, {"with_optimizer": True}),
    "llama-tied-by-layer": ({**LLAMA, **TIED}, PP2, {"per_layer": True, "prefix": "module."}),
    "llama-bridge": (LLAMA, PP2, {"with_args": False}),
    "nemotron": (NEMOTRON, PP2, {"prefix": "model.", "local_norms": True}),
    "nemotron-bridge-by-layer": ({**NEMOTRON, **WIDER}, TP2, {"per_layer": True, "with_args": False}),
    "qwen2-by-layer": ({**QWEN2, **TIED}, TP2, {"per_layer": True, "local_norms": True}),
    "qwen3-bridge": (QWEN3, TP2, {"with_args": False}),
}


def arguments(**changes: Any) -> argparse.Namespace:
    """Megatron-LM's `args`, as far as they matter, and some of every kind that does not."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    given: dict[str, Any] = {
        **SIZES,
        "group_query_attention": True,
        "vocab_size": VOCAB,
        "padded_vocab_size": PADDED,
        "max_position_embeddings": CONTEXT,
        "seq_length": CONTEXT,
        "normalization": "LayerNorm",
        "apply_layernorm_1p": False,
        "norm_epsilon": 1e-5,
        "swiglu": False,
        "squared_relu": False,
        "quick_geglu": False,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "untie_embeddings_and_output_weights": True,
        "init_method_std": 0.02,
        "num_experts": None,
        "multi_latent_attention": False,
        "mtp_num_layers": None,
        "heterogeneous_layers_config_path": None,
        "is_hybrid_model": False,
        "attention_backend": AttnBackend.auto,
        "model_type": ModelType.encoder_or_decoder,
        "params_dtype": torch.bfloat16,
        "exit_signal": signal.SIGTERM,
        "data_path": ["0.3", "a", "0.7", "b"],
        "rampup_batch_size": None,
    }
    assert not set(changes) - set(given)
    return argparse.Namespace(**{**given, **changes})


def run_config(args: argparse.Namespace, **changes: Any) -> str:
    """The same model as Megatron-Bridge's run_config.yaml has it."""

    def named(target: str) -> dict[str, Any]:
        return {"_call_": False, "_target_": target}

    names = (*SIZES, "normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "rotary_percent", "vocab_size")
    functions = {True: "torch.nn.functional.silu", False: "megatron.core.activations.squared_relu"}
    model = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **{name: getattr(args, name) for name in names},
        "activation_func": named(functions[args.swiglu]),
        "attention_backend": {"_args_": [5], "_call_": True, "_target_": "megatron.core.transformer.enums.AttnBackend"},
        "gated_linear_unit": args.swiglu,
        "glu_linear_offset": 0.0,
        "init_method": {"_args_": [], "_partial_": True, "_target_": "torch.nn.init.normal_", "mean": 0.0, "std": 0.02},
        "init_method_std": args.init_method_std,
        "layernorm_epsilon": args.norm_epsilon,
        "layernorm_zero_centered_gamma": args.apply_layernorm_1p,
        "make_vocab_size_divisible_by": 128,
        "moe_router_topk": 2,
        "num_moe_experts": None,
        "params_dtype": named("torch.bfloat16"),
        "position_embedding_type": "rope",
        "rotary_base": float(args.rotary_base),
        "seq_len_interpolation_factor": None,
        "seq_length": CONTEXT,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "softmax_type": "vanilla",
        "tensor_model_parallel_size": 2,
        "window_size": None,
    }
    if args.use_rope_scaling:
        model |= {"scale_factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0, "old_context_len": 32}
    train = {"_target_": "megatron.bridge.training.config.TrainingConfig", "global_batch_size": 8}
    return yaml.safe_dump({"model": {**model, **changes}, "train": train})


def value_of(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The global tensor `key`, of one layer where it has layers, as `decoder.layers.3.…`."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored_value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The stored global tensor, layers stacked where its name has no number of a layer."""
    if "decoder.layers." not in key or re.search(r"decoder\.layers\.\d", key):
        return value_of(key, shape)
    one = key.replace("decoder.layers.", "decoder.layers.{}.")
    return torch.stack([value_of(one.format(layer), shape[1:]) for layer in range(shape[0])])


def foreign_model(
    args: argparse.Namespace, parallel: dict[str, Any], dtype: torch.dtype, *, per_layer: bool = False
) -> Any:
    """megatron-core's GPTModel of `args`, of its local layers, with random weights; after `start_layout`."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        **{name: getattr(args, name) for name in SIZES},
        normalization=args.normalization,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.relu,
        add_bias_linear=False,
        add_qkv_bias=args.add_qkv_bias,
        qk_layernorm=args.qk_layernorm,
        hetereogenous_dist_checkpoint=per_layer,
        tensor_model_parallel_size=parallel.get("tensor", 1),
        pipeline_model_parallel_size=parallel.get("pipeline", 1),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        persist_layer_norm=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization, qk_layernorm=args.qk_layernorm),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=CONTEXT,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
    ).to(dtype)


def save_foreign(
    folder: str,
    args: argparse.Namespace,
    parallel: dict[str, Any],
    world_size: int,
    *,
    per_layer: bool = False,
    prefix: str = "",
    local_norms: bool = False,
    with_args: bool = True,
    with_optimizer: bool = False,
) -> None:
    """A checkpoint of Megatron-LM's model of `args`; every rank calls. `per_layer`: layers one by one.

    `prefix` goes before every name of the model, as a wrapper adds it; `local_norms`: a layer's norms keep the names
    that the local layers have in their modules. bf16, as is usual.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from minitron_mcore.runtime.repairs import save_without_helper

    start_layout(parallel, world_size)
    model = foreign_model(args, parallel, torch.bfloat16, per_layer=per_layer)
    metadata = {"non_homogeneous_layers": True} if per_layer else None
    weights = model.sharded_state_dict(metadata=metadata)
    common: dict[str, Any] = {"args": args} if with_args else {"train_state": {"step": ITERATION}}
    state: dict[str, Any] = {**common, "checkpoint_version": 3.0, "iteration": ITERATION, "model": weights}
    if with_optimizer:
        state["optimizer"] = optimizer_of(model, weights)
    fill_stored(weights)
    dict_list_map_inplace(lambda part: renamed(part, prefix, LOCAL_NORMS if local_norms else {}), weights)
    place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    grid = (parallel_state.get_pipeline_model_parallel_world_size(), parallel.get("tensor", 1))
    replica = parallel_state.get_data_parallel_rank()
    rng = [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.get_rng_state()}]
    state["rng_state"] = ShardedObject("rng_state", rng, grid, place, replica_id=replica)
    iteration = Path(folder) / f"iter_{ITERATION:07d}"
    if torch.distributed.get_rank() == 0:
        iteration.mkdir(parents=True)
    torch.distributed.barrier()
    save_without_helper()
    dist_checkpointing.save(state, str(iteration))
    if torch.distributed.get_rank() == 0:
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    torch.distributed.barrier()


def fill_stored(weights: dict[str, Any]) -> None:
    """Every tensor of a model's sharded state dict gets this rank's part of `stored_value`; factories are applied."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(weights)
    for part in nested_values(weights):
        if isinstance(part, ShardedTensor):
            shift = part.prepend_axis_num
            whole = stored_value(part.key, tuple(part.global_shape))
            layer = tuple(part.global_offset[:shift])
            cut = [
                slice(start, start + length)
                for start, length in zip(part.global_offset[shift:], part.local_shape, strict=True)
            ]
            part.data.detach().copy_(whole[layer][tuple(cut)])


def renamed(part: Any, prefix: str, names: dict[str, str]) -> Any:
    for name, other in names.items():
        part.key = part.key.replace(name, other)
    part.key = prefix + part.key
    return part


def optimizer_of(model: Any, weights: dict[str, Any]) -> Any:
    """The state of Megatron's DistributedOptimizer after a step, as it is stored."""
    from minitron_mcore.runtime.repairs import optimizer_state
    from minitron_mcore.training.config import TrainConfig
    from minitron_mcore.training.step import build_optimizer, wrap_model

    optimizer = build_optimizer(wrap_model([model]), TrainConfig(), "bf16")
    optimizer.step()
    return optimizer_state(optimizer, weights, is_loading=False)


def write_cases(root: Path, names: Iterable[str]) -> None:
    """The folder `root`/NAME for each of CASES that is named; both ranks call."""
    for name in names:
        changes, parallel, how = CASES[name]
        args = arguments(**changes)
        save_foreign(str(root / name), args, parallel, 2, **how)
        if not how.get("with_args", True) and torch.distributed.get_rank() == 0:
            (root / name / f"iter_{ITERATION:07d}" / "run_config.yaml").write_text(run_config(args))
        torch.distributed.barrier()


def with_common_file(place: Path) -> None:
    """Give an iteration that megatron-core wrote its common part as a file, as up to 0.18, and not as an object."""
    import megatron.core  # noqa: F401  (or its classes would be read as stand-ins, which cannot be stored)

    from minitron_mcore.checkpoint.unpickle import read_common, read_metadata
    from minitron_mcore.checkpoint.versions import COMMON_OBJECT, save_common

    metadata = read_metadata(place)
    save_common(read_common(place, metadata), place)
    metadata.state_dict_metadata.pop(COMMON_OBJECT, None)
    stored = metadata.storage_data
    metadata.storage_data = {index: info for index, info in stored.items() if index.fqn != COMMON_OBJECT}
    (place / ".metadata").write_bytes(pickle.dumps(metadata))


def expected_architecture(name: str) -> Architecture:
    """Written out by hand."""
    gated = not name.startswith("nemotron")
    return Architecture(
        family=name.partition("-")[0],
        **SIZES,
        vocab_size=VOCAB,
        padded_vocab_size=WIDER["padded_vocab_size"] if name == "nemotron-bridge-by-layer" else PADDED,
        max_position_embeddings=CONTEXT,
        normalization="RMSNorm" if gated else "LayerNorm",
        layernorm_zero_centered_gamma=not gated,
        gated_linear_unit=gated,
        activation="silu" if gated else "squared_relu",
        rotary_percent=1.0 if gated else 0.5,
        rotary_base={"llama": 500000.0, "nemotron": 10000.0}.get(name.partition("-")[0], 1000000.0),
        rope_scaling={
            "llama": RopeScaling(8.0, 1.0, 4.0, 8192),  # the three that Megatron fixes, and its factor's default
            "llama-tied-by-layer": RopeScaling(8.0, 1.0, 4.0, 8192),
            "llama-bridge": RopeScaling(4.0, 1.0, 3.0, 32),
        }.get(name),
        untie_embeddings_and_output_weights="tied" not in name and not name.startswith("qwen2"),
        add_qkv_bias=name.startswith("qwen2"),
        qk_layernorm=name.startswith("qwen3"),
    )


def value(key: str, layer: int | None, shape: tuple[int, ...]) -> torch.Tensor:
    """What foreign_models.py put there; bf16."""
    name = key if layer is None else key.replace("decoder.layers.", f"decoder.layers.{layer}.")
    return value_of(name, shape).bfloat16()


def whole_tensors(architecture: Architecture) -> dict[tuple[str, int | None], torch.Tensor]:
    return {
        (parameter.key, layer): value(parameter.key, layer, parameter.shape(architecture))
        for parameter in parameter_table(architecture)
        for layer in (range(architecture.num_layers) if parameter.per_layer else [None])
    }
