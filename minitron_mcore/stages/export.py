"""Verb `export`: a Megatron checkpoint, of any pruned shape and layout, as a Hugging Face folder."""

from __future__ import annotations

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
    )
    runtime.print(f"export: {target} is written")
    return target
