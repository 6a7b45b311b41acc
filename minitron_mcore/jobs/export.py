"""`export`: a Megatron checkpoint, of any pruned shape and layout, as a Hugging Face folder. Pure."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from minitron_mcore.checkpoint.companions import tokenizer_class
from minitron_mcore.checkpoint.folder import tokenizer_folder
from minitron_mcore.data.agreement import check_saved
from minitron_mcore.data.tokenizer import SENTENCEPIECE, Tokenizer
from minitron_mcore.data.tokenizer_json import save_for_transformers
from minitron_mcore.errors import InputError, StorageError
from minitron_mcore.families.find import find_family
from minitron_mcore.families.serving_limits import serving_warnings
from minitron_mcore.families.table import config_of
from minitron_mcore.jobs.inputs import find_model, model_tokenizer, output_folder, require
from minitron_mcore.jobs.job import NOTHING, Item, Model, ModelJob, Promises
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class ExportJob(ModelJob):
    """`model` to the Hugging Face folder `target`. as_it_is: the SentencePiece model goes along unconverted."""

    max_shard_bytes: int
    as_it_is: bool


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING, *, replaces: bool = False) -> ExportJob:
    """`checkpoint` -> the new folder `hf`; one that is there is replaced where `replaces`. Raises InputError."""
    require(recipe, {"checkpoint": "the folder of a checkpoint", "hf": "the Hugging Face folder to write"})
    model = find_model(recipe.checkpoint, "checkpoint", promises)
    target = output_folder(recipe.hf, "hf")
    if target.exists() and not replaces:
        raise InputError("hf", target, "exists", "name a folder that does not, or move that one away")
    max_shard_bytes = parse_size(recipe.max_shard_size, "max_shard_size")
    config_of(find_family(model.architecture.family, f"checkpoint={model.folder}"), model.architecture, f"hf={target}")
    has_tokenizer = model.iteration is None or recipe.tokenizer.model or tokenizer_folder(model.folder)
    tokenizer = model_tokenizer(recipe, model, promises) if has_tokenizer else None
    as_it_is = tokenizer is not None and tokenizer.type == SENTENCEPIECE and "unconverted_tokenizer" in recipe.allow
    if tokenizer is not None and not as_it_is:
        try_tokenizer(tokenizer, model, target)
    lacks = f"{model.folder} has no tokenizer, so {target} gets none: tokenizer.model names one"
    makes = (Item("hf", str(target), "Hugging Face folder"),)
    notes = (*(() if has_tokenizer else (lacks,)), *serving_warnings(model.architecture))
    model = replace(model, tokenizer=tokenizer)
    return ExportJob(
        recipe, (model,), makes, notes, model=model, target=target, max_shard_bytes=max_shard_bytes, as_it_is=as_it_is
    )


def try_tokenizer(tokenizer: Tokenizer, model: Model, target: Path) -> None:
    """Raise InputError, before weights are written, where transformers would not read the exported tokenizer so."""
    classes = {} if model.iteration is None else tokenizer_class(model.folder)
    try:
        with tempfile.TemporaryDirectory() as place:
            Path(place, "config.json").write_text(json.dumps({"model_type": model.architecture.family, **classes}))
            save_for_transformers(tokenizer, place)
            check_saved(tokenizer, place)
    except OSError as error:
        place = f"{tempfile.gettempdir()}/…/{Path(str(error.filename)).name}"
        rule = f"cannot be written: [Errno {error.errno}] {error.strerror}: {place}, where the tokenizer is tried first"
        raise StorageError("hf", target, rule, "make room there") from error
    except InputError as error:
        if tokenizer.type != SENTENCEPIECE:
            raise
        remedy = f"{error.remedy} (allow=[unconverted_tokenizer] exports the model as it is)".lstrip()
        raise InputError(error.key, error.value, error.rule, remedy) from error


def parse_size(text: str, key: str) -> int:
    """Bytes, from 500MB, 1.5GB, 2GiB or a plain number of them, as transformers writes sizes. `key` is for messages.

    A small b, which there means bits, is refused, as is everything else. Raises InputError.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGT])(i?)B)?", str(text).strip())
    if not found or ("." in found[1] and not found[2]):
        remedy = "write a number of bytes, or one with a unit, as 500MB, 5GB or 2GiB"
        raise InputError(key, text, "is not a size", remedy)
    unit = (1024 if found[3] else 1000) ** ("KMGT".index(found[2]) + 1) if found[2] else 1
    size = int(Decimal(found[1]) * unit)
    if size < 1:
        raise InputError(key, text, "must be at least one byte", "write a size as 500MB, 5GB or 2GiB")
    return size
