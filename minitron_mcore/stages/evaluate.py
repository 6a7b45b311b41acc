"""Verb `evaluate`: held-out LM loss and perplexity of a checkpoint, at any layout -> `results.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.folder import find_checkpoint, read_architecture, read_lineage
from minitron_mcore.checkpoint.store import as_chunks, load_weights
from minitron_mcore.data.blend import parse_blend
from minitron_mcore.data.corpus import check_file
from minitron_mcore.data.dataset import Batch, Dataset, batches_once, build_datasets
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.objective import Objective
from minitron_mcore.evaluation.lm_loss import mean_loss
from minitron_mcore.files import write_whole
from minitron_mcore.jobs.tokenizers import checkpoint_tokenizer
from minitron_mcore.model.gpt import build_model
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import in_calls
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import data_group
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.common import check_model, lay_out
from minitron_mcore.training.reader import to_device


def run(recipe: Recipe, runtime: Runtime) -> dict[str, Any]:
    """Evaluate `checkpoint` and write the file `results`, by default results.json beside the checkpoint."""
    folder, _ = find_checkpoint(recipe.checkpoint, "checkpoint")
    target = Path(recipe.results) if recipe.results else folder / "results.json"
    check_file(str(target), "results")
    results = evaluate_checkpoint(recipe, runtime, folder)
    runtime.on_main(lambda: write_results(target, results))
    runtime.print(
        f"evaluate: {folder}, iteration {results['iteration']}: lm loss {results['lm loss']:.6f}, ppl "
        f"{results['ppl']:.3f} over {results['samples']} sequences of {results['sequence_length']} tokens -> {target}"
    )
    return results


def evaluate_checkpoint(recipe: Recipe, runtime: Runtime, folder: str | Path) -> dict[str, Any]:
    """Numbers of the newest iteration in `folder` over `evaluate.samples` held-out sequences; every rank calls.

    `lm loss` (nats a token) and `ppl`; what was evaluated: `checkpoint`, `iteration`, `samples`, `sequence_length`,
    `precision`. The same on every rank, and at every layout. Raises InputError.
    """
    lay_out(recipe, runtime)
    path, iteration = find_checkpoint(folder, "checkpoint")
    architecture = read_architecture(path)
    check_model(architecture, recipe)
    dataset = held_out(recipe, checkpoint_tokenizer(recipe, path))
    samples = min(recipe.evaluate.samples, len(dataset))
    if samples < recipe.evaluate.samples:
        runtime.print(
            f"evaluate: the held-out text has {samples} sequences, fewer than evaluate.samples="
            f"{recipe.evaluate.samples}"
        )

    chunks = as_chunks(build_model(architecture, recipe.parallel, recipe.precision, trainable=False))
    load_weights(path, iteration, chunks, architecture)
    microbatches = batches_once(
        dataset,
        range(samples),
        micro_batch_size=recipe.evaluate.micro_batch_size,
        data_parallel_rank=data_group().rank(),
        data_parallel_size=data_group().size(),
    )
    losses = mean_loss(chunks, grouped(microbatches, recipe.parallel), Objective(LossSettings(architecture.vocab_size)))
    facts = {
        "checkpoint": str(path),
        "iteration": iteration,
        "parameters": architecture.num_parameters,
        "tokens": read_lineage(path).get("tokens", 0),
        "samples": samples,
        "sequence_length": recipe.data.sequence_length,
        "precision": recipe.precision,
    }
    return {**losses, **facts}


def held_out(recipe: Recipe, tokenizer: Tokenizer) -> Dataset:
    """The validation set: one pass, so that no sequence counts twice; a weighted blend in its proportions."""
    data, key = recipe.data, "data.train"
    if data.valid is not None:  # then the training text need not be named
        data, key = dataclasses.replace(data, train=data.valid), "data.valid"
    wanted = recipe.evaluate.samples if parse_blend(data.train, key).weights else None
    _, valid, _ = build_datasets(data, tokenizer, train_samples=0, valid_samples=wanted, seed=recipe.seed)
    assert valid is not None
    return valid


def grouped(microbatches: Iterator[Batch], parallel: ParallelConfig) -> Iterator[list[Microbatch]]:
    """A few pipelines' fill of microbatches at a time, on the device.

    The interleaved schedule needs a multiple of the stages: uncounted copies fill the last group.
    """
    return in_calls(map(to_device, microbatches), interleaved=parallel.virtual_pipeline is not None, each=4)


def write_results(target: Path, results: dict[str, Any]) -> None:
    """The file is whole, or as it was before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(results, indent=2) + "\n")
