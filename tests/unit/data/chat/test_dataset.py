"""Rows that training reads: what is in them, packed and not, and in which order."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy
import pytest
import torch

from minitron_mcore.data.chat.dataset import ChatDataset
from minitron_mcore.data.chat.prepared import Part
from minitron_mcore.data.dataset import batches, batches_once
from minitron_mcore.model.microbatch import Microbatch

LENGTH, PAD = 12, 99
LENGTHS = [5, 3, 9, 2, 7, 4, 12, 3]  # of segments, in tokens


def part(sides: int) -> Part:
    """Segment n has the tokens 1000 n, 1000 n + 1, …; of each the last two are learnt."""
    starts = numpy.concatenate([[0], numpy.cumsum(LENGTHS)])
    tokens = [1000 * number + place for number, length in enumerate(LENGTHS) for place in range(length)]
    learnt = [place >= length - 2 for length in LENGTHS for place in range(length)]
    return Part(numpy.array(tokens, dtype=numpy.int32), numpy.array(learnt), starts, None, sides)


def dataset(sides: int = 1, **how: Any) -> ChatDataset:
    return ChatDataset(part(sides), LENGTH, padding=PAD, **{"seed": 3, **how})


def expected_segment(number: int) -> dict[str, Any]:
    length = LENGTHS[number]
    tokens = [1000 * number + place for place in range(length)]
    learnt = [float(place >= length - 2) for place in range(length)]
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": learnt[1:],
        "position_ids": list(range(length - 1)),
        "segments": [number] * (length - 1),
    }


def split(row: dict[str, torch.Tensor]) -> list[dict[str, list[float]]]:
    """A row's segments, checked to be followed by padding alone."""
    assert {name: tuple(value.shape) for name, value in row.items()} == dict.fromkeys(row, (LENGTH,))
    numbers = row["segments"].tolist()
    used = LENGTH - numbers.count(-1)
    assert -1 not in numbers[:used]
    assert row["tokens"][used:].tolist() == row["labels"][used:].tolist() == [PAD] * (LENGTH - used)
    assert row["loss_mask"][used:].sum() == 0 and row["position_ids"][used:].tolist() == list(range(LENGTH - used))
    order = list(dict.fromkeys(numbers[:used]))
    places = [[place for place in range(used) if numbers[place] == number] for number in order]
    return [{name: [value[place].item() for place in each] for name, value in row.items()} for each in places]


def test_a_chat_is_a_row() -> None:
    data = dataset()
    assert len(data) == 8 == data.rows
    assert [split(data[number]) for number in range(8)] == [[expected_segment(number)] for number in range(8)]
    row = data[0]
    types = {name: value.dtype for name, value in row.items()}
    assert types == {**dict.fromkeys(row, torch.int64), "loss_mask": torch.float32}


def test_a_preference_is_two_rows() -> None:
    data = dataset(sides=2)
    assert len(data) == 4 and data[1]["tokens"].shape == (2, LENGTH)
    for number in range(4):
        sides = [{name: value[side] for name, value in data[number].items()} for side in range(2)]
        assert [split(side) for side in sides] == [[expected_segment(2 * number)], [expected_segment(2 * number + 1)]]


@pytest.mark.parametrize("sides", [1, 2])
def test_packed_rows_hold_every_segment_once(sides: int) -> None:
    data = ChatDataset(part(sides), 16, padding=PAD, seed=3, packing=True)
    found = []
    for number in range(len(data)):
        row = data[number]
        assert row.pop("packed") and row["tokens"].shape == (16,)
        segments = list(dict.fromkeys(each for each in row["segments"].tolist() if each >= 0))
        for segment in segments:
            is_there = row["segments"] == segment
            assert {name: value[is_there].tolist() for name, value in row.items()} == expected_segment(segment)
        # Both sides of a preference, one behind the other.
        assert segments == [unit * sides + side for unit in data.units_of(number) for side in range(sides)]
        found += segments
    assert sorted(found) == list(range(8)) and len(data) == len(set(map(tuple, map(data.units_of, range(len(data))))))
    assert len(data) < 8 // sides


def test_samples_of_the_same_weight() -> None:
    data = dataset(per_sample=True)
    sums = [data[number]["loss_mask"].sum().item() for number in range(8)]
    assert sums == pytest.approx([1.0] * 8)
    assert set(data[3]["loss_mask"].tolist()) == {0.0, 1.0}, "a segment of two tokens has one label"


def test_every_pass_has_each_row_once_in_another_order() -> None:
    data = dataset(size=20)
    order = [int(data[index]["segments"][0]) for index in range(20)]
    assert sorted(order[:8]) == sorted(order[8:16]) == list(range(8)) and order[:8] != order[8:16]
    assert order == [int(dataset(size=20)[index]["segments"][0]) for index in range(20)]
    assert [int(dataset(size=3)[index]["segments"][0]) for index in range(3)] == order[:3], "the budget does not matter"
    assert order != [int(dataset(size=20, seed=4)[index]["segments"][0]) for index in range(20)]


def read(data: ChatDataset, consumed: int, rank: int, ranks: int, size: int) -> Any:
    return batches(
        data,
        consumed_samples=consumed,
        micro_batch_size=size,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        global_batch_size=4,
    )


@pytest.mark.parametrize("sides", [1, 2])
def test_microbatches(sides: int) -> None:
    """A preference is one sample of two rows; which are read depends neither on the layout nor on a restart."""
    data = dataset(sides=sides, size=40)
    alone = [batch["segments"][..., 0] for batch in islice(read(data, 0, 0, 1, 4), 3)]
    assert alone[0].shape == ((4, 2) if sides == 2 else (4,))
    for ranks, size in ((2, 2), (2, 1), (4, 1)):
        streams = [read(data, 4, rank, ranks, size) for rank in range(ranks)]
        for expected in alone[1:]:
            parts = [next(stream)["segments"][..., 0] for _ in range(4 // size // ranks) for stream in streams]
            assert torch.cat(parts).tolist() == expected.tolist()
    batch = next(read(data, 0, 0, 1, 4))
    assert batch["samples"].tolist() == [0, 1, 2, 3]
    microbatch = Microbatch.of(batch)
    assert microbatch.segments is not None and microbatch.packed is None
    assert microbatch.segments.shape == microbatch.tokens.shape == (4 * sides, LENGTH)
    assert microbatch.segments[:, 0].tolist() == alone[0].flatten().tolist()


def test_a_packed_microbatch_keeps_its_segments_apart() -> None:
    data = ChatDataset(part(2), 16, padding=PAD, seed=3, packing=True, size=8)
    microbatch = Microbatch.of(next(read(data, 0, 0, 1, 4)))
    assert microbatch.packed is not None and microbatch.tokens.shape == (1, 4 * 16)


def test_fillers_have_no_segments() -> None:
    data = dataset(sides=2)
    once = batches_once(data, [2], micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1)
    (batch,) = once
    assert batch["valid"].tolist() == [1.0, 0.0] and batch["tokens"].shape == (2, 2, LENGTH)
    assert batch["segments"][0, :, 0].tolist() == [4, 5] and set(batch["segments"][1].flatten().tolist()) == {-1}
    assert batch["loss_mask"][1].sum() == 0 < batch["loss_mask"][0].sum()
