"""Where a run's numbers go: console, JSONL, TensorBoard, Weights & Biases, Prometheus; under Megatron's names.

Only the first rank writes. A run folder has one `metrics.jsonl`, with one line per iteration; a run resumed from a
checkpoint first cuts every log back to it, so that each iteration appears once. The console shows a line every
`log.interval` iterations, with the losses averaged over them. Pure.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from minitron_mcore.files import writing
from minitron_mcore.runtime.pace import duration
from minitron_mcore.training.config import LogConfig
from minitron_mcore.training.dashboard import Dashboard
from minitron_mcore.training.metrics_file import cut_back
from minitron_mcore.training.patient_file import PatientFile
from minitron_mcore.training.prometheus import PrometheusFile


class MetricsLog:
    """Writes rows of numbers. Until `open`, which the first rank alone calls, every call does nothing."""

    def __init__(
        self,
        folder: Path,
        log: LogConfig,
        iterations: int,
        *,
        name: str,
        recipe: dict[str, Any],
        stage: str = "train",
        documents: dict[str, str] | None = None,
    ) -> None:
        """stage: the section that trains. documents: what a dashboard keeps beside the numbers (`Dashboard`)."""
        self.folder, self.log, self.iterations, self.name, self.recipe = folder, log, iterations, name, recipe
        self.stage, self.documents = stage, documents or {}
        self._file: Any = None
        self._tensorboard: Any = None
        self._dashboard: Dashboard | None = None
        self._prometheus: PrometheusFile | None = None
        self._iteration = 0

    @property
    def file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def open(self, iteration: int) -> None:
        """Start every writer for a run that continues after `iteration`; rows of later ones are deleted, as they come
        again. Raises InputError where they cannot be written, or Weights & Biases refuses."""
        file = self.file
        with writing(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.log.wandb != "disabled":
                about: dict[str, Any] = {"stage": self.stage, "documents": self.documents, "goes_on": iteration > 0}
                self._dashboard = Dashboard(self.folder, self.log, self.name, self.recipe, **about)
            if cut := cut_back(file, iteration):
                print(f"{file}: deleted {cut} lines after iteration {iteration}, which are run again", flush=True)
            if self._dashboard is not None:
                self._dashboard.take_over(file)
            self._file = PatientFile(file)
            if self.log.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # Readers drop these steps from earlier files.
                self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=iteration + 1)
        if self.log.prometheus is not None:
            labels = {"run": self.name, "stage": self.stage}
            self._prometheus = PrometheusFile(Path(self.log.prometheus), labels, self.iterations)

    def write(
        self,
        iteration: int,
        row: dict[str, float],
        *,
        shown: dict[str, float] | None,
        kind: str = "train",
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Write `row` to files and dashboards, `shown`, if given, to the console, and `facts` to metrics.jsonl alone.

        `kind`: train or validation; names of validation losses have a suffix of their own.
        """
        if self._file is None:
            return
        # JSON has no NaN and no infinity.
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._write_line(iteration, kind, {**numbers, **(facts or {})})
        self._iteration = iteration
        if shown is not None:
            shown = once(shown)
            full = self.log.console == "full"
            line = train_line(iteration, self.iterations, shown, full=full) if kind == "train" else None
            self._say(line or validation_line(iteration, shown, full=full))
            if self._prometheus is not None:
                self._prometheus.write(iteration, row)
        try:
            if self._tensorboard is not None:
                for name, value in row.items():
                    self._tensorboard.add_scalar(name, value, iteration)
                self._tensorboard.flush()  # a killed run resumes after these rows and never writes them again
        except OSError as error:
            self._leave_tensorboard(error)
        if self._dashboard is not None:
            self._dashboard.write(iteration, row)

    def event(self, iteration: int, kind: str, facts: dict[str, Any], line: str) -> None:
        """Write what happened at an iteration: `facts` to the file, `line` to the console."""
        if self._file is None:
            return
        self._write_line(iteration, kind, facts)
        self._say(line)

    def _say(self, line: str) -> None:
        print(line, flush=True)
        if self._dashboard is not None:
            self._dashboard.say(line)

    def _leave_tensorboard(self, error: OSError) -> None:
        """Its writer does not recover from a disk that failed; what it lacks is in metrics.jsonl."""
        self._tensorboard = None
        print(f"WARNING: TensorBoard's files in {self.folder} cannot be written, and end here: {error}", flush=True)

    def _write_line(self, iteration: int, kind: str, facts: dict[str, Any]) -> None:
        record = {"iteration": iteration, "kind": kind, "time": round(time.time(), 3), **facts}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self, *, finished: bool = True) -> None:
        """End the writers; Weights & Biases shows the run as `finished` or failed, with the lineage as it is now."""
        if self._file is not None:
            self._file.close()
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
        except OSError as error:
            self._leave_tensorboard(error)
        if self._dashboard is not None:
            told = {}
            with suppress(OSError):  # before the first save, or on a disk that went away
                told["lineage"] = (self.folder / "lineage.yaml").read_text(encoding="utf-8")
            self._dashboard.close(finished=finished, documents=told)
        if self._prometheus is not None:
            self._prometheus.close(self._iteration)


# Lines on the console: short enough to read, with Megatron's names. metrics.jsonl has everything, as has the console
# with log.console=full.
WIDTH = 200  # of a short line, in characters
LARGE = 1e8


def _count(number: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f}{letter}"
    return f"{number:,.0f}"


def _fixed(digits: int) -> Callable[[float], str]:
    """`digits` decimals, or an exponent for very large numbers, such as the perplexity of a diverged model."""
    return lambda number: f"{number:.3E}" if LARGE <= abs(number) < math.inf else f"{number:.{digits}f}"


# Order and format on the console; other names follow in the order given. A short line has what is marked ALWAYS, and as
# many of the unmarked losses and shares as fit; DETAIL is in metrics.jsonl alone, but for counts of skipped or NaN
# iterations above 0.
ALWAYS, DETAIL = "always", "detail"
COLUMNS: dict[str, tuple[Callable[[float], str], str]] = {
    "consumed samples": (_fixed(0), DETAIL),
    "tokens": (_count, ALWAYS),
    "elapsed time per iteration (ms)": (_fixed(1), ALWAYS),
    "time left": (duration, ALWAYS),
    "throughput per GPU (TFLOP/s/GPU)": (_fixed(3), DETAIL),
    "student throughput per GPU (TFLOP/s/GPU)": (_fixed(3), DETAIL),
    "teacher throughput per GPU (TFLOP/s/GPU)": (_fixed(3), DETAIL),
    "model FLOPs utilization (%)": (_fixed(1), ""),
    "tokens per second": (_fixed(1), DETAIL),
    "tokens per second per GPU": (_fixed(1), DETAIL),
    "peak memory (GiB)": (_fixed(3), DETAIL),
    "learning-rate": ("{:.3E}".format, ALWAYS),
    "global batch size": (_fixed(0), DETAIL),
    "loss": (_fixed(6), ALWAYS),
    "rewards/accuracies": (_fixed(4), ALWAYS),
    "rewards/margins": (_fixed(4), ALWAYS),
    "lm loss": (_fixed(6), ALWAYS),
    "logits distillation loss": (_fixed(6), ALWAYS),
    "teacher lm loss": (_fixed(6), ""),
    "top-1 agreement": (_fixed(4), ""),
    "grad-norm": (_fixed(3), ALWAYS),
    "number of skipped iterations": (_fixed(0), DETAIL),
    "number of nan iterations": (_fixed(0), DETAIL),
}
OTHER = (_fixed(6), "")
LM = "lm loss"  # with what follows it in a name; without its first word, the loss that is trained
# What a short line of validation always has.
ALWAYS_VALIDATED = ("loss", "rewards/accuracies", "rewards/margins", "lm loss", "ppl", "logits distillation loss")


def once(row: dict[str, float]) -> dict[str, float]:
    """Without the next-token loss where `loss`, the loss that is trained, is the same: fine-tuning logs both names."""
    return {name: value for name, value in row.items() if not (name.startswith(LM) and row.get(name[3:]) == value)}


def train_line(iteration: int, iterations: int, row: dict[str, float], *, full: bool) -> str:
    """One line for a step, or for the mean of several."""
    head = f" iteration {iteration:>{len(str(iterations))}}/{iterations} |"
    if full:
        return _line(head, row, list(row))
    marks = {name: COLUMNS.get(name, OTHER)[1] for name in row}
    always = [name for name in row if marks[name] == ALWAYS or (row[name] and name.startswith("number of"))]
    return _line(head, row, always, [name for name in row if not marks[name]])


def validation_line(iteration: int, row: dict[str, float], *, full: bool) -> str:
    """One line per source, whose name follows `validation` in the names of its losses."""
    sources: dict[str, list[str]] = {}
    for name in row:
        sources.setdefault(name.partition(" validation")[2], []).append(name)
    lines = []
    for source, names in sources.items():
        always = [f"{loss} validation{source}" for loss in ALWAYS_VALIDATED]
        first = names if full else [name for name in always if name in names]
        rest = [name for name in names if name not in first]
        lines.append(_line(f" validation at iteration {iteration} |", row, first, rest))
    return "\n".join(lines)


def _line(head: str, row: dict[str, float], always: list[str], where_it_fits: list[str] | None = None) -> str:
    cells = {name: f" {name}: {COLUMNS.get(name, OTHER)[0](row[name])} |" for name in row}
    chosen, length = set(always), len(head) + sum(len(cells[name]) for name in always)
    for name in where_it_fits or ():
        if length + len(cells[name]) <= WIDTH:
            chosen.add(name)
            length += len(cells[name])
    return head + "".join(cells[name] for name in dict.fromkeys([*COLUMNS, *row]) if name in chosen)
