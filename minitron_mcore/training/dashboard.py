"""Weights & Biases: one run a folder, resumed under its id when the training is.

Offline, too, there is one folder below `wandb/`, whatever was killed: a resumed run copies its earlier rows from
metrics.jsonl, from which those of repeated iterations were deleted, into the new folder and deletes the old one.
Online, repeated iterations keep their first numbers, as Weights & Biases accepts each step once. Pure.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.files import whole_file
from minitron_mcore.training.config import LogConfig

LOG_IN = "log in with `wandb login`, or set log.wandb=offline"


def check_wandb(log: LogConfig, rank: int) -> None:
    """Raise InputError where uploading is asked for without an API key; it is looked up on the first rank alone."""
    if log.wandb == "online" and rank == 0 and not is_logged_in():
        raise InputError("log.wandb", "online", "needs an API key", LOG_IN)


def is_logged_in() -> bool:
    """Whether there is a key; whether the server takes it is not asked."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if "prompt" in inspect.signature(wandb.login).parameters:
        return wandb.login(prompt=False, verify=False)
    return bool(wandb.api.api_key)  # older versions; newer ones warn at every use


class Dashboard:
    """A run of Weights & Biases in `folder`/wandb; its id lies in `folder`/wandb_run_id. One process makes it.

    Raises InputError where Weights & Biases refuses.
    """

    def __init__(self, folder: Path, log: LogConfig, name: str, recipe: dict[str, Any]) -> None:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        id_file = folder / "wandb_run_id"
        self.id = id_file.read_text() if id_file.exists() else uuid.uuid4().hex[:8]
        self.mode = log.wandb
        if self.mode == "auto":
            self.mode = "online" if is_logged_in() else "offline"
        self.earlier = sorted((folder / "wandb").glob(f"offline-run-*-{self.id}"))
        run: dict[str, Any] = {"project": log.wandb_project, "name": name, "id": self.id, "mode": self.mode}
        try:
            self.run = wandb.init(**run, dir=str(folder), config=recipe, resume="allow", reinit="create_new")
        except wandb.errors.Error as error:
            rule = f"is refused by Weights & Biases ({' '.join(str(error).split()).rstrip('.')})"
            raise InputError("log.wandb", self.mode, rule, LOG_IN) from error
        if not id_file.exists():
            id_file.write_text(self.id)

    def __str__(self) -> str:
        place = self.run.url if self.mode == "online" else Path(self.run.dir).parent
        return f"wandb: {self.mode}, run {self.id} -> {place}"

    def take_over(self, history: Path) -> None:
        """Bring what an earlier, killed process logged offline into this run: the rows of `history`, which has been cut
        back. Nothing happens online, or where there are no such rows."""
        earlier = [path for path in self.earlier if path != Path(self.run.dir).parent]
        rows = logged(history) if self.mode == "offline" and earlier and history.is_file() else iter(())
        is_whole = False
        for iteration, time, row in rows:
            self.run.log({"_timestamp": time, **row}, step=iteration)
            is_whole = True
        for path in earlier if is_whole else ():
            shutil.rmtree(path, ignore_errors=True)

    def write(self, iteration: int, row: dict[str, float]) -> None:
        self.run.log(row, step=iteration)

    def close(self, *, finished: bool) -> None:
        """Weights & Biases shows the run as `finished`, or as failed."""
        self.run.finish(exit_code=0 if finished else 1)


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
            iteration, time, kind = row.pop("iteration"), row.pop("time"), row.pop("kind")
            if kind in ("train", "validation"):
                yield iteration, time, {name: math.nan if value is None else value for name, value in row.items()}
