"""Faults carried out and judged: a stage is disturbed, mended where that is needed, and started again by the same
command; where it ends must be where it ends undisturbed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint.folder import TRACKER, iteration_folder
from minitron_mcore.checkpoint.integrity import verify_checkpoint
from minitron_mcore.errors import InputError
from tests.faults.outcome import differences, finished, left_over, lost, newest, outcome
from tests.faults.plan import Fault, Result
from tests.faults.stages import STAGES, Stage, write_inputs
from tests.faults.starts import Ending, Script, Start
from tests.faults.ways import HOW

ITERATION = re.compile(r"^ iteration +\d+/ *\d+ \|(?! skipped)", re.MULTILINE)
TRIES = 4
AGAIN = 3  # starts until it must have ended well


@dataclass
class Whole:
    """A stage that nothing disturbs: what it leaves, bytes, iterations of training, and the seconds after its start in
    which it is at work: from halfway to its first word to its last one."""

    outcome: dict[str, Any]
    size: int
    steps: int
    begins: float = 0.0
    ends: float = 0.0

    def see(self, ending: Ending) -> None:
        """Of one of its runs; the earlier limits stay, since no two last alike."""
        first, last = ending.spoke
        self.begins = min(self.begins or first, first / 2)
        self.ends = min(self.ends or last, last)


@dataclass
class Place:
    """Of one fault: where all inputs were made, where it reads and writes, and its starts so far."""

    root: Path
    stage: Stage
    made: Path
    inputs: Path
    folder: Path
    starts: list[Start]

    def start(self, *keys: str, module: str = "minitron_mcore", first: Sequence[str] = (), **variables: str) -> Start:
        words = [*first, *self.stage.command(self.inputs, self.folder, *keys)]
        log = self.root / f"start-{len(self.starts)}"
        self.starts.append(Start(words, self.stage.ranks, log, module=module, **variables))
        return self.starts[-1]

    def outcome(self) -> dict[str, Any]:
        """The inputs say themselves where they were made."""
        return outcome(self.folder, self.inputs, self.made)

    @property
    def steps(self) -> int:
        return sum(len(ITERATION.findall(start.shown())) for start in self.starts)


class Campaign:
    """Faults against the stages, in `root`. limit: seconds in which whatever is to end must have."""

    def __init__(self, root: Path, limit: float) -> None:
        self.root, self.limit, self.inputs = root, limit, root / "inputs"
        self.whole: dict[str, Whole] = {}

    def prepare(self, stages: Sequence[str], lanes: int) -> Iterator[str]:
        """Carry all stages out undisturbed, then those of `stages` once more, side by side as faults will be: a line
        for each that does not end as it did the first time. Raises RuntimeError where one does not end well."""
        write_inputs(self.inputs)
        for name, stage in STAGES.items():
            start = Start(stage.command(self.inputs, self.inputs / name), stage.ranks, self.root / f"whole-{name}")
            ending = start.finish(10 * self.limit)
            if not ending.ended_well:
                raise RuntimeError(f"{name} ended with {ending.codes}, though nothing disturbed it:\n{start.shown()}")
            folder = self.inputs / name
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            steps = len(ITERATION.findall(start.shown()))
            self.whole[name] = Whole(outcome(folder, self.inputs), size, steps)
            self.whole[name].see(ending)
        with ThreadPoolExecutor(lanes) as pool:
            for name, differ in zip(stages, pool.map(self._once_more, stages), strict=True):
                if differ:
                    yield f"{name} does not end twice alike: {', '.join(differ)}"

    def _once_more(self, name: str) -> list[str]:
        place = self._place(self.root / f"again-{name}", STAGES[name])
        ending = place.start().finish(10 * self.limit)
        self.whole[name].see(ending)
        found = place.outcome()
        shutil.rmtree(place.root)
        return differences(found, self.whole[name].outcome) if ending.ended_well else [str(ending.codes)]

    def _place(self, root: Path, stage: Stage) -> Place:
        (root / "out").mkdir(parents=True)
        return Place(root, stage, self.inputs, self.inputs, root / "out", [])

    def carry_out(self, fault: Fault) -> Result:
        """Do it, and see what becomes of it; a moment after the end is drawn in."""
        root = self.root / f"{fault.number:03d}-{fault.kind}-{fault.stage}"
        for _ in range(TRIES):
            result = Result(fault)
            place = self._place(root, STAGES[fault.stage])
            try:
                HOW[fault.kind](self, fault, place, result)
            except Exception as error:
                result.problems.append(f"{type(error).__name__}: {error}")
            if not result.is_missed:
                break
            shutil.rmtree(root)
            fault = replace(fault, moment=0.6 * fault.moment)
        if not result.problems:
            shutil.rmtree(root, ignore_errors=True)
        return result

    def seconds(self, fault: Fault) -> float:
        whole = self.whole[fault.stage]
        return whole.begins + fault.moment * (whole.ends - whole.begins)

    def disturb(self, place: Place, start: Start, script: Script, result: Result, limit: float | None = None) -> Ending:
        """To the end of the start, in which the script happens; what was finished before must stay."""
        before: dict[str, Any] = {}

        def first(act: Callable[[], bool]) -> bool:
            before.update(finished(place.folder))
            return act()

        (when, act), *rest = script
        ending = start.finish(limit or self.limit, [(when, lambda: first(act)), *rest])
        result.is_missed = not ending.met[0]
        result.seconds = ending.since
        result.happened = ", ".join(map(str, ending.codes))
        if ending.hung:
            result.problems.append(f"hangs: ranks {ending.forced} had not ended after {ending.since:.0f} s")
        if ending.left:
            result.problems.append(f"{ending.left} processes were left behind")
        result.problems += self.lost(place, before)
        return ending

    def lost(self, place: Place, before: dict[str, Any]) -> list[str]:
        """What was finished and is no more, and finished checkpoints that are not whole."""
        problems = [f"{name} was finished, and is not any more" for name in lost(before, finished(place.folder))]
        for tracker in place.folder.rglob(TRACKER):
            if (iteration := newest(tracker.parent)) is not None:
                try:
                    problems += verify_checkpoint(iteration_folder(tracker.parent, iteration)).faults
                except InputError as error:
                    problems.append(str(error))
        return problems

    def go_on(self, place: Place, result: Result, *keys: str, but: Sequence[str] = ()) -> None:
        """The same command, until it ends well, and where it ends; `but`: files that may differ."""
        for _ in range(AGAIN):
            ending = place.start(*keys).finish(self.limit)
            result.again += 1
            if ending.hung:
                result.problems.append("hangs when it is started again")
            if ending.ended_well:
                break
        else:
            result.problems.append(f"ends with {ending.codes} when it is started again: {place.starts[-1].told()}")
            return
        self.compare(place, result, but)

    def differ(self, place: Place) -> list[str]:
        """The files that are not as they are undisturbed."""
        return differences(place.outcome(), self.whole[place.stage.name].outcome)

    def compare(self, place: Place, result: Result, but: Sequence[str] = ()) -> None:
        whole = self.whole[place.stage.name]
        differ = [name for name in self.differ(place) if name not in but]
        result.equal = not differ
        if differ:
            result.problems.append(f"ends otherwise: {', '.join(differ[:3])}{' ...' if differ[3:] else ''}")
        if left := left_over(place.folder):
            result.problems.append(f"leaves {', '.join(left[:3])}")
        result.steps = place.steps - whole.steps

    def end(self, place: Place, result: Result, ending: Ending, *keys: str) -> None:
        """Where it ended well, it must be where the stage ends; else the same command goes on to there."""
        if ending.ended_well or not (place.stage.trains or self.differ(place)):
            self.compare(place, result)  # a rank may be met when all is written
        else:
            self.go_on(place, result, *keys)
