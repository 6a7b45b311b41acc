"""Divergences over few outcomes: K token ids of the teacher, and one bucket of all other ids.

With q the K + 1 outcomes' probabilities under the student, D the divergence and d_i = dD / dq_i, the gradient in the
logarithm of outcome i's probability is g_i = q_i (d_i - sum_j q_j d_j). It is that in the student's logit (over the
temperature) of each of the K ids; the tail's is shared out by the student's softmax over the tail's ids alone. So no
number of it is larger than the probabilities and ratios are, however improbable the tail.

Legend: C tokens of a chunk, K outcomes, V this shard's columns, R shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_mcore.distillation.logits.divergences import log_mixture_ratios, log_softmax_
from minitron_mcore.distillation.logits.settings import LossSettings

# Stands for minus infinity where that would give NaN in a difference or in a product with 0.
LOWEST = -1e30


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


def tail_statistics(x_CV: Tensor, column_CK: Tensor, here_CK: Tensor) -> dict[str, Tensor]:
    """Of this shard's logits outside the selected ids, [C] each: the largest, and the sum of exp(logit - largest).

    Not from the probabilities: under a sharp distribution the tail's is too small for fp32, or for 1 minus the selected
    ones, while its logarithm is an ordinary number.
    """
    # Added, not set: ids that lie on other shards point at column 0.
    others_CV = x_CV.scatter_add(1, column_CK, torch.where(here_CK, -torch.inf, 0.0).to(x_CV))
    maximum_C = others_CV.amax(-1).clamp_min(LOWEST)
    return {"tail_maximum": maximum_C, "tail_sum": others_CV.sub_(maximum_C.unsqueeze(1)).exp_().sum(-1)}


def outcome_gradient_(x_CV: Tensor, found: dict[str, Tensor]) -> None:
    """Overwrite x, the student's logits over T, with the gradient in them: `selected` [C, K] at the ids that lie `here`
    in `column`, elsewhere `outcome_tail` [C], shared out by the student's softmax over the tail's ids."""
    column_CK, here_CK = found["column"], found["here"]
    exponent_CV = log_softmax_(x_CV, found["tail_maximum"].unsqueeze(1), found["tail_log_sum"].unsqueeze(1))
    # Above 0: selected ids, which are set below.
    exponent_CV.clamp_max_(0.0).exp_().mul_(found["outcome_tail"].unsqueeze(1))
    # A plain scatter would hit column 0 for the ids elsewhere.
    x_CV.scatter_add_(1, column_CK, -selected_logits(x_CV, column_CK, here_CK))
    x_CV.scatter_add_(1, column_CK, found["selected"].masked_fill(~here_CK, 0.0))


def outcome_divergence(
    log_p: Tensor, log_q: Tensor, log_p_tail: Tensor, log_q_tail: Tensor, used: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of each token, [C], and its gradient in the outcomes' logarithms of q: of the tail, [C], and of the K
    selected ones, [C, K]. From logarithms of the K outcomes' probabilities under teacher and student, [C, K], and of
    the tail's, [C], minus infinity where there is none; `used`, bool [C, K], leaves slots out. All fp64."""
    log_p = torch.cat((log_p.masked_fill(~used, -torch.inf), log_p_tail.unsqueeze(1)), 1)
    log_q = torch.cat((log_q.masked_fill(~used, -torch.inf), log_q_tail.unsqueeze(1)), 1)
    # An outcome that neither model has does not count; one that the teacher alone lacks gets a finite ratio.
    ratio = (log_p - log_q).masked_fill(log_q.isneginf(), 0.0).clamp_min(LOWEST)
    p, q = log_p.exp(), log_q.exp()
    # Where q is nearly 1 at one outcome, d there and its mean cancel down to the rest of q: its sum must be 1 exactly.
    q = q / q.sum(-1, keepdim=True)
    if settings.divergence == "forward_kl":
        value = (p * ratio).sum(-1)
        q_d = -p
    elif settings.divergence == "reverse_kl":
        value = -(q * ratio).sum(-1)
        q_d = -q * ratio
    else:
        over_q, over_p = log_mixture_ratios(ratio, settings.jensen_shannon_mix)
        student = 1.0 - settings.jensen_shannon_mix
        value = -(settings.jensen_shannon_mix * p * over_p + student * q * over_q).sum(-1)
        q_d = -student * q * over_q
    gradient = q_d - q * q_d.sum(-1, keepdim=True)
    return value * settings.divisor**2, gradient[:, -1], gradient[:, :-1]
