"""Checkpoints written by the megatron-core of whichever interpreter runs this, to be read under another version.

    OMP_NUM_THREADS=1 PYTHON -m tests.distributed.megatron_writer FOLDER [NAME ...]

makes FOLDER/NAME, by default each of KINDS: megatron-core's own GPTModel (or HybridModel, from 0.19 on), its own
`dist_checkpointing.save`, and Megatron-LM's own parsed arguments where they are installed; beside it, in logits.pt,
what that model works out. What is in
tests/distributed/checkpoint/megatron_0_19.tar.xz was made so, by Python 3.13 with megatron-core 0.19.2, torch 2.13 and
numpy 2.5, and packed with

    tar --sort=name --owner=0 --group=0 --mtime=2026-11-29 -C FOLDER -cJf megatron_0_19.tar.xz .
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from tests.distributed.foreign_models import CONTEXT, LLAMA, arguments, fill_stored, foreign_model, optimizer_of
from tests.distributed.models import start_layout

ITERATION = 3
SIZES = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2, "num_query_groups": 1}
MODEL = {**LLAMA, **SIZES, "kv_channels": 4, "vocab_size": 20, "padded_vocab_size": 24, "use_rope_scaling": False}
PAIRS = "*-*-"  # a hybrid model's layers: attention, MLP, and again
KINDS = ("gpt", "gpt-optimizer", "hybrid")


def megatron_lm_arguments(**changes: Any) -> argparse.Namespace:
    """Megatron-LM's `args` of MODEL: all that its own command line gives, where it is installed."""
    ours = arguments(**MODEL)
    try:
        from megatron.training import arguments as theirs
    except ImportError:
        return argparse.Namespace(**{**vars(ours), **changes})
    typed, sys.argv = sys.argv, [sys.argv[0]]
    try:
        parsed = theirs.parse_args(ignore_unknown_args=True)
    finally:
        sys.argv = typed
    theirs._normalize_cuda_graph_modules_args(parsed)
    theirs._normalize_inference_cuda_graph_scope_arg(parsed)
    # Of 0.19 are these names, instead of two that are older.
    renamed = {"layernorm_epsilon": ours.norm_epsilon, "layernorm_zero_centered_gamma": False}
    known = {name: value for name, value in vars(ours).items() if name not in ("norm_epsilon", "apply_layernorm_1p")}
    return argparse.Namespace(**{**vars(parsed), **known, **renamed, **changes})


def hybrid_model(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """megatron-core's HybridModel of PAIRS, of local layers under the names of Transformer Engine's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer

    whole = get_gpt_layer_local_submodules(normalization=args.normalization)
    attention = dataclasses.replace(whole, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    mlp = dataclasses.replace(
        whole, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp
    )
    layers = hybrid_block.HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    hybrid_block.TENorm = WrappedTorchNorm
    config = foreign_model(args, {}, dtype).config
    config.num_layers = len(PAIRS)
    return HybridModel(
        config,
        ModuleSpec(module=hybrid_block.HybridStack, submodules=layers),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=CONTEXT,
        hybrid_layer_pattern=PAIRS,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    ).to(dtype)


def write(folder: Path, kind: str) -> None:
    """One checkpoint of one process. Its tensors hold what `stored_value` gives for their names."""
    from megatron.core import dist_checkpointing

    start_layout({}, 1)
    args = megatron_lm_arguments()
    model, exact = (
        hybrid_model(args, dtype) if kind == "hybrid" else foreign_model(args, {}, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    if kind == "hybrid":
        args = megatron_lm_arguments(num_layers=len(PAIRS), hybrid_layer_pattern=PAIRS, is_hybrid_model=True)
    weights = model.sharded_state_dict(metadata={"dp_cp_group": None})
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION, "model": weights}
    if kind == "gpt-optimizer":
        state["optimizer"] = optimizer_of(model, weights)
    fill_stored(weights)
    place = folder / f"iter_{ITERATION:07d}"
    place.mkdir(parents=True)
    dist_checkpointing.save(state, str(place))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    exact.load_state_dict(model.state_dict())
    torch.save(logits_of(exact), folder / "logits.pt")


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions [2, 16]."""
    tokens = torch.randint(0, MODEL["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(3))
    return tokens, torch.arange(16).expand_as(tokens).contiguous()


def logits_of(model: Any) -> torch.Tensor:
    """What megatron-core's model works out of `sample`, in float32: [2, 16, V]."""
    tokens, positions = sample()
    masked = torch.ones(1, 1, *tokens.shape[1:], tokens.shape[1]).triu(1).bool()
    with torch.no_grad():
        return model.eval()(tokens, positions, masked)


if __name__ == "__main__":
    from minitron_mcore.runtime.repairs import save_without_helper
    from minitron_mcore.runtime.start import stop

    for kind in sys.argv[2:] or KINDS:
        save_without_helper()
        write(Path(sys.argv[1]) / kind, kind)
    stop()
