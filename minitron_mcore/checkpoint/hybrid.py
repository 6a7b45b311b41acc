"""Checkpoints of megatron-core's HybridModel (MambaModel, up to 0.17) that are a GPT under other names.

Its layers are positions of a pattern: `*` attention, `-` MLP, `M` Mamba, `E` experts, and more; `|` divides pipeline
stages. A pattern of `*-` pairs alone is a GPT of half as many layers, and computes the same:

    stored, always layer by layer                    the GPT's
    decoder.layers.6.self_attention.linear_qkv.…     decoder.layers.3.self_attention.linear_qkv.…
    decoder.layers.7.mlp.linear_fc1.…                decoder.layers.3.mlp.linear_fc1.…
    decoder.final_norm.weight                        decoder.final_layernorm.weight

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.layout import LAYERS

FINAL_NORM, GPT_FINAL_NORM = "decoder.final_norm.", "decoder.final_layernorm."
PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")  # the option's name, from 0.17 on and before
PAIR = "*-"
ONLY_PAIRS = "a hybrid model can be read only if its layers are all pairs of attention and MLP (`*-*-`)"
_LAYER = re.compile(re.escape(LAYERS) + r"(\d+)\.")
# What a position of a pair holds -> its symbol.
_SYMBOLS = {"self_attention.": "*", "input_layernorm.": "*", "mlp.linear_fc": "-", "pre_mlp_layernorm.": "-"}


def gpt_names(stored: Iterable[str]) -> dict[str, str]:
    """The name in a GPT of each of a model's tensors, which are `stored` without a wrapper's prefix.

    The same name if it is not a hybrid model. Raises InputError, naming a tensor, if it has layers of other kinds.
    """
    names = list(stored)
    if not any(name.startswith(FINAL_NORM) for name in names):
        return {name: name for name in names}
    result: dict[str, str] = {}
    pattern: dict[int, str] = {}
    for name in names:
        layer = _LAYER.match(name)
        if layer is None:
            result[name] = name.replace(FINAL_NORM, GPT_FINAL_NORM)
            continue
        inner, position = name[layer.end() :], int(layer[1])
        symbol = next((symbol for part, symbol in _SYMBOLS.items() if inner.startswith(part)), None)
        if symbol is None or pattern.setdefault(position, symbol) != symbol or symbol != PAIR[position % 2]:
            raise InputError("", None, f"the tensor {name} is not supported: {ONLY_PAIRS}")
        result[name] = f"{LAYERS}{position // 2}.{inner}"
    return result


def as_gpt(fields: dict[str, Any], source: Any) -> dict[str, Any]:
    """The `fields` of a description; those of a hybrid model of pairs are turned into a GPT's.

    Raises InputError, naming the pattern and the description `source`, for a hybrid model of other layers.
    """
    key = next((name for name in PATTERNS if fields.get(name)), None)
    if key is None and not fields.get("is_hybrid_model"):
        return fields
    positions = fields.get("num_layers")
    if key is not None:
        pattern = str(fields[key]).replace("|", "")
        pairs, rest = divmod(len(pattern), len(PAIR))
        if rest or pairs == 0 or pattern != PAIR * pairs:
            raise InputError(key, fields[key], f"in {source} is not supported: {ONLY_PAIRS}")
        if positions not in (None, len(pattern)):
            raise InputError(key, fields[key], f"in {source} has {len(pattern)} layers, but num_layers={positions}")
        positions = len(pattern)
    layers = positions // len(PAIR) if isinstance(positions, int) else positions
    return {**fields, "num_layers": layers, "is_hybrid_model": False}
