"""`metrics.jsonl`, a line for each iteration: cut back to a checkpoint, and read again for a dashboard. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from minitron_mcore.files import whole_file


def cut_back(file: Path, iteration: int) -> int:
    """Delete from `file` the rows after `iteration`, and incomplete ones, as a killed process leaves its last row. The
    file is whole at every moment. Returns how many lines were deleted. One process calls."""
    if not file.is_file():
        return 0
    with file.open("rb") as stream:
        cut = sum(not _stays(line, iteration) for line in stream)
    if cut:
        with whole_file(file) as partial, file.open("rb") as source, partial.open("wb") as target:
            target.writelines(line for line in source if _stays(line, iteration))
    return cut


def _stays(line: bytes, iteration: int) -> bool:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("iteration"), int) and row["iteration"] <= iteration


def logged(file: Path) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(iteration, time, numbers) of every row that dashboards get; null, for what JSON cannot hold, becomes NaN."""
    with file.open(encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            iteration, moment, kind = row.pop("iteration"), row.pop("time"), row.pop("kind")
            if kind in ("train", "validation"):
                numbers = {name: value for name, value in row.items() if not isinstance(value, list)}
                yield iteration, moment, {name: math.nan if value is None else value for name, value in numbers.items()}
