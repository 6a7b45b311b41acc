"""`distill`: train the pruned student from its teacher, for a token budget (arXiv 2407.14679, section 3)."""

from __future__ import annotations

import dataclasses
from functools import partial

from minitron_mcore.distillation.cache.teacher import CachedTeacher
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.distillation.states.loss import StateLosses
from minitron_mcore.distillation.teacher.ahead import Teacher
from minitron_mcore.estimate.forecast import Forecast, explaining_memory
from minitron_mcore.jobs.train import Teaching, TrainingJob
from minitron_mcore.model.fp8 import passes_of
from minitron_mcore.model.gpt import LanguageModel
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.chats import prepare_samples
from minitron_mcore.stages.train import describe, fit_model, load_or_initialize, prepare
from minitron_mcore.training.job import Progress, TrainingData
from minitron_mcore.training.teaching import TrainedTeacher


def run(job: TrainingJob, runtime: Runtime) -> Progress:
    """Distil to `distill.tokens`; the same command goes on where it was cut off. Every rank calls."""
    if job.chats:
        chats = dataclasses.replace(job.chats, samples=prepare_samples(job.chats.samples, runtime))
        job = dataclasses.replace(job, chats=chats)
    data, memory = prepare(job, runtime)
    with explaining_memory(memory, "while loading"):
        teacher = find_teacher(job, runtime, data)
        chunks = load_or_initialize(job)
    return distil(job, runtime, chunks, teacher, data, memory)


def find_teacher(job: TrainingJob, runtime: Runtime, data: TrainingData) -> Teacher | CachedTeacher:
    """Whoever teaches, loaded; every rank calls. Raises InputError for a cache of other samples than `data` has."""
    teaching = job.teaching
    if teaching.cache is None:
        return load_teacher(job, teaching)
    cached = CachedTeacher(teaching.cache, job.recipe.distill.temperature)
    (dataset,) = data.datasets.values()
    runtime.on_main(partial(cached.check_dataset, dataset, job.timetable.samples))
    return cached


def distil(
    job: TrainingJob,
    runtime: Runtime,
    chunks: list[LanguageModel],
    teacher: Teacher | CachedTeacher,
    data: TrainingData,
    memory: Forecast,
    until: int | None = None,
) -> Progress:
    """Train the student `chunks` by its losses to `teacher`, whom another student may follow; every rank calls.

    until: the iteration to stop after; None: the last.
    """
    recipe, distill, student = job.recipe, job.recipe.distill, job.architecture
    states = None
    if distill.hidden_states.sites and isinstance(teacher, Teacher):
        wide = teacher.architecture
        states = StateLosses(chunks, distill.hidden_states, student, wide, recipe.parallel, seed=recipe.seed)
        teacher.want_states(states.pairs, student.num_layers)
    trained = f"student {student.num_parameters:,} parameters, {job.timetable}"
    runtime.print(f"distill: {job.teaching} -> {trained} -> {job.folder}")
    settings = LossSettings.of(distill, student.vocab_size)
    objective = Objective(settings, teacher, states, window=distill.teacher_window)
    return fit_model(job, runtime, chunks, objective, data, memory, until)


def load_teacher(job: TrainingJob, teaching: Teaching) -> Teacher:
    """The teacher in memory, in its own layout, placement and precision, trained or not; every rank calls."""
    recipe, source = job.recipe, teaching.model
    assert source is not None and teaching.layout is not None
    teacher = Teacher.load(
        *source.place,
        source.architecture,
        recipe.parallel,
        recipe.teacher.precision or recipe.precision,
        layout=teaching.layout,
        placement=recipe.teacher.placement,
        **(passes_of(recipe.correct) if teaching.corrected else {}),
    )
    if teaching.corrected is None:
        return teacher
    lineage = {"stage": "correct", "load": str(source.folder), "lineage": dict(source.lineage)}
    folder, shape = teaching.corrected.folder, source.architecture
    corrected = dataclasses.replace(job, folder=folder, architecture=shape, source=source, lineage=lineage)
    return TrainedTeacher(teacher, recipe.correct, job.timetable, folder, partial(describe, corrected))
