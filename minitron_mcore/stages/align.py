"""`align`: train on the answers of chats, or on pairs of answers, round after round (alignment/)."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import torch

from minitron_mcore.checkpoint.folder import latest_iteration
from minitron_mcore.data.chat.prepare import prepare
from minitron_mcore.data.chat.prepared import load_prepared
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.jobs.align import AlignJob, Round, prepared_of
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.interrupt import exit_code
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.align_round import run_round
from minitron_mcore.training.job import Progress


def run(job: AlignJob, runtime: Runtime) -> Progress:
    """Every round in turn, each to its budget; the same command goes on where it was cut off. Every rank calls."""
    progress = Progress()
    for number, (this, known) in enumerate(job.rounds, start=1):
        assert known.tokenizer is not None
        folder = runtime.on_main(partial(prepare_samples, this, known.tokenizer, runtime))
        prepared = all_or_none(partial(load_prepared, folder))
        training = all_or_none(partial(job.training, this, prepared))
        if len(job.rounds) > 1:
            done = latest_iteration(this.folder) == training.timetable.iterations
            runtime.print(f"align: [{number}/{len(job.rounds)}] {this.name}{': done before' if done else ''}")
            if done:
                continue
        progress = run_round(this, training, prepared, runtime)
        if runtime.stop_signal and number < len(job.rounds):
            raise SystemExit(exit_code(runtime.stop_signal))
        gc.collect()
        torch.cuda.empty_cache()
    return progress


def prepare_samples(this: Round, tokenizer: Tokenizer, runtime: Runtime) -> Path:
    """The folder of the round's samples; one process calls."""
    what = prepared_of(this, tokenizer)
    return prepare(what, this.chats, report=runtime.print, progress=runtime.progress).folder
