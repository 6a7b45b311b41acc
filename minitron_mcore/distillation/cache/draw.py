"""A teacher's distribution by few of its outcomes, for a cache: drawn at random, or the most probable ones.

Drawn (arXiv 2503.16870, "random sampling KD"): id v is drawn n_v times from a proposal q, and its target is
(n_v / n) p_v / q_v with n = sum of n_v, whose mean is p_v exactly. With q = p it is n_v / n. Here each n_v is a Poisson
variate of mean draws * q_v, from a random number that is a hash of (seed, sample, position, id). Given their sum n,
Poisson variates are n draws from q with replacement: only n varies, about draws ± sqrt(draws), and the targets stay
unbiased. Every id decides for itself, so no rank needs another one's logits, and a rounding that differs between
layouts changes a draw with a probability of the size of that rounding.

Legend: S sequence, B batch, H hidden size, C tokens of a chunk, of which R are still to be drawn for, V columns of this
rank's vocabulary shard, K ids a token, E ids of several tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from minitron_mcore.distillation.cache.file import Targets, has_tails
from minitron_mcore.distillation.logits.chunk import offer_top
from minitron_mcore.distillation.logits.outcomes import top_of_all
from minitron_mcore.model.vocab_parallel import ABSENT, VocabularyShard, product_, product_operand

_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # the multipliers of splitmix64's finaliser, as signed numbers
_STEP = -0x61C8864680B583EB  # 2^64 / golden ratio
_FRACTION = float(2**53)


@dataclass(frozen=True)
class _Kept:
    """Of C tokens: ids [C, K] ascending, -1 in unused slots; counts [C, K]; values fp32 [C, K]; tails fp32 [C]."""

    ids: Tensor
    counts: Tensor | None
    values: Tensor | None
    tails: Tensor | None = None


def make_targets(
    hidden_SBH: Tensor,
    weight_VH: Tensor,
    samples_B: Tensor,
    settings: dict[str, Any],
    *,
    tp_group: dist.ProcessGroup,
    sequence_parallel: bool = False,
    chunk_tokens: int = 128,
) -> tuple[list[Targets], Tensor]:
    """(targets of each of the B samples, on the host, the same on every rank; bool [B]: whether all its logits are
    finite).

    hidden_SBH: final hidden states, under `sequence_parallel` this rank's part of the sequence; weight_VH: this rank's
    shard of the output head; samples_B: numbers of the samples; settings: the cache's, of which these decide: method,
    vocab_size, temperature, top_k or draws, proposal_temperature and seed; chunk_tokens: tokens whose logits exist at a
    time. Called by every rank of `tp_group`, on the last stage.
    """
    if sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH.detach(), group=tp_group)
    shard = VocabularyShard.of(weight_VH.shape[0], settings["vocab_size"], tp_group)
    head_VH = product_operand(weight_VH.detach()[: shard.width])
    length = hidden_SBH.shape[0]
    logits_CV = torch.empty(min(chunk_tokens, length), shard.width, device=hidden_SBH.device)
    targets, finite = [], []
    for column, sample in enumerate(samples_B.tolist()):
        hidden_SH = hidden_SBH[:, column].to(weight_VH.dtype)
        kept, is_finite = [], []
        for start in range(0, length, chunk_tokens):
            hidden_CH = product_operand(hidden_SH[start : start + chunk_tokens].contiguous())
            chunk_CV = product_(logits_CV[: len(hidden_CH)], hidden_CH, head_VH.t())
            if shard.absent:
                chunk_CV.fill_(ABSENT)
            chunk_CV.div_(settings["temperature"])
            is_finite.append(shard_logsumexp(chunk_CV, shard).isfinite().all())
            if settings["method"] == "top_k":
                kept.append(most_probable(chunk_CV, shard, settings["top_k"], with_tail=has_tails(settings)))
            else:
                keys_C = token_keys(settings["seed"], sample, start, len(chunk_CV), chunk_CV.device)
                kept.append(draw(chunk_CV, shard, settings["draws"], settings["proposal_temperature"], keys_C))
        targets.append(_on_host(kept))
        finite.append(torch.stack(is_finite).all())
    return targets, torch.stack(finite)


def shard_logsumexp(logits_CV: Tensor, shard: VocabularyShard) -> Tensor:
    """logsumexp over the whole vocabulary, float64 [C]."""
    return shard.gather(torch.logsumexp(logits_CV, dim=-1).double().unsqueeze(0))[:, 0].logsumexp(dim=0)


def most_probable(logits_CV: Tensor, shard: VocabularyShard, k: int, *, with_tail: bool = True) -> _Kept:
    """The `k` most probable ids of the vocabulary and their log-probabilities; `with_tail` that of all others together,
    from their own logits: what the k leave of 1 would be rounding where they are nearly all."""
    logsumexp_C1 = shard_logsumexp(logits_CV, shard).unsqueeze(1)
    offered = offer_top(logits_CV, k, shard)
    best_CK, ids_CK = top_of_all(shard.gather(offered["values"]), shard.gather(offered["ids"]), k)
    ids_CK, order_CK = ids_CK.sort(dim=-1)
    log_probs_CK = best_CK.gather(1, order_CK).double() - logsumexp_C1
    tails_C = None
    if with_tail:
        columns_CK, here_CK = shard.locate(ids_CK)
        # Added, not set: ids that lie on other shards point at column 0.
        others_CV = logits_CV.scatter_add(1, columns_CK, torch.where(here_CK, -torch.inf, 0.0).to(logits_CV))
        tails_C = (shard_logsumexp(others_CV, shard) - logsumexp_C1.squeeze(1)).float()
    return _Kept(ids_CK, None, log_probs_CK.float(), tails_C)


def draw(logits_CV: Tensor, shard: VocabularyShard, draws: int, proposal_temperature: float, keys_C: Tensor) -> _Kept:
    """Ids drawn at random from the proposal softmax(logits / proposal_temperature), how often, and, where that is
    another distribution than softmax(logits), log p/q. `keys_C`: int64, what the random numbers of a token follow from.

    A token that nothing was drawn for is drawn for once more: targets are unbiased given that there are any.
    """
    scaled_CV = logits_CV if proposal_temperature == 1.0 else logits_CV / proposal_temperature
    logsumexp_C = shard_logsumexp(scaled_CV, shard)
    means_CV = (scaled_CV - logsumexp_C.float().unsqueeze(1)).exp_().mul_(draws)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    open_R = logsumexp_C.isfinite().nonzero().squeeze(1)
    while len(open_R):
        again = len(open_R) < len(means_CV)
        drawn = poisson(means_CV[open_R] if again else means_CV, keys_C[open_R], shard.start, most=draws)
        found.append((open_R[drawn[0]], drawn[1], drawn[2]))
        local_R = torch.bincount(drawn[0], minlength=len(open_R))
        open_R = open_R[shard.gather(local_R.unsqueeze(0)).sum(dim=0)[0] == 0]
        keys_C = _mix(keys_C + 1)
    found.append((keys_C.new_empty(0),) * 3)
    rows_E, columns_E, counts_E = (torch.cat(parts) for parts in zip(*found, strict=True))
    order_E = rows_E.argsort(stable=True)
    rows_E, columns_E, counts_E = rows_E[order_E], columns_E[order_E], counts_E[order_E]

    in_row_C = torch.bincount(rows_E, minlength=len(means_CV))
    slots_E = torch.arange(len(rows_E), device=rows_E.device) - (in_row_C.cumsum(0) - in_row_C)[rows_E]
    widest = int(shard.gather(in_row_C.amax().view(1, 1)).amax())

    def padded(values_E: Tensor, filler: int) -> Tensor:
        values_CK = values_E.new_full((len(means_CV), widest), filler)
        values_CK[rows_E, slots_E] = values_E
        return shard.gather(values_CK.t()).permute(2, 0, 1).flatten(1)  # the ranks' side by side

    values_CK = None
    if proposal_temperature != 1.0:
        log_p_C, log_q_C = shard_logsumexp(logits_CV, shard), logsumexp_C
        difference_E = logits_CV[rows_E, columns_E].double() - scaled_CV[rows_E, columns_E].double()
        values_CK = padded((difference_E - (log_p_C - log_q_C)[rows_E]).float(), 0)
    return _Kept(padded(columns_E + shard.start, -1), padded(counts_E, 0), values_CK)


def poisson(means_RV: Tensor, keys_R: Tensor, start: int, *, most: float) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column, count) int64 [E], row by row, of every Poisson variate above zero; means at most about `most`.

    Each follows from its token's key and its id, the column + `start`, by the inverse of the distribution function.
    """
    ids_V = torch.arange(start, start + means_RV.shape[1], device=means_RV.device)
    bits_RV = _mix(keys_R.unsqueeze(1) + _mix((ids_V + 1) * _STEP))
    # Uniform in (0, 1); that it is small means that the count is large.
    uniform_RV = _shifted(bits_RV, 11).double().add_(0.5).mul_(1.0 / _FRACTION)
    rows_E, columns_E = (uniform_RV < means_RV.neg().expm1_().neg_()).nonzero(as_tuple=True)
    uniform_E, means_E = uniform_RV[rows_E, columns_E], means_RV[rows_E, columns_E].double()
    # The largest n with uniform < P(count >= n), which is the regularised incomplete gamma function of (n, mean).
    low_E = torch.ones_like(rows_E)
    high_E = torch.full_like(rows_E, int(most + 12 * math.sqrt(most)) + 40)
    for _ in range(int(high_E[:1].sum()).bit_length()):
        middle_E = (low_E + high_E) // 2
        reached_E = uniform_E < torch.special.gammainc(middle_E.double(), means_E)
        low_E = torch.where(reached_E, middle_E, low_E)
        high_E = torch.where(reached_E, high_E, middle_E)
    return rows_E, columns_E, low_E


def token_keys(seed: int, sample: int, start: int, count: int, device: torch.device) -> Tensor:
    """Keys int64 [count] of the positions from `start` on of a sample; well mixed, so that none resembles another."""
    key = _mix(_mix(torch.tensor([seed % 2**62], device=device)) + sample)
    return _mix(key + torch.arange(start, start + count, device=device))


def _mix(bits: Tensor) -> Tensor:
    """splitmix64's finaliser: of int64, every bit of the result depends on every bit."""
    bits = (bits ^ _shifted(bits, 30)).mul_(_MIX[0])
    bits ^= _shifted(bits, 27)
    bits *= _MIX[1]
    return bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in at the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _on_host(kept: list[_Kept]) -> Targets:
    """The chunks of one sample, one after another."""
    rows = []
    for part in kept:
        used_CK = part.ids >= 0
        flat = (None if whole is None else whole[used_CK] for whole in (part.ids, part.counts, part.values))
        rows.append((used_CK.sum(dim=1), *flat, part.tails))
    columns = (None if column[0] is None else torch.cat(column).cpu().numpy() for column in zip(*rows, strict=True))
    return Targets(*columns)  # type: ignore[arg-type]
