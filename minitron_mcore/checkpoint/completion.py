"""What a foreign description lacks: taken from the stored tensors, or asked of the user by key, never guessed.

num_layers, hidden_size, ffn_hidden_size, gated_linear_unit,        shown by the tensors (stored.py)
normalization, tying, add_qkv_bias, qk_layernorm, padded_vocab_size
num_attention_heads, num_query_groups, kv_channels                  shown once one of them is known
activation, layernorm_zero_centered_gamma, position_embedding_type  model.family, or a provider named after one
rotary_percent                                                      the same, else model.rotary_percent
rotary_base, layernorm_epsilon, max_position_embeddings             model.<the same>
rope_scaling                                                        model.rope_scaling; where the rest of the rotary
    embedding is described, and no scaling, the writer had none: a warning says so
vocab_size                                                          the tokenizer (Megatron-LM), else model.vocab_size
init_method_std                                                     0.02; trained weights do not depend on it

Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_mcore.architecture import Architecture
from minitron_mcore.checkpoint.stated import said_by_user
from minitron_mcore.checkpoint.stored import StoredTensors, shown_fields, shown_heads
from minitron_mcore.errors import InputError, shown
from minitron_mcore.families.find import known_families
from minitron_mcore.runtime.notice import say, warn

Fields = dict[str, Any]

# Those fields that a description has under our names once it is read (foreign.py).
DESCRIBED = {entry.name for entry in dataclasses.fields(Architecture)}
DESCRIBED -= {"family", "vocab_size", "padded_vocab_size", "rope_scaling"}
# The writer's own names of fields that it may leave out.
RUN_CONFIG = {
    "activation": "activation_func",
    "max_position_embeddings": "seq_length",
    "rope_scaling": "scale_factor, low_freq_factor, high_freq_factor, old_context_len or rope_scaling",
}
ARGUMENTS = {
    "activation": "swiglu or squared_relu",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "layernorm_epsilon": "norm_epsilon",
    "rope_scaling": "use_rope_scaling with rope_scaling_factor",
}
FLOATS = ("rotary_base", "rotary_percent", "layernorm_epsilon")
UNSCALED = {"factor": 1.0}  # for frequencies that are explicitly not scaled


@dataclass
class Missing:
    """Fields that are said nowhere, gathered for one message."""

    source: Path
    keys: dict[str, str] = field(default_factory=dict)  # field -> how to give it
    hints: list[str] = field(default_factory=list)

    def add(self, name: str, key: str | None = None) -> None:
        self.keys[name] = key or f"model.{name}"

    def refuse(self) -> None:
        if not self.keys:
            return
        theirs = RUN_CONFIG if self.source.name == "run_config.yaml" else ARGUMENTS
        names = [f"{name} (there {theirs[name]})" if name in theirs else name for name in self.keys]
        ways = list(dict.fromkeys(self.keys.values()))
        rule = f"does not say {', '.join(names)}, nor do the stored tensors show it"
        raise InputError("", self.source, rule, "; ".join([f"give {', '.join(ways)}", *self.hints]))


def complete(said: Fields, stored: StoredTensors, source: Path) -> Fields:
    """The fields for build_architecture: as `said` by the description in the file `source`, else by the user, else as
    the tensors show.

    Raises InputError, listing all that is missing and the keys to give.
    """
    user, shown, missing = said_by_user().fields, shown_fields(stored), Missing(source)
    fields = {**shown, **_known(user), **_known(said)}
    # A field that does not fit the tensors stays: the check of all shapes names it.
    fields = {**shown_heads(stored, fields), **fields}
    if not fields.get("num_attention_heads"):
        missing.add("num_attention_heads")
    complete_scaling(fields, said, missing)
    family, fixed = find_family(fields, said, source)
    fields = {**fixed, **fields}
    for name in ("activation", "layernorm_zero_centered_gamma", "position_embedding_type"):
        if name not in fields and said.get(name) is None:
            missing.add(name, f"model.family (as model.family={family})")
    for name in ("rotary_percent", "rotary_base", "layernorm_epsilon", "max_position_embeddings"):
        if name not in fields:
            missing.add(name)
    is_said = "rope_scaling" in fields or "rope_scaling" in missing.keys
    if not is_said and said.get("rotary_base") is None:
        missing.add("rope_scaling", "model.rope_scaling (as model.rope_scaling={factor: 8}; a factor of 1 is none)")
    rows = shown["padded_vocab_size"]
    if (size := said.get("vocab_size") or user.get("vocab_size")) is None:
        size = count_vocabulary(said, stored.folder, rows, missing)
    missing.refuse()
    if not is_said:
        taken = "rotary frequencies are taken as not scaled; if they are, give model.rope_scaling"
        warn(f"{source} does not mention rope_scaling: {taken}")
    fields.pop("position_embedding_type", None)
    fields |= {name: float(fields[name]) for name in FLOATS}
    return {"rope_scaling": None, **fields, "family": family, "vocab_size": size, "padded_vocab_size": rows}


def _known(fields: Mapping[str, Any]) -> Fields:
    return {name: fields[name] for name in DESCRIBED if fields.get(name) is not None}


def complete_scaling(fields: Fields, said: Fields, missing: Missing) -> None:
    """Put `rope_scaling` into `fields`, None if frequencies are not scaled; leave it out if it is said nowhere."""
    there, here = said.get("rope_scaling"), said_by_user().fields.get("rope_scaling")
    if there is None and here is None:
        return
    scaling = {**(there or {}), **{name: value for name, value in (here or {}).items() if value is not None}}
    if lacking := [name for name, value in scaling.items() if value is None]:
        example = ", ".join(f"{name}: …" for name in lacking)
        missing.add("rope_scaling", f"model.rope_scaling (as model.rope_scaling={{{example}}})")
        return
    fields["rope_scaling"] = None if scaling.get("factor") == UNSCALED["factor"] else scaling


def find_family(fields: Fields, said: Fields, source: Path) -> tuple[str, Fields]:
    """(family, what it fixes) whose fixed fields contradict none of `fields`.

    The one that the user gives (`model.family`) or that the description's provider is named after; without either the
    nearest, Llama first, which then fixes nothing. Raises InputError if none fits, naming how the nearest differs.
    """
    families = known_families()
    unlike = {
        name: {key: needed for key, needed in family.fixed.items() if key in fields and fields[key] != needed}
        for name, family in families.items()
    }
    fitting = [name for name, differences in unlike.items() if not differences]
    asked = said_by_user().fields.get("family")
    if asked is not None and asked not in families:
        raise InputError("model.family", asked, "is not known", f"choose one of {', '.join(families)}")
    if (asked and asked not in fitting) or not fitting:
        nearest = asked or min(unlike, key=lambda name: (len(unlike[name]), name != "llama"))
        key, needed = next(iter(unlike[nearest].items()))
        fits = f"does not fit model.family={asked}" if asked else f"fits none of the families {', '.join(unlike)}"
        raise InputError(key, fields[key], f"in {source} {fits}: a {nearest} model has {shown(needed)}")
    provider = str(said.get("provider", "")).lower()
    named = [asked] if asked else [name for name in fitting if f".{name}." in provider]
    if named:
        return named[0], {**families[named[0]].fixed, "position_embedding_type": "rope"}
    return ([name for name in fitting if name == "llama"] or fitting)[0], {}


def count_vocabulary(said: Fields, place: Path, rows: int, missing: Missing) -> int | None:
    """The true size of a vocabulary of which `rows` are stored, from the tokenizer of the run that wrote it.

    Megatron-LM pads a tokenizer's ids up to a multiple of make_vocab_size_divisible_by x tensor parallelism, so a
    tokenizer counts if that gives the stored rows. Bridge has the size from a Hugging Face config, which a tokenizer
    need not fill, so it is asked for. None, and an entry in `missing`, if no tokenizer tells.
    """
    way = "model.vocab_size"
    if not said.get("is_megatron_lm"):
        missing.add("vocab_size", way)
        missing.hints.append(f"{rows:,} rows are stored, padding included")
        return None
    named, unit = said.get("tokenizer_model"), said.get("make_vocab_size_divisible_by") or 128
    paths = [None, str(place / "tokenizer"), str(place.parent / "tokenizer")]
    if isinstance(named, str) and named:
        paths += [named, str(place.parent / named), str(place.parent / Path(named).name)]
    size = said.get("tensor_model_parallel_size")
    layouts = [size] if size else [2**power for power in range(8)]
    for path in paths:
        if (found := said_by_user().count_ids(path)) is None:
            continue
        name, ids = found
        if any(-(-ids // (unit * size)) * unit * size == rows for size in layouts):
            padding = f"the other {rows - ids:,} of {rows:,} stored rows are padding"
            say(f"{missing.source} does not say vocab_size: the {ids:,} ids of {name} count, {padding}")
            return ids
        missing.hints.append(f"{name} has {ids:,} ids, which no padding turns into the {rows:,} stored rows")
    if named and not missing.hints:
        missing.hints.append(f"the tokenizer it names, {named}, cannot be read here")
    missing.add("vocab_size", f"{way} or tokenizer.model")
    return None
