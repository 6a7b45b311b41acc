"""One round of `align`: the reference's log-probabilities, then the training."""

from __future__ import annotations

import gc
from functools import partial

import numpy
import torch

from minitron_mcore.alignment.config import REFERENCED, REWARDED
from minitron_mcore.alignment.losses import PreferenceSettings
from minitron_mcore.alignment.objective import AnswerObjective, Pairs, PreferenceObjective
from minitron_mcore.alignment.reference import read_reference, work_out_reference
from minitron_mcore.checkpoint.folder import identify_weights
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.data.chat.prepared import Prepared
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.estimate.forecast import explaining_memory
from minitron_mcore.jobs.job import absolute
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.model.gpt import build_model
from minitron_mcore.runtime.folder_lock import one_writer
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.distill import load_teacher
from minitron_mcore.stages.train import fit_model, load_or_initialize, prepare
from minitron_mcore.training.job import Progress


def run_round(job: TrainingJob, runtime: Runtime) -> Progress:
    """One round to its budget; every rank calls."""
    config = job.recipe.align
    data, memory = prepare(job, runtime)
    with explaining_memory(memory, "while loading"):
        pairs = {name: pairs_of(job, name, runtime) for name in samples_of(job).parts}
        reference = load_teacher(job, job.teaching) if job.teaching.model else None
        chunks = load_or_initialize(job)
    parameters = f"{job.architecture.num_parameters:,} parameters"
    runtime.print(f"align: {config.method} of {parameters}, {job.timetable} -> {job.folder}")
    settings = loss_settings(job)
    objective: Objective = AnswerObjective(settings)
    if config.method != "sft":
        how = PreferenceSettings.of(config)
        objective = PreferenceObjective(
            settings, reference, preference=how, pairs=pairs["train"], valid=pairs.get("valid")
        )
    return fit_model(job, runtime, chunks, objective, data, memory)


def pairs_of(job: TrainingJob, name: str, runtime: Runtime) -> Pairs:
    """What is known of the pairs of `train` or `valid`, on the device; the reference's log-probabilities are worked out
    if they are not there. Every rank calls."""
    method, device = job.recipe.align.method, torch.cuda.current_device()
    reference = rewards = None
    if method in REFERENCED and job.teaching.model is None:
        reference = torch.from_numpy(reference_of(job, name, runtime)).to(device)
    if method in REWARDED:
        rewards = torch.from_numpy(numpy.array(samples_of(job).parts[name].rewards)).to(device)
    return Pairs(reference, rewards)


def reference_of(job: TrainingJob, name: str, runtime: Runtime) -> numpy.ndarray:
    """float64 [segments] of `train` or `valid`, by the model that the round starts from, which is then gone from
    memory; every rank calls."""
    recipe, source, prepared = job.recipe, job.source, samples_of(job)
    assert source is not None
    folder, part = job.folder / "reference" / name, prepared.parts[name]
    weights = identify_weights(*source.place)
    if weights["weights"] is None:  # a checkpoint from elsewhere, without a manifest, is known by its place alone
        weights["folder"] = str(absolute(source.folder))
    facts = {**weights, "samples": prepared.digest, "part": name, "precision": recipe.precision}
    found: numpy.ndarray | None = runtime.on_main(partial(read_reference, folder, facts, part.segments))
    if found is not None:
        return found
    with one_writer({"align.checkpoint": job.folder}):
        model = build_model(source.architecture, recipe.parallel, recipe.precision, trainable=False)
        load_weights(*source.place, as_chunks(model), source.architecture)
        size = recipe.align.micro_batch_size
        found = work_out_reference(model, part, folder, facts, runtime, loss_settings(job), micro_batch_size=size)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return found


def samples_of(job: TrainingJob) -> Prepared:
    assert job.chats and job.chats.samples.prepared
    return job.chats.samples.prepared


def loss_settings(job: TrainingJob) -> LossSettings:
    return LossSettings(job.architecture.vocab_size, chunk_tokens=job.config.loss_chunk_tokens)
