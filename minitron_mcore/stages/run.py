"""`run`: the steps of a recipe in one process group: skips what is done, resumes what was cut off."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.errors import InputError
from minitron_mcore.files import write_whole
from minitron_mcore.jobs.iterate import Step
from minitron_mcore.jobs.job import NOTHING
from minitron_mcore.jobs.run import EVALUATE, RESULTS, RunJob, resolve
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.report.closing_table import closing_table
from minitron_mcore.report.journal import note
from minitron_mcore.runtime.agree import all_or_none
from minitron_mcore.runtime.folder_lock import ANOTHER, FolderLock, held
from minitron_mcore.runtime.interrupt import made_progress, name_of, stopped_code
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages.act import act
from minitron_mcore.stages.generate import side_by_side
from minitron_mcore.stages.run_folder import begin, tell
from minitron_mcore.training.job import Progress

# What these steps make was only promised: the others are looked at once more when it is there.
LOOK_AGAIN = ("tokenizer", "preprocess", "search")


def run(job: RunJob, runtime: Runtime) -> dict[str, Any]:
    """Walk the road; returns the held-out results by model. The same command goes on where it was cut off."""
    folder = job.folder
    runtime.on_main(lambda: begin(job))
    started = time.perf_counter()
    results: dict[str, Any] = {}
    for number in range(1, len(job.steps) + 1):
        step, _ = job.steps[number - 1]
        place = f"[{number}/{len(job.steps)}]"
        results[step.name] = runtime.on_main(partial(step.outcome, folder))
        if results[step.name] is not None:
            runtime.print(f"{place} {step.title}: done before")
            continue
        results[step.name] = do(step, place, job, runtime)
        if step.verb in LOOK_AGAIN and number < len(job.steps):
            job = all_or_none(partial(resolve, job.recipe, job.world))
    if job.recipe.run.only:
        return results
    losses = {name.removeprefix(EVALUATE): value for name, value in results.items() if name.startswith(EVALUATE)}
    runtime.on_main(lambda: _write(folder / RESULTS, losses))
    runtime.print(f"\n{closing_table(losses)}")
    for step, _ in job.steps:
        if step.verb == "generate":
            runtime.print(side_by_side(results[step.name]))
    runtime.print(f"\nrun: done in {time.perf_counter() - started:.0f} s -> {folder}")
    runtime.on_main(lambda: tell(job))
    return losses


def do(step: Step, number: str, job: RunJob, runtime: Runtime) -> Any:
    """Carry a step out, and mark it as done with what it gave."""
    done = step.mark(job.folder)
    runtime.print(f"\n{number} {step.title}")
    started = time.perf_counter()
    refusal = InputError("output", job.folder, f"is being worked on by another run, at {step.word}", ANOTHER)
    with held(FolderLock(done.with_suffix(".lock"), refusal)):
        # Once more, now that all it needs is there.
        told = all_or_none(lambda: step.resolve(job.world, NOTHING))
        result = _plain(act(step.verb, told, runtime))
        gc.collect()
        torch.cuda.empty_cache()
        runtime.barrier()
        seconds = time.perf_counter() - started
        forecast = {"forecast": told.forecast.parts} if isinstance(told, TrainingJob) else {}
        facts: dict[str, Any] = {"name": done.stem, "title": step.title, "seconds": round(seconds, 3), **forecast}
        runtime.on_main(lambda: note(job.folder, "step", **facts))
        runtime.on_main(lambda: _write(done, result))
        made_progress()
    runtime.print(f"{number} {step.title}: {seconds:.1f} s")
    if runtime.stop_signal:
        runtime.print(f"{name_of(runtime.stop_signal)}: {step.title} is done; the same command goes on after it")
        raise SystemExit(stopped_code(runtime.stop_signal))
    return result


def _plain(result: Any) -> Any:
    """What is kept of a step's result: plain data alone."""
    if isinstance(result, Progress):
        return dataclasses.asdict(result)
    return result if isinstance(result, dict | list | int | float) else str(result)


def _write(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
