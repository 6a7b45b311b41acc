"""`import`: a Hugging Face folder as a sharded Megatron checkpoint, at any layout. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minitron_mcore.checkpoint.companions import refuse_adapter, refuse_torn
from minitron_mcore.checkpoint.hf_config import find_hugging_face, read_config
from minitron_mcore.data.tokenizer import cut_otherwise, load_tokenizer
from minitron_mcore.data.tokenizer_files import has_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inputs import check_model, fit_tokenizer, output_folder, require
from minitron_mcore.jobs.job import NOTHING, Item, Job, Model, Promises
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import check_layout
from minitron_mcore.runtime.world import World


@dataclass(frozen=True, kw_only=True)
class ImportJob(Job):
    """The folder `source` as the checkpoint `made`."""

    source: Path
    made: Model


def resolve(recipe: Recipe, world: World, promises: Promises = NOTHING, *, replaces: bool = False) -> ImportJob:
    """`hf` -> the new folder `checkpoint`; one that is there is replaced where `replaces`. Raises InputError."""
    require(recipe, {"hf": "the Hugging Face folder to read", "checkpoint": "the folder to write to"})
    check_layout(recipe.parallel, world.size)
    source = find_hugging_face(str(recipe.hf))
    target = output_folder(recipe.checkpoint, "checkpoint")
    if target.exists() and not replaces:
        raise InputError("checkpoint", target, "exists", "name a folder that does not, or move that one away")
    refuse_adapter(source)
    refuse_torn(source)
    architecture = read_config(source, recipe.model.make_vocab_size_divisible_by)
    check_model(architecture, recipe, world, reads_text=False)
    # Reading tensors' types takes torch; a folder whose config is refused need not wait for it.
    from minitron_mcore.checkpoint.conversion import units
    from minitron_mcore.checkpoint.safetensors_folder import SafetensorsFolder

    SafetensorsFolder(source).check(units(architecture), architecture, allow_extra="extra_tensors" in recipe.allow)
    notes = []
    tokenizer = load_tokenizer(str(source)) if has_tokenizer(source) else None
    if tokenizer is None:
        notes.append(f"{source} holds no tokenizer; stages that read text need tokenizer.model")
    else:
        fit_tokenizer(tokenizer, architecture, recipe)
        if others := cut_otherwise(tokenizer):
            notes.append(
                "tokenizer.model is read by transformers, because of the files beside it, and it cuts "
                f"{others} of 10 texts differently from sentencepiece; a tokenizer_config.json would say which is right"
            )
    reads = (Item("hf", str(source), f"Hugging Face folder, {architecture.num_parameters:,} parameters"),)
    made = Model("checkpoint", target, architecture, 0, tokenizer=tokenizer)
    return ImportJob(recipe, reads, (made,), tuple(notes), source=source, made=made)
