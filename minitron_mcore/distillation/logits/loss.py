"""Next-token loss and distillation loss from final hidden states, over vocabulary shards, without ever holding logits.

One sweep over the tokens (sweep.py) computes the losses and, where gradients are wanted, these too. Products take the
parameters' type with fp32 output; statistics, losses and logit gradients are fp32. The same sweep serves next-token
training (no teacher), evaluation (no gradients) and distillation. For a token with student logits z, teacher logits
z_t and label y the loss is

    lm_weight (logsumexp(z) - z[y]) + kd_weight D(z_t, z)

with D of divergences.py, or of outcomes.py where the teacher is given by few outcomes.

Gradients are computed only where grad mode and `requires_grad` ask for them. Where the head has an fp32 `main_grad`,
its gradient is added there: during forward, and then `loss` must enter the trained loss with factor 1 (backward
checks), or with `recompute` during backward. Extra memory beyond the gradients: one fp32 buffer of [chunk, V] for each
model; in bf16 one more for the logit gradient on CUDA, widened heads on CPU. Under Megatron's DDP it needs
`overlap_grad_reduce` off.

Legend: S sequence, B batch, N = S * B tokens, H hidden size, V this rank's vocabulary shard, K outcomes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from minitron_mcore.distillation.logits.sweep import Model, Swept, Wanted, sweep
from minitron_mcore.errors import InputError
from minitron_mcore.model.vocab_parallel import VocabularyShard

Run = Callable[..., Swept]
# The next-token loss; with a teacher the divergence, temperature² included; if reported the teacher's next-token loss,
# where it is in memory, and the weight of the tokens of one likeliest id (of equals the lowest) in both models.
REPORTED = ("lm", "kd", "teacher_lm", "agreement")


@dataclass(frozen=True)
class LogitLossOutput:
    """Sums over the tokens, each weighted by its loss mask (not means): fp32 scalars, equal on every TP rank."""

    loss: Tensor  # lm_weight * lm + kd_weight * kd; differentiable, all else is detached
    sums: dict[str, Tensor]  # by names of REPORTED
    num_tokens: Tensor  # sum of the loss mask
    token_loss: Tensor  # [S, B]: each token's next-token loss, without the mask


def logit_loss(
    hidden_SBH: Tensor,
    weight_VH: Tensor,
    labels_SB: Tensor,
    loss_mask_SB: Tensor,
    settings: LossSettings,
    *,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool = False,
    teacher: Model | SparseTarget | None = None,
) -> LogitLossOutput:
    """The training loss from final hidden states, without ever holding the logits of more than a chunk of tokens.

    hidden_SBH: the student's, after the final norm: the full sequence on every TP rank, or with `sequence_parallel` a
        rank's contiguous part of it. weight_VH: this rank's shard of its output head, [padded vocabulary / TP, H].
    labels_SB, loss_mask_SB: of the full sequence; a label outside the vocabulary must have mask 0.
    tp_group: over which the vocabulary is sharded; None for one rank. All its ranks call, on the last stage.
    teacher: a model of any width, sharded alike, which gets no gradient; or few of its outcomes for the full sequence.

    Raises InputError for shapes, settings and teachers that do not go together."""
    if teacher is None and settings.kd_weight:
        raise InputError("kd_weight", settings.kd_weight, "must be 0 without a teacher")
    if isinstance(teacher, SparseTarget):
        teacher.check_loss(settings)
    if isinstance(teacher, Model) and len(teacher.weight) != len(weight_VH):
        rule = f"are not the student's {len(weight_VH)}: both models need one padded vocabulary"
        raise InputError("rows of the teacher's head on a rank", len(teacher.weight), rule)
    if tp_group is not None and tp_group.size() > 1:
        split = gather_from_sequence_parallel_region if sequence_parallel else copy_to_tensor_model_parallel_region
        hidden_SBH = split(hidden_SBH, group=tp_group)
        if isinstance(teacher, Model):
            teacher = Model(split(teacher.hidden.detach(), group=tp_group), teacher.weight)
    if not hidden_SBH.shape[:2] == labels_SB.shape == loss_mask_SB.shape:
        shapes = f"labels {list(labels_SB.shape)} and loss mask {list(loss_mask_SB.shape)}"
        raise InputError("hidden states", list(hidden_SBH.shape[:2]), f"must agree with {shapes} in [sequence, batch]")
    mask_N = loss_mask_SB.detach().float().flatten()
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_SBH, weight_VH))
    run = partial(
        sweep,
        teacher=None if teacher is None else teacher.flat(),
        labels_N=labels_SB.flatten(),
        settings=settings if teacher is not None else settings.without_teacher(),
        shard=VocabularyShard.of(weight_VH.shape[0], settings.vocab_size, tp_group),
    )
    loss, *by_token = _LogitLoss.apply(hidden_SBH.flatten(0, 1), weight_VH, mask_N, settings, wanted, run)
    token_losses = zip(REPORTED, by_token, strict=True)
    sums = {name: torch.dot(loss_N, mask_N) for name, loss_N in token_losses if loss_N is not None}
    return LogitLossOutput(loss, sums, mask_N.sum(), by_token[0].view(labels_SB.shape))


class _LogitLoss(torch.autograd.Function):
    """Where the head has a `main_grad`, autograd gets no gradient for it (Megatron's hook then adds nothing, but still
    adds the embedding's where that is the same parameter; with `overlap_grad_reduce` the hook insists on one)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, mask_N: Tensor, settings: LossSettings, wanted: Wanted, run: Run
    ) -> tuple[Tensor | None, ...]:
        ctx.later = settings.recompute and any(wanted)
        model, now = Model(hidden_NH, weight_VH), (False, False) if ctx.later else wanted
        losses, *grads = run(model, weight_N=mask_N, wanted=now)
        loss = settings.lm_weight * torch.dot(losses["lm"], mask_N)
        if "kd" in losses:
            loss = loss + settings.kd_weight * torch.dot(losses["kd"], mask_N)
        ctx.mark_non_differentiable(*losses.values())
        ctx.run, ctx.wanted, ctx.grads, ctx.weight_dtype = run, wanted, grads, weight_VH.dtype
        # A gradient already added to a `main_grad` cannot be scaled any more.
        ctx.added = not ctx.later and wanted[1] and grads[1] is None
        if ctx.later:
            ctx.save_for_backward(hidden_NH, mask_N)
            ctx.weight_VH = weight_VH  # the parameter itself: a saved tensor comes back without `main_grad`
        return loss, *(losses.get(name) for name in REPORTED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("backward through logit_loss a second time: its gradients are scaled in place")
        grads, ctx.grads = ctx.grads, None
        if ctx.later:
            hidden_NH, mask_N = ctx.saved_tensors
            _, *grads = ctx.run(Model(hidden_NH, ctx.weight_VH), weight_N=mask_N * grad_loss, wanted=ctx.wanted)
        elif ctx.added:
            torch._assert_async(grad_loss == 1, _ADDED)
        else:
            grads = [None if grad is None else grad.mul_(grad_loss) for grad in grads]
        return grads[0], None if grads[1] is None else grads[1].to(ctx.weight_dtype), *[None] * 4


_ADDED = (
    "logit_loss has added the head's gradient to main_grad already, so its loss must go into the trained loss with "
    "factor 1; with recompute=True any factor will do"
)
