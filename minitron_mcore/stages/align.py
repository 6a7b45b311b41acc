"""`align`: train on the answers of chats, or on pairs of answers, round after round (alignment/)."""

from __future__ import annotations

import gc
from functools import partial

import torch

from minitron_mcore.checkpoint.folder import latest_iteration
from minitron_mcore.jobs.align import AlignJob
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.interrupt import exit_code
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.align_round import run_round
from minitron_mcore.stages.chats import prepare_samples
from minitron_mcore.training.job import Progress


def run(job: AlignJob, runtime: Runtime) -> Progress:
    """Every round in turn, each to its budget; the same command goes on where it was cut off. Every rank calls.

    The samples of all rounds are prepared before anything is trained: what is wrong with one of them is told at once.
    """
    progress, count = Progress(), len(job.rounds)
    ready = [prepare_samples(known.chats.samples, runtime) for _, known in job.rounds if known.chats]
    for number, ((this, _), samples) in enumerate(zip(job.rounds, ready, strict=True), start=1):
        assert samples.prepared is not None
        training = all_or_none(partial(job.training, this, samples.prepared))
        if count > 1:
            done = latest_iteration(this.folder) == training.timetable.iterations
            runtime.print(f"align: [{number}/{count}] {this.name}{': done before' if done else ''}")
            if done:
                continue
        progress = run_round(this, training, runtime)
        if runtime.stop_signal and number < count:
            raise SystemExit(exit_code(runtime.stop_signal))
        gc.collect()
        torch.cuda.empty_cache()
    return progress
