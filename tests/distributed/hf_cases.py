"""Shapes, families and small helpers of the Hugging Face tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.runtime.start import Runtime

# head_dim is not hidden / heads, nothing is a power of two, and the vocabulary ends inside the last rank's part.
SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 96,
    "ffn_hidden_size": 136,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 20,
    "vocab_size": 1003,
    "max_position_embeddings": 64,
    "init_method_std": 0.08,
}
SCALING = {"factor": 6.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 24}
CASES: dict[str, dict[str, Any]] = {
    "llama2": {"family": "llama", "num_query_groups": 6, "rotary_base": 10000.0, "layernorm_epsilon": 1e-6},
    "llama-scaled": {"family": "llama", "rope_scaling": SCALING, "layernorm_epsilon": 3e-4},
    "llama-tied": {"family": "llama", "untie_embeddings_and_output_weights": False, "rotary_base": 10000.0},
    "nemotron": {"family": "nemotron"},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2", "layernorm_epsilon": 1e-6},
    "qwen2-tied": {"family": "qwen2", "untie_embeddings_and_output_weights": False},
    "qwen3": {"family": "qwen3", "rotary_base": 5000.0},
}


def architecture_of(case: str) -> Architecture:
    return build_architecture({**SHAPE, **CASES[case]})


def save_with_transformers(case: str, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """A random model that transformers makes and saves, in several files; its norms and biases are all different."""
    from transformers import AutoConfig, AutoModelForCausalLM

    a = architecture_of(case)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rotary_base}
    if a.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **SCALING}
    if a.family == "nemotron":
        rope |= {"partial_rotary_factor": a.rotary_percent}
    config = AutoConfig.for_model(
        a.family,
        hidden_size=a.hidden_size,
        intermediate_size=a.ffn_hidden_size,
        head_dim=a.kv_channels,
        num_hidden_layers=a.num_layers,
        num_attention_heads=a.num_attention_heads,
        vocab_size=a.vocab_size,
        num_key_value_heads=a.num_query_groups,
        max_position_embeddings=a.max_position_embeddings,
        initializer_range=a.init_method_std,
        tie_word_embeddings=not a.untie_embeddings_and_output_weights,
        rope_parameters=rope,
        **({"sliding_window": None} if a.family == "mistral" else {}),
        **{("norm_eps" if a.family == "nemotron" else "rms_norm_eps"): a.layernorm_epsilon},
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.named_parameters():
        if "norm" in name or "bias" in name:
            tensor.data += 0.3 * torch.randn(tensor.shape)
    model.to(dtype).save_pretrained(path, max_shard_size="400KB")


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def token_ids() -> torch.Tensor:
    """[b, s]"""
    return torch.randint(0, SHAPE["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(3))


def transformers_logits(path: Path) -> torch.Tensor:
    """[b, s, V]; nothing may be missing, left over or of another shape."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        return model.eval()(token_ids()).logits


def logits_of(chunks: list[Any]) -> torch.Tensor | None:
    """[s, b, V / TP] on the last stage. Every rank calls."""
    from minitron_mcore.model.gpt import unwrap
    from minitron_mcore.model.microbatch import Microbatch
    from minitron_mcore.model.schedule import final_hidden_states

    tokens = token_ids()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    hidden = final_hidden_states(chunks, [Microbatch.unlabelled(tokens, positions)])
    with torch.no_grad():
        return unwrap(chunks[-1]).logits(hidden[0]) if hidden else None


def greedy_tokens(chunks: list[Any], architecture: Architecture, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What our engine writes after each prompt. Every rank calls."""
    from minitron_mcore.inference.engine import Engine, Sampling

    return [list(one.tokens) for one in Engine(chunks, architecture).generate(prompts, Sampling(new))]


def transformers_tokens(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What transformers' model greedily generates, one prompt at a time, up to its context's end."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    how: Any = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = []
    for prompt in prompts:
        room = min(new, model.config.max_position_embeddings - len(prompt))
        found.append(model.generate(torch.tensor([prompt]), max_new_tokens=room, **how)[0, len(prompt) :].tolist())
    return found


def whole_logits(ranks: list[dict[str, torch.Tensor]], tensor: int) -> dict[str, torch.Tensor]:
    """[b, s, V] by model, from every rank's `logits_of` by model."""
    last = ranks[-tensor:]  # tensor-parallel ranks are neighbours, the last stage comes last
    return {
        model: torch.cat([rank[model] for rank in last], dim=-1)[..., : SHAPE["vocab_size"]].transpose(0, 1)
        for model in last[0]
    }


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def alone() -> Runtime:
    return Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
