"""Verb `export`: a Megatron checkpoint, of any pruned shape and layout, as a Hugging Face folder."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

from minitron_mcore.checkpoint.export import export_checkpoint
from minitron_mcore.checkpoint.folder import find_checkpoint
from minitron_mcore.data.tokenizer_json import save_for_transformers
from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import checkpoint_tokenizer


def run(recipe: Recipe, runtime: Runtime) -> Path:
    """Write `checkpoint` to the new folder `hf`; every rank calls, at any layout. Returns the folder."""
    folder, iteration = find_checkpoint(recipe.checkpoint, "checkpoint")
    if not recipe.hf:
        raise InputError("hf is not given: name the Hugging Face folder to write")
    target = Path(recipe.hf)
    max_shard_bytes = parse_size(recipe.max_shard_size, "max_shard_size")
    tokenizer = checkpoint_tokenizer(recipe, folder)
    runtime.print(f"export: {folder}, iteration {iteration} -> {target}")
    export_checkpoint(
        folder,
        iteration,
        target,
        runtime,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        save_tokenizer=lambda path: save_for_transformers(tokenizer, str(path)),
        max_shard_bytes=max_shard_bytes,
    )
    runtime.print(f"export: {target} is written")
    return target


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
