"""Softmax statistics and matrix products over vocabulary shards.

Legend: C tokens of a chunk, R tensor-parallel ranks, V_r columns of one shard, K statistics a token, h hidden size.
Rank r holds the rows [r * V_r, (r + 1) * V_r) of the output head. Global ids from `vocab_size` on are padding: they
fill the end of the last shard, or whole shards.

    ids    0 ........ V_r ........ 2 V_r .. vocab_size .. 3 V_r ........ 4 V_r
    rank   |    0     |     1      |         2   |padding|   3: padding  |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.errors import InputError

# Stands for -inf on a rank that holds only padding: exp of it is zero, and its difference with itself is not NaN.
ABSENT = -1e30


class Gathering(NamedTuple):
    """A collective under way: `wait` for it gives every rank's statistics, [R, K, C]."""

    gathered: Tensor
    sent: Tensor | None = None  # [K, C], held until it has been sent
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """On CUDA the current stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.gathered


@dataclass(frozen=True)
class VocabularyShard:
    """The columns of the vocabulary that this rank computes: global ids [start, start + width), of `rows` with padding.
    Where it holds nothing but padding, `absent`, it keeps one column, with a logit of -1e30: probability zero."""

    group: dist.ProcessGroup | None
    rows: int
    start: int
    width: int
    absent: bool

    @classmethod
    def of(cls, rows: int, vocab_size: int, group: dist.ProcessGroup | None) -> VocabularyShard:
        """This rank's shard, of `rows` rows of the head, padding included."""
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        if rows * ranks < vocab_size:
            raise InputError("rows of the output head", rows * ranks, f"must be at least vocab_size={vocab_size}")
        true_columns = min(rows, vocab_size - rank * rows)
        return cls(group if ranks > 1 else None, rows, rank * rows, max(true_columns, 1), true_columns <= 0)

    def locate(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each label on this shard (0 where it lies elsewhere) and, as bool, whether it lies here."""
        index_C = labels_C - self.start
        here_C = (index_C >= 0) & (index_C < (0 if self.absent else self.width))
        return index_C.masked_fill(~here_C, 0), here_C

    def gather(self, statistics_KC: Tensor) -> Tensor:
        """Every rank's statistics, [R, K, C]. All ranks call."""
        return self.start_gather(statistics_KC).wait()

    def start_gather(self, statistics_KC: Tensor) -> Gathering:
        """`gather`, to be waited for later: the one collective of some tokens (none where one rank has everything). All
        ranks start theirs in the same order."""
        if self.group is None:
            return Gathering(statistics_KC.unsqueeze(0))
        sent_KC = statistics_KC.contiguous()
        gathered_RKC = sent_KC.new_empty(self.group.size(), *sent_KC.shape)
        into_RKC = gathered_RKC.flatten(0, 1)
        work = dist.all_gather_into_tensor(into_RKC, sent_KC, group=self.group, async_op=True)
        return Gathering(gathered_RKC, sent_KC, work)


def local_softmax(logits_CV: Tensor, out_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over this shard alone, written to `out_CV` (another buffer); returns, [C] each, the largest logit m and
    the sum of exp(logit - m).

    The sum is read off the result (the largest entry is 1 / sum, never below 1 / V_r), since torch's fused softmax
    passes over the logits fewer times than separate exp and sum do.
    """
    torch.softmax(logits_CV, dim=-1, out=out_CV)
    return logits_CV.amax(-1), out_CV.amax(-1).reciprocal_()


def combine(maxima_RC: Tensor, sums_RC: Tensor) -> tuple[Tensor, Tensor]:
    """From each rank's largest logit and sum of exp(logit - largest): logsumexp over the vocabulary, [C], and each
    shard's probability, [R, C]."""
    maximum_C = maxima_RC.amax(0)
    shares_RC = sums_RC * (maxima_RC - maximum_C).exp_()
    total_C = shares_RC.sum(0)
    return maximum_C + total_C.log(), shares_RC / total_C


def product_operand(tensor: Tensor) -> Tensor:
    """The tensor as the products below take it: widened on the CPU, which rounds products to the operands' type."""
    return tensor if tensor.is_cuda else tensor.float()


def product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out = left @ right in fp32; the operands are of one type, as `product_operand` gives them."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total += left @ right in fp32."""
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    if torch.__version__ >= "2.10":  # before, the addend had to be of the operands' type
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    return total.add_(torch.mm(left, right, out_dtype=torch.float32))
