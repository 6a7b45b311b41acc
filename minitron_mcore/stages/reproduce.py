"""Verb `reproduce`: the arms of a claim, each distilled and measured on the same held-out documents, and a verdict."""

from __future__ import annotations

import gc
import json
from functools import partial

import torch

from minitron_mcore.checkpoint.store import load_model
from minitron_mcore.data.documents import draw_documents
from minitron_mcore.evaluation.documents import document_losses
from minitron_mcore.files import write_whole, writing
from minitron_mcore.jobs.inputs import find_model
from minitron_mcore.jobs.job import NOTHING
from minitron_mcore.jobs.reproduce import PLOT, RESULT, SUMMARY, Arm, ReproduceJob, resolve
from minitron_mcore.jobs.run import RunJob
from minitron_mcore.reproduction.figure import write_plot
from minitron_mcore.reproduction.measured import Measured, read_measured, write_measured
from minitron_mcore.reproduction.result import Result, in_words, page, read_results, result_of
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.run import do
from minitron_mcore.stages.run_folder import begin


def run(job: ReproduceJob, runtime: Runtime) -> Result:
    """Make what is shared, then each arm with each seed; the same command goes on where it was cut off.

    Returns the differences and the verdict; every rank calls, and gets the same.
    """
    for shared in job.shared:
        walk(shared, "", runtime)
    job = all_or_none(partial(resolve, job.recipe, job.world))  # the text and the teachers are there now
    found: dict[str, list[Measured]] = {}
    for number, arm in enumerate(job.arms, start=1):
        place = f"{number}/{len(job.arms)} {arm.name}, seed {arm.seed}: "
        walk(arm.run, place, runtime)
        measured = measure(arm, job, runtime)
        runtime.print(f"[{place}held-out loss {measured.loss:.4f}]")
        found.setdefault(arm.name, []).append(measured)
    result = result_of(job.recipe.name, job.recipe.reproduce, found)
    runtime.warn(runtime.on_main(partial(write, job, result)))
    runtime.print(f"\n{in_words(result)}\n\nreproduce: -> {job.target / RESULT}, {PLOT}, {job.folder / SUMMARY}")
    return result


def walk(job: RunJob, place: str, runtime: Runtime) -> None:
    """Carry out what is left of the steps. Every rank calls."""
    runtime.on_main(partial(begin, job))
    for number, (step, _) in enumerate(job.steps, start=1):
        if runtime.on_main(partial(step.outcome, job.folder)) is None:
            do(step, f"[{place}{number}/{len(job.steps)}]", job, runtime)


def measure(arm: Arm, job: ReproduceJob, runtime: Runtime) -> Measured:
    """What the arm's model loses on each document, worked out unless it is there. Every rank calls."""
    recipe, config = arm.run.recipe, job.recipe.reproduce
    drawn = {"documents": config.documents, "document_tokens": config.document_tokens, "seed": job.recipe.seed}
    there = runtime.on_main(partial(read_measured, arm.target, drawn))
    if there is not None:
        return there
    lay_out(recipe.parallel, recipe.seed, runtime.world_size)
    model = all_or_none(lambda: find_model(arm.checkpoint, "output", NOTHING))
    chunks = load_model(model.place, model.architecture, recipe.parallel, recipe.precision)
    drawn_documents = draw_documents(arm.part, config.documents, job.recipe.seed)
    documents = [ids for each in drawn_documents if len(ids := each[: config.document_tokens].tolist()) > 1]
    length, size = recipe.data.sequence_length, recipe.evaluate.micro_batch_size
    vocabulary = model.architecture.vocab_size
    nats = document_losses(chunks, documents, vocabulary, sequence_length=length, micro_batch_size=size)
    measured = Measured(drawn, [len(ids) - 1 for ids in documents], nats.tolist())
    runtime.on_main(writing(f"output={job.folder}")(partial(write_measured, arm.target, measured)))
    del chunks
    gc.collect()
    torch.cuda.empty_cache()
    return measured


def write(job: ReproduceJob, result: Result) -> str:
    """The result of this claim, and the page of all in the folder, but for those whose result cannot be read, which is
    returned in words. One process calls."""
    with writing(f"output={job.folder}"):
        write_whole(job.target / RESULT, json.dumps(result, indent=2) + "\n")
        write_plot(result, job.target / PLOT)
        results, damaged = read_results(sorted(job.folder.glob(f"*/{RESULT}")))
        write_whole(job.folder / SUMMARY, page(results))
    if not damaged:
        return ""
    return f"{job.folder / SUMMARY} lacks {', '.join(damaged)}, which cannot be read: try the claim once more"
