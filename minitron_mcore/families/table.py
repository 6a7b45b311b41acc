"""What a family's file consists of: rows of tensor names with their layouts, config fields, and what the family fixes.

Pure data; `checkpoint/conversion.py` moves the tensors. docs/add-a-family.md walks through a new file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minitron_mcore.errors import InputError
from minitron_mcore.layout import LAYERS

if TYPE_CHECKING:
    from minitron_mcore.architecture import Architecture


# Llama-3.1's frequency scaling: its `rope_type`, and its keys in a config, which are an Architecture's fields of it.
SCALED = "llama3"
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class Row:
    """One checkpoint tensor and its Hugging Face names; `{layer}` stands for the layer's number.

    `layout` says how the one becomes the others: "same", "vocab" (padding taken off), "qkv" (interleaved by query
    group), "gate_up" (gate, then up).
    """

    key: str
    names: tuple[str, ...]
    layout: str = "same"


def layer_row(key: str, *names: str, layout: str = "same") -> Row:
    """A row of every layer, by its names inside the layer."""
    return Row(LAYERS + key, tuple(f"model.layers.{{layer}}.{name}" for name in names), layout)


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    `fields` maps Architecture fields to config keys of the same meaning. `fixed` are Architecture fields that the
    config cannot express, so they must have the family's values; `defaults` are those it can, for recipes that leave
    them out. `constants` are config keys without a field here, so they must hold these values. `refuse` raises
    InputError for a shape that transformers does not accept; its second argument says which model that is, for
    messages. `read` rewrites a config so that these tables hold for it, or raises InputError.
    """

    model_type: str
    hugging_face_class: str
    tensors: tuple[Row, ...]
    fields: dict[str, str]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    constants: dict[str, Any]
    refuse: Callable[[Architecture, str], None] = field(default=lambda architecture, where: None)
    read: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda config: config)


def config_of(family: Family, architecture: Architecture, where: str) -> dict[str, Any]:
    """The shape's part of `config.json`; of the rotary embedding, the keys of transformers 4, which 5 reads too.

    Raises InputError, naming `where` it was to go, for an architecture that the family's config cannot express.
    """
    for name, needed in family.fixed.items():
        if (value := getattr(architecture, name)) != needed:
            rule = f"cannot be written into a {family.hugging_face_class} config, where it is always {needed}"
            raise InputError(name, value, f"of {where} {rule}")
    family.refuse(architecture, where)
    scaling = architecture.rope_scaling and {"rope_type": SCALED, **dataclasses.asdict(architecture.rope_scaling)}
    return {
        "architectures": [family.hugging_face_class],
        "model_type": family.model_type,
        **{theirs: getattr(architecture, ours) for ours, theirs in family.fields.items()},
        **({} if "rope_scaling" in family.fixed else {"rope_scaling": scaling}),
        "tie_word_embeddings": not architecture.untie_embeddings_and_output_weights,
        **family.constants,
    }


def fields_of(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Architecture fields from a whole Hugging Face config (defaults filled in).

    Raises InputError for a config that asks for what these models do not have.
    """
    # In transformers 5's `rope_parameters` are the older keys of the rotary embedding too.
    config = family.read({**config, **config["rope_parameters"]})
    allowed = {name: [needed] for name, needed in family.constants.items()}
    allowed["rope_type"] = ["default"] if "rope_scaling" in family.fixed else ["default", SCALED]
    for name, values in allowed.items():
        if (value := config.get(name, values[0])) not in values:
            only = " or ".join(map(str, values))
            raise InputError(name, value, f"is not supported for model_type={family.model_type}, only {only} is")
    return {
        **{ours: config.get(theirs) for ours, theirs in family.fields.items()},
        "rope_scaling": {name: config[name] for name in SCALING} if config["rope_type"] == SCALED else None,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
    }
