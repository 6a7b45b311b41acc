"""Shapes that an engine does not load, though transformers does. Pure.

A table: what was read in the engines' sources, and met by running them (docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minitron_mcore.architecture import Architecture

# Head dimensions that vLLM's attention on CPUs has kernels for.
CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True)
class Limit:
    """`breaks` says of a shape of one of `families` (none: any) how it breaks the rule; "" where it does not. source:
    where the rule stands."""

    engine: str
    families: tuple[str, ...]
    breaks: Callable[[Architecture], str]
    source: str


def _own_head_dim(a: Architecture) -> str:
    """Most engines once took it for granted that the heads are as wide together as the model."""
    width = a.num_attention_heads * a.kv_channels
    if width == a.hidden_size:
        return ""
    heads = f"num_attention_heads={a.num_attention_heads} x kv_channels={a.kv_channels}"
    return f"needs hidden_size={a.hidden_size} to be {heads} = {width} in {a.family} models"


def _head_dim_without_kernel(a: Architecture) -> str:
    known = ", ".join(map(str, CPU_HEAD_DIMS))
    return (
        "" if a.kv_channels in CPU_HEAD_DIMS else f"has no attention for kv_channels={a.kv_channels}, only for {known}"
    )


LIMITS = (
    Limit(
        "llama.cpp",
        ("nemotron", "qwen2"),
        _own_head_dim,
        "src/models/nemotron.cpp and qwen2.cpp (November 2026), whose queries are n_embd wide; ggml-org/llama.cpp#8922",
    ),
    Limit("vLLM", ("qwen2",), _own_head_dim, "vllm/model_executor/models/qwen2.py (0.32), which reads no head_dim"),
    Limit(
        "vLLM on a CPU",
        (),
        _head_dim_without_kernel,
        "vllm/v1/attention/backends/cpu_attn.py (0.32): get_supported_head_sizes",
    ),
    Limit(
        "CTranslate2",
        ("llama", "qwen2"),
        _own_head_dim,
        "converters/transformers.py (4.8), whose Llama and Qwen2 loaders take no head_dim; OpenNMT/CTranslate2#1793",
    ),
)


def serving_warnings(architecture: Architecture, teacher: Architecture | None = None) -> Iterator[str]:
    """Which engines will not load an export of this shape, and why, a sentence each; with `teacher`, only of engines
    that load that."""
    for limit in LIMITS:
        concerns = not limit.families or architecture.family in limit.families
        if concerns and not (teacher and limit.breaks(teacher)) and (broken := limit.breaks(architecture)):
            yield f"{limit.engine} will not load this shape: it {broken} (docs/serving.md)"
