"""The file that `evaluate` writes. Nothing that an earlier one measured is lost: what is of the same weights stays in
the file, and a file that says more of others is set aside under a name of its own. Pure.

A measurement is the loss on held-out text, or the scores of a task. Made anew, it takes the place of the older one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from minitron_mcore.files import write_whole

HELD_OUT = ("lm loss", "ppl", "samples", "sequence_length")
SAME = ("weights", "iteration", "precision")  # of results that belong together


def write_results(target: Path, results: Mapping[str, Any]) -> str:
    """Write what `evaluate` gives of one model, or of several, and what `target` says besides of the same weights.

    Returns where the rest of what it said is, in words; "" where there is none. One process calls.
    """
    kept, told = _kept(results, _read(target)), ""
    if kept is None:
        aside = next(path for n in count(1) if not (path := target.with_stem(f"{target.stem}.before-{n}")).exists())
        os.replace(target, aside)
        kept, told = dict(results), f"what {target.name} said of other weights or models is in {aside.name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(kept, indent=2) + "\n")
    return told


def _read(target: Path) -> Any:
    """What lies there already."""
    if not target.is_file():
        return {"models": {}}
    try:
        return json.loads(target.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _kept(results: Mapping[str, Any], earlier: Any) -> dict[str, Any] | None:
    """`results`, and what `earlier` says besides of the same weights; None where it says more of others."""
    ours, theirs = _by_model(results), _by_model(earlier)
    if theirs is None:
        return None
    if not any(_measured(row) - _measured(ours.get(name, {})) for name, row in theirs.items()):
        return dict(results)
    row = theirs.get("", {})
    if "" not in ours or row.get("weights") is None or any(row.get(name) != results.get(name) for name in SAME):
        return None
    losses = {name: row[name] for name in HELD_OUT if name in row}
    tasks = {**row.get("tasks", {}), **results.get("tasks", {})}
    return {**losses, **results, **({"tasks": tasks} if tasks else {})}


def _by_model(results: Any) -> Any:
    """The results by model's name, "" for the only one; None: the file is of another kind."""
    if isinstance(results, dict) and "checkpoint" in results:
        return {"": results}
    rows = results.get("models") if isinstance(results, dict) else None
    return rows if isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()) else None


def _measured(row: Mapping[str, Any]) -> set[str]:
    return {*({HELD_OUT[0]} & row.keys()), *row.get("tasks", {})}
