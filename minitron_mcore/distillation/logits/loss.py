"""Next-token loss and distillation loss from final hidden states, over vocabulary shards, without ever holding logits.

One sweep over the tokens by chunks computes the losses and, where gradients are wanted, these too. Products take the
parameters' type with fp32 output; statistics, losses and logit gradients are fp32. The same sweep serves next-token
training (no teacher), evaluation (no gradients) and distillation. For a token with student logits z, teacher logits
z_t and label y the loss is

    lm_weight (logsumexp(z) - z[y]) + kd_weight D(z_t, z)

with D of divergences.py, or of outcomes.py where the teacher is given by few outcomes.

Gradients are computed only where grad mode and `requires_grad` ask for them. Where the head has an fp32 `main_grad`,
its gradient is added there: during forward, and then `loss` must enter the trained loss with factor 1 (backward
checks), or with `recompute` during backward. Extra memory beyond the gradients: one fp32 buffer of [chunk, V] for each
model; in bf16 one more for the logit gradient on CUDA, widened heads on CPU.

A chunk is: the products that give its logits; what chunk.py makes of them, the losses and the logits' gradient in their
place; the two products with it. On the CPU an elementwise pass goes over as many rows at a time as stay in cache; on
CUDA it is compiled to one kernel.

Over several shards the logits of a large enough chunk come in two halves, so that a half's collective runs beside
products: the first one's beside the second's logits, the second's beside the student's logits of the next chunk's first
half. These go to where the first half's teacher logits were, which nothing needs any more: the two buffers change roles
from chunk to chunk, and nothing is held for the overlap. The products with the gradient are the whole chunk's.

Legend: S sequence, B batch, N = S * B tokens, C tokens of a chunk, H hidden size, V this rank's vocabulary shard, K
outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from minitron_mcore.distillation.config import LEAST_CHUNK, default_chunk_tokens
from minitron_mcore.distillation.logits.chunk import Found, Steps, Target, losses_by_steps
from minitron_mcore.distillation.logits.settings import LossSettings
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from minitron_mcore.errors import InputError
from minitron_mcore.model.vocab_parallel import ABSENT, VocabularyShard, add_product_, product_, product_operand

# The next-token loss; with a teacher the divergence, temperature² included; if reported the teacher's next-token loss,
# where it is in memory, and the weight of the tokens of one likeliest id (of equals the lowest) in both models.
REPORTED = ("lm", "kd", "teacher_lm", "agreement")
Wanted = tuple[bool, bool]  # of hidden states and head: whether their gradients are


class Model(NamedTuple):
    """A model's final hidden states, [S, B, H] or in the sweep [N, H], and its shard of the output head, [V, H]."""

    hidden: Tensor
    weight: Tensor

    def flat(self) -> Model:
        """The tokens along one axis, without a gradient."""
        return Model(self.hidden.detach().flatten(0, 1), self.weight.detach())


# Losses of each token, [N] fp32 each, by name; this shard's part of the hidden states' gradient, [N, H] in their type;
# the head's, fp32 [V, H], None also where it was added to the head's fp32 `main_grad`.
Swept = tuple[dict[str, Tensor], Tensor | None, Tensor | None]
Run = Callable[..., Swept]
_ADDED = "has added the head's gradient to main_grad: the loss needs the factor 1, or recompute=True for any other"


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
    hidden_SBH = on_every_shard(hidden_SBH, tp_group, sequence_parallel)
    if isinstance(teacher, Model):
        teacher = Model(on_every_shard(teacher.hidden.detach(), tp_group, sequence_parallel), teacher.weight)
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
    losses = dict(zip(REPORTED, by_token, strict=True))
    sums = {name: torch.dot(loss_N, mask_N) for name, loss_N in losses.items() if loss_N is not None}
    return LogitLossOutput(loss, sums, mask_N.sum(), by_token[0].view(labels_SB.shape))


def on_every_shard(hidden_SBH: Tensor, tp_group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Final hidden states of the full sequence, whose gradient is the sum of what every vocabulary shard has of it."""
    if tp_group is None or tp_group.size() == 1:
        return hidden_SBH
    split = gather_from_sequence_parallel_region if sequence_parallel else copy_to_tensor_model_parallel_region
    return split(hidden_SBH, group=tp_group)


def sweep(
    student: Model,
    teacher: Model | SparseTarget | None,
    labels_N: Tensor,
    weight_N: Tensor,
    settings: LossSettings,
    shard: VocabularyShard,
    wanted: Wanted,
) -> Swept:
    """Every token's losses (`losses_and_gradient`) and, if `wanted`, the gradients of hidden states and head.
    weight_N: fp32, each token's weight in both gradients, besides the settings' two weights."""
    grad_hidden_NH = torch.empty_like(student.hidden) if wanted[0] else None
    grad_weight_VH = own_VH = None
    if wanted[1]:
        grad_weight_VH = getattr(student.weight, "main_grad", None)  # Megatron's DDP keeps it
        if grad_weight_VH is None or grad_weight_VH.dtype != torch.float32:
            grad_weight_VH = own_VH = torch.zeros_like(student.weight, dtype=torch.float32)
    tokens = labels_N.shape[0]
    chunk_size = min(settings.chunk_tokens or default_chunk_tokens(tokens), tokens)
    # Halves of fewer tokens would cost the products more than a collective takes.
    halves = 2 if shard.group is not None and chunk_size >= 2 * LEAST_CHUNK else 1
    products = [_Head.of(model, shard) for model in (student, teacher) if isinstance(model, Model)]
    buffers = list(weight_N.new_empty(len(products), chunk_size, shard.width))
    losses: dict[str, Tensor] = {}
    chunks = [_parts(start, min(start + chunk_size, tokens), halves) for start in range(0, tokens, chunk_size)]
    ahead_CV: Tensor | None = None  # the student's logits of a chunk's first part
    for number, parts in enumerate(chunks):
        chunk, running = slice(parts[0].start, parts[-1].stop), []
        for rows in parts:
            here = slice(rows.start - chunk.start, rows.stop - chunk.start)
            x_CV = products[0].logits(rows, buffers[0][here]) if ahead_CV is None else ahead_CV
            ahead_CV = None
            target: Target = teacher.rows(rows) if isinstance(teacher, SparseTarget) else None
            if len(products) == 2:
                target = products[1].logits(rows, buffers[1][here])
            steps = losses_by_steps(x_CV, target, labels_N[rows], settings, shard, any(wanted))
            next(steps)
            running.append((rows, steps))
        for rows, found in _finished(running):
            for name, value_C in found.items():
                losses.setdefault(name, weight_N.new_empty(tokens))[rows] = value_C.float()
            if len(products) == 2 and rows is not parts[-1] and number + 1 < len(chunks):
                following = chunks[number + 1][0]
                ahead_CV = products[0].logits(following, buffers[1][: following.stop - following.start])
        if any(wanted):
            products[0].gradients_(chunk, buffers[0], weight_N, settings.scale, grad_hidden_NH, grad_weight_VH)
        if ahead_CV is not None:
            buffers.reverse()
    return losses, grad_hidden_NH, own_VH


class _Head(NamedTuple):
    """A model's products of some tokens, `rows` of all."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], as products take it
    dtype: torch.dtype  # of the model, to which hidden states are rounded
    absent: bool

    @classmethod
    def of(cls, model: Model, shard: VocabularyShard) -> _Head:
        return cls(model.hidden, product_operand(model.weight[: shard.width]), model.weight.dtype, shard.absent)

    def states(self, rows: slice) -> Tensor:
        return product_operand(self.hidden[rows].to(self.dtype))

    def logits(self, rows: slice, out_CV: Tensor) -> Tensor:
        product_(out_CV, self.states(rows), self.weight.t())
        return out_CV.fill_(ABSENT) if self.absent else out_CV

    def gradients_(
        self,
        rows: slice,
        gradient_CV: Tensor,
        weight_N: Tensor,
        scale: float,
        hidden_NH: Tensor | None,
        head_VH: Tensor | None,
    ) -> None:
        """Set that of the hidden states and add to the head's, from the logits' before weights and scale."""
        gradient_CV = gradient_CV[: rows.stop - rows.start].to(self.weight.dtype)
        # The tokens' weights go to the narrow factors of the products instead of the [C, V] gradient.
        weight_C1 = weight_N[rows].unsqueeze(1) * scale
        if hidden_NH is not None:
            part_CH = weight_N.new_empty(gradient_CV.shape[0], hidden_NH.shape[1])
            hidden_NH[rows] = product_(part_CH, gradient_CV, self.weight).mul_(weight_C1)
        if head_VH is not None:
            weighted_CH = (self.states(rows) * weight_C1).to(self.weight.dtype)
            add_product_(head_VH[: self.weight.shape[0]], gradient_CV.t(), weighted_CH)


def _parts(start: int, stop: int, count: int) -> list[slice]:
    """These tokens in at most so many parts, the first ones no smaller than the others."""
    each = -(-(stop - start) // count)
    return [slice(begin, min(begin + each, stop)) for begin in range(start, stop, each)]


def _finished(running: list[tuple[slice, Steps[tuple[Found, Tensor | None]]]]) -> Iterator[tuple[slice, Found]]:
    """The losses of each part, as soon as it has them: the parts take their steps in turn, so that one's collective is
    under way while another works."""
    while running:
        rows, steps = running.pop(0)
        try:
            next(steps)
        except StopIteration as end:
            yield rows, end.value[0]
        else:
            running.append((rows, steps))


class _LogitLoss(torch.autograd.Function):
    """Where the head has a `main_grad`, autograd gets no gradient for it (Megatron's hook then adds nothing, but still
    adds the embedding's where that is the same parameter; overlapped, runtime/overlap.py tells it so)."""

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
            torch._assert_async(grad_loss == 1, f"logit_loss {_ADDED}")
        else:
            grads = [None if grad is None else grad.mul_(grad_loss) for grad in grads]
        return grads[0], None if grads[1] is None else grads[1].to(ctx.weight_dtype), *[None] * 4
