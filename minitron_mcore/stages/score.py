"""Verb `score`: importance of every axis of the teacher, from one forward pass over the calibration samples, or without
one (importance.method)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy

from minitron_mcore.checkpoint.store import load_model
from minitron_mcore.data.dataset import batches_once, build_datasets, draw_samples
from minitron_mcore.data.described import calibration_part
from minitron_mcore.importance.magnitude import magnitude_scores
from minitron_mcore.importance.score import score_model
from minitron_mcore.importance.scores import Scores, random_scores, save_scores
from minitron_mcore.jobs.score import ScoreJob
from minitron_mcore.model.microbatch import Microbatch, to_device
from minitron_mcore.runtime.groups import data_group, data_place
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.score_depth import with_depth
from minitron_mcore.tables import table

SPREAD = (numpy.min, numpy.median, numpy.max)


def run(job: ScoreJob, runtime: Runtime) -> Path:
    """Write `job.target` and return it; a file made in the same way stays as it is. Every rank calls."""
    recipe, (folder, iteration), architecture = job.recipe, job.model.place, job.model.architecture
    lay_out(recipe.parallel, recipe.seed, runtime.world_size)
    # The first rank's answer counts: one that looked later would see what the first has written meanwhile.
    if runtime.broadcast(job.is_there):
        runtime.print(f"score: {job.target} exists, made in the same way")
        return job.target

    importance = recipe.importance
    subject = f"score: {architecture.num_parameters:,} parameters of {folder}"
    if importance.method == "activation":
        batches = read_calibration(job)
        chunks = load_model(job.model.place, architecture, recipe.parallel, recipe.precision)
        samples, length = importance.num_samples, recipe.data.sequence_length
        runtime.print(f"{subject}, {samples:,} samples of {length:,} tokens -> {job.target}")
        a_round = importance.micro_batch_size * data_group().size()
        with runtime.progress(samples, "samples", "score") as bar:
            scores = score_model(
                chunks,
                batches(),
                architecture,
                importance,
                settings=job.settings,
                report=lambda rounds: bar.reach(rounds * a_round),
            )
        scores = with_depth(job, runtime, chunks, batches, scores)
    else:
        runtime.print(f"{subject}, {importance.method} -> {job.target}")
        if importance.method == "random":
            scores = random_scores(architecture, recipe.seed, job.settings)
        else:
            scores = magnitude_scores(folder, iteration, architecture, job.settings)
    if runtime.is_main:
        save_scores(scores, job.target)
    runtime.print(describe(scores))
    runtime.barrier()
    return job.target


def read_calibration(job: ScoreJob) -> Callable[[], Iterator[Microbatch]]:
    """A function that reads the calibration samples once through: this rank's microbatches, on the device."""
    recipe, importance = job.recipe, job.recipe.importance
    part = calibration_part(recipe.data, importance.num_samples)
    (dataset,) = build_datasets(recipe.data, job.model.tokenizer, [part], seed=recipe.seed)
    assert dataset is not None
    samples = draw_samples(dataset, importance.num_samples, recipe.seed)

    def batches() -> Iterator[Microbatch]:
        how = {"micro_batch_size": importance.micro_batch_size, "num_workers": recipe.data.num_workers}
        return map(to_device, batches_once(dataset, samples, **how, **data_place()))

    return batches


def describe(scores: Scores, shown: int = 8) -> str:
    """Size and spread of every axis, and the least important layers."""
    rows = [
        (axis, " x ".join(f"{part:,}" for part in values.shape), *(f"{of(values):.4g}" for of in SPREAD))
        for axis, values in scores.arrays()
        if "/" not in axis
    ]
    lines = [table(rows, ("axis", "scores", "least", "median", "most"))]
    if scores.variants:
        lines.append(f"further variants: {', '.join(scores.variants)}")
    order = numpy.argsort(scores.layers, kind="stable")[:shown]
    least = ", ".join(f"{index} ({scores.layers[index]:.3g})" for index in order)
    method = scores.settings.get("importance", {}).get("method", "activation")
    what = "block influence" if method == "activation" else method
    return "\n".join([*lines, f"layers of least {what} (the first layer is 0): {least}"])
