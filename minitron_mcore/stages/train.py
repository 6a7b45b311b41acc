"""`train`: next-token training, from random weights (`model.*`) or onward from a checkpoint (`train.load`)."""

from __future__ import annotations

import dataclasses

from minitron_mcore.checkpoint.companions import carry_companions, stop_at
from minitron_mcore.checkpoint.folder import write_description
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.estimate.forecast import Forecast, explaining_memory, forecast_words
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.model.gpt import LanguageModel, build_model
from minitron_mcore.model.initialize import initialize
from minitron_mcore.recipe import to_yaml
from minitron_mcore.runtime.folder_lock import one_writer
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime, measured_world
from minitron_mcore.runtime.user_buffers import user_buffers
from minitron_mcore.stages.chats import chat_data
from minitron_mcore.training.job import Job, Progress, TrainingData, build_training_data
from minitron_mcore.training.loop import fit
from minitron_mcore.training.teaching import TrainedTeacher


def run(job: TrainingJob, runtime: Runtime) -> Progress:
    """Train to the token budget of `job.section`; the same command goes on where it was cut off."""
    data, memory = prepare(job, runtime)
    with explaining_memory(memory, "while loading"):
        chunks = load_or_initialize(job)
    runtime.print(f"{job.section}: {job.architecture.num_parameters:,} parameters, {job.timetable} -> {job.folder}")
    settings = LossSettings(job.architecture.vocab_size, chunk_tokens=job.config.loss_chunk_tokens)
    return fit_model(job, runtime, chunks, Objective(settings), data, memory)


def prepare(job: TrainingJob, runtime: Runtime) -> tuple[TrainingData, Forecast]:
    """The samples of `job`, text or prepared chats, and what the ranks will need of memory, printed beside what they
    have, once they are laid out; every rank calls."""
    recipe = job.recipe
    assert job.tokenizer is not None
    lay_out(recipe.parallel, recipe.seed, runtime.world_size)
    runtime.on_main(lambda: job.sources)  # for the lineage, as they are now
    if job.chats:
        data = chat_data(job)
    else:
        data = build_training_data(recipe.data, job.tokenizer, job.wanted, job.config, seed=recipe.seed)
    expected = job.forecast_on(world := measured_world(runtime))
    runtime.print("\n".join(forecast_words(expected, world.memory)))
    return data, expected


def load_or_initialize(job: TrainingJob) -> list[LanguageModel]:
    """The model to train, with its first weights; where a run goes on the loop loads them. Every rank calls."""
    recipe, architecture = job.recipe, job.architecture
    chunks = build_model(architecture, recipe.parallel, recipe.precision, **job.passes)
    if job.resumes:
        return chunks
    if job.source is None or job.draws_weights:
        initialize(chunks, architecture, recipe.seed)
    else:
        load_weights(*job.source.place, as_chunks(chunks), architecture)
    return chunks


def fit_model(
    job: TrainingJob,
    runtime: Runtime,
    chunks: list[LanguageModel],
    objective: Objective,
    data: TrainingData,
    memory: Forecast,
    until: int | None = None,
) -> Progress:
    """Train `chunks` into `job.folder`; every rank calls. until: the iteration to stop after; None: the last."""
    teaching = objective.teacher if isinstance(objective.teacher, TrainedTeacher) else None
    folders = {f"{job.section}.checkpoint": job.folder} | ({"correct.checkpoint": teaching.folder} if teaching else {})
    with one_writer(folders), explaining_memory(memory, "while training"), user_buffers(job.exchange):
        return fit(
            Job(
                chunks=chunks,
                architecture=job.architecture,
                objective=objective,
                train=job.config,
                log=job.recipe.log,
                runtime=runtime,
                timetable=job.timetable,
                data=data,
                precision=job.recipe.precision,
                folder=job.folder,
                describe=lambda progress: describe(job, progress.consumed_tokens),
                recipe=dataclasses.asdict(job.recipe),
                name=job.recipe.name,
                stage=job.section,
                documents=job.documents,
                teaching=teaching,
                identity=job.identity,
                until=until,
            )
        )


def describe(job: TrainingJob, tokens: int) -> None:
    """Write what lies beside the weights in `job.folder`, trained on `tokens` tokens; one rank calls."""
    samples = job.chats and job.chats.samples

    def save(folder: str) -> None:
        assert job.tokenizer is not None
        job.tokenizer.save(folder)
        if samples and samples.preparation.template:
            samples.preparation.template.save(folder)

    assert job.tokenizer is not None
    facts = {**job.lineage, "tokens": tokens, "tokenizer": job.tokenizer.fingerprint, "sources": job.sources}
    facts |= {"samples": samples.prepared.digest} if samples and samples.prepared else {}
    write_description(job.folder, job.architecture, lineage=facts, recipe=to_yaml(job.recipe), save_tokenizer=save)
    if job.source is not None and not job.draws_weights:
        carry_companions(job.source.folder, job.folder)
    stop_at(job.folder, samples.ends_with if samples else None, bos=job.tokenizer.bos, eos=job.tokenizer.eod)
