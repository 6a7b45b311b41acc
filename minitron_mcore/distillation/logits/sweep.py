"""One sweep over the tokens by chunks: both heads' logits, the losses, and the gradients of hidden states and head.

A chunk is: the products that give its logits; a pass over them that leaves a few floats a token; one gather of these
over the vocabulary shards (a second pass and gather for Jensen-Shannon and for few outcomes); one elementwise pass that
turns the student's logits into their gradient in place; the two products with it. On the CPU a pass goes over as many
rows at a time as stay in cache; on CUDA it is compiled to one kernel.

Legend: N tokens, C tokens of a chunk, H hidden size, V this rank's vocabulary shard, R shards, K outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_mcore.distillation.logits.divergences import (
    Divergence,
    divergence_value,
    inverse_norms,
    mixture_statistics,
)
from minitron_mcore.distillation.logits.outcomes import (
    LOWEST,
    outcome_divergence,
    selected_logits,
    tail_statistics,
    top_of_all,
    top_of_shard,
)
from minitron_mcore.distillation.logits.passes import (
    KEEPING,
    by_rows,
    kept_gradient_,
    logit_gradient_,
    logit_statistics,
)
from minitron_mcore.model.vocab_parallel import (
    ABSENT,
    VocabularyShard,
    add_product_,
    combine,
    product_,
    product_operand,
)

# What the selected outcomes leave of 1 where rounding leaves nothing: less than the last digit of their sum in fp64.
_LEAST_REST = 1e-37


@dataclass(frozen=True)
class Objective:
    """What is computed of every token. `kd_weight`, `lm_weight`: of the gradient; values are not weighted."""

    shard: VocabularyShard
    divergence: Divergence
    lm_weight: float
    kd_weight: float
    top_k: int
    chunk_size: int
    report: bool

    @property
    def scale(self) -> float:
        """What a chunk's logit gradient is to be multiplied by: with it apart, equal models give exactly zero."""
        return self.kd_weight * self.divergence.gradient_scale if self.kd_weight else self.lm_weight

    @property
    def lm_share(self) -> float:
        """Weight of the next-token loss's gradient in the raw logits, in units of `scale`."""
        return self.lm_weight / self.scale if self.kd_weight else 1.0


@dataclass(frozen=True)
class Outcomes:
    """A sparse target of the chunk's (or sweep's) tokens: ids and logarithms [N, K], log_tail [N]; see SparseTarget."""

    ids: Tensor
    log_probs: Tensor
    tail: bool
    log_tail: Tensor | None = None

    def rows(self, rows: slice) -> Outcomes:
        log_tail = None if self.log_tail is None else self.log_tail[rows]
        return Outcomes(self.ids[rows], self.log_probs[rows], self.tail, log_tail)

    def log_tail_probability(self, vocab_size: int) -> Tensor:
        """Of the ids in no used slot, fp64 [N]; minus infinity where there are none, or without a tail."""
        used = self.ids >= 0
        if self.log_tail is not None:
            log_tail_N = self.log_tail.double()
        else:
            selected_N = self.log_probs.double().exp().masked_fill(~used, 0.0).sum(-1)
            log_tail_N = (1.0 - selected_N).clamp_min(_LEAST_REST).log()
        without = used.sum(-1) >= vocab_size if self.tail else torch.ones_like(log_tail_N, dtype=torch.bool)
        return log_tail_N.masked_fill(without, -torch.inf)

    def top(self, vocab_size: int) -> Tensor:
        """The likeliest id, the lowest of several, fp64 [N]; `vocab_size` where no slot is used."""
        used = self.ids >= 0
        log_probs = self.log_probs.masked_fill(~used, float("-inf"))
        best = used & (log_probs == log_probs.amax(-1, keepdim=True))
        return self.ids.masked_fill(~best, vocab_size).amin(-1).double()


@dataclass(frozen=True)
class Model:
    """One model's final hidden states, [N, H], and its shard of the output head, [V, H]."""

    hidden: Tensor
    weight: Tensor


def _gather(shard: VocabularyShard, local: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every shard's statistics, [R, C] of [C] and [R, K, C] of a block [K, C], in fp64: what is left of their sums
    after cancelling is small."""
    blocks = [value.unsqueeze(0) if value.dim() == 1 else value for value in local.values()]
    gathered = shard.gather(torch.cat(blocks)).double().split([block.shape[0] for block in blocks], 1)
    parts = zip(local.items(), gathered, strict=True)
    return {name: part.squeeze(1) if value.dim() == 1 else part for (name, value), part in parts}


def _over_vocabulary(gathered: dict[str, Tensor], divergence: Divergence) -> dict[str, Tensor]:
    """From every shard's statistics [R, C] to those of the vocabulary [C], fp64."""
    found: dict[str, Tensor] = {}
    shares: dict[str, Tensor] = {}
    for of in ("", "teacher_"):
        if f"{of}maximum" not in gathered:
            continue
        maxima_RC = gathered[f"{of}maximum"]
        found[f"{of}logsumexp"], shares[of] = combine(maxima_RC, gathered[f"{of}sum"])
        found[f"{of}maximum"] = maxima_RC.amax(0)
        found[f"{of}log_sum"] = found[f"{of}logsumexp"] - found[f"{of}maximum"]
        found[f"{of}plain_logsumexp"] = found[f"{of}logsumexp"]
        if f"{of}plain_sum" in gathered:
            found[f"{of}plain_logsumexp"], _ = combine(maxima_RC * divergence.temperature, gathered[f"{of}plain_sum"])
        if f"{of}top" in gathered:  # the first of equal maxima: shards are in the order of the ids
            found[f"{of}top"] = gathered[f"{of}top"].gather(0, maxima_RC.max(0, keepdim=True).indices).squeeze(0)
    for name in ("cross", "square", "teacher_square", "label", "teacher_label"):
        if name in gathered:
            found[name] = gathered[name].sum(0)
    if "cross" in gathered and divergence.probabilistic:
        # The local sums are weighted by exp(logit - shard's maximum): of the teacher, or of the student.
        local_sum_RC = gathered["teacher_sum" if divergence.name == "forward_kl" else "sum"]
        share_RC = shares["teacher_" if divergence.name == "forward_kl" else ""]
        found["cross"] = (gathered["cross"] / local_sum_RC * share_RC).sum(0)
    if "square" in found:
        found["inverse_norms"] = inverse_norms(found["square"], found["teacher_square"])
    return found


class _Chunk:
    """The losses of one chunk of tokens from its logits, which are overwritten; then `gradient_`."""

    def __init__(
        self,
        x_CV: Tensor,
        y_CV: Tensor | None,
        target: Outcomes | None,
        labels_C: Tensor,
        objective: Objective,
        *,
        gradient: bool,
    ) -> None:
        self.x_CV, self.y_CV, self.target, self.objective = x_CV, y_CV, target, objective
        self.shard, self.divergence = objective.shard, objective.divergence
        index_C, self.label_here_C = self.shard.locate(labels_C)
        self.label_index_C1 = index_C.unsqueeze(1)
        self.distils = y_CV is not None or target is not None
        self.few = target is not None or (y_CV is not None and objective.top_k > 0)
        self.report = objective.report and self.distils
        # Where memory is slow next to exp (CPU), the second pass starts from exponentials that the first one leaves.
        name = self.divergence.name if self.distils and not self.few else "next_token"
        alone = not (self.distils and (self.few or objective.kd_weight == 0.0))
        plain = self.divergence.temperature == 1.0 or not objective.lm_share
        self.keeps = gradient and alone and plain and name in KEEPING and not x_CV.is_cuda
        self.found = self._first_pass()
        self.losses = self._losses()

    def _label_logit(self, logits_CV: Tensor) -> Tensor:
        return logits_CV.gather(1, self.label_index_C1).squeeze(1).masked_fill_(~self.label_here_C, 0.0)

    def _first_pass(self) -> dict[str, Tensor]:
        x_CV, y_CV, shard = self.x_CV, self.y_CV, self.shard
        labels = {"label": self._label_logit(x_CV)}
        if y_CV is not None and self.report:
            labels["teacher_label"] = self._label_logit(y_CV)
        local = by_rows(
            logit_statistics,
            x_CV,
            y_CV,
            divergence=self.divergence,
            cross=not self.few,
            report=self.report,
            keep=self.keeps,
        )
        self.local_maxima = {of: local[f"{of}maximum"] for of in ("", "teacher_") if f"{of}maximum" in local}
        for name in ("top", "teacher_top"):
            if name in local:
                local[name] += shard.start
        if shard.absent:
            moments = [name for name in ("cross", "square", "teacher_square") if name in local]
            local |= {name: torch.zeros_like(local[name]) for name in moments}
        local |= labels
        if y_CV is None or not self.few:
            return _over_vocabulary(_gather(shard, local), self.divergence)
        count = min(self.objective.top_k, shard.rows)
        local |= self._top_of_shard(y_CV, count)
        gathered = _gather(shard, local)
        self.top_CK, self.ids_CK = top_of_all(gathered["values"], gathered["ids"], self.objective.top_k)
        return _over_vocabulary(gathered, self.divergence)

    def _top_of_shard(self, y_CV: Tensor, count: int) -> dict[str, Tensor]:
        """`values` and `ids`, [count, C] each: the same number on every shard, so that they can be gathered."""
        found = by_rows(top_of_shard, y_CV, count=min(count, self.shard.width))
        missing = (0, count - found["values"].shape[1])
        values_CK = torch.nn.functional.pad(found["values"], missing, value=float("-inf"))
        ids_CK = torch.nn.functional.pad(found["columns"].float() + self.shard.start, missing)
        return {"values": values_CK.t(), "ids": ids_CK.t()}

    def _losses(self) -> dict[str, Tensor]:
        found, x_CV, y_CV = self.found, self.x_CV, self.y_CV
        losses = {"lm": found["plain_logsumexp"] - found["label"]}
        if not self.distils:
            return losses
        if self.few:
            losses["kd"] = self._few_outcomes()
        else:
            if self.divergence.name == "jensen_shannon":
                normalizers = (*self._normalizer(), *self._normalizer("teacher_"))
                local = by_rows(mixture_statistics, x_CV, y_CV, *normalizers, mix=self.divergence.mix)
                found |= {name: value.sum(0) for name, value in _gather(self.shard, local).items()}
            losses["kd"] = divergence_value(found, self.divergence)
        if self.report:
            if y_CV is not None:
                losses["teacher_lm"] = found["teacher_plain_logsumexp"] - found["teacher_label"]
            losses["agreement"] = (found["top"] == found["teacher_top"]).double()
        return losses

    def _normalizer(self, of: str = "") -> tuple[Tensor, Tensor]:
        return self.found[f"{of}maximum"].float(), self.found[f"{of}log_sum"].float()

    def _few_outcomes(self) -> Tensor:
        """The divergence over the K + 1 outcomes, [C]; keeps its gradient."""
        found, x_CV, y_CV, target = self.found, self.x_CV, self.y_CV, self.target
        ids_CK = self.ids_CK if target is None else target.ids
        self.columns = self.shard.locate(ids_CK)
        logits_CK = selected_logits(x_CV, *self.columns)
        local = {"logits": logits_CK.t()}
        for of, logits_CV in (("", x_CV), ("teacher_", y_CV)):
            if logits_CV is not None:
                tail = by_rows(tail_statistics, logits_CV, *self.columns)
                if self.shard.absent:
                    tail = {"tail_maximum": tail["tail_maximum"].fill_(LOWEST), "tail_sum": tail["tail_sum"].zero_()}
                local |= {f"{of}{name}": value for name, value in tail.items()}
        gathered = _gather(self.shard, local)
        log_q = gathered["logits"].sum(0).t().contiguous() - found["logsumexp"].unsqueeze(1)
        tail_C, _ = combine(gathered["tail_maximum"], gathered["tail_sum"])
        found["tail_maximum"] = gathered["tail_maximum"].amax(0)
        found["tail_log_sum"] = tail_C - found["tail_maximum"]
        if target is None:
            log_p = self.top_CK - found["teacher_logsumexp"].unsqueeze(1)
            teacher_tail_C, _ = combine(gathered["teacher_tail_maximum"], gathered["teacher_tail_sum"])
            log_p_tail = teacher_tail_C - found["teacher_logsumexp"]
        else:
            log_p, log_p_tail = target.log_probs.double(), target.log_tail_probability(self.divergence.vocab_size)
            found["teacher_top"] = target.top(self.divergence.vocab_size)
        value_C, found["outcome_tail"], self.outcome_gradient_CK = outcome_divergence(
            log_p, log_q, log_p_tail, tail_C - found["logsumexp"], ids_CK >= 0, self.divergence
        )
        return value_C

    def gradient_(self) -> Tensor:
        """The gradient in the student's raw logits divided by `Objective.scale`, [C, V], where its logits were."""
        x_CV, objective = self.x_CV, self.objective
        if self.keeps:
            self._kept_gradient_()
            return self._less_label_()
        y_CV = self.y_CV if objective.kd_weight else None
        per_token = {name: value.float() for name, value in self.found.items()}
        outcomes: tuple[Tensor, ...] = ()
        if self.few and objective.kd_weight:
            y_CV, outcomes = None, (self.outcome_gradient_CK.float(), *self.columns)
        by_rows(
            logit_gradient_,
            x_CV,
            y_CV,
            *per_token.values(),
            *outcomes,
            names=tuple(per_token),
            divergence=self.divergence,
            lm_share=objective.lm_share,
        )
        return self._less_label_()

    def _kept_gradient_(self) -> None:
        """From the exponentials over this shard's maxima that the first pass left."""
        found, y_CV = self.found, self.y_CV
        factors = {of: (local - found[f"{of}logsumexp"]).exp_().float() for of, local in self.local_maxima.items()}
        cross_C = None
        if y_CV is not None and self.divergence.name == "reverse_kl":
            cross_C = (found["cross"] - self.objective.lm_share).float()
        by_rows(
            kept_gradient_,
            self.x_CV,
            y_CV,
            factors[""],
            factors.get("teacher_"),
            cross_C,
            lm_share=self.objective.lm_share,
        )

    def _less_label_(self) -> Tensor:
        """The gradient, once the next-token loss's part at the label is taken off."""
        x_CV, lm_share = self.x_CV, self.objective.lm_share
        if lm_share:
            x_CV.scatter_add_(1, self.label_index_C1, self.label_here_C.float().mul_(-lm_share).unsqueeze(1))
        return x_CV.zero_() if self.shard.absent else x_CV


def losses_and_gradient(
    x_CV: Tensor, y_CV: Tensor | None, target: Outcomes | None, labels_C: Tensor, objective: Objective
) -> tuple[dict[str, Tensor], Tensor]:
    """What the sweep makes of one chunk's logits on this shard, [C, V] fp32 each, which are overwritten: the losses,
    [C] fp64, and the gradient in the student's logits divided by `objective.scale`, where those were."""
    chunk = _Chunk(x_CV, y_CV, target, labels_C, objective, gradient=True)
    return chunk.losses, chunk.gradient_()


def sweep(
    student: Model,
    teacher: Model | None,
    target: Outcomes | None,
    labels_N: Tensor,
    objective: Objective,
    weight_N: Tensor,
    grad_hidden_NH: Tensor | None = None,
    grad_weight_VH: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every token's losses, [N] fp32 each: `lm`; with a teacher or target `kd`; if reported `teacher_lm`, `agreement`.

    grad_hidden_NH: overwritten with this shard's part of the gradient, where given, in its own type.
    grad_weight_VH: fp32 (or the head's type); the gradient is added to it, where given.
    weight_N: fp32, each token's weight in both gradients, besides the objective's two weights.
    """
    tokens, shard = labels_N.shape[0], objective.shard
    chunk_size = min(objective.chunk_size, tokens)
    models = [student] if teacher is None else [student, teacher]
    heads = [product_operand(model.weight[: shard.width]) for model in models]
    buffers = weight_N.new_empty(len(models), chunk_size, shard.width)  # the chunks take turns in them
    losses: dict[str, Tensor] = {}
    wanted = grad_hidden_NH is not None or grad_weight_VH is not None

    for start in range(0, tokens, chunk_size):
        rows = slice(start, min(start + chunk_size, tokens))
        logits = [buffer[: rows.stop - rows.start] for buffer in buffers]
        hidden = [product_operand(model.hidden[rows].to(model.weight.dtype)) for model in models]
        for logits_CV, hidden_CH, head_VH in zip(logits, hidden, heads, strict=True):
            product_(logits_CV, hidden_CH, head_VH.t())
            if shard.absent:
                logits_CV.fill_(ABSENT)
        outcomes = target.rows(rows) if target is not None else None
        y_CV = logits[1] if teacher is not None else None
        chunk = _Chunk(logits[0], y_CV, outcomes, labels_N[rows], objective, gradient=wanted)
        for name, value_C in chunk.losses.items():
            losses.setdefault(name, weight_N.new_empty(tokens))[rows] = value_C.float()
        if not wanted:
            continue
        gradient_CV = chunk.gradient_().to(heads[0].dtype)
        # The tokens' weights go to the narrow factors of the products instead of the [C, V] gradient.
        weight_C1 = weight_N[rows].unsqueeze(1) * objective.scale
        if grad_hidden_NH is not None:
            part_CH = weight_N.new_empty(gradient_CV.shape[0], grad_hidden_NH.shape[1])
            grad_hidden_NH[rows] = product_(part_CH, gradient_CV, heads[0]).mul_(weight_C1)
        if grad_weight_VH is not None:
            weighted_CH = (hidden[0] * weight_C1).to(heads[0].dtype)
            add_product_(grad_weight_VH[: shard.width], gradient_CV.t(), weighted_CH)
    return losses
