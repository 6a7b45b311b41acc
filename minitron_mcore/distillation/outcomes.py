"""Divergences over few outcomes: K token ids of the teacher, and one bucket of all other ids.

With q̂ the student's softmax, q the K + 1 outcomes' probabilities under it, D the divergence and d_i = dD / dq_i, the
gradient in the student's logit (over the temperature) of column j is q̂_j (d_bucket(j) - sum_i q_i d_i): one number a
token for every column of the tail, and K single ones.

Legend: C tokens of a chunk, K outcomes, V this shard's columns, R shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_mcore.distillation.divergences import Divergence, log_mixture_ratios, log_softmax, log_softmax_

# Stands for a probability of 0 in a logarithm or a quotient.
_TINY = 1e-37


def order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order by value, fp32, and among equal values the lower id first (as the larger key)."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.long() << 32) | (0xFFFFFFFF - ids)


def top_of_shard(logits_CV: Tensor, *, count: int) -> dict[str, Tensor]:
    """The `count` largest logits of this shard and their columns, [C, count] each; the lower column of equal ones."""
    columns = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    keys = order_keys(logits_CV, columns.expand_as(logits_CV)).topk(count, dim=-1).values
    columns_CK = 0xFFFFFFFF - (keys & 0xFFFFFFFF)
    return {"values": logits_CV.gather(1, columns_CK), "columns": columns_CK}


def top_of_all(values_RKC: Tensor, ids_RKC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """From every shard's largest: the `count` largest of all, values (fp32) and ids (int64), [C, count] each."""
    values, ids = (part.flatten(0, 1).t().contiguous() for part in (values_RKC.float(), ids_RKC.long()))
    chosen = order_keys(values, ids).topk(count, dim=-1).indices
    return values.gather(1, chosen), ids.gather(1, chosen)


def selected_logits(x_CV: Tensor, column_CK: Tensor, here_CK: Tensor) -> Tensor:
    """The selected logits that lie on this shard, 0 for the others, [C, K]: the sum over shards has them all."""
    return x_CV.gather(1, column_CK).masked_fill(~here_CK, 0.0)


def _clear_(values_CV: Tensor, column_CK: Tensor, here_CK: Tensor) -> Tensor:
    """Set the selected columns to exactly zero. (A plain scatter would hit column 0 for the ids elsewhere.)"""
    return values_CV.scatter_add_(1, column_CK, -selected_logits(values_CV, column_CK, here_CK))


def tail_probability(
    x_CV: Tensor, maximum_C: Tensor, log_sum_C: Tensor, column_CK: Tensor, here_CK: Tensor
) -> dict[str, Tensor]:
    """This shard's probability outside the selected ids, [C]; summed, since 1 - the selected ones would cancel."""
    probability_CV = log_softmax(x_CV, maximum_C.unsqueeze(1), log_sum_C.unsqueeze(1)).exp_()
    return {"tail": _clear_(probability_CV, column_CK, here_CK).sum(-1)}


def outcome_gradient_(
    x_CV: Tensor,
    maximum_C: Tensor,
    log_sum_C: Tensor,
    tail_C: Tensor,
    selected_CK: Tensor,
    column_CK: Tensor,
    here_CK: Tensor,
) -> None:
    """Overwrite x, the student's logits over T, with the gradient in them: `selected` at the selected ids, `tail` times
    the student's softmax elsewhere."""
    log_softmax_(x_CV, maximum_C.unsqueeze(1), log_sum_C.unsqueeze(1)).exp_().mul_(tail_C.unsqueeze(1))
    _clear_(x_CV, column_CK, here_CK).scatter_add_(1, column_CK, selected_CK.masked_fill(~here_CK, 0.0))


def outcome_divergence(
    log_p: Tensor, log_q: Tensor, p_tail: Tensor, q_tail: Tensor, used: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of each token, [C], and the `tail` [C] and `selected` [C, K] of its gradient, from logarithms of the K
    outcomes' probabilities under teacher and student, [C, K], and the tail's probabilities, [C]; `used`, bool [C, K],
    leaves slots out. All fp64."""
    tails = torch.stack((p_tail, q_tail))
    log_tails = tails.clamp_min(_TINY).log_()
    p = torch.cat((log_p.exp().masked_fill(~used, 0.0), p_tail.unsqueeze(1)), 1)
    q = torch.cat((log_q.exp().masked_fill(~used, 0.0), q_tail.unsqueeze(1)), 1)
    # Where q is nearly 1 at one outcome, d there and its mean cancel down to the rest of q: its sum must be 1 exactly.
    q = q / q.sum(-1, keepdim=True)
    tail_ratio = (log_tails[0] - log_tails[1]).unsqueeze(1)
    ratio = torch.cat(((log_p - log_q).masked_fill(~used, 0.0), tail_ratio), 1)
    if divergence.name == "forward_kl":
        value = (p * ratio).sum(-1)
        q_d, tail_d = -p, -p_tail / q_tail.clamp_min(_TINY)
    elif divergence.name == "reverse_kl":
        value = -(q * ratio).sum(-1)
        q_d, tail_d = -q * ratio, -ratio[:, -1]
    else:
        over_q, over_p = log_mixture_ratios(ratio, divergence.mix)
        student = 1.0 - divergence.mix
        value = -(divergence.mix * p * over_p + student * q * over_q).sum(-1)
        q_d, tail_d = -student * q * over_q, -student * over_q[:, -1]
    total = q_d.sum(-1, keepdim=True)
    return value * divergence.value_scale, tail_d - total.squeeze(1), (q_d - q * total)[:, :-1]
