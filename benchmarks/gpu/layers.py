"""Transformer Engine's layers against megatron-core's local ones, and an fp8 teacher against a bf16 one.

    python benchmarks/gpu/layers.py             8 layers of Llama-3.1-8B's shapes, 1024 tokens
    python benchmarks/gpu/layers.py --small     a tiny model; without Transformer Engine local layers stand in for its

The same weights, by the names that checkpoints have, and the same tokens: final hidden states, and the gradient of
their projection on a fixed direction in every parameter, by relative norm. bf16 rounds to 2^-9 and the two have other
kernels: a bound of 5%; fp8 has 3 bits of mantissa: 15%. Exit code 77 where Transformer Engine is not installed, so that
nothing of it was shown. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BOUNDS = {"states": 0.05, "gradients": 0.05, "fp8 states": 0.15}
SKIPPED = 77
LLAMA = {
    "family": "llama",
    "num_layers": 8,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "rotary_base": 500000.0,
}
SMALL = {
    **LLAMA,
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 1000,
}


def run(architecture: Any, device: torch.device, precision: str, *, engine: bool, tokens: int) -> dict[str, Any]:
    """Final hidden states and gradients by checkpoint names, of weights that are the same in every call."""
    from minitron_mcore.model import specs
    from minitron_mcore.model.gpt import build_model
    from minitron_mcore.model.initialize import initialize, named_parameters
    from minitron_mcore.runtime.config import ParallelConfig

    trains = precision != "fp8"
    chosen = specs.use_transformer_engine if engine else (lambda config: False)
    with mock.patch.object(specs, "use_transformer_engine", chosen):
        (model,) = build_model(architecture, ParallelConfig(), precision, trainable=trains)
    initialize([model], architecture, seed=1)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, architecture.vocab_size, (1, tokens), generator=generator).to(device)
    direction = torch.randn(tokens, 1, architecture.hidden_size, generator=generator).to(device)
    with torch.set_grad_enabled(trains):
        hidden = model(ids, torch.arange(tokens, device=device).unsqueeze(0), None)
    found: dict[str, Any] = {"states": hidden.detach().float(), "layer": type(model.decoder.layers[0]).__name__}
    linear = type(model.decoder.layers[0].self_attention.linear_qkv)
    found["linear"] = f"{linear.__module__}.{linear.__name__}"
    if trains:
        (hidden.float() * direction).sum().backward()
        rows = named_parameters(model)
        found["gradients"] = {(key, layer): p.grad.float() for key, layer, p in rows if p.grad is not None}
    return found


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a machine without a GPU")
    options = parser.parse_args()
    options.small = options.small or not torch.cuda.is_available()
    return options


def main() -> int:
    options = parse()
    from minitron_mcore.architecture import build_architecture
    from minitron_mcore.model.specs import HAVE_TE
    from minitron_mcore.runtime.config import ParallelConfig
    from minitron_mcore.runtime.parallel import seed_everything, use_layout
    from minitron_mcore.runtime.start import start

    runtime = start()
    use_layout(ParallelConfig(), runtime.world_size)
    seed_everything(1)
    architecture = build_architecture(SMALL if options.small else LLAMA)
    there, tokens = bool(HAVE_TE) and torch.cuda.is_available(), 32 if options.small else 1024
    local = run(architecture, runtime.device, "bf16", engine=False, tokens=tokens)
    other = run(architecture, runtime.device, "bf16" if there else "fp32", engine=there, tokens=tokens)
    assert local["gradients"].keys() == other["gradients"].keys()
    errors = {"states": relative(local["states"], other["states"])}
    mine, theirs = local["gradients"], other["gradients"]
    errors["gradients"] = max(relative(mine[name], theirs[name]) for name in mine)
    if there and torch.cuda.get_device_capability() >= (8, 9):
        quantised = run(architecture, runtime.device, "fp8", engine=True, tokens=tokens)
        errors["fp8 states"] = relative(quantised["states"], other["states"])
    bad = [name for name, error in errors.items() if not error <= BOUNDS[name]]
    told = ", ".join(f"{name} off by {error:.1e} (bound {BOUNDS[name]})" for name, error in errors.items())
    summary = f"{other['linear']} against {local['linear']}: {told}"
    if not there:
        summary = f"Transformer Engine is not installed; local layers in bf16 against fp32: {told}"
    facts = {"summary": summary, "small": options.small, "errors": errors, "bad": bad}
    print(json.dumps({"benchmark": "gpu_layers", **facts}))
    return 1 if bad else 0 if there else SKIPPED


if __name__ == "__main__":
    sys.exit(main())
