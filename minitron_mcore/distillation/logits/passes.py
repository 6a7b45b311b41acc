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


def by_rows(
    function: Callable[..., Any], x_CV: Tensor, *others: Rows, spare: bool = False, **settings: Any
) -> dict[str, Tensor]:
    """`function(x, *others, **settings)` over the rows of all, in one kernel on CUDA, by cached blocks on the CPU.
    spare: where there are blocks, they take turns in a `spare_CV` that it takes."""

    def part(whole: Rows, block: slice) -> Rows:
        if isinstance(whole, dict):
            return {name: value[block] for name, value in whole.items()}
        return None if whole is None else whole[block]

    if x_CV.is_cuda and has_triton():
        function = _compiled(function)
    tokens = x_CV.shape[0]
    rows = tokens if x_CV.is_cuda else max(1, CACHED_ENTRIES * torch.get_num_threads() // x_CV.shape[1])
    if rows >= tokens:
        return function(x_CV, *others, **settings)
    found: dict[str, Tensor] = {}
    spare_CV = x_CV.new_empty(rows, x_CV.shape[1]) if spare else None
    for start in range(0, tokens, rows):
        block = slice(start, min(start + rows, tokens))
        if spare_CV is not None:
            settings["spare_CV"] = spare_CV[: block.stop - start]
        of_block = function(x_CV[block], *(part(each, block) for each in others), **settings)
        while of_block:
            name, value = of_block.popitem()
            if name not in found:
                found[name] = value.new_empty(tokens, *value.shape[1:])
            found[name][block] = value
            # Nothing of a block is left when the next begins: a few numbers in the memory of the last one's temporaries
            # would keep the next one's out of it, and the heap grew by a block each time.
            del value
    return found


def logit_statistics(
    x_CV: Tensor,
    y_CV: Tensor | None,
    *,
    settings: LossSettings,
    cross: bool,
    report: bool,
    keep: bool,
    whole: bool = False,
    spare_CV: Tensor | None = None,
) -> dict[str, Tensor]:
    """First pass: statistics by name, [C] each. Both logits are divided by the temperature in place.
    cross: also what a divergence over the whole vocabulary needs; report: also what the teacher's next-token loss and
    the agreement need; keep: leave in x and y what `kept_gradient_` starts from; whole: this shard is the vocabulary,
    so go on to the gradient. spare_CV: memory for a temporary."""
    found = _logit_statistics(x_CV, y_CV, spare_CV, settings, cross, report, keep)
    if whole:
        factors = {f"{of}factor": found[f"{of}sum"].reciprocal() for of in ("", "teacher_") if f"{of}sum" in found}
        if settings.divergence == "reverse_kl" and "cross" in found:
            factors["shift"] = found["cross"] * factors["factor"] - settings.lm_share
        kept_gradient_(x_CV, y_CV, factors, settings)
    return found


def _logit_statistics(
    x_CV: Tensor,
    y_CV: Tensor | None,
    spare_CV: Tensor | None,
    settings: LossSettings,
    cross: bool,
    report: bool,
    keep: bool,
) -> dict[str, Tensor]:
    temperature, divergence = settings.divisor, settings.divergence
    if temperature != 1.0:
        for logits_CV in (x_CV,) if y_CV is None else (x_CV, y_CV):
            logits_CV.mul_(1.0 / temperature)
    if y_CV is None:
        return softmax_statistics(x_CV, temperature, report, out=x_CV if keep else spare_CV)[0]
    forward, reverse = (cross and divergence == name for name in ("forward_kl", "reverse_kl"))
    found: dict[str, Tensor] = {}
    difference_CV = torch.sub(y_CV, x_CV, out=spare_CV) if forward else None
    if report or divergence in PROBABILISTIC:
        out = y_CV if keep and forward else None if forward else spare_CV
        of_teacher, e_y_CV = softmax_statistics(y_CV, temperature if report else 1.0, report, out=out)
        found = {f"teacher_{name}": value for name, value in of_teacher.items()}
    if reverse:
        difference_CV = torch.sub(x_CV, y_CV, out=y_CV if keep else e_y_CV)
    of_student, e_x_CV = softmax_statistics(x_CV, temperature, report, out=x_CV if keep else None)
    found |= of_student
    if difference_CV is not None:
        products_CV = torch.mul(difference_CV, e_y_CV if forward else e_x_CV, out=e_y_CV if reverse else difference_CV)
        found["cross"] = products_CV.sum(-1)
    elif cross:
        found |= cross_statistics(x_CV, y_CV, settings)
    return found


def factors_of_kept(found: dict[str, Tensor], local: dict[str, Tensor], settings: LossSettings) -> dict[str, Tensor]:
    """What `kept_gradient_` takes: from quantities over the vocabulary, and this shard's maxima."""
    factors = {
        f"{of}factor": (local[f"{of}maximum"] - found[f"{of}logsumexp"]).exp_().float()
        for of in ("", "teacher_")
        if f"{of}maximum" in local
    }
    if settings.divergence == "reverse_kl" and "cross" in found:
        factors["shift"] = (found["cross"] - settings.lm_share).float()
    return factors


def kept_gradient_(
    x_CV: Tensor, y_CV: Tensor | None, factors: dict[str, Tensor], settings: LossSettings
) -> dict[str, Tensor]:
    """Second pass after one that kept exponentials over this shard's maxima, in x and, with forward_kl, in y; with
    reverse_kl y holds x - y. factors, [C] each: what makes probabilities of the exponentials, and what is subtracted
    from that y."""
    factor_C = factors["factor"]
    if y_CV is not None and settings.divergence == "reverse_kl":
        x_CV.mul_(factor_C.unsqueeze(1)).mul_(y_CV.sub_(factors["shift"].unsqueeze(1)))
        return {}
    if y_CV is None:
        x_CV.mul_(factor_C.unsqueeze(1))
        return {}
    if settings.lm_share:
        factor_C = factor_C * (1.0 + settings.lm_share)
    x_CV.mul_(factor_C.unsqueeze(1)).sub_(y_CV.mul_(factors["teacher_factor"].unsqueeze(1)))
    return {}


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
