"""Segments of random tokens, packed into rows, each in a padded row of its own, and each by itself."""

from __future__ import annotations

from typing import Any

import torch

from tests.distributed.models import SEQUENCE

# Lengths of each row's segments; padding fills it up. Of one token, of a whole row, of many, and rows filled exactly.
LENGTHS = [[5, 1, 7], [16], [1, 1, 14], [9, 4], [3, 3, 3, 3, 4], [2, 3], [15, 1], [6, 10]]
COUNT = sum(map(len, LENGTHS))
Part = dict[str, torch.Tensor]


def drawn(vocab_size: int, seed: int) -> list[Part]:
    """Each segment by itself, [1, length]: ids, labels of its own, so that segments of one token count too, and
    weights 0, 1/2 and 1."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in [length for row in LENGTHS for length in row]:
        ids = torch.randint(0, vocab_size, (2, 1, length), generator=generator)
        weights = torch.randint(1, 3, (1, length), generator=generator) / 2
        weights[0, 1::4] = 0.0
        positions = torch.arange(length).unsqueeze(0)
        found.append({"tokens": ids[0], "labels": ids[1], "loss_mask": weights, "position_ids": positions})
    return found


def padding(length: int) -> Part:
    """Tokens that change what follows, were they seen; they do not count."""
    ids = torch.full((1, length), 7)
    return {"tokens": ids, "labels": ids, "loss_mask": torch.zeros(1, length), "position_ids": ids.cumsum(1) // 7 - 1}


def rows_of(vocab_size: int, lengths: list[list[int]], micro_batch: int, seed: int = 3) -> list[Part]:
    """The segments, in order, in rows that hold as many of them as `lengths` says; microbatches [b, SEQUENCE]."""
    numbered = iter(enumerate(drawn(vocab_size, seed)))
    rows: list[Part] = []
    for row in lengths:
        parts = []
        for _ in row:
            number, segment = next(numbered)
            parts.append({**segment, "segments": torch.full_like(segment["tokens"], number)})
        if sum(row) < SEQUENCE:
            filler = padding(SEQUENCE - sum(row))
            parts.append({**filler, "segments": torch.full_like(filler["tokens"], -1)})
        rows.append({name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})
    batch = [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]
    return [{name: torch.cat([row[name] for row in rows]) for name in rows[0]} for rows in batch]


def packed(vocab_size: int, micro_batch: int) -> list[Part]:
    """As a reader of packed rows gives them."""
    rows = rows_of(vocab_size, LENGTHS, micro_batch)
    return [{**part, "packed": torch.ones(len(part["tokens"]), dtype=torch.bool)} for part in rows]


def alone(vocab_size: int, micro_batch: int) -> list[Part]:
    """Each segment in a row of its own, padded at the right."""
    return rows_of(vocab_size, [[length] for row in LENGTHS for length in row], micro_batch)


def by_segment(values: torch.Tensor, segments: torch.Tensor) -> dict[int, Any]:
    """The values of each segment's tokens; both [b, s]."""
    values, segments = values.flatten(), segments.flatten()
    return {number: values[segments == number] for number in segments.unique().tolist() if number >= 0}
