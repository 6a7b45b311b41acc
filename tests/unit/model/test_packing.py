"""Where segments lie in rows laid end to end, and which layouts packed rows are refused at."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron_mcore.errors import InputError
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.model.packing import Packed
from minitron_mcore.runtime.config import ParallelConfig, check_packing


def test_boundaries_of_the_drawn_example() -> None:
    """As the module draws it; padding is a segment, and one number on both sides of a row's end makes two."""
    packed = Packed.of(torch.tensor([[0, 0, 0, 1, 1, -1, -1], [2, 3, 3, 3, 3, 3, 3]]))
    assert packed.boundaries.tolist() == [0, 3, 5, 7, 8, 14]
    assert packed.boundaries.dtype == torch.int32
    assert packed.lengths == (3, 2, 2, 1, 6)
    assert packed.longest == 6
    assert Packed.of(torch.tensor([[4, 4], [4, 4]])).lengths == (2, 2)


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=4))
def test_against_groups_of_equal_numbers(rows: list[list[int]]) -> None:
    packed = Packed.of(torch.tensor(rows))
    lengths = [len(list(group)) for row in rows for _, group in itertools.groupby(row)]
    assert packed.lengths == tuple(lengths)
    assert packed.boundaries.tolist() == [0, *itertools.accumulate(lengths)]
    again = Packed.of(packed.numbers())
    assert again.lengths == packed.lengths
    assert torch.equal(again.boundaries, packed.boundaries)


def batch_of(*shape: int) -> dict[str, torch.Tensor]:
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    rows = {name: numbers + start for start, name in enumerate(("tokens", "labels", "position_ids"))}
    return {**rows, "loss_mask": torch.ones(shape), "segments": numbers // 2, "samples": torch.arange(shape[0])}


def test_packed_rows_are_laid_end_to_end() -> None:
    batch = batch_of(2, 4)
    microbatch = Microbatch.of({**batch, "packed": torch.tensor([True, True])})
    for name in ("tokens", "labels", "position_ids", "loss_mask", "segments"):
        assert torch.equal(getattr(microbatch, name), batch[name].view(1, 8)), name
    assert microbatch.samples is not None and torch.equal(microbatch.samples, batch["samples"])
    assert microbatch.packed is not None and microbatch.packed.lengths == (2, 2, 2, 2)
    moved = microbatch.to("cpu").packed
    assert moved is not None and moved.lengths == (2, 2, 2, 2)


def test_other_rows_stay_rows() -> None:
    """With segments or without; of a sample of several rows, as of a pair, each is one of the microbatch's."""
    for batch in (batch_of(2, 4), {**batch_of(2, 4), "packed": torch.tensor([False, False])}):
        microbatch = Microbatch.of(batch)
        assert microbatch.packed is None and torch.equal(microbatch.tokens, batch["tokens"])
    pairs = batch_of(3, 2, 4)
    microbatch = Microbatch.of(pairs)
    assert torch.equal(microbatch.tokens, pairs["tokens"].view(6, 4))
    assert microbatch.segments is not None and microbatch.segments.shape == (6, 4)
    assert microbatch.samples is not None and microbatch.samples.shape == (3,)


def test_sequences_cut_over_ranks_are_refused() -> None:
    check_packing({"parallel": ParallelConfig(tensor=2, pipeline=2, sequence=True)})
    with pytest.raises(InputError) as caught:
        check_packing({"parallel": ParallelConfig(), "teacher.parallel": ParallelConfig(context=2)})
    assert str(caught.value) == (
        "chat.packing=true does not go with teacher.parallel.context=2, since segments are not cut over ranks: "
        "set chat.packing=false, or teacher.parallel.context=1"
    )
