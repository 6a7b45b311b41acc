"""Verb `import`: a Hugging Face folder as a sharded Megatron checkpoint, at any layout."""

from __future__ import annotations

from functools import partial
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
from minitron_mcore.runtime.whole_folder import whole_folder


def run(job: ImportJob, runtime: Runtime) -> Path:
    """Write `job.made`, iteration 0, and return its folder; it is whole, or not there.

    With `verify`, the checkpoint's logits are compared with those of transformers' model first.
    """
    recipe, source, made = job.recipe, job.source, job.made
    target, architecture, tokenizer = made.folder, made.architecture, made.tokenizer
    use_layout(recipe.parallel, runtime.world_size)
    runtime.print(f"import: {source}, {architecture.num_parameters:,} parameters -> {target}")
    called = f"checkpoint={target}"

    def describe(unfinished: Path) -> list[str]:
        made_by, save = (tokenizer.fingerprint, tokenizer.save) if tokenizer else (None, None)
        lineage = {"stage": "import", "hf": str(source), "tokens": 0, "tokenizer": made_by}
        with writing(called):
            write_description(unfinished, architecture, lineage=lineage, recipe=to_yaml(recipe), save_tokenizer=save)
            return keep_companions(source, unfinished)

    with whole_folder(target, called) as unfinished:
        checked = import_checkpoint(
            source, unfinished, architecture, recipe.parallel, runtime, called=called, allow=recipe.allow
        )
        runtime.print(f"import: {checked}")
        if checked.allowed:
            runtime.print(
                f"import: WARNING: {len(checked.allowed)} tensors are all zero or not finite, let through by "
                f"allow={recipe.allow}: {', '.join(checked.allowed[:4])}{' …' if len(checked.allowed) > 4 else ''}"
            )
        notes = runtime.on_main(partial(describe, unfinished))
        if recipe.verify:
            error = compare_with_transformers(source, unfinished, architecture, recipe.parallel, runtime)
            runtime.print(
                f"import: logits differ from transformers' by at most {error:.1e} of the largest one "
                f"(up to {TOLERANCE:.0e} is rounding)"
            )
    for note in notes:
        runtime.print(f"import: {note}")
    return target
