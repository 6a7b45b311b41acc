"""Where a run's numbers go: console, JSONL, TensorBoard, Weights & Biases; by Megatron's names.

Only the first rank writes. One file `metrics.jsonl` a run folder, one line an iteration; a run that goes on after a
checkpoint cuts every log back to it first, so that each iteration stands there once. The console shows a line every
`log.interval` iterations, with the losses' means over them.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from minitron_mcore.training.config import LogConfig
from minitron_mcore.training.console import train_line, validation_line
from minitron_mcore.training.dashboard import Dashboard
from minitron_mcore.training.history import cut_back


class MetricsLog:
    """Writes rows of numbers. Until `open`, which the first rank alone calls, every call does nothing."""

    def __init__(self, folder: Path, log: LogConfig, *, name: str, recipe: dict[str, Any]) -> None:
        self.folder, self.log, self.name, self.recipe = folder, log, name, recipe
        self._file: Any = None
        self._tensorboard: Any = None
        self._dashboard: Dashboard | None = None

    def open(self, iteration: int) -> None:
        """Start every writer, for a run that goes on after `iteration`: what was logged of later ones goes, since it is
        done again. Raises InputError where Weights & Biases will not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.log.wandb != "disabled":
            self._dashboard = Dashboard(self.folder, self.log, self.name, self.recipe)
            print(self._dashboard, flush=True)
        file = self.folder / "metrics.jsonl"
        if cut := cut_back(file, iteration):
            print(f"{file}: {cut} lines from after iteration {iteration} are cut, since they come again", flush=True)
        if self._dashboard is not None:
            self._dashboard.take_over(file)
        self._file = file.open("a", buffering=1)
        if self.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Readers drop what earlier files say of these steps.
            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=iteration + 1)

    def write(
        self,
        iteration: int,
        iterations: int,
        row: dict[str, float],
        *,
        shown: dict[str, float] | None,
        kind: str = "train",
    ) -> None:
        """`row` to the files and dashboards; `shown`, where there is something, to the console.

        `kind`: train or validation; validation names are given with their own suffix.
        """
        if self._file is None:
            return
        # JSON has no NaN and no infinity.
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        record = {"iteration": iteration, "kind": kind, "time": round(time.time(), 3), **numbers}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        if shown is not None:
            full = self.log.console == "full"
            line = validation_line(iteration, shown, full=full)
            if kind == "train":
                line = train_line(iteration, iterations, shown, full=full)
            print(line, flush=True)
        if self._tensorboard is not None:
            for name, value in row.items():
                self._tensorboard.add_scalar(name, value, iteration)
            self._tensorboard.flush()  # a run that is killed resumes after these rows and never writes them again
        if self._dashboard is not None:
            self._dashboard.write(iteration, row)

    def event(self, iteration: int, kind: str, facts: dict[str, Any], line: str) -> None:
        """What happened at an iteration: `facts` to the file, `line` to the console."""
        if self._file is None:
            return
        record = {"iteration": iteration, "kind": kind, "time": round(time.time(), 3), **facts}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        print(line, flush=True)

    def close(self, *, finished: bool = True) -> None:
        """End the writers; Weights & Biases shows the run as `finished`, or as failed."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._dashboard is not None:
            self._dashboard.close(finished=finished)
