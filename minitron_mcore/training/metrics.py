"""Where a run's numbers go: console, JSONL, TensorBoard, Weights & Biases; under Megatron's names.

Only the first rank writes. A run folder has one `metrics.jsonl`, with one line per iteration; a run resumed from a
checkpoint first cuts every log back to it, so that each iteration appears once. The console shows a line every
`log.interval` iterations, with the losses averaged over them.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from minitron_mcore.files import writing
from minitron_mcore.training.config import LogConfig
from minitron_mcore.training.console import train_line, validation_line
from minitron_mcore.training.dashboard import Dashboard, cut_back


class MetricsLog:
    """Writes rows of numbers. Until `open`, which the first rank alone calls, every call does nothing."""

    def __init__(self, folder: Path, log: LogConfig, iterations: int, *, name: str, recipe: dict[str, Any]) -> None:
        self.folder, self.log, self.iterations, self.name, self.recipe = folder, log, iterations, name, recipe
        self._file: Any = None
        self._tensorboard: Any = None
        self._dashboard: Dashboard | None = None

    def open(self, iteration: int) -> None:
        """Start every writer for a run that continues after `iteration`; rows of later ones are deleted, as they come
        again. Raises InputError where they cannot be written, or Weights & Biases refuses."""
        file = self.folder / "metrics.jsonl"
        with writing(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.log.wandb != "disabled":
                self._dashboard = Dashboard(self.folder, self.log, self.name, self.recipe)
                print(self._dashboard, flush=True)
            if cut := cut_back(file, iteration):
                print(f"{file}: deleted {cut} lines after iteration {iteration}, which are run again", flush=True)
            if self._dashboard is not None:
                self._dashboard.take_over(file)
            self._file = file.open("a", buffering=1)
            if self.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # Readers drop these steps from earlier files.
                self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=iteration + 1)

    def write(
        self, iteration: int, row: dict[str, float], *, shown: dict[str, float] | None, kind: str = "train"
    ) -> None:
        """Write `row` to files and dashboards, and `shown`, if given, to the console.

        `kind`: train or validation; names of validation losses have a suffix of their own.
        """
        if self._file is None:
            return
        # JSON has no NaN and no infinity.
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._write_line(iteration, kind, numbers)
        if shown is not None:
            full = self.log.console == "full"
            line = train_line(iteration, self.iterations, shown, full=full) if kind == "train" else None
            print(line or validation_line(iteration, shown, full=full), flush=True)
        if self._tensorboard is not None:
            for name, value in row.items():
                self._tensorboard.add_scalar(name, value, iteration)
            self._tensorboard.flush()  # a killed run resumes after these rows and never writes them again
        if self._dashboard is not None:
            self._dashboard.write(iteration, row)

    def event(self, iteration: int, kind: str, facts: dict[str, Any], line: str) -> None:
        """Write what happened at an iteration: `facts` to the file, `line` to the console."""
        if self._file is None:
            return
        self._write_line(iteration, kind, facts)
        print(line, flush=True)

    def _write_line(self, iteration: int, kind: str, facts: dict[str, Any]) -> None:
        record = {"iteration": iteration, "kind": kind, "time": round(time.time(), 3), **facts}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self, *, finished: bool = True) -> None:
        """End the writers; Weights & Biases shows the run as `finished`, or as failed."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._dashboard is not None:
            self._dashboard.close(finished=finished)
