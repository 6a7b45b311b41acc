"""Verb `import`: a Hugging Face folder as a sharded Megatron checkpoint, at any layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from minitron_mcore.checkpoint.companions import keep_companions
from minitron_mcore.checkpoint.folder import write_description
from minitron_mcore.checkpoint.import_hf import import_checkpoint
from minitron_mcore.checkpoint.verify import TOLERANCE, compare_with_transformers
from minitron_mcore.files import writing
from minitron_mcore.jobs.import_ import ImportJob
from minitron_mcore.recipe import to_yaml
from minitron_mcore.runtime.parallel import use_layout
from minitron_mcore.runtime.start import Runtime


def run(job: ImportJob, runtime: Runtime) -> Path:
    """Write `job.target`, iteration 0, and return it; it is whole, or not there.

    With `verify`, the checkpoint's logits are compared with those of transformers' model first.
    """
    recipe, source, target, architecture, tokenizer = (
        job.recipe,
        job.source,
        job.target,
        job.architecture,
        job.tokenizer,
    )
    use_layout(recipe.parallel, runtime.world_size)
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
    return target
