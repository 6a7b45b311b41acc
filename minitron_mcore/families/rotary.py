"""The rotary embedding's part of a Hugging Face config, for families without scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minitron_mcore.errors import InputError

if TYPE_CHECKING:
    from minitron_mcore.architecture import Architecture


def plain_to_config(a: Architecture) -> dict[str, Any]:
    """The key that transformers 4 writes, which transformers 5 reads too."""
    return {"rope_theta": a.rotary_base}


def plain_from_config(config: dict[str, Any]) -> dict[str, Any]:
    """From transformers 5's `rope_parameters`, into which it also turns the older keys; raises InputError if scaled."""
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        rule = f"is not supported for model_type={config['model_type']}, only default is"
        raise InputError("rope_type", rope["rope_type"], rule)
    return {"rotary_base": rope["rope_theta"]}
