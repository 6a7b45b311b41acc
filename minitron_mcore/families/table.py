"""What a family's file consists of: rows of tensor names with their layouts, config fields, and what the family fixes.

Pure data; `checkpoint/conversion.py` moves the tensors. docs/add-a-family.md walks through a new file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minitron_mcore.errors import InputError

if TYPE_CHECKING:
    from minitron_mcore.architecture import Architecture


LAYER = "decoder.layers."  # of checkpoint keys
THEIRS = "model.layers.{layer}."  # of Hugging Face names


@dataclass(frozen=True)
class Row:
    """One checkpoint tensor and its Hugging Face names; `{layer}` stands for the layer's number.

    `layout` says how the one becomes the others: "same", "vocab" (padding taken off), "qkv" (interleaved by query
    group), "gate_up" (gate, then up).
    """

    key: str
    names: tuple[str, ...]
    layout: str = "same"


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    `fields` maps Architecture fields to config keys of the same meaning. `fixed` are Architecture fields that the
    config cannot express, so they must have the family's values; `defaults` are those it can, for recipes that leave
    them out. `constants` are config keys without a field here, so they must hold these values. `to_config` and
    `from_config` translate the rest (rotary embedding). `refuse` raises InputError for a shape that transformers does
    not accept; its second argument says which model that is, for messages.
    """

    model_type: str
    hugging_face_class: str
    tensors: tuple[Row, ...]
    fields: dict[str, str]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    constants: dict[str, Any]
    to_config: Callable[[Architecture], dict[str, Any]]
    from_config: Callable[[dict[str, Any]], dict[str, Any]]
    refuse: Callable[[Architecture, str], None] = field(default=lambda architecture, where: None)


def config_of(family: Family, architecture: Architecture, where: str) -> dict[str, Any]:
    """The shape's part of `config.json`.

    Raises InputError, naming `where` it was to go, for an architecture that the family's config cannot express.
    """
    for name, needed in family.fixed.items():
        if (value := getattr(architecture, name)) != needed:
            rule = (
                f"of {where} cannot be written into a {family.hugging_face_class} config, where it is always {needed}"
            )
            raise InputError(name, value, rule)
    family.refuse(architecture, where)
    return {
        "architectures": [family.hugging_face_class],
        "model_type": family.model_type,
        **{theirs: getattr(architecture, ours) for ours, theirs in family.fields.items()},
        "tie_word_embeddings": not architecture.untie_embeddings_and_output_weights,
        **family.constants,
        **family.to_config(architecture),
    }


def fields_of(family: Family, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Architecture fields from a whole Hugging Face config (defaults filled in).

    Raises InputError, naming the file `where`, for a config that asks for what these models do not have.
    """
    for name, needed in family.constants.items():
        if (value := config.get(name, needed)) != needed:
            rule = f"in {where} is not supported for model_type={family.model_type}, only {needed} is"
            raise InputError(name, value, rule)
    try:
        translated = family.from_config(config)
    except InputError as error:
        raise error.found_in(where) from error
    return {
        **{ours: config.get(theirs) for ours, theirs in family.fields.items()},
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        **translated,
    }
