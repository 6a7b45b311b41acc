"""Held-out loss of a model at any layout, from its final hidden states; full logits never exist."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.schedule import evaluating

if TYPE_CHECKING:
    from minitron_mcore.distillation.objective import Objective


def mean_loss(
    chunks: list[torch.nn.Module], batches: Iterable[list[Microbatch]], objective: Objective
) -> dict[str, float]:
    """Mean of each of the objective's losses over all counted tokens of `batches`, and the perplexity (`ppl`).

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
    result = {name: value / (count or 1.0) for name, value in totals.items()}
    result["ppl"] = math.exp(min(result["lm loss"], 20.0))
    return result
