"""`align`: train on the answers of chats, or on pairs of answers, round after round (alignment/)."""

from __future__ import annotations

import gc
from functools import partial

import torch

from minitron_mcore.checkpoint.folder import resumed_iteration
from minitron_mcore.jobs.align import AlignJob
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.interrupt import made_progress, stopped_code
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.align_round import run_round
from minitron_mcore.stages.chats import prepare_samples
from minitron_mcore.training.job import Progress


def run(job: AlignJob, runtime: Runtime) -> Progress:
    """Every round in turn, each to its budget; the same command goes on where it was cut off. Every rank calls.

    The samples of all rounds are prepared before anything is trained: what is wrong with one of them is told at once.
    """
    progress, count = Progress(), len(job.rounds)
    prepared = [prepare_samples(known.chats.samples, runtime).prepared for known in job.trainings if known.chats]
    for number, samples in enumerate(prepared):
        assert samples is not None
        training = all_or_none(partial(job.training, number, samples))
        if count > 1:
            done = resumed_iteration(training.folder) == training.timetable.iterations
            title = f"[{number + 1}/{count}] {job.rounds[number].name}"
            runtime.print(f"align: {title}{': done before' if done else ''}")
            if done:
                continue
        progress = run_round(training, runtime)
        made_progress()
        if runtime.stop_signal and number + 1 < count:
            raise SystemExit(stopped_code(runtime.stop_signal))
        gc.collect()
        torch.cuda.empty_cache()
    return progress
