"""Which tokens of a microbatch belong to which segment, and sums over segments.

A segment is a chat, or one side of a pair: number 2p the chosen side of pair p, 2p + 1 the rejected one, which follows
it: in the next row, or packed behind it in the same one.

    unpacked   0 0 0 0 . .      row after row, one segment each        packed   0 0 0 1 1 6 6 6 7 7 7 7 . .
               1 1 1 . . .

A segment's place is counted in the microbatch, in its order, since rows of two passes over the samples may bring the
same pair twice.

Legend: S sequence (under context parallelism this rank's part of it), B rows, R segments of the microbatch, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.runtime.groups import context_group, context_part, in_order


@dataclass(frozen=True)
class Segments:
    """The segments of a microbatch; the same ones on every context-parallel rank."""

    numbers: Tensor  # int64 [R], in the microbatch's order
    places: Tensor  # int64 [S, B]: each token's segment, of R; R: padding

    @classmethod
    def of(cls, microbatch: Microbatch) -> Segments:
        """Of a microbatch with `segments`; every context-parallel rank calls."""
        assert microbatch.segments is not None, "the samples name their segments"
        group = context_group()
        whole_BS = _whole(microbatch.segments, group)
        is_token = whole_BS >= 0
        before_BS = torch.nn.functional.pad(whole_BS[:, :-1], (1, 0), value=-2)  # a row begins a segment
        begins = whole_BS != before_BS
        if microbatch.packed is not None:  # one row may end and the next begin with the same segment, of two passes
            begins.view(-1)[microbatch.packed.boundaries[:-1].long()] = True
        starts = is_token & begins
        numbers_R = whole_BS[starts]
        places_BS = (starts.flatten().cumsum(0).view_as(whole_BS) - 1).masked_fill(~is_token, len(numbers_R))
        return cls(numbers_R, context_part(places_BS, 1, group.rank(), group.size()).transpose(0, 1))

    @property
    def pairs(self) -> Tensor:
        """int64 [P, 2]: numbers of the chosen and the rejected sides."""
        numbers_P2 = self.numbers.view(len(self.numbers) // 2, 2)
        follows = (numbers_P2[:, 0] % 2 == 0) & (numbers_P2[:, 1] == numbers_P2[:, 0] + 1)
        assert bool(follows.all()), f"chosen and rejected sides do not follow one another: {self.numbers.tolist()}"
        return numbers_P2

    def sums(self, values_SB: Tensor) -> Tensor:
        """Each segment's sum of its tokens' values, fp64 [R], differentiable; over all parts of the sequence, of which
        each rank gets the gradient of its own. Every context-parallel rank calls."""
        found = values_SB.new_zeros(len(self.numbers) + 1, dtype=torch.float64)
        found = found.index_add(0, self.places.flatten(), values_SB.double().flatten())[:-1]
        return reduce_from_tensor_model_parallel_region(found, group=context_group())


def _whole(part_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole sequences, from every context-parallel rank's part."""
    if group.size() == 1:
        return part_BS
    part_SB = part_BS.t().contiguous()
    gathered = part_SB.new_empty(len(part_SB) * group.size(), part_SB.shape[1])
    dist.all_gather_into_tensor(gathered, part_SB, group=group)
    return in_order(gathered, group.size()).t()
