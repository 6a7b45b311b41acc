"""Verb `evaluate`: held-out LM loss of checkpoints, and tasks of the LM Evaluation Harness -> `results.json`."""

from __future__ import annotations

import gc
from typing import Any

import torch

from minitron_mcore.checkpoint.store import as_chunks, load_model
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.evaluation.harness.answers import weights_of
from minitron_mcore.evaluation.harness.papers import published
from minitron_mcore.evaluation.held_out import held_out, held_out_batches, mean_loss
from minitron_mcore.evaluation.hugging_face import load_hugging_face, mean_loss_of
from minitron_mcore.evaluation.results_file import write_results
from minitron_mcore.jobs.compared import titled
from minitron_mcore.jobs.evaluate import Evaluated, EvaluateJob
from minitron_mcore.report.evaluation_table import evaluation_table
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.evaluate_tasks import TaskRun


def run(job: EvaluateJob, runtime: Runtime) -> dict[str, Any]:
    """Evaluate `job.models`, one after another, and write the file; every rank calls.

    Returns of one model `lm loss` (nats a token) and `ppl` where there is held-out text, `tasks` where they were asked
    for, and what was evaluated: `checkpoint`, `iteration`, `weights` (which ones), `samples`, `sequence_length`,
    `precision`. Of several, these by name as `models`, and `differences` to the first. The same on every rank, and at
    every layout.
    """
    lay_out(job.recipe.parallel, job.recipe.seed, runtime.world_size)
    tasks = TaskRun(job, runtime) if job.tasks else None
    models = {each.name: _evaluate(each, job, runtime, tasks) for each in job.models}
    results = next(iter(models.values()))
    differences = tasks.differences() if tasks else {}
    if len(models) > 1:
        for name, found in list(models.items())[1:]:
            losses = {key: found[key] - results[key] for key in ("lm loss", "ppl") if key in found and key in results}
            differences[name] = {**losses, **differences.get(name, {})}
        results = {"models": models, "differences": differences}
    told = runtime.on_main(lambda: write_results(job.target, results))
    if tasks or len(models) > 1:
        runtime.print(f"\n{evaluation_table(models, differences)}\n")
    runtime.print(f"evaluate: -> {job.target}{f'; {told}' if told else ''}")
    return results


def _evaluate(each: Evaluated, job: EvaluateJob, runtime: Runtime, tasks: TaskRun | None) -> dict[str, Any]:
    """One model's part of the results; it is gone from memory afterwards. Every rank calls."""
    recipe, model = job.recipe, each.compared.model
    folder, iteration = model.place if model else (each.compared.folder, None)
    chunks = whole = None
    if model is not None:
        chunks = as_chunks(load_model(model.place, model.architecture, recipe.parallel, recipe.precision))
    elif runtime.is_main:
        whole = load_hugging_face(folder, recipe.precision, runtime.device)
    results = _losses(each, job, runtime, chunks, whole) if job.part else {}
    results |= {
        "checkpoint": str(folder),
        "iteration": iteration,
        "parameters": each.architecture.num_parameters if each.architecture else None,
        "tokens": model.lineage.get("tokens", 0) if model else None,
        "precision": recipe.precision,
        "weights": runtime.on_main(lambda: weights_of(folder, iteration)),
        **({"published": known} if (known := published(each.architecture)) else {}),
    }
    if tasks:
        results["tasks"] = (
            tasks.in_place(each, chunks) if chunks is not None else tasks.through_transformers(each, whole)
        )
    del chunks, whole
    gc.collect()
    torch.cuda.empty_cache()
    return results


def _losses(each: Evaluated, job: EvaluateJob, runtime: Runtime, chunks: Any, whole: Any) -> dict[str, Any]:
    """The loss on held-out text, and on how much of it. Every rank calls."""
    recipe, data = job.recipe, job.recipe.data
    config = recipe.evaluate
    dataset = held_out(data, each.tokenizer, config.samples, seed=recipe.seed)
    samples = min(config.samples, len(dataset))
    if samples < config.samples:
        fewer = f"{samples} sequences, fewer than evaluate.samples={config.samples}"
        runtime.print(f"evaluate: the held-out text has {fewer}")
    if chunks is not None:
        assert each.architecture is not None
        size, replicas = config.micro_batch_size, data_group().size()
        batches = held_out_batches(dataset, samples, micro_batch_size=size, parallel=recipe.parallel)
        with runtime.progress(samples, "sequences", titled("evaluate", each.name, job.models)) as bar:
            counted = bar.over(batches, lambda batch: len(batch) * size * replicas)
            losses = mean_loss(chunks, counted, Objective(LossSettings(each.architecture.vocab_size)))
    else:
        losses = runtime.on_main(lambda: mean_loss_of(whole, dataset, samples, config.micro_batch_size))
    version = f", iteration {each.compared.model.iteration}" if each.compared.model else ""
    runtime.print(
        f"evaluate: {each.compared.folder}{version}: lm loss {losses['lm loss']:.6f}, ppl {losses['ppl']:.3f} over "
        f"{samples} sequences of {data.sequence_length} tokens"
    )
    return {**losses, "samples": samples, "sequence_length": data.sequence_length}
