"""Verb `export`: a Megatron checkpoint, of any pruned shape and layout, as a Hugging Face folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.export import export_checkpoint
from minitron_mcore.data.tokenizer_json import save_for_transformers
from minitron_mcore.jobs.export import ExportJob
from minitron_mcore.report.model_card import model_card
from minitron_mcore.runtime.start import Runtime


def run(job: ExportJob, runtime: Runtime) -> Path:
    """Write the new folder `job.target`; every rank calls, at any layout. Returns the folder."""
    (folder, iteration), target, tokenizer = job.model.place, job.target, job.model.tokenizer
    runtime.print(f"export: {folder}, iteration {iteration} -> {target}")
    beside: dict[str, Any] = {}
    if tokenizer is not None:
        save = tokenizer.save if job.as_it_is else partial(save_for_transformers, tokenizer)
        beside = {"bos": tokenizer.bos, "eos": tokenizer.eos, "save_tokenizer": lambda path: save(str(path))}
    export_checkpoint(
        folder,
        iteration,
        target,
        runtime,
        card=partial(model_card, target.name, job.model.architecture, folder, iteration, tokenizer is not None),
        max_shard_bytes=job.max_shard_bytes,
        **beside,
    )
    runtime.print(f"export: {target} is written")
    return target
