"""Verb `import`: a Hugging Face folder as a sharded Megatron checkpoint, at any layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from minitron_mcore.checkpoint.folder import write_description
from minitron_mcore.checkpoint.import_hf import import_checkpoint, read_config
from minitron_mcore.data.tokenizer import VOCABULARY_FILES, load_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.recipe import Recipe, to_yaml
from minitron_mcore.runtime.parallel import use_layout
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import check_tokenizer, output_folder


def run(recipe: Recipe, runtime: Runtime) -> Path:
    """Write `hf` to the new folder `checkpoint`, iteration 0, and return it; it is whole, or not there."""
    use_layout(recipe.parallel, runtime.world_size)
    if not recipe.hf:
        raise InputError("hf is not given: name the Hugging Face folder to read")
    source = Path(recipe.hf)
    if not source.is_dir():
        raise InputError(f"hf={source} is not there: name a Hugging Face folder")
    target = output_folder(recipe.checkpoint, "checkpoint")
    if target.exists():
        raise InputError(f"checkpoint={target} exists: name a folder that does not, or move that one away")
    architecture = read_config(source, recipe.model.make_vocab_size_divisible_by)
    has_tokenizer = any((source / name).is_file() for name in VOCABULARY_FILES)
    tokenizer = load_tokenizer(str(source)) if has_tokenizer else None
    if tokenizer is not None:
        check_tokenizer(tokenizer, architecture)
    runtime.barrier()  # every rank has looked before the first one writes

    runtime.print(f"import: {source}, {architecture.num_parameters:,} parameters -> {target}")
    unfinished = target.with_name(f".{target.name}.unfinished")
    runtime.on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))
    import_checkpoint(source, unfinished, architecture, recipe.parallel, runtime)

    def finish() -> None:
        fingerprint = tokenizer.fingerprint if tokenizer else None
        lineage = {"stage": "import", "hf": str(source), "tokens": 0, "tokenizer": fingerprint}
        save = tokenizer.save if tokenizer else None
        write_description(unfinished, architecture, lineage=lineage, recipe=to_yaml(recipe), save_tokenizer=save)
        os.rename(unfinished, target)

    runtime.on_main(finish)
    if tokenizer is None:
        runtime.print(f"import: {source} holds no tokenizer; stages that read text need tokenizer.model")
    return target
