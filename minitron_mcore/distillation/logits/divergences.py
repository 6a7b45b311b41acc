"""Divergences between the teacher's and the student's logits over the whole vocabulary, one vocabulary shard at a time.

Each takes two passes over a chunk (passes.py): one leaves some numbers per token, which are gathered over the shards;
`gradient_` is elementwise in what was gathered. Jensen-Shannon needs `mixture_statistics` between the two.

Legend: C tokens of a chunk, V this shard's columns. x = z / T is the student's logits over the temperature, y the
teacher's; q = softmax(x), p = softmax(y); b the mix. Values and their gradients in z (the student's raw logits):

    forward_kl       T² sum p log(p / q)                                  T (q - p)
    reverse_kl       T² sum q log(q / p)                                  T q (log(q / p) - sum q log(q / p))
    jensen_shannon   T² (b KL(p || m) + (1 - b) KL(q || m)),              T (1 - b) q (log(q / m) - KL(q || m))
                     m = b p + (1 - b) q
    mse              mean over the true vocabulary of (z - z_t)²          2 (z - z_t) / vocabulary
    cosine           1 - z.z_t / (|z| |z_t|)                              cos z / |z|² - z_t / (|z| |z_t|)

Jensen-Shannon goes to 0 as b goes to 0 or 1; divided by b it goes to forward_kl at 0, divided by 1 - b to reverse_kl at
1. The factor T² keeps the gradient's size over temperatures (arXiv 1503.02531, section 2). The squared error of logits
over T, times T², is that of the logits, and a cosine has no scale: the temperature changes neither mse nor cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_mcore.distillation.logits.settings import LossSettings

# If all logits of a model are 0, the cosine is 0 / 0.
_SMALLEST_NORM = 1e-20
_BLOCK = 256


def maximum_and_column(x_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum and its column, the lowest if there are several, [C] each. On the CPU one block of the row is
    searched for the column, because torch's own search goes entry by entry."""
    blocks, rest = divmod(x_CV.shape[1], _BLOCK)
    if x_CV.is_cuda or blocks < 2:
        return torch.max(x_CV, -1)
    blocked = x_CV[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    maximum_C, block_C = blocked.amax(-1).max(-1)
    chosen = blocked.gather(1, block_C.view(-1, 1, 1).expand(-1, 1, _BLOCK)).squeeze(1)
    column_C = block_C * _BLOCK + chosen.max(-1).indices
    if rest:
        rest_C, rest_column_C = x_CV[:, -rest:].max(-1)
        column_C = torch.where(rest_C > maximum_C, rest_column_C + blocks * _BLOCK, column_C)
        maximum_C = torch.maximum(maximum_C, rest_C)
    return maximum_C, column_C


def softmax_statistics(
    x_CV: Tensor, temperature: float, top: bool, *, out: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """[C] each: `maximum`; `sum` of exp(x - maximum); `plain_sum`, the same at temperature 1; `top`, the column of the
    maximum (the lowest of several), if asked. And exp(x - maximum) itself, [C, V], in `out`, which may be x."""
    found: dict[str, Tensor] = {}
    if top:
        found["maximum"], column_C = maximum_and_column(x_CV)
        found["top"] = column_C.float()
    else:
        found["maximum"] = x_CV.amax(-1)
    maximum_C1 = found["maximum"].unsqueeze(1)
    exponent_CV = torch.sub(x_CV, maximum_C1, out=out)
    if temperature != 1.0:
        found["plain_sum"] = (exponent_CV * temperature).exp_().sum(-1)
    exponential_CV = exponent_CV.exp_()
    found["sum"] = exponential_CV.sum(-1)
    return found, exponential_CV


def log_softmax(x_CV: Tensor, maximum_C1: Tensor, log_sum_C1: Tensor) -> Tensor:
    """From the vocabulary's largest logit and the logarithm of its sum of exp(x - maximum). In two steps: the first has
    no rounding error near the maximum, where one with logsumexp would have that of a number as large as the logits."""
    return (x_CV - maximum_C1).sub_(log_sum_C1)


def log_softmax_(x_CV: Tensor, maximum_C1: Tensor, log_sum_C1: Tensor) -> Tensor:
    return x_CV.sub_(maximum_C1).sub_(log_sum_C1)


def cross_statistics(x_CV: Tensor, y_CV: Tensor, settings: LossSettings) -> dict[str, Tensor]:
    """What mse and cosine need on this shard, [C] each."""
    if settings.divergence == "mse":
        return {"cross": (x_CV - y_CV).square_().sum(-1)}
    if settings.divergence == "cosine":
        return {
            "cross": (x_CV * y_CV).sum(-1),
            "square": x_CV.square().sum(-1),
            "teacher_square": y_CV.square().sum(-1),
        }
    return {}


def log_mixture_ratios(r: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """log(m / q) and log(m / p) from r = log(p / q); both exactly 0 where r is, and nothing overflows."""
    shares = torch.where(r < 0, mix, 1.0 - mix)
    bent = r.abs().neg_().expm1_().mul_(shares).log1p_()
    return r.clamp_min(0.0).add_(bent), r.neg().clamp_min_(0.0).add_(bent)


def mixture_statistics(x_CV: Tensor, y_CV: Tensor, found: dict[str, Tensor], *, mix: float) -> dict[str, Tensor]:
    """This shard's part of KL(p || m) and KL(q || m), [C] each. found: as `gradient_` takes it, but [C] each."""
    log_q_CV = log_softmax(x_CV, found["maximum"].unsqueeze(1), found["log_sum"].unsqueeze(1))
    log_p_CV = log_softmax(y_CV, found["teacher_maximum"].unsqueeze(1), found["teacher_log_sum"].unsqueeze(1))
    over_q_CV, over_p_CV = log_mixture_ratios(log_p_CV - log_q_CV, mix)
    return {
        "teacher_to_mixture": -(over_p_CV.mul_(log_p_CV.exp_())).sum(-1),
        "student_to_mixture": -(over_q_CV.mul_(log_q_CV.exp_())).sum(-1),
    }


def divergence_value(found: dict[str, Tensor], settings: LossSettings) -> Tensor:
    """The divergence of each token, [C], from quantities over the whole vocabulary, [C] each."""
    name, mix = settings.divergence, settings.jensen_shannon_mix
    if name == "mse":
        return found["cross"] / settings.vocab_size
    if name == "cosine":
        return 1.0 - found["cross"] * found["inverse_norms"]
    if name == "jensen_shannon":
        value_C = mix * found["teacher_to_mixture"] + (1.0 - mix) * found["student_to_mixture"]
    else:
        gap_C = found["logsumexp"] - found["teacher_logsumexp"]
        value_C = found["cross"] + (gap_C if name == "forward_kl" else -gap_C)
    return value_C * settings.divisor**2


def inverse_norms(square_C: Tensor, teacher_square_C: Tensor) -> Tensor:
    return (square_C * teacher_square_C).clamp_min_(_SMALLEST_NORM**2).rsqrt_()


def gradient_(x_CV: Tensor, y_CV: Tensor, found: dict[str, Tensor], settings: LossSettings) -> None:
    """Overwrite x with the gradient in the raw logits divided by the temperature; y is overwritten too.

    found: quantities over the whole vocabulary, fp32, [C, 1] each.
    """
    name = settings.divergence
    if name == "mse":
        x_CV.sub_(y_CV).mul_(2.0 / settings.vocab_size)
        return
    if name == "cosine":
        cosine = found["cross"] * found["inverse_norms"]
        x_CV.mul_(cosine / found["square"].clamp_min(_SMALLEST_NORM)).sub_(y_CV.mul_(found["inverse_norms"]))
        return
    if name == "reverse_kl":
        torch.sub(x_CV, y_CV, out=y_CV)
        log_softmax_(x_CV, found["maximum"], found["log_sum"]).exp_().mul_(y_CV.sub_(found["cross"]))
        return
    log_softmax_(x_CV, found["maximum"], found["log_sum"])
    log_softmax_(y_CV, found["teacher_maximum"], found["teacher_log_sum"])
    if name == "forward_kl":
        x_CV.exp_().sub_(y_CV.exp_())
    else:
        over_q_CV, _ = log_mixture_ratios(y_CV.sub_(x_CV), settings.jensen_shannon_mix)
        x_CV.exp_().mul_(over_q_CV.add_(found["student_to_mixture"])).mul_(settings.jensen_shannon_mix - 1.0)
