"""What model a Hugging Face folder's config.json describes. Pure."""

from __future__ import annotations

import json
import re
from pathlib import Path

from minitron_mcore.architecture import Architecture, build_architecture
from minitron_mcore.errors import InputError
from minitron_mcore.families.find import find_family
from minitron_mcore.families.table import fields_of
from minitron_mcore.runtime.libraries import AS_DATA, imported

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_hugging_face(hf: str | Path) -> Path:
    """The folder `hf`. Raises InputError for anything else, saying how to get a folder from it."""
    source = Path(hf)
    if source.is_dir():
        return source
    if source.is_file():
        raise InputError("hf", hf, "is a file", f"name the folder that holds it beside config.json: hf={source.parent}")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(hf)):
        remedy = f"if it is a model on the Hugging Face hub, run `hf download {hf} --local-dir DIR`, then give hf=DIR"
        raise InputError("hf", hf, "is not a folder here", remedy)
    raise InputError("hf", hf, "is not there", "name a Hugging Face folder")


def read_config(source: Path, make_vocab_size_divisible_by: int = 128) -> Architecture:
    """The Architecture that `config.json` in `source` describes, transformers' defaults filled in. Any rank calls.

    Raises InputError where there is no such file, or no family here for it.
    """
    path = source / "config.json"
    if not path.is_file():
        ours = (source / "architecture.yaml").is_file()
        remedy = "it is a Megatron checkpoint already" if ours else "name a Hugging Face folder"
        raise InputError("hf", source, "holds no config.json", remedy)
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("", path, f"is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise InputError("", path, "is not a config: it does not map keys to values")
    if given.get("quantization_config"):
        rule = "has a quantization_config, and quantized weights are not supported"
        remedy = "dequantize the model first, or delete the key if its weights are not quantized"
        raise InputError("", path, rule, remedy)
    family = find_family(given.get("model_type"), str(path))
    # Late: transformers takes seconds to import, and a wrong folder is refused before.
    transformers = imported("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(source, **AS_DATA).to_dict()
    except Exception as error:
        raise InputError("", path, f"is refused by transformers: {' '.join(str(error).split())}") from error
    divisor = {"make_vocab_size_divisible_by": make_vocab_size_divisible_by}
    try:
        return build_architecture({"family": family.model_type, **fields_of(family, config), **divisor})
    except InputError as error:
        raise error.found_in(path) from error
