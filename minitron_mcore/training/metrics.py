"""Where a run's numbers go: console, JSONL, TensorBoard, Weights & Biases; under Megatron's names.

Only the first rank writes. A run folder has one `metrics.jsonl`, with one line per iteration; a run resumed from a
checkpoint first cuts every log back to it, so that each iteration appears once. The console shows a line every
`log.interval` iterations, with the losses averaged over them. Pure.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.files import whole_file, writing
from minitron_mcore.runtime.pace import duration
from minitron_mcore.training.config import LogConfig
from minitron_mcore.training.patient_file import PatientFile


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
            self._file = PatientFile(file)
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
            shown = once(shown)
            full = self.log.console == "full"
            line = train_line(iteration, self.iterations, shown, full=full) if kind == "train" else None
            print(line or validation_line(iteration, shown, full=full), flush=True)
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
        print(line, flush=True)

    def _leave_tensorboard(self, error: OSError) -> None:
        """Its writer does not recover from a disk that failed; what it lacks is in metrics.jsonl."""
        self._tensorboard = None
        print(f"WARNING: TensorBoard's files in {self.folder} cannot be written, and end here: {error}", flush=True)

    def _write_line(self, iteration: int, kind: str, facts: dict[str, Any]) -> None:
        record = {"iteration": iteration, "kind": kind, "time": round(time.time(), 3), **facts}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self, *, finished: bool = True) -> None:
        """End the writers; Weights & Biases shows the run as `finished`, or as failed."""
        if self._file is not None:
            self._file.close()
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
        except OSError as error:
            self._leave_tensorboard(error)
        if self._dashboard is not None:
            self._dashboard.close(finished=finished)


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

    One run a folder, resumed under its id when the training is. Offline, too, there is one folder below `wandb/`,
    whatever was killed: a resumed run copies its earlier rows from metrics.jsonl, which was cut back to where it goes
    on, into the new folder and deletes the old one. Online, repeated iterations keep their first numbers, as
    Weights & Biases accepts each step once. Raises InputError where Weights & Biases refuses.
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
        for iteration, moment, row in rows:
            self.run.log({"_timestamp": moment, **row}, step=iteration)
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
            iteration, moment, kind = row.pop("iteration"), row.pop("time"), row.pop("kind")
            if kind in ("train", "validation"):
                yield iteration, moment, {name: math.nan if value is None else value for name, value in row.items()}


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
