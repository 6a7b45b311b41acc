"""A flat range of a tensor as boxes of it."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch

from minitron_mcore.runtime.optimizer_pieces import boxes


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (5, 1), (1, 4), (2, 3, 4), (2, 1, 3, 2)])
def test_every_range_of_a_tensor_is_made_of_its_boxes(shape: tuple[int, ...]) -> None:
    whole = torch.arange(prod(shape)).view(shape)
    for start, end in itertools.combinations_with_replacement(range(prod(shape) + 1), 2):
        found = boxes(shape, start, end)
        parts = [
            whole[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]
            for offsets, sizes in found
        ]
        assert all(part.shape == sizes for part, (_, sizes) in zip(parts, found, strict=True))
        read = torch.cat([part.reshape(-1) for part in parts]) if parts else whole.new_zeros(0)
        assert torch.equal(read, torch.arange(start, end))
        assert len(found) <= 2 * len(shape) - 1
