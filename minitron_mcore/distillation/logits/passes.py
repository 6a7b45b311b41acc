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

from minitron_mcore.distillation.config import CACHED_ENTRIES, PROBABILISTIC
from minitron_mcore.distillation.logits.divergences import cross_statistics, gradient_, softmax_statistics
from minitron_mcore.distillation.logits.outcomes import outcome_gradient_
from minitron_mcore.distillation.logits.settings import LossSettings

# Compiled variants of one function: by its settings, by shapes, with gradients on or off. Beyond its limit, 8 by
# default, torch.compile silently runs uncompiled: slower, and with several more buffers of logits.
VARIANTS = 64
Rows = Tensor | dict[str, Tensor] | None  # what is cut into blocks of rows together with the logits


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    return torch.compile(function)


def by_rows(function: Callable[..., Any], x_CV: Tensor, *others: Rows, **settings: Any) -> dict[str, Tensor]:
    """`function(x, *others, **settings)` over the rows of all, in one kernel on CUDA, by cached blocks on the CPU."""

    def part(whole: Rows, block: slice) -> Rows:
        if isinstance(whole, dict):
            return {name: value[block] for name, value in whole.items()}
        return None if whole is None else whole[block]

    if x_CV.is_cuda and has_triton():
        function = _compiled(function)
    rows = x_CV.shape[0] if x_CV.is_cuda else max(1, CACHED_ENTRIES * torch.get_num_threads() // x_CV.shape[1])
    blocks = (slice(start, start + rows) for start in range(0, x_CV.shape[0], rows))
    found = [function(x_CV[block], *(part(each, block) for each in others), **settings) for block in blocks]
    return found[0] if len(found) == 1 else {name: torch.cat([each[name] for each in found]) for name in found[0]}


def logit_statistics(
    x_CV: Tensor, y_CV: Tensor | None, *, settings: LossSettings, cross: bool, report: bool, keep: bool
) -> dict[str, Tensor]:
    """First pass: statistics by name, [C] each. Both logits are divided by the temperature in place.
    cross: also what a divergence over the whole vocabulary needs; report: also what the teacher's next-token loss and
    the agreement need; keep: leave in x and y what `kept_gradient_` starts from."""
    temperature, divergence = settings.divisor, settings.divergence
    if temperature != 1.0:
        for logits_CV in (x_CV,) if y_CV is None else (x_CV, y_CV):
            logits_CV.mul_(1.0 / temperature)
    if y_CV is None:
        return softmax_statistics(x_CV, temperature, report, in_place=keep)[0]
    forward, reverse = (cross and divergence == name for name in ("forward_kl", "reverse_kl"))
    difference_CV = y_CV - x_CV if forward else x_CV - y_CV if reverse else None
    found, e_x_CV = softmax_statistics(x_CV, temperature, report, in_place=keep)
    if report or divergence in PROBABILISTIC:
        of_teacher, e_y_CV = softmax_statistics(y_CV, temperature if report else 1.0, report, in_place=keep and forward)
        found |= {f"teacher_{name}": value for name, value in of_teacher.items()}
    if difference_CV is None:
        return found | (cross_statistics(x_CV, y_CV, settings) if cross else {})
    if keep and reverse:
        y_CV.copy_(difference_CV)
    return found | {"cross": difference_CV.mul_(e_y_CV if forward else e_x_CV).sum(-1)}


def kept_gradient_(
    x_CV: Tensor, y_CV: Tensor | None, found: dict[str, Tensor], settings: LossSettings
) -> dict[str, Tensor]:
    """Second pass after one that kept exponentials over this shard's maxima, in x and, with forward_kl, in y; with
    reverse_kl y holds x - y. found: quantities over the vocabulary, and those maxima."""
    x_CV.mul_(_to_probabilities(found, ""))
    if y_CV is not None and settings.divergence == "reverse_kl":
        x_CV.mul_(y_CV.sub_((found["cross"] - settings.lm_share).float().unsqueeze(1)))
    elif y_CV is not None:
        if settings.lm_share:
            x_CV.mul_(1.0 + settings.lm_share)
        x_CV.sub_(y_CV.mul_(_to_probabilities(found, "teacher_")))
    return {}


def _to_probabilities(found: dict[str, Tensor], of: str) -> Tensor:
    return (found[f"shard_{of}maximum"] - found[f"{of}logsumexp"]).exp_().float().unsqueeze(1)


def logit_gradient_(
    x_CV: Tensor, y_CV: Tensor | None, found: dict[str, Tensor], settings: LossSettings
) -> dict[str, Tensor]:
    """Second pass: x becomes the gradient, in units of `LossSettings.scale`, without the label's part.

    found: quantities over the vocabulary, [C] each, and for few outcomes what `outcome_gradient_` takes. Without these
    and without y: the next-token loss alone.
    """
    next_token_CV = None
    if settings.lm_share:
        exponent_CV = x_CV * settings.divisor if settings.divisor != 1.0 else x_CV
        next_token_CV = (exponent_CV - found["plain_logsumexp"].unsqueeze(1)).exp_()
    if "selected" in found and settings.kd_weight:
        outcome_gradient_(x_CV, found)
    elif y_CV is not None and settings.kd_weight:
        gradient_(x_CV, y_CV, {name: value.unsqueeze(1) for name, value in found.items()}, settings)
    elif next_token_CV is not None:
        x_CV.copy_(next_token_CV)
        return {}
    if next_token_CV is not None:
        x_CV.add_(next_token_CV, alpha=settings.lm_share)
    return {}
