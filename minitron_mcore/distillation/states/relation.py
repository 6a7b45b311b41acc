"""Attention relations of MiniLMv2 (arXiv 2012.15828, section 3.1): how alike a token's query is to the queries of
others, and so for keys and values; compared by KL between teacher and student.

All queries of a token are put side by side and cut anew into relation heads, whose number is the same in both models
whatever theirs are; likewise keys and values. For relation head a of width d, of queries X [s, d] say,

    R = softmax(X Xᵀ / √d)       row by row, over the tokens up to the row's own
    loss of a token i = mean over a, and over queries, keys and values, of KL(R_teacher[i] || R_student[i])

The paper's models look both ways; these are causal, so a token is compared with those it attends to, and its loss does
not depend on what comes after it. Queries and keys are taken as projected, before they are rotated or normed.

Legend: s sequence, b batch, A relation heads of this tensor-parallel rank, d width of one, R rows of a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minitron_mcore.architecture import Architecture
from minitron_mcore.distillation.config import RELATION_BUFFER
from minitron_mcore.distillation.states.token_loss import WithGradient

_ABSENT = -1e30


def _split_qkv(mixed_SBC: Tensor, architecture: Architecture, heads: int) -> list[Tensor]:
    """linear_qkv's output [s, b, g (q + 2) e], groups side by side -> queries, keys and values, of g q e, g e and g e
    channels, cut into relation heads: [b, A, s, d] each; g query groups of this rank, q query heads in each.
    """
    per_group = architecture.num_attention_heads // architecture.num_query_groups
    groups = mixed_SBC.unflatten(-1, (-1, per_group + 2, architecture.kv_channels))
    parts = groups.split((per_group, 1, 1), dim=-2)
    return [part.flatten(2).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for part in parts]


def relation_loss(
    student_SBC: Tensor,
    teacher_SBC: Tensor,
    mask_SB: Tensor,
    models: Sequence[Architecture],
    heads: int,
    ranks: int,
    segments: Sequence[int] | None = None,
) -> Tensor:
    """This tensor-parallel rank's share of the loss, fp32: its tokens' losses, times `mask_SB`, added up.

    student_SBC, teacher_SBC: outputs of linear_qkv for the whole sequence, this rank's contiguous part of the channels;
    `models`: student and teacher; `heads` relation heads in all, shared out over so many tensor-parallel `ranks`. The
    shares of all ranks add up to the loss; the gradient, of the student alone, is that of the rank's own channels.
    segments: lengths of what attention keeps apart in the sequence; None: nothing.
    """
    sweep = _sweep if segments is None else partial(_by_segment, lengths=list(segments))
    mask_BS = mask_SB.transpose(0, 1).float()
    total = student_SBC.new_zeros((), dtype=torch.float32)
    given = zip((student_SBC, teacher_SBC), models, strict=True)
    sides = [_split_qkv(mixed_SBC, model, heads // ranks) for mixed_SBC, model in given]
    for student_BASD, teacher_BASD in zip(*sides, strict=True):
        work = partial(sweep, teacher_BASD=teacher_BASD, mask_BS=mask_BS)
        total = total + WithGradient.apply(student_BASD, work)
    return total / (3 * heads)


def _by_segment(
    student_BASD: Tensor, wants_gradient: bool, teacher_BASD: Tensor, mask_BS: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor | None]:
    """`_sweep` over each segment by itself: a token is compared with those of its own."""
    parts = student_BASD.split(lengths, 2), teacher_BASD.split(lengths, 2), mask_BS.split(lengths, 1)
    found = [_sweep(student, wants_gradient, *others) for student, *others in zip(*parts, strict=True)]
    gradients = [gradient for _, gradient in found if gradient is not None]
    return torch.stack([loss for loss, _ in found]).sum(), torch.cat(gradients, 2) if gradients else None


def _sweep(
    student_BASD: Tensor, wants_gradient: bool, teacher_BASD: Tensor, mask_BS: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Sum over b, A and s of the rows' KL, each times its token's mask; the gradient in the same sweep over rows."""
    batch, heads, length, width = student_BASD.shape
    student_BASD, teacher_BASD = student_BASD.float().contiguous(), teacher_BASD.float().contiguous()
    scale, teacher_scale = 1 / math.sqrt(width), 1 / math.sqrt(teacher_BASD.shape[-1])
    gradient = torch.zeros_like(student_BASD) if wants_gradient else None
    loss = mask_BS.new_zeros(())
    rows = max(1, min(length, RELATION_BUFFER // (batch * heads * length)))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        here, past = slice(start, stop), slice(0, stop)
        row_numbers = torch.arange(start, stop, device=mask_BS.device)
        later_RS = torch.arange(stop, device=mask_BS.device) > row_numbers.unsqueeze(1)
        relations = []
        for states, factor in ((student_BASD, scale), (teacher_BASD, teacher_scale)):
            scores_BARS = (states[:, :, here] @ states[:, :, past].transpose(2, 3)).mul_(factor)
            relations.append(torch.log_softmax(scores_BARS.masked_fill_(later_RS, _ABSENT), dim=-1))
        student_BARS, teacher_BARS = relations
        target_BARS = teacher_BARS.exp()
        kl_BAR = (target_BARS * teacher_BARS.sub_(student_BARS)).sum(-1)
        mask_BAR = mask_BS[:, None, here]
        loss = loss + (kl_BAR * mask_BAR).sum()
        if gradient is not None:
            change_BARS = student_BARS.exp_().sub_(target_BARS).mul_(mask_BAR.unsqueeze(-1) * scale)
            gradient[:, :, here] += change_BARS @ student_BASD[:, :, past]
            gradient[:, :, past] += change_BARS.transpose(2, 3) @ student_BASD[:, :, here]
    return loss, gradient
