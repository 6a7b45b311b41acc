"""Chats and preferences made tokens, and read as the rows of a training."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from minitron_mcore.data.chat.prepare import prepare
from minitron_mcore.data.chat.prepared import load_prepared
from minitron_mcore.jobs.chats import Samples
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.training.budget import Shape
from minitron_mcore.training.job import TrainingData, data_order, once_reader, step_reader


def prepare_samples(samples: Samples, runtime: Runtime) -> Samples:
    """These, prepared: by the first rank, unless they are there; every rank calls. Raises InputError for a record that
    breaks a rule."""

    def work() -> Path:
        what, folder = samples.preparation, samples.folder
        return prepare(what, folder, report=runtime.print, progress=runtime.progress).folder

    folder = runtime.on_main(work)
    return dataclasses.replace(samples, prepared=all_or_none(partial(load_prepared, folder)))


def chat_data(job: TrainingJob) -> TrainingData:
    """The prepared rows that train, and those that validate: as many as `eval_iters` global batches, or all of them,
    once, where there are fewer. Any rank calls."""
    assert job.chats is not None
    samples, config = job.chats.samples, job.config
    (length,) = job.timetable.samples_needed()
    training = {length: samples.dataset("train", job.timetable.samples)}
    read_valid = {}
    assert samples.prepared is not None
    if "valid" in samples.prepared.parts and config.eval_iters:
        shape = Shape(0, length, config.global_batch_size, config.micro_batch_size)
        layouts = (job.recipe.parallel, job.teaching.layout)
        whole = any(layout.virtual_pipeline is not None for layout in layouts if layout)
        read_valid[""] = once_reader(samples.dataset("valid"), shape, whole=whole)
    read_train = step_reader(training, num_workers=job.recipe.data.num_workers)
    return TrainingData(training, read_train, read_valid, data_order(training), samples.sides or 1)
