"""Prepared samples as rows of a fixed length, in the order they are trained on. Pure.

Legend: s sequence length.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Optional

import numpy
import torch

from minitron_mcore.data.chat.packing import rows_of
from minitron_mcore.data.chat.prepared import Part

FIELDS = ("tokens", "labels", "loss_mask", "position_ids", "segments")
PADDING = -1  # as a segment's number


class ChatDataset:
    """Rows of `part`, each with FIELDS: `tokens`, `labels`, `position_ids`, `segments` int64 and `loss_mask` fp32.

    Of chats a row is one, [s]; of preferences both sides, [2, s], the chosen one first; packed, as many of either as
    fit, [s], and `packed` is true. `segments` numbers the segments of `part`, and is -1 where a row is filled up with
    `padding`, which comes last. `position_ids` begin anew with every segment, and with the filling. `loss_mask` is 1
    where the label is counted; with `per_sample` 1 over the number of such labels in the segment, so that every answer
    weighs the same.

    size: rows in all, going through `part` as often as that takes, each time in another order that `seed` draws; None:
    each row once, in the order of the files. Nothing depends on the layout.
    """

    def __init__(
        self,
        part: Part,
        sequence_length: int,
        *,
        padding: int,
        seed: int,
        size: Optional[int] = None,
        packing: bool = False,
        per_sample: bool = False,
    ) -> None:
        self.part, self.sequence_length, self.padding, self.seed = part, sequence_length, padding, seed
        self.packing = packing
        self.fields = (*FIELDS, "packed") if packing else FIELDS
        learnt = part.learnt()
        self._weights = 1.0 / numpy.maximum(learnt, 1) if per_sample else numpy.ones(len(learnt))
        self._rows = rows_of(part, sequence_length, packing=packing, seed=seed)
        self.rows = len(self._rows) if self._rows is not None else part.units  # of one pass
        self.size = self.rows if size is None else size
        self._is_shuffled = size is not None
        # The passes that are read at a time are few.
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, self.rows)
        row = int(self._order(epoch)[place]) if self._is_shuffled else place
        units = [row] if self._rows is None else self._rows[row]
        segments = [unit * self.part.sides + side for unit in units for side in range(self.part.sides)]
        if self.packing:
            return {**self._row(segments), "packed": torch.tensor(True)}
        if self.part.sides == 1:
            return self._row(segments)
        sides = [self._row([segment]) for segment in segments]
        return {name: torch.stack([side[name] for side in sides]) for name in FIELDS}

    def units_of(self, row: int) -> list[int]:
        """The chats or preferences in a row, by their numbers in the files."""
        return [row] if self._rows is None else list(self._rows[row])

    def _shuffled(self, epoch: int) -> numpy.ndarray:
        return numpy.random.default_rng([self.seed, epoch]).permutation(self.rows)

    def _row(self, segments: list[int]) -> dict[str, torch.Tensor]:
        """The segments end to end, then padding."""
        length, part = self.sequence_length, self.part
        tokens = numpy.full(length, self.padding, dtype=numpy.int64)
        labels, numbers = tokens.copy(), numpy.full(length, PADDING, dtype=numpy.int64)
        mask, positions = numpy.zeros(length, dtype=numpy.float32), numpy.zeros(length, dtype=numpy.int64)
        at = 0
        for segment in segments:
            start, stop = int(part.starts[segment]), int(part.starts[segment + 1])
            place = slice(at, at + stop - start - 1)
            tokens[place], labels[place] = part.tokens[start : stop - 1], part.tokens[start + 1 : stop]
            mask[place] = part.counted[start + 1 : stop] * self._weights[segment]
            numbers[place], positions[place] = segment, numpy.arange(stop - start - 1)
            at = place.stop
        positions[at:] = numpy.arange(length - at)
        rows = dict(tokens=tokens, labels=labels, loss_mask=mask, position_ids=positions, segments=numbers)
        return {name: torch.from_numpy(array) for name, array in rows.items()}
