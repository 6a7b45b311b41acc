"""The elementwise passes over a chunk's logits on one vocabulary shard: statistics, then the gradient in place.

Legend: C tokens of a chunk, V this shard's columns; x the student's logits (over the temperature, after the first
pass), y the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from minitron_mcore.distillation.logits.divergences import cross_statistics, gradient_, softmax_statistics
from minitron_mcore.distillation.logits.outcomes import outcome_gradient_
from minitron_mcore.distillation.logits.settings import Divergence

# Logits that one thread processes at a time on the CPU: half a megabyte of fp32, so that those of two models and a
# temporary stay in a core's cache.
CACHED_ENTRIES = 1 << 17
# Losses whose gradient follows from the exponentials of the statistics.
KEEPING = ("forward_kl", "reverse_kl", "next_token")


# Compiled variants of one function: by its settings, by shapes, with gradients on or off. Beyond its limit, 8 by
# default, torch.compile silently runs uncompiled: slower, and with several more buffers of logits.
VARIANTS = 64


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    return torch.compile(function)


def by_rows(function: Callable[..., Any], x_CV: Tensor, *others: Tensor | None, **settings: Any) -> dict[str, Tensor]:
    """`function(x, *others, **settings)` over the rows of all, in one kernel on CUDA, by cached blocks on the CPU."""
    if x_CV.is_cuda and has_triton():
        function = _compiled(function)
    cached = CACHED_ENTRIES * torch.get_num_threads() // x_CV.shape[1]
    rows = x_CV.shape[0] if x_CV.is_cuda else max(1, cached)
    results = []
    for start in range(0, x_CV.shape[0], rows):
        block = [None if tensor is None else tensor[start : start + rows] for tensor in (x_CV, *others)]
        results.append(function(*block, **settings))
    if len(results) == 1:
        return results[0]
    return {name: torch.cat([found[name] for found in results]) for name in results[0]}


def logit_statistics(
    x_CV: Tensor, y_CV: Tensor | None, *, divergence: Divergence, cross: bool, report: bool, keep: bool
) -> dict[str, Tensor]:
    """First pass: statistics by name, [C] each. Both logits are divided by the temperature in place.

    cross: also what a divergence over the whole vocabulary needs; report: also what the teacher's next-token loss and
    the agreement need; keep: leave in x and y what `kept_gradient_` starts from.
    """
    temperature, name = divergence.temperature, divergence.name
    if temperature != 1.0:
        x_CV.mul_(1.0 / temperature)
        if y_CV is not None:
            y_CV.mul_(1.0 / temperature)
    if y_CV is None:
        return softmax_statistics(x_CV, temperature, report, in_place=keep)[0]
    exponentials = name in ("forward_kl", "reverse_kl") and cross
    difference_CV = y_CV - x_CV if exponentials else None
    found, e_x_CV = softmax_statistics(x_CV, temperature, report, in_place=keep)
    if report or divergence.probabilistic:
        plain = temperature if report else 1.0
        of_teacher, e_y_CV = softmax_statistics(y_CV, plain, report, in_place=keep and name == "forward_kl")
        found |= {f"teacher_{name}": value for name, value in of_teacher.items()}
        if difference_CV is not None and name == "forward_kl":
            return found | {"cross": difference_CV.mul_(e_y_CV).sum(-1)}
    if difference_CV is not None:
        torch.neg(difference_CV, out=difference_CV)
        if keep:
            y_CV.copy_(difference_CV)
        return found | {"cross": difference_CV.mul_(e_x_CV).sum(-1)}
    return found | (cross_statistics(x_CV, y_CV, divergence) if cross else {})


def kept_gradient_(
    x_CV: Tensor,
    y_CV: Tensor | None,
    factor_C: Tensor,
    teacher_factor_C: Tensor | None,
    cross_C: Tensor | None,
    *,
    lm_share: float,
) -> dict[str, Tensor]:
    """Second pass after one that kept exponentials; the factors turn them into probabilities over the vocabulary.

    With forward_kl x and y hold the exponentials; with reverse_kl (`cross` less `lm_share`) y holds x - y; for the
    next-token loss alone there is no y.
    """
    x_CV.mul_(factor_C.unsqueeze(1))
    if y_CV is None:
        return {}
    if cross_C is not None:
        x_CV.mul_(y_CV.sub_(cross_C.unsqueeze(1)))
        return {}
    assert teacher_factor_C is not None
    y_CV.mul_(teacher_factor_C.unsqueeze(1))
    if lm_share:
        x_CV.mul_(1.0 + lm_share)
    x_CV.sub_(y_CV)
    return {}


def _next_token_softmax(x_CV: Tensor, plain_logsumexp_C: Tensor, temperature: float) -> Tensor:
    exponent_CV = x_CV * temperature if temperature != 1.0 else x_CV
    return (exponent_CV - plain_logsumexp_C.unsqueeze(1)).exp_()


def logit_gradient_(
    x_CV: Tensor, y_CV: Tensor | None, *values: Tensor, names: tuple[str, ...], divergence: Divergence, lm_share: float
) -> dict[str, Tensor]:
    """Second pass: x becomes the gradient, in units of `LossSettings.scale`, without the label's part.

    values: quantities over the vocabulary, [C] each, by `names`; then, for few outcomes, the last arguments of
    `outcome_gradient_`. Without them and without y: the next-token loss alone.
    """
    found = dict(zip(names, values, strict=False))
    outcomes = values[len(names) :]
    next_token_CV = None
    if lm_share:
        next_token_CV = _next_token_softmax(x_CV, found["plain_logsumexp"], divergence.temperature)
    if outcomes:
        outcome_gradient_(x_CV, found["tail_maximum"], found["tail_log_sum"], found["outcome_tail"], *outcomes)
    elif y_CV is not None:
        gradient_(x_CV, y_CV, {name: value.unsqueeze(1) for name, value in found.items()}, divergence)
    elif next_token_CV is not None:
        x_CV.copy_(next_token_CV)
        return {}
    if next_token_CV is not None:
        x_CV.add_(next_token_CV, alpha=lm_share)
    return {}
