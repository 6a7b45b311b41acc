"""What a model is: one record of Megatron's field names, and the exact arithmetic on it.

Parameters are summed from the table of `layout.py`, so that what is counted, sharded, pruned and stored is one list.
Pure.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.families.find import known_families
from minitron_mcore.families.table import Family
from minitron_mcore.files import as_yaml, read_mapping, write_whole
from minitron_mcore.layout import parameter_table

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer, in Megatron's field names.

    `kv_channels` is the head dimension, always explicit: it is not hidden_size / num_attention_heads after pruning.
    `padded_vocab_size` is part of the model, not of the layout, so that a checkpoint loads at any tensor parallelism;
    rows from `vocab_size` on are padding and masked in every loss.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    padded_vocab_size: int
    max_position_embeddings: int
    normalization: str
    layernorm_zero_centered_gamma: bool
    gated_linear_unit: bool
    activation: str
    rotary_percent: float
    rotary_base: float
    rope_scaling: RopeScaling | None = None
    layernorm_epsilon: float = 1e-5
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = 0.02
    add_qkv_bias: bool = False
    qk_layernorm: bool = False

    def __post_init__(self) -> None:
        _family(self.family)
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        for name in (*sizes, "kv_channels", "vocab_size", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(name, value, "must be a whole number of at least 1")
        if self.num_attention_heads % self.num_query_groups:
            rule = f"must be a multiple of num_query_groups={self.num_query_groups}"
            why = "every group serves the same number of query heads"
            raise InputError("num_attention_heads", self.num_attention_heads, rule, why)
        if self.padded_vocab_size < self.vocab_size:
            rule = f"must be at least vocab_size={self.vocab_size}"
            raise InputError("padded_vocab_size", self.padded_vocab_size, rule)
        for name in ("rotary_base", "layernorm_epsilon", "init_method_std"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (value == 0 and name != "init_method_std"):
                raise InputError(name, value, "must be a number above 0")
        if not 0 < self.rotary_percent <= 1:
            raise InputError("rotary_percent", self.rotary_percent, "must be above 0 and at most 1")
        rotated = int(self.kv_channels * self.rotary_percent)
        if rotated % 2 or not rotated:
            rule = f"x rotary_percent={self.rotary_percent} makes {rotated} rotary channels per head"
            raise InputError("kv_channels", self.kv_channels, rule, "they rotate in pairs, so choose an even number")

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_query_groups

    @property
    def num_parameters(self) -> int:
        """Every stored parameter, counted with the true vocabulary: padding rows are not part of the model."""
        return sum(p.count(self, self.vocab_size) for p in parameter_table(self))

    @property
    def num_non_embedding_parameters(self) -> int:
        """Parameters without the input embedding and the output head (the papers' "non-embedding")."""
        embedding = self.vocab_size * self.hidden_size
        return self.num_parameters - embedding * (2 if self.untie_embeddings_and_output_weights else 1)

    def forward_flops_per_token(self, sequence_length: int, *, output_head: bool = True) -> int:
        """Floating-point operations of one token's forward pass: 2 for each multiply-add of the matrix products.

        Attention counts the full score matrix over `sequence_length`, where Megatron-LM counts the causal half; norms,
        activations and softmax are not counted. The true vocabulary is counted, not the padding.
        """
        attention_width = self.num_attention_heads * self.kv_channels
        kv_width = self.num_query_groups * self.kv_channels
        projections = self.hidden_size * (2 * attention_width + 2 * kv_width)
        scores = 2 * sequence_length * attention_width
        mlp = self.hidden_size * self.ffn_hidden_size * (3 if self.gated_linear_unit else 2)
        head = self.hidden_size * self.vocab_size if output_head else 0
        return 2 * (self.num_layers * (projections + scores + mlp) + head)

    def training_flops_per_token(self, sequence_length: int) -> int:
        """Forward and backward: three times the forward pass."""
        return 3 * self.forward_flops_per_token(sequence_length)

    def replace(self, **changes: Any) -> Architecture:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def difference(self, stored: Architecture) -> str:
        """How the model `stored` somewhere is another one, by the first field: "FIELD is X there and Y here"; "" where
        it is not. Random weights' deviation is no part of a model."""
        there, here = stored.to_dict(), self.to_dict()
        names = (name for name in here if there[name] != here[name] and name != "init_method_std")
        return next((f"{name} is {there[name]} there and {here[name]} here" for name in names), "")


def _family(name: str) -> Family:
    if name not in (known := known_families()):
        raise InputError("family", name, "is not known", f"choose one of {', '.join(known)}")
    return known[name]


def padded_vocab(vocab_size: int, make_vocab_size_divisible_by: int = 128) -> int:
    """Megatron's padding, without its factor of tensor parallelism: 128 serves every power of two up to 128."""
    return -(-vocab_size // make_vocab_size_divisible_by) * make_vocab_size_divisible_by


def build_architecture(fields: dict[str, Any]) -> Architecture:
    """An Architecture from `fields` (Megatron's names; None means not given) and the family's defaults.

    Raises InputError when a required field is missing or a field is unknown.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    family = _family(given.get("family", "llama"))
    merged: dict[str, Any] = {"family": "llama", **family.fixed, **family.defaults, **given}
    divisor = merged.pop("make_vocab_size_divisible_by", 128)
    if divisor < 1:
        raise InputError("make_vocab_size_divisible_by", divisor, "must be at least 1")
    known = {field.name for field in dataclasses.fields(Architecture)}
    if unknown := sorted(set(merged) - known):
        raise InputError(
            unknown[0], None, "is not a field of an architecture", f"choose from {', '.join(sorted(known))}"
        )
    needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
    for name in needed:
        if name not in merged:
            raise InputError(name, None, "is missing", f"an architecture needs {', '.join(needed)}")
    merged.setdefault("num_query_groups", merged["num_attention_heads"])
    merged.setdefault("max_position_embeddings", 4096)
    if "kv_channels" not in merged:
        if merged["num_attention_heads"] < 1:
            raise InputError("num_attention_heads", merged["num_attention_heads"], "must be at least 1")
        if merged["hidden_size"] % merged["num_attention_heads"]:
            rule = f"is not a multiple of num_attention_heads={merged['num_attention_heads']}"
            raise InputError("hidden_size", merged["hidden_size"], rule, "give kv_channels (the head dimension)")
        merged["kv_channels"] = merged["hidden_size"] // merged["num_attention_heads"]
    merged.setdefault("padded_vocab_size", padded_vocab(merged["vocab_size"], divisor))
    if isinstance(merged.get("rope_scaling"), dict):
        merged["rope_scaling"] = _rope_scaling(merged["rope_scaling"])
    return Architecture(**merged)


def _rope_scaling(given: dict[str, Any]) -> RopeScaling:
    """Raises InputError for an unknown field and for numbers that cannot scale."""
    known = [field.name for field in dataclasses.fields(RopeScaling)]
    for name, value in given.items():
        if name not in known:
            rule = "is not a field of rope_scaling"
            raise InputError(f"rope_scaling.{name}", None, rule, f"choose from {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            rule = f"must be a number above 0{', not text' if isinstance(value, str) else ''}"
            raise InputError(f"rope_scaling.{name}", value, rule)
    scaling = RopeScaling(**given)
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        rule = f"must be above rope_scaling.low_freq_factor={scaling.low_freq_factor}"
        raise InputError("rope_scaling.high_freq_factor", scaling.high_freq_factor, rule)
    return scaling


def save_architecture(architecture: Architecture, path: Path) -> None:
    write_whole(path, as_yaml(architecture.to_dict()))


def load_architecture(path: Path) -> Architecture:
    """Read `architecture.yaml`; raises InputError when it is missing or does not describe an architecture."""
    if not path.is_file():
        raise InputError("", path, "is missing", f"{path.parent} is not a checkpoint of minitron_mcore")
    fields = read_mapping(path)
    try:
        return build_architecture(fields)
    except InputError as error:
        raise error.found_in(path) from error
