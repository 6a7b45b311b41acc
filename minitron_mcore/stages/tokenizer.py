"""Verb `tokenizer`: train a SentencePiece model on text files."""

from __future__ import annotations

from typing import Any

from minitron_mcore.data.tokenizer_training import train_tokenizer
from minitron_mcore.jobs.tokenizer import TokenizerJob
from minitron_mcore.runtime.start import Runtime


def run(job: TokenizerJob, runtime: Runtime) -> str:
    """Write `job.config.model`, whose path is returned on every rank. The first rank works; the others wait."""
    how: Any = {"seed": job.recipe.seed, "report": runtime.print, "progress": runtime.progress}
    runtime.on_main(lambda: train_tokenizer(job.config, job.texts, **how) and None)
    model = str(job.config.model)
    runtime.print(f"tokenizer: tokenizer.model={model}")
    return model
