"""Next-token loss and distillation loss from hidden states: both output heads by token chunks, over vocabulary shards.

One sweep over the tokens computes the losses and, when gradients are wanted, their gradients too; logits exist for one
chunk at a time, and backward only scales what the sweep stored. Products take the parameters' type with fp32 output;
statistics, losses and logit gradients are fp32. The same sweep serves plain next-token training (no teacher),
evaluation (no gradients) and distillation.

For a token with student logits z, teacher logits z_t, label y and temperature T:

    next-token loss    logsumexp(z) - z[y]
    distillation loss  T² KL(softmax(z_t / T) || softmax(z / T))        (Hinton et al., arXiv 1503.02531, section 2)
    gradient in z      lm_weight (softmax(z) - onehot(y)) + kd_weight T (softmax(z / T) - softmax(z_t / T))

Legend: S sequence, B batch, N = S * B tokens, C tokens of a chunk, H hidden size, V this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_mcore.model.vocab_parallel import (
    ABSENT,
    VocabularyShard,
    add_product_,
    combine,
    local_softmax,
    product_,
    product_operand,
)


@dataclass(frozen=True)
class LogitLossOutput:
    """Sums over the tokens, each weighted by its loss mask (not means): fp32 scalars, equal on every TP rank.

    `loss` = lm_weight * lm_loss + kd_weight * kd_loss is differentiable with respect to the student's hidden states and
    head; the rest is detached. `kd_loss` includes the factor temperature² and is zero without a teacher. `num_tokens`
    is the sum of the loss mask. `token_loss`, [S, B], is each token's next-token loss without the mask.
    """

    loss: Tensor
    lm_loss: Tensor
    kd_loss: Tensor
    num_tokens: Tensor
    token_loss: Tensor


@dataclass(frozen=True)
class _Objective:
    shard: VocabularyShard
    temperature: float
    lm_weight: float
    kd_weight: float
    chunk_size: int
    needs_gradient: bool

    @property
    def distils(self) -> bool:
        """Whether the teacher has a part in the gradient."""
        return self.kd_weight != 0.0

    @property
    def scale(self) -> float:
        """What the stored gradients are to be multiplied by: with it apart, equal models give a gradient of zero."""
        return self.kd_weight * self.temperature if self.distils else self.lm_weight

    @property
    def lm_share(self) -> float:
        """Weight of the next-token loss's logit gradient, in units of `scale`."""
        return self.lm_weight / self.scale if self.distils else 1.0


def _next_token_chunk(
    logits_CV: Tensor, spare_CV: Tensor, labels_C: Tensor, objective: _Objective
) -> tuple[Tensor, Tensor | None]:
    """Next-token loss, [C], and its logit gradient (in `spare_CV`) where wanted."""
    shard = objective.shard
    index_C, here_C = shard.locate(labels_C)
    label_logit_C = logits_CV.gather(1, index_C.unsqueeze(1)).squeeze(1).masked_fill(~here_C, 0.0)
    maximum_C, sum_C = local_softmax(logits_CV, spare_CV)
    maxima_RC, sums_RC, label_logits_RC = shard.gather(torch.stack((maximum_C, sum_C, label_logit_C))).unbind(1)
    logsumexp_C, shares_RC = combine(maxima_RC, sums_RC)
    loss_C = logsumexp_C - label_logits_RC.sum(0)
    if not objective.needs_gradient:
        return loss_C, None
    if shard.group is not None:
        spare_CV.mul_(shares_RC[shard.group.rank()].unsqueeze(1))
    return loss_C, spare_CV.scatter_add_(1, index_C.unsqueeze(1), -here_C.float().unsqueeze(1))


def _distillation_chunk(
    logits_CV: Tensor, teacher_CV: Tensor, spare_CV: Tensor, labels_C: Tensor, objective: _Objective
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Next-token loss and distillation loss, [C] each, and, where wanted, the logit gradient of their weighted sum
    divided by `objective.scale`. All three [C, V] buffers are overwritten; the gradient lies in one of them."""
    shard, temperature = objective.shard, objective.temperature
    index_C, here_C = shard.locate(labels_C)
    label_logit_C = logits_CV.gather(1, index_C.unsqueeze(1)).squeeze(1).masked_fill(~here_C, 0.0)

    if temperature != 1.0:
        teacher_CV.mul_(1.0 / temperature)
    teacher_probability_CV = spare_CV
    statistics = [label_logit_C, *local_softmax(teacher_CV, teacher_probability_CV)]
    # E over the teacher's shard of (z_t - z) / T; the KL follows from it and the two logsumexp.
    statistics.append(teacher_CV.sub_(logits_CV, alpha=1.0 / temperature).mul_(teacher_probability_CV).sum(-1))
    probability_CV = teacher_CV
    maximum_C, sum_C = local_softmax(logits_CV, probability_CV)
    statistics += [maximum_C, sum_C]
    soft_CV, soft_sum_C = probability_CV, sum_C
    if temperature != 1.0:
        soft_CV = logits_CV.sub_(maximum_C.unsqueeze(1)).mul_(1.0 / temperature).exp_()
        soft_sum_C = soft_CV.sum(-1)
        soft_CV.mul_(soft_sum_C.reciprocal().unsqueeze(1))
        statistics.append(soft_sum_C)

    gathered = shard.gather(torch.stack(statistics)).unbind(1)
    label_logits_RC, teacher_maxima_RC, teacher_sums_RC, differences_RC, maxima_RC, sums_RC = gathered[:6]
    logsumexp_C, shares_RC = combine(maxima_RC, sums_RC)
    teacher_logsumexp_C, teacher_shares_RC = combine(teacher_maxima_RC, teacher_sums_RC)
    soft_logsumexp_C, soft_shares_RC = logsumexp_C, shares_RC
    if temperature != 1.0:
        soft_logsumexp_C, soft_shares_RC = combine(maxima_RC / temperature, gathered[6])
    difference_C = (teacher_shares_RC * differences_RC).sum(0)
    loss_C = logsumexp_C - label_logits_RC.sum(0)
    kl_C = difference_C - teacher_logsumexp_C + soft_logsumexp_C
    if not objective.needs_gradient:
        return loss_C, kl_C * temperature**2, None

    rank = 0 if shard.group is None else shard.group.rank()
    gradient_CV = _distillation_gradient(
        (probability_CV, shares_RC[rank]),
        (soft_CV, soft_shares_RC[rank]),
        (teacher_probability_CV, teacher_shares_RC[rank]),
        objective,
    )
    onehot_C = here_C.float() * objective.lm_share
    gradient_CV.scatter_add_(1, index_C.unsqueeze(1), -onehot_C.unsqueeze(1))
    return loss_C, kl_C * temperature**2, gradient_CV


def _distillation_gradient(
    student: tuple[Tensor, Tensor], soft: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], objective: _Objective
) -> Tensor:
    """lm_share * softmax(z) + softmax(z / T) - softmax(z_t / T), in place, from this shard's softmaxes, [C, V], and
    the shard's probability under each, [C]. At T = 1 `student` and `soft` are one buffer."""
    (probability_CV, share_C), (soft_CV, soft_share_C), (teacher_CV, teacher_share_C) = student, soft, teacher
    alone = objective.shard.group is None  # then every share is 1
    if not objective.distils:
        return probability_CV if alone else probability_CV.mul_(share_C.unsqueeze(1))
    if soft_CV is probability_CV:
        factor_C = soft_share_C * (1.0 + objective.lm_share)
        if not alone or objective.lm_share:
            soft_CV.mul_(factor_C.unsqueeze(1))
    else:
        if not alone:
            soft_CV.mul_(soft_share_C.unsqueeze(1))
        if objective.lm_share:
            soft_CV.addcmul_(probability_CV, share_C.unsqueeze(1), value=objective.lm_share)
    if alone:
        return soft_CV.sub_(teacher_CV)
    return soft_CV.addcmul_(teacher_CV, teacher_share_C.unsqueeze(1), value=-1.0)


@dataclass(frozen=True)
class _Model:
    """One model's final hidden states, [N, H], and its shard of the output head, [V, H]."""

    hidden: Tensor
    weight: Tensor


def _sweep(
    student: _Model,
    teacher: _Model | None,
    labels_N: Tensor,
    mask_N: Tensor,
    objective: _Objective,
    grad_hidden_NH: Tensor | None,
    grad_weight_VH: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Next-token loss and distillation loss of every token, [N] fp32. Writes the gradients of their weighted sum,
    divided by `objective.scale`, into the fp32 buffers given; both hold this vocabulary shard's part."""
    shard = objective.shard
    tokens = labels_N.shape[0]
    chunk_size = min(objective.chunk_size, tokens)
    lm_loss_N = mask_N.new_zeros(tokens)
    kd_loss_N = mask_N.new_zeros(tokens)
    models = [student] if teacher is None else [student, teacher]
    heads = [product_operand(model.weight[: shard.width]) for model in models]
    # The logits of each model and one more; the chunks take turns in them.
    buffers = mask_N.new_empty(len(models) + 1, chunk_size, shard.width)

    for start in range(0, tokens, chunk_size):
        rows = slice(start, min(start + chunk_size, tokens))
        logits = buffers[:, : rows.stop - rows.start].unbind(0)
        hidden = [product_operand(model.hidden[rows].to(model.weight.dtype)) for model in models]
        for logits_CV, hidden_CH, head_VH in zip(logits, hidden, heads, strict=False):
            product_(logits_CV, hidden_CH, head_VH.t())
            if shard.absent:
                logits_CV.fill_(ABSENT)
        if teacher is None:
            lm_loss_N[rows], gradient_CV = _next_token_chunk(logits[0], logits[1], labels_N[rows], objective)
        else:
            lm_loss_N[rows], kd_loss_N[rows], gradient_CV = _distillation_chunk(
                logits[0], logits[1], logits[2], labels_N[rows], objective
            )
        if gradient_CV is None:
            continue
        gradient_CV = gradient_CV.to(heads[0].dtype)
        # The mask weighs the narrow factors of the products instead of the [C, V] gradient.
        mask_C1 = mask_N[rows].unsqueeze(1)
        if grad_hidden_NH is not None:
            product_(grad_hidden_NH[rows], gradient_CV, heads[0]).mul_(mask_C1)
        if grad_weight_VH is not None:
            masked_CH = (hidden[0] * mask_C1).to(heads[0].dtype)
            add_product_(grad_weight_VH[: shard.width], gradient_CV.t(), masked_CH)
    return lm_loss_N, kd_loss_N


def _head_gradient(weight_VH: Tensor, grad_weight_VH: Tensor, factor: Tensor) -> Tensor:
    """The head's gradient as autograd is to see it.

    Where Megatron's DDP keeps a wider buffer than the parameter (`main_grad`), the fp32 gradient is added to that
    buffer here, and autograd sees zeros. `grad_added_to_main_grad` is left alone: with that flag DDP's hook drops
    `param.grad`, and where the head is tied to the embedding `param.grad` carries the embedding's gradient.
    """
    main_grad = getattr(weight_VH, "main_grad", None)
    if main_grad is None or main_grad.dtype == weight_VH.dtype:
        return grad_weight_VH.mul_(factor).to(weight_VH.dtype)
    main_grad.addcmul_(grad_weight_VH, factor)
    return torch.zeros_like(weight_VH)


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        teacher: _Model | None,
        labels_N: Tensor,
        mask_N: Tensor,
        objective: _Objective,
        needed: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grads = [
            torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device) if wanted else None
            for tensor, wanted in zip((hidden_NH, weight_VH), needed, strict=True)
        ]
        student = _Model(hidden_NH, weight_VH)
        lm_loss_N, kd_loss_N = _sweep(student, teacher, labels_N, mask_N, objective, *grads)
        lm_loss, kd_loss = torch.dot(lm_loss_N, mask_N), torch.dot(kd_loss_N, mask_N)
        loss = objective.lm_weight * lm_loss + objective.kd_weight * kd_loss
        ctx.mark_non_differentiable(lm_loss, kd_loss, lm_loss_N)
        ctx.grads, ctx.scale, ctx.hidden_dtype, ctx.weight_VH = grads, objective.scale, hidden_NH.dtype, weight_VH
        return loss, lm_loss, kd_loss, lm_loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("backward through logit_loss a second time: its gradients are scaled in place")
        grad_hidden_NH, grad_weight_VH = ctx.grads
        ctx.grads = None
        factor = grad_loss * ctx.scale
        if grad_hidden_NH is not None:
            grad_hidden_NH = grad_hidden_NH.mul_(factor).to(ctx.hidden_dtype)
        if grad_weight_VH is not None:
            grad_weight_VH = _head_gradient(ctx.weight_VH, grad_weight_VH, factor)
        return grad_hidden_NH, grad_weight_VH, None, None, None, None, None


def logit_loss(
    hidden_SBH: Tensor,
    weight_VH: Tensor,
    labels_SB: Tensor,
    loss_mask_SB: Tensor,
    *,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    lm_weight: float,
    kd_weight: float = 0.0,
    teacher_hidden_SBH: Tensor | None = None,
    teacher_weight_VH: Tensor | None = None,
    temperature: float = 1.0,
    sequence_parallel: bool = False,
    chunk_size: int = 512,
) -> LogitLossOutput:
    """The training loss from final hidden states, without ever holding the logits of more than `chunk_size` tokens.

    hidden_SBH: the student's final hidden states (after the final norm), the full sequence on every TP rank, or with
        `sequence_parallel` this rank's contiguous part of it; its gradient is reduced over `tp_group` here.
    weight_VH: this rank's shard of the student's output head, [padded vocabulary / TP, H].
    labels_SB: global token ids of the full sequence; a label outside the vocabulary must have mask 0.
    loss_mask_SB: weight of each token, of the full sequence; 0 leaves a token out.
    vocab_size: the true vocabulary; head rows from there on are padding, outside every softmax, with zero gradient.
    tp_group: the tensor-parallel group, over which the vocabulary is sharded; None for one rank.
    teacher_hidden_SBH, teacher_weight_VH: as the student's, of any width, with the same sharding; they get no gradient.
    lm_weight, kd_weight: weights of the two sums in `loss`; both are reported whatever their weight.

    Called by every rank of `tp_group`, on the pipeline's last stage. Gradients are computed only where grad mode and
    `requires_grad` ask for them. Extra memory beyond fp32 gradients of hidden states and head: two fp32 buffers of
    [chunk_size, V], three with a teacher; in bf16 one more for the logit gradient on CUDA, widened heads on CPU.
    Where the head has a wider `main_grad`, its gradient is added there in fp32 during backward.

    Raises ValueError for shapes or settings that do not belong together.
    """
    if (teacher_hidden_SBH is None) != (teacher_weight_VH is None):
        raise ValueError("teacher_hidden_SBH and teacher_weight_VH go together: give both or neither")
    if teacher_weight_VH is None and kd_weight:
        raise ValueError(f"kd_weight is {kd_weight}; without a teacher it must be 0")
    if teacher_weight_VH is not None and teacher_weight_VH.shape[0] != weight_VH.shape[0]:
        raise ValueError(
            f"the teacher's head has {teacher_weight_VH.shape[0]} rows a rank and the student's {weight_VH.shape[0]}; "
            "both models need one padded vocabulary"
        )
    if temperature <= 0 or chunk_size < 1:
        raise ValueError(f"temperature is {temperature} and chunk_size {chunk_size}; both must be positive")
    if tp_group is not None and tp_group.size() > 1:
        if sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=tp_group)
            if teacher_hidden_SBH is not None:
                teacher_hidden_SBH = gather_from_sequence_parallel_region(teacher_hidden_SBH.detach(), group=tp_group)
        else:
            hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=tp_group)
    if not hidden_SBH.shape[:2] == labels_SB.shape == loss_mask_SB.shape:
        raise ValueError(
            f"hidden states of {tuple(hidden_SBH.shape[:2])}, labels of {tuple(labels_SB.shape)} and a loss mask of "
            f"{tuple(loss_mask_SB.shape)}: [sequence, batch] must agree"
        )
    teacher = None
    if teacher_hidden_SBH is not None and teacher_weight_VH is not None:
        teacher = _Model(teacher_hidden_SBH.detach().flatten(0, 1), teacher_weight_VH.detach())
    mask_N = loss_mask_SB.detach().float().flatten()
    shard = VocabularyShard.of(weight_VH.shape[0], vocab_size, tp_group)
    needed = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_SBH, weight_VH)]
    objective = _Objective(shard, temperature, lm_weight, kd_weight, chunk_size, any(needed))
    loss, lm_loss, kd_loss, token_loss_N = _LogitLoss.apply(
        hidden_SBH.flatten(0, 1), weight_VH, teacher, labels_SB.flatten(), mask_N, objective, needed
    )
    return LogitLossOutput(loss, lm_loss, kd_loss, mask_N.sum(), token_loss_N.view(labels_SB.shape))
