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
from minitron_mcore.data.chat.prepared import Part, Prepared
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.estimate.forecast import explaining_memory
from minitron_mcore.jobs.align import Round
from minitron_mcore.jobs.job import absolute
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.model.gpt import build_model
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.distill import load_teacher
from minitron_mcore.stages.train import fit_model, load_or_initialize, prepare
from minitron_mcore.training.job import Progress


def run_round(this: Round, job: TrainingJob, runtime: Runtime) -> Progress:
    """One round to its budget; every rank calls."""
    config = this.config
    assert job.chats and job.chats.samples.prepared
    prepared = job.chats.samples.prepared
    data, memory = prepare(job, runtime)
    settings = LossSettings(job.architecture.vocab_size, chunk_tokens=config.loss_chunk_tokens)
    with explaining_memory(memory, "while loading"):
        given = this, job, prepared, settings, runtime
        known = {name: pairs_of(part, name, *given) for name, part in prepared.parts.items()}
        teacher = load_teacher(job, job.teaching) if job.teaching.model else None
        chunks = load_or_initialize(job)
    parameters = f"{job.architecture.num_parameters:,} parameters"
    runtime.print(f"align: {config.method} of {parameters}, {job.timetable} -> {job.folder}")
    objective: Objective = AnswerObjective(settings)
    if config.method != "sft":
        preference = PreferenceSettings.of(config)
        objective = PreferenceObjective(
            settings, teacher, preference=preference, pairs=known["train"], valid=known.get("valid")
        )
    return fit_model(job, runtime, chunks, objective, data, memory)


def pairs_of(
    part: Part, name: str, this: Round, job: TrainingJob, prepared: Prepared, settings: LossSettings, runtime: Runtime
) -> Pairs:
    """What is known of a part's pairs, on the device; the reference's log-probabilities are worked out if they are not
    there. Every rank calls."""
    method, device = this.config.method, torch.cuda.current_device()
    reference = rewards = None
    if method in REFERENCED and job.teaching.model is None:
        values = reference_of(part, name, this, job, prepared, settings, runtime)
        reference = torch.from_numpy(values).to(device)
    if method in REWARDED:
        rewards = torch.from_numpy(numpy.array(part.rewards)).to(device)
    return Pairs(reference, rewards)


def reference_of(
    part: Part, name: str, this: Round, job: TrainingJob, prepared: Prepared, settings: LossSettings, runtime: Runtime
) -> numpy.ndarray:
    """float64 [segments] of a part, by the model that the round starts from, which is then gone from memory; every rank
    calls."""
    recipe, source = job.recipe, job.source
    assert source is not None
    folder = this.reference / name
    weights = identify_weights(*source.place)
    if weights["weights"] is None:  # a checkpoint from elsewhere, without a manifest, is known by its place alone
        weights["folder"] = str(absolute(source.folder))
    facts = {**weights, "samples": prepared.digest, "part": name, "precision": recipe.precision}
    found: numpy.ndarray | None = runtime.on_main(partial(read_reference, folder, facts, part.segments))
    if found is not None:
        return found
    model = build_model(source.architecture, recipe.parallel, recipe.precision, trainable=False)
    load_weights(*source.place, as_chunks(model), source.architecture)
    size = this.config.micro_batch_size
    found = work_out_reference(model, part, folder, facts, runtime, settings, micro_batch_size=size)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return found
