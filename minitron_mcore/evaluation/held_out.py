"""Held-out text: which sequences, their microbatches, each counted once, and a model's loss on them at any layout, from
its final hidden states; full logits never exist."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from minitron_mcore.data.config import DataConfig
from minitron_mcore.data.dataset import Dataset, batches_once, build_datasets
from minitron_mcore.data.described import held_out_part
from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.model.microbatch import Microbatch, to_device
from minitron_mcore.model.schedule import evaluating, in_calls
from minitron_mcore.runtime.config import ParallelConfig
from minitron_mcore.runtime.groups import data_place

if TYPE_CHECKING:
    from minitron_mcore.distillation.objective import Objective


def held_out(data: DataConfig, tokenizer: Tokenizer | None, samples: int, *, seed: int) -> Dataset:
    """The validation set: one pass, so that no sequence counts twice; a weighted blend in its proportions, of `samples`
    sequences. Every rank calls. Raises InputError."""
    (valid,) = build_datasets(data, tokenizer, [held_out_part(data, samples)], seed=seed)
    assert valid is not None
    return valid


def held_out_batches(
    dataset: Dataset, samples: int, *, micro_batch_size: int, parallel: ParallelConfig
) -> Iterator[list[Microbatch]]:
    """The first `samples` sequences, or all where there are fewer, of this data-parallel rank, a few pipelines' fill of
    microbatches at a time, on the device. The interleaved schedule needs a multiple of the stages: uncounted copies
    fill the last group."""
    first = range(min(samples, len(dataset)))
    microbatches = batches_once(dataset, first, micro_batch_size=micro_batch_size, **data_place())
    return in_calls(map(to_device, microbatches), interleaved=parallel.virtual_pipeline is not None, each=4)


def mean_loss(
    chunks: list[torch.nn.Module], batches: Iterable[list[Microbatch]], objective: Objective
) -> dict[str, float]:
    """Mean of each of the objective's losses over all that counts of `batches`, and of a next-token loss the perplexity
    (`ppl`).

    Nothing is trained: modules in evaluation mode, no gradients. Every rank calls; the same result on every rank.
    """
    totals: dict[str, float] = {}
    count, objective = 0.0, objective.held_out()
    with evaluating(chunks):
        for batch in batches:
            means = objective.run(chunks, batch, forward_only=True)
            tokens = means.pop("num_tokens")
            count += tokens
            for name, value in means.items():
                totals[name] = totals.get(name, 0.0) + value * tokens
    result = objective.reported({name: value / (count or 1.0) for name, value in totals.items()})
    return result | ({"ppl": perplexity(result["lm loss"])} if "lm loss" in result else {})


def perplexity(loss: float) -> float:
    """Of a loss in nats a token; above 20 that of 20."""
    return math.exp(min(loss, 20.0))
