"""Verb `import`: a Hugging Face folder as a sharded Megatron checkpoint, at any layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from minitron_mcore.checkpoint.companions import keep_companions, refuse_adapter
from minitron_mcore.checkpoint.folder import write_description
from minitron_mcore.checkpoint.import_hf import import_checkpoint, read_config
from minitron_mcore.checkpoint.verify import TOLERANCE, compare_with_transformers
from minitron_mcore.data.tokenizer import cut_otherwise, load_tokenizer
from minitron_mcore.data.tokenizer_files import has_tokenizer
from minitron_mcore.errors import InputError
from minitron_mcore.files import writing
from minitron_mcore.recipe import Recipe, to_yaml
from minitron_mcore.runtime.parallel import use_layout
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import output_folder
from minitron_mcore.stages.tokenizers import fit_tokenizer


def run(recipe: Recipe, runtime: Runtime) -> Path:
    """Write `hf` to the new folder `checkpoint`, iteration 0, and return it; it is whole, or not there.

    With `verify`, the checkpoint's logits are compared with those of transformers' model first.
    """
    use_layout(recipe.parallel, runtime.world_size)
    if not recipe.hf:
        raise InputError("hf is not given: name the Hugging Face folder to read")
    source = Path(recipe.hf)
    if not source.is_dir():
        raise InputError(f"hf={source} is not there: name a Hugging Face folder")
    target = output_folder(recipe.checkpoint, "checkpoint")
    if target.exists():
        raise InputError(f"checkpoint={target} exists: name a folder that does not, or move that one away")
    refuse_adapter(source)
    architecture = read_config(source, recipe.model.make_vocab_size_divisible_by)
    tokenizer = load_tokenizer(str(source)) if has_tokenizer(source) else None
    if tokenizer is not None:
        fit_tokenizer(tokenizer, architecture, recipe)
        if others := cut_otherwise(tokenizer):
            runtime.print(
                "import: tokenizer.model is read by transformers, for what lies beside it, which cuts "
                f"{others} of 10 texts otherwise than sentencepiece; a tokenizer_config.json would say how"
            )
    runtime.barrier()  # every rank has looked before the first one writes

    runtime.print(f"import: {source}, {architecture.num_parameters:,} parameters -> {target}")
    unfinished = target.with_name(f".{target.name}.unfinished")
    runtime.on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))
    called = f"checkpoint={target}"
    checked = import_checkpoint(
        source, unfinished, architecture, recipe.parallel, runtime, called=called, allow=recipe.allow
    )
    runtime.print(f"import: {checked}")
    if checked.allowed:
        runtime.print(
            f"import: warning: {len(checked.allowed)} tensors are all zero or not finite, let through by "
            f"allow={recipe.allow}: {', '.join(checked.allowed[:4])}{' …' if len(checked.allowed) > 4 else ''}"
        )

    notes: list[str] = []

    def describe() -> None:
        fingerprint = tokenizer.fingerprint if tokenizer else None
        lineage = {"stage": "import", "hf": str(source), "tokens": 0, "tokenizer": fingerprint}
        save = tokenizer.save if tokenizer else None
        with writing(called):
            write_description(unfinished, architecture, lineage=lineage, recipe=to_yaml(recipe), save_tokenizer=save)
            notes.extend(keep_companions(source, unfinished))

    def put_in_place() -> None:
        with writing(called):
            os.rename(unfinished, target)

    try:
        runtime.on_main(describe)
        if recipe.verify:
            error = compare_with_transformers(source, unfinished, architecture, recipe.parallel, runtime)
            runtime.print(
                f"import: logits differ from transformers' by at most {error:.1e} of the largest one "
                f"(up to {TOLERANCE:.0e} is rounding)"
            )
        runtime.on_main(put_in_place)
    except BaseException:
        if runtime.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for note in notes:
        runtime.print(f"import: {note}")
    if tokenizer is None:
        runtime.print(f"import: {source} holds no tokenizer; stages that read text need tokenizer.model")
    return target
