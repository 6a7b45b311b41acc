"""What model a Hugging Face folder's config.json describes. Pure."""

from __future__ import annotations

import json
from pathlib import Path

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.families.find import find_family
from minitron_mcore.families.table import fields_of


def read_config(source: Path, make_vocab_size_divisible_by: int = 128) -> Architecture:
    """The Architecture that `config.json` in `source` describes, transformers' defaults filled in. Any rank calls.

    Raises InputError where there is no such file, or no family here for it.
    """
    path = source / "config.json"
    if not path.is_file():
        raise InputError(f"hf={source} holds no config.json: name a Hugging Face folder")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"{path} is no config: it holds no mapping of keys to values")
    if given.get("quantization_config"):
        raise InputError(
            f"{path} has a quantization_config: quantized weights are not read; dequantize the model first, or take "
            "the key out where the weights are not quantized"
        )
    family = find_family(given.get("model_type"), str(path))
    # transformers takes seconds to import; a folder that is none need not wait for it
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True).to_dict()
    except Exception as error:
        raise InputError(f"{path} is refused by transformers: {' '.join(str(error).split())}") from error
    fields = fields_of(family, config, str(path))
    divisor = {"make_vocab_size_divisible_by": make_vocab_size_divisible_by}
    try:
        return build_architecture({"family": family.model_type, **fields, **divisor})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
