"""A walk of `run` that is interrupted in every step, by Ctrl-C, SIGTERM or kill -9, against one that is not.

    python -m tests.e2e.interrupted RECIPE.yaml FOLDER [--ranks 2] [--signals SIGINT,SIGTERM,SIGKILL] [key=value ...]

In FOLDER/whole lies the walk that nothing interrupts, in FOLDER/SIGINT and so on the others, with a log of each start.
Where they end must be the same: held-out losses, every logged number of a loss, each iteration once in each log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.launchers import ROOT, environment

ENDED = re.compile(r"^\[(\d+)/(\d+)\] (.*): ([\d.]+) s$", re.MULTILINE)
LEFT_OVER = re.compile(r"\.unfinished|\.tmp$|\.old$")
PATIENCE = 1800.0  # seconds until a step has begun, or a process has ended


@dataclass(frozen=True)
class Walk:
    """What is started, again and again."""

    recipe: Path
    output: Path
    ranks: int
    overrides: tuple[str, ...] = ()

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        words = ["run", "--config", str(self.recipe), f"output={self.output}", *self.overrides]
        launcher = [str(ROOT / "launch" / "torchrun.sh")]
        return subprocess.Popen(
            [*(launcher if self.ranks > 1 else [sys.executable, "-m", "minitron_mcore"]), *words],
            cwd=ROOT,
            env=environment(NPROC_PER_NODE=str(self.ranks)),
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self, log: Path) -> list[tuple[str, float]]:
        """To the end; the title of each step and the seconds it took."""
        process = self.start(log)
        assert process.wait(PATIENCE) == 0, log.read_text()
        return [(title, float(seconds)) for _, _, title, seconds in ENDED.findall(log.read_text())]


def interrupt(walk: Walk, log: Path, number: int, title: str, delay: float, signal_name: str) -> bool:
    """Start, and send the signal `delay` seconds into step `number`; whether it met the walk before its end."""
    process = walk.start(log)
    begins = re.compile(rf"^\[{number}/\d+\] {re.escape(title)}$", re.MULTILINE)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not begins.search(log.read_text()):
        assert time.monotonic() < deadline, f"{title} did not begin\n{log.read_text()}"
        time.sleep(0.01)
    time.sleep(delay)
    if process.poll() is None and signal_name == "SIGKILL":
        for each in [process.pid, *descendants(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    elif process.poll() is None:
        process.send_signal(getattr(signal, signal_name))
    code, shown = process.wait(PATIENCE), log.read_text()
    if code == 0:
        return False
    if signal_name != "SIGKILL":
        # Of a training, SIGTERM asks to be started again.
        assert code in (128 + getattr(signal, signal_name), *([200] if signal_name == "SIGTERM" else [])), shown
        assert "Traceback" not in shown and "same command goes on" in shown, shown
    return True


def descendants(process: int) -> list[int]:
    """All below it, ranks in sessions of their own among them."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, open_ones = [], [process]
    while open_ones:
        children = parents.get(open_ones.pop(), [])
        found += children
        open_ones += children
    return found


def interrupt_everywhere(walk: Walk, steps: list[tuple[str, float]], signal_name: str, logs: Path) -> int:
    """In the middle of each step in turn; then to the end. Returns how often it was interrupted."""
    logs.mkdir(parents=True, exist_ok=True)
    met = 0
    for number, (title, seconds) in enumerate(steps, start=1):
        met += interrupt(walk, logs / f"{number}.log", number, title, seconds / 2, signal_name)
    walk.finish(logs / "last.log")
    return met


def losses(output: Path) -> dict[str, Any]:
    """Everything that two walks must have in common; asserts that each iteration stands once in each log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, Any] = {"results": {}}
    for name, row in json.loads((output / "results.json").read_text()).items():
        found["results"][name] = {key: row[key] for key in ("lm loss", "ppl", "tokens", "parameters")}
    for file in sorted(output.rglob("metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        twice = [key for key, count in Counter((row["kind"], row["iteration"]) for row in rows).items() if count > 1]
        iterations = [row["iteration"] for row in rows if row["kind"] == "train"]
        assert not twice and iterations == list(range(1, len(iterations) + 1)), f"{file}: {twice}"
        folder = str(file.parent.relative_to(output))
        found[folder] = [
            {name: value for name, value in row.items() if "loss" in name or name in ("grad-norm", "iteration", "kind")}
            for row in rows
        ]
        accumulator = EventAccumulator(str(file.parent / "tensorboard"), size_guidance={"scalars": 0})
        accumulator.Reload()
        steps = [event.step for event in accumulator.Scalars("lm loss")]
        assert steps == iterations, f"{folder}: TensorBoard has {steps}"
    left = [str(path) for path in output.rglob("*") if LEFT_OVER.search(path.name)]
    assert not left, left
    return found


def compare(recipe: Path, folder: Path, ranks: int, signals: list[str], overrides: tuple[str, ...]) -> None:
    """The walk without an interruption, then one for each of `signals`. Asserts that they end alike."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = Walk(recipe, folder / "whole", ranks, overrides)
    steps = whole.finish(folder / "whole.log")
    expected = losses(whole.output)
    for name in signals:
        walk = Walk(recipe, folder / name, ranks, overrides)
        met = interrupt_everywhere(walk, steps, name, folder / f"{name}.logs")
        assert met >= len(steps) - 1, f"{name}: only {met} of {len(steps)} steps were interrupted"
        assert losses(walk.output) == expected, f"{name}: another end"
        print(f"{name}: interrupted in {met} of {len(steps)} steps, the same to the last digit", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--signals", default="SIGINT,SIGTERM,SIGKILL")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    signals = options.signals.split(",")
    compare(options.recipe.resolve(), options.folder.resolve(), options.ranks, signals, tuple(options.overrides))


if __name__ == "__main__":
    main()
