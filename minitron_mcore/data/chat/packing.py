"""Which samples share a row. Pure."""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from typing import Optional

from minitron_mcore.data.chat.prepared import Part


def rows_of(part: Part, sequence_length: int, *, packing: bool, seed: int) -> Optional[list[list[int]]]:
    """Of each row of one pass its units, chats or preferences, by their numbers; None: each has one, that of its own
    number. Both sides of a preference are packed into one row."""
    lengths = part.positions().reshape(part.units, part.sides)
    whole = lengths.sum(1) if packing else lengths.max(1)
    assert part.units and whole.max() <= sequence_length, "prepared for another sequence length"
    return pack(whole.tolist(), sequence_length, seed=seed) if packing else None


def pack(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Units of the given lengths, by their numbers, in rows of at most `capacity`: each in one row, whole.

    Best fit, the longest first: at most 11/9 of the fewest rows possible, plus 4 (Johnson et al., SIAM J. Comput. 3,
    1974). `seed` decides among equals.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda unit: -lengths[unit])  # stable: equals stay shuffled
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # positions left -> the rows that have just so many
    rooms: list[int] = []  # the keys of `with_room`, ascending
    for unit in order:
        length = lengths[unit]
        assert 0 < length <= capacity, f"unit {unit} is {length} long, of {capacity}"
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(unit)
        if left := room - length:
            if left not in with_room:
                bisect.insort(rooms, left)
                with_room[left] = []
            with_room[left].append(row)
    return rows
