"""Verb `export`: a Megatron checkpoint, of any pruned shape and layout, as a Hugging Face folder."""

from __future__ import annotations

import json
import re
import tempfile
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.companions import tokenizer_class
from minitron_mcore.checkpoint.export import export_checkpoint
from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture, tokenizer_folder
from minitron_mcore.data.agreement import check_saved
from minitron_mcore.data.tokenizer import SENTENCEPIECE, Tokenizer
from minitron_mcore.data.tokenizer_json import save_for_transformers
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.recipe import Recipe
from minitron_mcore.report.model_card import model_card
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import checkpoint_tokenizer


def run(recipe: Recipe, runtime: Runtime) -> Path:
    """Write `checkpoint` to the new folder `hf`; every rank calls, at any layout. Returns the folder."""
    folder, iteration = find_checkpoint(recipe.checkpoint, "checkpoint")
    if not recipe.hf:
        raise InputError("hf is not given: name the Hugging Face folder to write")
    target = Path(recipe.hf)
    max_shard_bytes = parse_size(recipe.max_shard_size, "max_shard_size")
    has_tokenizer = recipe.tokenizer.model or tokenizer_folder(folder) is not None
    tokenizer = checkpoint_tokenizer(recipe, folder) if has_tokenizer else None
    runtime.print(f"export: {folder}, iteration {iteration} -> {target}")
    beside: dict[str, Any] = {}
    if tokenizer is None:
        runtime.print(f"export: warning: {folder} has no tokenizer, so {target} gets none; name one as tokenizer.model")
    else:
        as_it_is = tokenizer.type == SENTENCEPIECE and "unconverted_tokenizer" in recipe.allow
        if not as_it_is:
            runtime.on_main(partial(try_tokenizer, tokenizer, folder, target))
        beside = {"bos": tokenizer.bos, "eos": tokenizer.eos}
        save = tokenizer.save if as_it_is else partial(save_for_transformers, tokenizer)
        beside["save_tokenizer"] = lambda path: save(str(path))
    export_checkpoint(
        folder,
        iteration,
        target,
        runtime,
        card=partial(model_card, target.name, read_architecture(folder), folder, iteration, tokenizer is not None),
        max_shard_bytes=max_shard_bytes,
        **beside,
    )
    runtime.print(f"export: {target} is written")
    return target


def try_tokenizer(tokenizer: Tokenizer, checkpoint: Path, target: Path) -> None:
    """Raise InputError, before weights are written, where transformers would not read the exported tokenizer so."""
    with writing(f"hf={target}"), tempfile.TemporaryDirectory() as place:
        config = {"model_type": read_architecture(checkpoint).family, **tokenizer_class(checkpoint)}
        Path(place, "config.json").write_text(json.dumps(config))
        try:
            save_for_transformers(tokenizer, place)
            check_saved(tokenizer, place)
        except InputError as error:
            if tokenizer.type != SENTENCEPIECE:
                raise
            raise InputError(f"{error} (allow=[unconverted_tokenizer] exports the model as it is)") from error


def parse_size(text: str, key: str) -> int:
    """Bytes, from 500MB, 1.5GB, 2GiB or a plain number of them, as transformers writes sizes. `key` is for messages.

    A small b, which there means bits, is refused, as is everything else. Raises InputError.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGT])(i?)B)?", str(text).strip())
    if not found or ("." in found[1] and not found[2]):
        raise InputError(f"{key}={text} is no size: write a number of bytes, or one with a unit, as 500MB, 5GB or 2GiB")
    unit = (1024 if found[3] else 1000) ** ("KMGT".index(found[2]) + 1) if found[2] else 1
    size = int(Decimal(found[1]) * unit)
    if size < 1:
        raise InputError(f"{key}={text} must be at least one byte: write a size as 500MB, 5GB or 2GiB")
    return size
