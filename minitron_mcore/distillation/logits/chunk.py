"""The losses of some tokens from their logits on this vocabulary shard, and their gradient where the logits were.

A pass over the logits leaves some numbers a token, which are gathered over the shards (twice for Jensen-Shannon and for
few outcomes); one more elementwise pass gives the gradient. The logits are overwritten by both. Where a gather has been
started and not yet been waited for, what is here stops (`yield`), so that other work can run beside it.

Legend: C tokens, V this rank's vocabulary shard, R shards, K outcomes.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import torch
from torch import Tensor

from minitron_mcore.distillation.logits.divergences import divergence_value, inverse_norms, mixture_statistics
from minitron_mcore.distillation.logits.outcomes import (
    outcome_divergence,
    selected_logits,
    tail_statistics,
    top_of_all,
    top_of_shard,
)
from minitron_mcore.distillation.logits.passes import (
    by_rows,
    factors_of_kept,
    kept_gradient_,
    logit_gradient_,
    logit_statistics,
)
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from minitron_mcore.model.vocab_parallel import VocabularyShard, combine

Target = Tensor | SparseTarget | None  # the teacher's logits [C, V], or few of its outcomes
Found = dict[str, Tensor]  # statistics of the tokens by name
Result = TypeVar("Result")
Steps = Generator[None, None, Result]  # stops at each gather, when it has been started
NORMALIZERS = ("maximum", "log_sum", "teacher_maximum", "teacher_log_sum")


def losses_and_gradient(
    x_CV: Tensor, target: Target, labels_C: Tensor, settings: LossSettings, shard: VocabularyShard, wants_gradient: bool
) -> tuple[Found, Tensor | None]:
    """The losses by name, fp64 [C] each: `lm`; with a teacher `kd`; if reported `teacher_lm` and `agreement`. And the
    gradient in x, the student's raw logits, divided by `LossSettings.scale`, where x was. All in fp32. All shards call.
    """
    steps = losses_by_steps(x_CV, target, labels_C, settings, shard, wants_gradient)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def losses_by_steps(
    x_CV: Tensor, target: Target, labels_C: Tensor, settings: LossSettings, shard: VocabularyShard, wants_gradient: bool
) -> Steps[tuple[Found, Tensor | None]]:
    """`losses_and_gradient` up to each of its gathers. All shards take the same steps, in the same order."""
    y_CV = target if isinstance(target, Tensor) else None
    few = isinstance(target, SparseTarget) or (y_CV is not None and settings.top_k > 0)
    report = settings.report and target is not None and not (isinstance(target, SparseTarget) and target.is_drawn)
    # Where memory is slow next to exp, on the CPU, the first pass leaves exponentials for the second; where this shard
    # is the whole vocabulary it goes on to the gradient.
    keep = wants_gradient and not x_CV.is_cuda and not few and (y_CV is None or settings.can_keep)
    whole = keep and shard.group is None
    column_C1, here_C1 = shard.locate(labels_C.unsqueeze(1))
    local = {"label": selected_logits(x_CV, column_C1, here_C1).squeeze(1)}
    if y_CV is not None and report:
        local["teacher_label"] = selected_logits(y_CV, column_C1, here_C1).squeeze(1)
    local |= by_rows(
        logit_statistics,
        x_CV,
        y_CV,
        settings=settings,
        cross=not few,
        report=report,
        keep=keep,
        whole=whole,
        spare=True,
    )
    local |= {name: local[name] + shard.start for name in ("top", "teacher_top") if name in local}
    if shard.absent:
        local |= {name: local[name].zero_() for name in ("cross", "square", "teacher_square") if name in local}
    if few and y_CV is not None:
        local |= offer_top(y_CV, settings.top_k, shard)
    gathered = yield from _gather(shard, local)
    found = _over_vocabulary(gathered, settings)
    losses = {"lm": found["plain_logsumexp"] - found["label"]}
    outcomes: Found = {}
    if few:
        losses["kd"], outcomes = yield from _few_outcomes(x_CV, target, gathered, found, settings, shard)
    elif y_CV is not None:
        if settings.divergence == "jensen_shannon":
            normalizers = {name: found[name].float() for name in NORMALIZERS}
            parts = by_rows(mixture_statistics, x_CV, y_CV, normalizers, mix=settings.jensen_shannon_mix)
            found |= {name: value.sum(0) for name, value in (yield from _gather(shard, parts)).items()}
        losses["kd"] = divergence_value(found, settings)
    if "teacher_label" in found:
        losses["teacher_lm"] = found["teacher_plain_logsumexp"] - found["teacher_label"]
    if report:
        losses["agreement"] = (found["top"] == found["teacher_top"]).double()
    if not wants_gradient:
        return losses, None
    if keep and not whole:
        by_rows(kept_gradient_, x_CV, y_CV, factors_of_kept(found, local, settings), settings=settings)
    elif not keep:
        found = {name: value.float() for name, value in found.items()} | outcomes
        by_rows(logit_gradient_, x_CV, y_CV, found, settings=settings)
    if settings.lm_share:  # the next-token loss's part at the label
        x_CV.scatter_add_(1, column_C1, here_C1.float().mul_(-settings.lm_share))
    return losses, x_CV.zero_() if shard.absent else x_CV


def _gather(shard: VocabularyShard, local: Found) -> Steps[Found]:
    """Every shard's statistics, [R, C] of [C] and [R, K, C] of a block [K, C], in fp64: what is left of their sums
    after cancelling is small."""
    blocks = [value.unsqueeze(0) if value.dim() == 1 else value for value in local.values()]
    gathering = shard.start_gather(torch.cat(blocks))
    yield
    gathered = gathering.wait().double().split([block.shape[0] for block in blocks], 1)
    parts = zip(local.items(), gathered, strict=True)
    return {name: part.squeeze(1) if value.dim() == 1 else part for (name, value), part in parts}


def _over_vocabulary(gathered: Found, settings: LossSettings) -> Found:
    """From every shard's statistics [R, C] to those of the vocabulary [C], fp64."""
    sums = ("cross", "square", "teacher_square", "label", "teacher_label")
    found = {name: gathered[name].sum(0) for name in sums if name in gathered}
    # A KL's local sums are weighted by exp(logit - shard's maximum): of the teacher, or of the student.
    weights = {"forward_kl": "teacher_", "reverse_kl": ""}.get(settings.divergence)
    for of in [of for of in ("", "teacher_") if f"{of}maximum" in gathered]:
        maxima_RC, sum_RC = gathered[f"{of}maximum"], gathered[f"{of}sum"]
        found[f"{of}logsumexp"], shares_RC = combine(maxima_RC, sum_RC)
        found[f"{of}maximum"] = maxima_RC.amax(0)
        found[f"{of}log_sum"] = found[f"{of}logsumexp"] - found[f"{of}maximum"]
        found[f"{of}plain_logsumexp"] = found[f"{of}logsumexp"]
        if f"{of}plain_sum" in gathered:
            found[f"{of}plain_logsumexp"], _ = combine(maxima_RC * settings.divisor, gathered[f"{of}plain_sum"])
        if f"{of}top" in gathered:  # the first of equal maxima: shards are in the order of the ids
            found[f"{of}top"] = gathered[f"{of}top"].gather(0, maxima_RC.max(0, keepdim=True).indices).squeeze(0)
        if of == weights and "cross" in gathered:
            found["cross"] = (gathered["cross"] / sum_RC * shares_RC).sum(0)
    if "square" in found:
        found["inverse_norms"] = inverse_norms(found["square"], found["teacher_square"])
    return found


def offer_top(y_CV: Tensor, count: int, shard: VocabularyShard) -> Found:
    """`values` and `ids` of this shard for `top_of_all`, [K, C] each: K is the same on every shard, to be gathered."""
    found = by_rows(top_of_shard, y_CV, count=min(count, shard.width))
    missing = (0, min(count, shard.rows) - found["values"].shape[1])
    values_CK = torch.nn.functional.pad(found["values"], missing, value=float("-inf"))
    ids_CK = torch.nn.functional.pad(found["columns"].float() + shard.start, missing)
    return {"values": values_CK.t(), "ids": ids_CK.t()}


def _few_outcomes(
    x_CV: Tensor, target: Target, first: Found, found: Found, settings: LossSettings, shard: VocabularyShard
) -> Steps[tuple[Tensor, Found]]:
    """The divergence over the K + 1 outcomes, fp64 [C]; and for `outcome_gradient_` its gradient in the `selected`
    outcomes' logits, fp32 [C, K], and where they lie here. first: what was gathered; `found` gets the tail's
    quantities too."""
    if isinstance(target, SparseTarget):
        ids_CK = target.ids
    else:
        top_CK, ids_CK = top_of_all(first["values"], first["ids"], settings.top_k)
    columns = shard.locate(ids_CK)
    local = {"logits": selected_logits(x_CV, *columns).t()}
    for of, logits_CV in (("", x_CV), ("teacher_", target)):
        if isinstance(logits_CV, Tensor):
            tail = by_rows(tail_statistics, logits_CV, *columns)
            if shard.absent:
                tail["tail_sum"].zero_()
            local |= {f"{of}{name}": value for name, value in tail.items()}
    gathered = yield from _gather(shard, local)
    log_q = gathered["logits"].sum(0).t().contiguous() - found["logsumexp"].unsqueeze(1)
    tail_C, _ = combine(gathered["tail_maximum"], gathered["tail_sum"])
    found["tail_maximum"] = gathered["tail_maximum"].amax(0)
    found["tail_log_sum"] = tail_C - found["tail_maximum"]
    if isinstance(target, SparseTarget):
        log_p, log_p_tail = target.log_probs.double(), target.log_tail_probability(settings.vocab_size)
        found["teacher_top"] = target.top(settings.vocab_size)
    else:
        log_p = top_CK - found["teacher_logsumexp"].unsqueeze(1)
        teacher_tail_C, _ = combine(gathered["teacher_tail_maximum"], gathered["teacher_tail_sum"])
        log_p_tail = teacher_tail_C - found["teacher_logsumexp"]
    tails = log_p_tail, tail_C - found["logsumexp"]
    value_C, found["outcome_tail"], gradient_CK = outcome_divergence(log_p, log_q, *tails, ids_CK >= 0, settings)
    return value_C, {"selected": gradient_CK.float(), "column": columns[0], "here": columns[1]}
