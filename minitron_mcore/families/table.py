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
    config cannot say, hence must have the family's values; `defaults` are those that it can say, for recipes that do
    not. `constants` are config keys that have no field here, hence must hold these values. `to_config` and
    `from_config` translate the rest (rotary embedding), `refuse` raises InputError for a shape that transformers does
    not accept; its second argument names the key to blame.
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

    Raises InputError, blaming the key `where`, for an architecture that the family's config cannot say.
    """
    for name, needed in family.fixed.items():
        if (value := getattr(architecture, name)) != needed:
            raise InputError(
                f"{where}: {name}={value!r} cannot be said in a {family.hugging_face_class} config, "
                f"where it is always {needed!r}"
            )
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

    Raises InputError, naming the file `where`, for a config that asks for what the family's model does not have.
    """
    for name, needed in family.constants.items():
        if (value := config.get(name, needed)) != needed:
            raise InputError(
                f"{where}: {name}={value!r} is not supported for model_type={family.model_type!r}, only {needed!r}"
            )
    try:
        translated = family.from_config(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return {
        **{ours: config.get(theirs) for ours, theirs in family.fields.items()},
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        **translated,
    }
