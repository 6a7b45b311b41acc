"""Verb `evaluate`: held-out LM loss and perplexity of a checkpoint, at any layout -> `results.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.store import as_chunks, load_model
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.evaluation.held_out import held_out, held_out_batches, mean_loss
from minitron_mcore.files import write_whole
from minitron_mcore.jobs.job import ModelJob
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime


def run(job: ModelJob, runtime: Runtime) -> dict[str, Any]:
    """Evaluate `job.model` over `evaluate.samples` held-out sequences and write the file; every rank calls.

    Returns `lm loss` (nats a token) and `ppl`; what was evaluated: `checkpoint`, `iteration`, `samples`,
    `sequence_length`, `precision`. The same on every rank, and at every layout.
    """
    recipe, model, (folder, iteration) = job.recipe, job.model, job.model.place
    config, data = recipe.evaluate, recipe.data
    lay_out(recipe.parallel, recipe.seed, runtime.world_size)
    dataset = held_out(data, model.tokenizer, config.samples, seed=recipe.seed)
    samples = min(config.samples, len(dataset))
    if samples < config.samples:
        fewer = f"{samples} sequences, fewer than evaluate.samples={config.samples}"
        runtime.print(f"evaluate: the held-out text has {fewer}")
    chunks = as_chunks(load_model(model.place, model.architecture, recipe.parallel, recipe.precision))
    size, replicas = config.micro_batch_size, data_group().size()
    batches = held_out_batches(dataset, samples, micro_batch_size=size, parallel=recipe.parallel)
    with runtime.progress(samples, "sequences", "evaluate") as bar:
        counted = bar.over(batches, lambda batch: len(batch) * size * replicas)
        losses = mean_loss(chunks, counted, Objective(LossSettings(model.architecture.vocab_size)))
    results = {
        **losses,
        "checkpoint": str(folder),
        "iteration": iteration,
        "parameters": model.architecture.num_parameters,
        "tokens": model.lineage.get("tokens", 0),
        "samples": samples,
        "sequence_length": data.sequence_length,
        "precision": recipe.precision,
    }
    runtime.on_main(lambda: write_results(job.target, results))
    runtime.print(
        f"evaluate: {folder}, iteration {iteration}: lm loss {results['lm loss']:.6f}, ppl {results['ppl']:.3f} over "
        f"{samples} sequences of {data.sequence_length} tokens -> {job.target}"
    )
    return results


def write_results(target: Path, results: dict[str, Any]) -> None:
    """The file is whole, or as it was before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(results, indent=2) + "\n")
