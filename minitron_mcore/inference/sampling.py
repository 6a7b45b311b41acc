"""How the next token is chosen from logits that lie over the vocabulary shards.

Legend: B rows of a batch, V columns of this rank's shard, padding included, R tensor-parallel ranks, W the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.model.vocab_parallel import VocabularyShard


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature: 0 takes the likeliest, of equal ones the lowest id. top_p: only from the
    smallest set of likeliest tokens that has at least this probability."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def choose(
    logits_BV: Tensor, shard: VocabularyShard, whose: Sequence[tuple[Sampling, int]], step: int, vocab_size: int
) -> Tensor:
    """The next token of every row, int64 [B]: the same on every tensor-parallel rank, all of which call.

    logits_BV: float32, this rank's shard; its padding is overwritten. whose: each row's sampling, and its prompt's
    number.
    """
    logits_BV[:, 0 if shard.absent else shard.width :] = -torch.inf
    sampled = [index for index, (sampling, _) in enumerate(whose) if sampling.temperature > 0]
    tokens_B = likeliest(logits_BV, shard) if len(sampled) < len(whose) else None
    if not sampled:
        assert tokens_B is not None
        return tokens_B
    rows = torch.tensor(sampled, device=logits_BV.device)
    whole_BW = shard.gather(logits_BV).transpose(0, 1).flatten(1)[rows, :vocab_size]
    drawn_B = rows.clone()
    if shard.group is None or shard.group.rank() == 0:
        draws = [uniform(sampling.seed, number, step) for sampling, number in (whose[index] for index in sampled)]
        settings = [(whose[index][0].temperature, whose[index][0].top_p) for index in sampled]
        drawn_B = draw(whole_BW, settings, draws)
    if shard.group is not None:  # sums on a GPU are not the same twice: the first rank's count
        dist.broadcast(drawn_B, dist.get_global_rank(shard.group, 0), group=shard.group)
    return drawn_B if tokens_B is None else tokens_B.index_copy(0, rows, drawn_B)


def likeliest(logits_BV: Tensor, shard: VocabularyShard) -> Tensor:
    """The id of the largest logit, of equal ones the lowest: int64 [B]. One small collective."""
    largest_B, index_B = logits_BV.max(-1)
    if shard.group is None:
        return index_B
    # In float64, which holds every id exactly.
    both_R2B = shard.gather(torch.stack([largest_B.double(), (index_B + shard.start).double()]))
    rank_B = both_R2B[:, 0].argmax(0)
    return both_R2B[:, 1].gather(0, rank_B.unsqueeze(0))[0].long()


def draw(logits_BW: Tensor, settings: Sequence[tuple[float, float]], draws: Sequence[float]) -> Tensor:
    """Where each row's number in (0, 1) falls among the probabilities, in the ids' order: int64 [B]. settings: each
    row's temperature and top_p. In float64."""
    temperatures, top_ps = zip(*settings, strict=True)
    column: Any = {"dtype": torch.float64, "device": logits_BW.device}
    probabilities_BW = (logits_BW.double() / torch.tensor(temperatures, **column).unsqueeze(1)).softmax(-1)
    if min(top_ps) < 1:
        sorted_BW, order_BW = probabilities_BW.sort(dim=-1, descending=True, stable=True)
        before_BW = sorted_BW.cumsum(-1) - sorted_BW
        kept_BW = before_BW < torch.tensor(top_ps, **column).unsqueeze(1)
        kept_BW[:, 0] = True
        probabilities_BW *= torch.zeros_like(probabilities_BW).scatter_(1, order_BW, kept_BW.double())
    reached_BW = probabilities_BW.cumsum(-1)
    aims_B1 = torch.tensor(draws, **column).unsqueeze(1) * reached_BW[:, -1:]
    return torch.searchsorted(reached_BW, aims_B1)[:, 0]


def uniform(seed: int, number: int, step: int) -> float:
    """A number in (0, 1) for a token: of the seed, the prompt's number and the step alone, on any machine."""
    digest = hashlib.blake2b(f"{seed} {number} {step}".encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52
