"""Verb `preprocess`: text and JSON lines to Megatron's .bin/.idx."""

from __future__ import annotations

from typing import Any

from minitron_mcore.data.corpus import prefixes_of
from minitron_mcore.data.preprocess import preprocess
from minitron_mcore.errors import shown
from minitron_mcore.jobs.preprocess import PreprocessJob
from minitron_mcore.runtime.start import Runtime


def run(job: PreprocessJob, runtime: Runtime) -> list[str]:
    """Write the token files, whose prefixes are returned on every rank, held-out ones last.

    The first rank and its worker processes work; the other ranks wait.
    """
    tokenizer = job.tokenizer
    assert tokenizer is not None, "a job whose tokenizer was promised is resolved again before it acts"
    how: Any = {"seed": job.recipe.seed, "report": runtime.print, "progress": runtime.progress}
    prefixes = runtime.on_main(lambda: preprocess(job.config, job.texts, tokenizer, **how))
    named = zip(("data.train", "data.valid"), prefixes_of(job.config), strict=True)
    words = [f"{key}={made[0] if len(made) == 1 else shown(made)}" for key, made in named if made]
    runtime.print(f"preprocess: {' '.join(words)}")
    return prefixes
