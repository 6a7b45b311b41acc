"""Next-token loss and distillation loss from final hidden states, over vocabulary shards, without ever holding logits.

One sweep over the tokens (sweep.py) computes the losses and, when gradients are wanted, their gradients
too. Products take the parameters' type with fp32 output; statistics, losses and logit gradients are fp32. The same
sweep serves plain next-token training (no teacher), evaluation (no gradients) and distillation.

For a token with student logits z, teacher logits z_t and label y the loss is

    lm_weight (logsumexp(z) - z[y]) + kd_weight D(z_t, z)

with D of divergences.py, or of outcomes.py where the teacher is given by few outcomes.

Legend: S sequence, B batch, N = S * B tokens, H hidden size, V this rank's vocabulary shard, K outcomes.
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

from minitron_mcore.distillation.config import default_chunk_tokens
from minitron_mcore.distillation.logits.divergences import Divergence
from minitron_mcore.distillation.logits.sparse_target import SparseTarget
from minitron_mcore.distillation.logits.sweep import Model, Objective, Outcomes, sweep
from minitron_mcore.model.vocab_parallel import VocabularyShard

REPORTED = ("lm", "kd", "teacher_lm", "agreement")


@dataclass(frozen=True)
class LogitLossOutput:
    """Sums over the tokens, each weighted by its loss mask (not means): fp32 scalars, equal on every TP rank.

    `loss` = lm_weight * lm_loss + kd_weight * kd_loss is differentiable with respect to the student's hidden states and
    head; the rest is detached. `kd_loss` includes the factor temperature² and is zero without a teacher. `num_tokens`
    is the sum of the loss mask. `token_loss`, [S, B], is each token's next-token loss without the mask.
    `teacher_lm_loss`, the teacher's own next-token loss: None where nothing is reported or the teacher is sparse.
    `top1_agreement`, the weight of the tokens whose likeliest id (of equals the lowest) is the same for both models:
    None where nothing is reported or there is no teacher.
    """

    loss: Tensor
    lm_loss: Tensor
    kd_loss: Tensor
    teacher_lm_loss: Tensor | None
    top1_agreement: Tensor | None
    num_tokens: Tensor
    token_loss: Tensor


@dataclass(frozen=True)
class _Task:
    """What a sweep needs besides the student's tensors; labels and mask are [N]."""

    teacher: Model | None
    target: Outcomes | None
    labels: Tensor
    mask: Tensor
    objective: Objective
    needs_hidden: bool
    needs_weight: bool
    recompute: bool

    @property
    def needs_gradient(self) -> bool:
        return self.needs_hidden or self.needs_weight

    def run(
        self, student: Model, weight_N: Tensor, *, gradients: bool
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Losses by token and, if asked, the gradients of hidden states (in their type) and head: of the head None
        where it has an fp32 `main_grad`, since the gradient is added to that."""
        grad_hidden = torch.empty_like(student.hidden) if gradients and self.needs_hidden else None
        grad_weight, own = None, None
        if gradients and self.needs_weight:
            grad_weight = wide_main_grad(student.weight)
            if grad_weight is None:
                own = grad_weight = torch.zeros_like(student.weight, dtype=torch.float32)
        losses = sweep(
            student, self.teacher, self.target, self.labels, self.objective, weight_N, grad_hidden, grad_weight
        )
        return losses, grad_hidden, own


def wide_main_grad(weight_VH: Tensor) -> Tensor | None:
    """The fp32 gradient buffer that Megatron's DDP keeps for a parameter, if any."""
    main_grad = getattr(weight_VH, "main_grad", None)
    return main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None


class _LogitLoss(torch.autograd.Function):
    """Where the head has a `main_grad`, autograd gets no gradient for it (Megatron's hook then adds nothing, but still
    adds the embedding's where that is the same parameter; with `overlap_grad_reduce` the hook insists on one)."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, task: _Task) -> tuple[Tensor | None, ...]:
        at_once = task.needs_gradient and not task.recompute
        student = Model(hidden_NH, weight_VH)
        losses, grad_hidden, grad_weight = task.run(student, task.mask, gradients=at_once)
        loss = task.objective.lm_weight * torch.dot(losses["lm"], task.mask)
        if "kd" in losses:
            loss = loss + task.objective.kd_weight * torch.dot(losses["kd"], task.mask)
        ctx.mark_non_differentiable(*losses.values())
        ctx.task, ctx.done, ctx.weight_dtype = task, False, weight_VH.dtype
        ctx.grads = (grad_hidden, grad_weight)
        # A gradient already added to a `main_grad` cannot be scaled any more.
        ctx.added = at_once and task.needs_weight and grad_weight is None
        if task.needs_gradient and task.recompute:
            ctx.save_for_backward(hidden_NH)
            ctx.weight_VH = weight_VH  # the parameter itself: a saved tensor comes back without `main_grad`
        return loss, *(losses.get(name) for name in REPORTED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.done:
            raise RuntimeError("backward through logit_loss a second time: its gradients are scaled in place")
        task, ctx.done = ctx.task, True
        if task.recompute:
            student = Model(ctx.saved_tensors[0], ctx.weight_VH)
            _, grad_hidden, grad_weight = task.run(student, task.mask * grad_loss, gradients=True)
            return grad_hidden, _of_parameter(grad_weight, ctx.weight_dtype), None
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        if ctx.added:
            torch._assert_async(
                grad_loss == 1,
                "logit_loss has added the head's gradient to main_grad already, so its loss must go into the trained "
                "loss with factor 1; with recompute=True any factor will do",
            )
            return grad_hidden, None, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = _of_parameter(grad_weight.mul_(grad_loss), ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def _of_parameter(grad_weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if grad_weight is None else grad_weight.to(dtype)


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
    teacher_target: SparseTarget | None = None,
    divergence: str = "forward_kl",
    jensen_shannon_mix: float = 0.5,
    temperature: float = 1.0,
    top_k: int = 0,
    recompute: bool = False,
    report: bool = True,
    sequence_parallel: bool = False,
    chunk_size: int | None = None,
) -> LogitLossOutput:
    """The training loss from final hidden states, without ever holding the logits of more than `chunk_size` tokens.

    hidden_SBH: the student's final hidden states (after the final norm), the full sequence on every TP rank, or with
        `sequence_parallel` this rank's contiguous part of it; its gradient is reduced over `tp_group` here.
    weight_VH: this rank's shard of the student's output head, [padded vocabulary / TP, H].
    labels_SB: global token ids of the full sequence; a label outside the vocabulary must have mask 0.
    loss_mask_SB: weight of each token, of the full sequence; 0 leaves a token out.
    vocab_size: the true vocabulary; head rows from there on are padding, outside every loss, with zero gradient.
    tp_group: the tensor-parallel group, over which the vocabulary is sharded; None for one rank.
    lm_weight, kd_weight: weights of the two sums in `loss`; both are reported whatever their weight.
    teacher_hidden_SBH, teacher_weight_VH: as the student's, of any width, with the same sharding; they get no gradient.
    teacher_target: in their place, few outcomes of the teacher at this temperature, of the full sequence on every
        rank. It goes with a divergence of probabilities; without a tail not with reverse_kl, which would be infinite.
    divergence, jensen_shannon_mix, temperature: see distillation/logits/divergences.py.
    top_k: compare over the teacher's top_k likeliest ids (of equals the lowest) and one bucket of all others; 0: over
        the whole vocabulary.
    recompute: the sweep once more in backward, instead of keeping gradients from forward.
    report: compute `teacher_lm_loss` and `top1_agreement` too.
    chunk_size: None for `default_chunk_tokens`.

    Called by every rank of `tp_group`, on the pipeline's last stage. Gradients are computed only where grad mode and
    `requires_grad` ask for them. Where the head has an fp32 `main_grad`, its gradient is added there: during forward,
    and then `loss` must enter the trained loss with factor 1 (backward checks), or with `recompute` during backward.
    Extra memory beyond the gradients: one fp32 buffer of [chunk_size, V] for each model; in bf16 one more for the logit
    gradient on CUDA, widened heads on CPU. Under Megatron's DDP it needs `overlap_grad_reduce` off.

    Raises ValueError for shapes or settings that do not go together."""
    distils = teacher_weight_VH is not None or teacher_target is not None
    form = Divergence.of(divergence, temperature, jensen_shannon_mix, vocab_size)
    _check_teacher(weight_VH, kd_weight, teacher_hidden_SBH, teacher_weight_VH, teacher_target)
    _check_outcomes(form, top_k, teacher_target, chunk_size)
    if tp_group is not None and tp_group.size() > 1:
        split = gather_from_sequence_parallel_region if sequence_parallel else copy_to_tensor_model_parallel_region
        hidden_SBH = split(hidden_SBH, group=tp_group)
        if teacher_hidden_SBH is not None:
            teacher_hidden_SBH = split(teacher_hidden_SBH.detach(), group=tp_group)
    if not hidden_SBH.shape[:2] == labels_SB.shape == loss_mask_SB.shape:
        raise ValueError(
            f"hidden states of {tuple(hidden_SBH.shape[:2])}, labels of {tuple(labels_SB.shape)} and a loss mask of "
            f"{tuple(loss_mask_SB.shape)}: [sequence, batch] must agree"
        )
    teacher, target = None, _outcomes(teacher_target)
    if teacher_hidden_SBH is not None and teacher_weight_VH is not None:
        teacher = Model(teacher_hidden_SBH.detach().flatten(0, 1), teacher_weight_VH.detach())
    mask_N = loss_mask_SB.detach().float().flatten()
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_SBH, weight_VH)]
    objective = Objective(
        shard=VocabularyShard.of(weight_VH.shape[0], vocab_size, tp_group),
        divergence=form if distils else Divergence.of("forward_kl", 1.0, 0.5, vocab_size),
        lm_weight=lm_weight,
        kd_weight=kd_weight,
        top_k=top_k,
        chunk_size=chunk_size or default_chunk_tokens(mask_N.shape[0]),
        report=report,
    )
    task = _Task(teacher, target, labels_SB.flatten(), mask_N, objective, wanted[0], wanted[1], recompute)
    loss, *by_token = _LogitLoss.apply(hidden_SBH.flatten(0, 1), weight_VH, task)
    return _output(loss, by_token, mask_N, labels_SB.shape)


def _outcomes(target: SparseTarget | None) -> Outcomes | None:
    if target is None:
        return None
    log_tail = None if target.log_tail is None else target.log_tail.flatten()
    return Outcomes(target.ids.flatten(0, 1), target.log_probs.flatten(0, 1), target.tail, log_tail)


def _output(loss: Tensor, by_token: list[Tensor | None], mask_N: Tensor, shape: torch.Size) -> LogitLossOutput:
    """From each token's values, [N] each in the order of REPORTED, None where one was not computed."""
    by_name = {name: loss_N for name, loss_N in zip(REPORTED, by_token, strict=True) if loss_N is not None}
    sums = {name: torch.dot(loss_N, mask_N) for name, loss_N in by_name.items()}
    return LogitLossOutput(
        loss=loss,
        lm_loss=sums["lm"],
        kd_loss=sums["kd"] if "kd" in sums else torch.zeros_like(sums["lm"]),
        teacher_lm_loss=sums.get("teacher_lm"),
        top1_agreement=sums.get("agreement"),
        num_tokens=mask_N.sum(),
        token_loss=by_name["lm"].view(shape),
    )


def _check_teacher(
    weight_VH: Tensor,
    kd_weight: float,
    teacher_hidden_SBH: Tensor | None,
    teacher_weight_VH: Tensor | None,
    teacher_target: SparseTarget | None,
) -> None:
    if (teacher_hidden_SBH is None) != (teacher_weight_VH is None):
        raise ValueError("teacher_hidden_SBH and teacher_weight_VH go together: give both or neither")
    if teacher_weight_VH is not None and teacher_target is not None:
        raise ValueError("a teacher's hidden states and a sparse target: give one of them")
    if teacher_weight_VH is None and teacher_target is None and kd_weight:
        raise ValueError(f"kd_weight is {kd_weight}; without a teacher it must be 0")
    if teacher_weight_VH is not None and teacher_weight_VH.shape[0] != weight_VH.shape[0]:
        raise ValueError(
            f"the teacher's head has {teacher_weight_VH.shape[0]} rows a rank and the student's {weight_VH.shape[0]}; "
            "both models need one padded vocabulary"
        )


def _check_outcomes(form: Divergence, top_k: int, target: SparseTarget | None, chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be positive")
    if not 0 <= top_k <= form.vocab_size:
        raise ValueError(f"top_k is {top_k}; it must be at least 0 and at most the vocabulary, {form.vocab_size}")
    if (top_k or target is not None) and not form.probabilistic:
        raise ValueError(f"divergence {form.name} compares logits; it needs the teacher's whole vocabulary")
    if target is None:
        return
    if top_k:
        raise ValueError(f"top_k is {top_k}; a sparse target has its own outcomes, so it must be 0")
    if form.name == "reverse_kl" and not target.tail:
        raise ValueError("reverse_kl is infinite where the target has weight 0: it needs a target with a tail")
