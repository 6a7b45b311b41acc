"""The losses of one chunk of tokens from its logits on this vocabulary shard, and their gradient where the logits were.

`measure` makes a pass over the logits that leaves some numbers a token, and gathers these over the shards (twice for
Jensen-Shannon and for few outcomes); `gradient_` is one more elementwise pass. The logits are overwritten by both.

Legend: C tokens of a chunk, V this rank's vocabulary shard, R shards, K outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minitron_mcore.distillation.logits.divergences import divergence_value, inverse_norms, mixture_statistics
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
from minitron_mcore.distillation.logits.settings import Divergence, LossSettings
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from minitron_mcore.model.vocab_parallel import VocabularyShard, combine


@dataclass(frozen=True)
class Chunk:
    """One chunk's logits on this shard, fp32, and what is to be made of them."""

    student: Tensor  # its logits [C, V]
    teacher: Tensor | SparseTarget | None  # the same of the teacher, or few of its outcomes
    labels: Tensor  # [C]
    settings: LossSettings
    shard: VocabularyShard
    gradient: bool = True  # whether `gradient_` will be called

    @property
    def of_teacher(self) -> Tensor | None:
        return self.teacher if isinstance(self.teacher, Tensor) else None

    @cached_property
    def label(self) -> tuple[Tensor, Tensor]:
        """Column of each label here, int64 [C, 1], and whether it lies here, bool [C]."""
        index_C, here_C = self.shard.locate(self.labels)
        return index_C.unsqueeze(1), here_C

    @property
    def few(self) -> bool:
        """Whether the models are compared over few outcomes."""
        return isinstance(self.teacher, SparseTarget) or (self.teacher is not None and self.settings.top_k > 0)

    @property
    def report(self) -> bool:
        drawn = isinstance(self.teacher, SparseTarget) and self.teacher.is_drawn
        return self.settings.report and self.teacher is not None and not drawn

    @property
    def keeps(self) -> bool:
        """Whether the first pass leaves exponentials for the second: where memory is slow next to exp, on the CPU."""
        settings, distils = self.settings, self.teacher is not None
        name = settings.divergence if distils and not self.few else "next_token"
        alone = not (distils and (self.few or settings.kd_weight == 0.0))
        plain = settings.form.temperature == 1.0 or not settings.lm_share
        return self.gradient and alone and plain and name in KEEPING and not self.student.is_cuda


@dataclass(frozen=True)
class FewOutcomes:
    """The divergence over few outcomes, fp64 [C]; its gradient in their logits [C, K], and their columns here."""

    value: Tensor
    gradient: Tensor
    columns: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Measured:
    """losses: fp64 [C] each; found: quantities over the vocabulary, fp64 [C] each; local_maxima: of this shard."""

    losses: dict[str, Tensor]
    found: dict[str, Tensor]
    local_maxima: dict[str, Tensor]
    few: FewOutcomes | None


def measure(chunk: Chunk) -> Measured:
    """The losses by name: `lm`; with a teacher `kd`; if reported `teacher_lm`, `agreement`. All shards call."""
    x_CV, y_CV, settings, shard = chunk.student, chunk.of_teacher, chunk.settings, chunk.shard
    labels = {"label": _label_logit(x_CV, chunk)}
    if y_CV is not None and chunk.report:
        labels["teacher_label"] = _label_logit(y_CV, chunk)
    how = {"cross": not chunk.few, "report": chunk.report, "keep": chunk.keeps}
    local = by_rows(logit_statistics, x_CV, y_CV, divergence=settings.form, **how)
    local_maxima = {of: local[f"{of}maximum"] for of in ("", "teacher_") if f"{of}maximum" in local}
    for name in ("top", "teacher_top"):
        if name in local:
            local[name] += shard.start
    if shard.absent:
        moments = [name for name in ("cross", "square", "teacher_square") if name in local]
        local |= {name: torch.zeros_like(local[name]) for name in moments}
    local |= labels
    if chunk.few and y_CV is not None:
        local |= _top_of_shard(y_CV, min(settings.top_k, shard.rows), shard)
    gathered = _gather(shard, local)
    found = _over_vocabulary(gathered, settings.form)
    losses = {"lm": found["plain_logsumexp"] - found["label"]}
    few = _few_outcomes(chunk, gathered, found) if chunk.few else None
    if few is not None:
        losses["kd"] = few.value
    elif y_CV is not None:
        if settings.divergence == "jensen_shannon":
            found |= _mixture(x_CV, y_CV, found, chunk)
        losses["kd"] = divergence_value(found, settings.form)
    if chunk.report:
        if y_CV is not None:
            losses["teacher_lm"] = found["teacher_plain_logsumexp"] - found["teacher_label"]
        losses["agreement"] = (found["top"] == found["teacher_top"]).double()
    return Measured(losses, found, local_maxima, few)


def gradient_(chunk: Chunk, measured: Measured) -> Tensor:
    """The gradient in the student's raw logits divided by `LossSettings.scale`, [C, V], where its logits were."""
    x_CV, settings = chunk.student, chunk.settings
    if chunk.keeps:
        _kept_gradient_(chunk, measured)
    else:
        y_CV = chunk.of_teacher if settings.kd_weight else None
        per_token = {name: value.float() for name, value in measured.found.items()}
        outcomes: tuple[Tensor, ...] = ()
        if measured.few is not None and settings.kd_weight:
            y_CV, outcomes = None, (measured.few.gradient.float(), *measured.few.columns)
        how = {"names": tuple(per_token), "divergence": settings.form, "lm_share": settings.lm_share}
        by_rows(logit_gradient_, x_CV, y_CV, *per_token.values(), *outcomes, **how)
    if settings.lm_share:  # the next-token loss's part at the label
        index_C1, here_C = chunk.label
        x_CV.scatter_add_(1, index_C1, here_C.float().mul_(-settings.lm_share).unsqueeze(1))
    return x_CV.zero_() if chunk.shard.absent else x_CV


def _kept_gradient_(chunk: Chunk, measured: Measured) -> None:
    """From the exponentials over this shard's maxima that the first pass left."""
    found, y_CV, lm_share = measured.found, chunk.of_teacher, chunk.settings.lm_share
    factors = {of: (local - found[f"{of}logsumexp"]).exp_().float() for of, local in measured.local_maxima.items()}
    cross_C = None
    if y_CV is not None and chunk.settings.divergence == "reverse_kl":
        cross_C = (found["cross"] - lm_share).float()
    by_rows(kept_gradient_, chunk.student, y_CV, factors[""], factors.get("teacher_"), cross_C, lm_share=lm_share)


def _label_logit(logits_CV: Tensor, chunk: Chunk) -> Tensor:
    index_C1, here_C = chunk.label
    return logits_CV.gather(1, index_C1).squeeze(1).masked_fill_(~here_C, 0.0)


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
        of = "teacher_" if divergence.name == "forward_kl" else ""
        found["cross"] = (gathered["cross"] / gathered[f"{of}sum"] * shares[of]).sum(0)
    if "square" in found:
        found["inverse_norms"] = inverse_norms(found["square"], found["teacher_square"])
    return found


def _mixture(x_CV: Tensor, y_CV: Tensor, found: dict[str, Tensor], chunk: Chunk) -> dict[str, Tensor]:
    """Jensen-Shannon's two divergences from the mixture, [C] each."""
    names = ("maximum", "log_sum", "teacher_maximum", "teacher_log_sum")
    normalizers = [found[name].float() for name in names]
    local = by_rows(mixture_statistics, x_CV, y_CV, *normalizers, mix=chunk.settings.jensen_shannon_mix)
    return {name: value.sum(0) for name, value in _gather(chunk.shard, local).items()}


def _top_of_shard(y_CV: Tensor, count: int, shard: VocabularyShard) -> dict[str, Tensor]:
    """`values` and `ids`, [count, C] each: the same number on every shard, so that they can be gathered."""
    found = by_rows(top_of_shard, y_CV, count=min(count, shard.width))
    missing = (0, count - found["values"].shape[1])
    values_CK = torch.nn.functional.pad(found["values"], missing, value=float("-inf"))
    ids_CK = torch.nn.functional.pad(found["columns"].float() + shard.start, missing)
    return {"values": values_CK.t(), "ids": ids_CK.t()}


def _few_outcomes(chunk: Chunk, first: dict[str, Tensor], found: dict[str, Tensor]) -> FewOutcomes:
    """The divergence over the K + 1 outcomes. first: what was gathered; `found` gets the tail's quantities too."""
    x_CV, y_CV, target, shard = chunk.student, chunk.of_teacher, chunk.teacher, chunk.shard
    vocab_size = chunk.settings.vocab_size
    if isinstance(target, SparseTarget):
        ids_CK = target.ids
    else:
        top_CK, ids_CK = top_of_all(first["values"], first["ids"], chunk.settings.top_k)
    columns = shard.locate(ids_CK)
    local = {"logits": selected_logits(x_CV, *columns).t()}
    for of, logits_CV in (("", x_CV), ("teacher_", y_CV)):
        if logits_CV is not None:
            tail = by_rows(tail_statistics, logits_CV, *columns)
            if shard.absent:
                tail = {"tail_maximum": tail["tail_maximum"].fill_(LOWEST), "tail_sum": tail["tail_sum"].zero_()}
            local |= {f"{of}{name}": value for name, value in tail.items()}
    gathered = _gather(shard, local)
    log_q = gathered["logits"].sum(0).t().contiguous() - found["logsumexp"].unsqueeze(1)
    tail_C, _ = combine(gathered["tail_maximum"], gathered["tail_sum"])
    found["tail_maximum"] = gathered["tail_maximum"].amax(0)
    found["tail_log_sum"] = tail_C - found["tail_maximum"]
    if isinstance(target, SparseTarget):
        log_p, log_p_tail = target.log_probs.double(), target.log_tail_probability(vocab_size)
        found["teacher_top"] = target.top(vocab_size)
    else:
        log_p = top_CK - found["teacher_logsumexp"].unsqueeze(1)
        teacher_tail_C, _ = combine(gathered["teacher_tail_maximum"], gathered["teacher_tail_sum"])
        log_p_tail = teacher_tail_C - found["teacher_logsumexp"]
    log_q_tail = tail_C - found["logsumexp"]
    value_C, found["outcome_tail"], gradient_CK = outcome_divergence(
        log_p, log_q, log_p_tail, log_q_tail, ids_CK >= 0, chunk.settings.form
    )
    return FewOutcomes(value_C, gradient_CK, columns)
