"""`submit`: scripts written and handed to sbatch, one after another; one that is refused takes the others back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_mcore.errors import InputError
from minitron_mcore.files import write_whole, writing
from minitron_mcore.jobs.batch import JOBS, SubmitJob
from minitron_mcore.recipe import to_yaml
from minitron_mcore.runtime import slurm
from minitron_mcore.runtime.folder_lock import ANOTHER, FolderLock
from minitron_mcore.stages.run_folder import establish
from minitron_mcore.tables import counted


def run(job: SubmitJob, runtime: None) -> dict[str, str]:
    """The id of each stage's job, by its name. One process calls, on a machine that has sbatch."""
    if not job.stages:
        print(f"submit: all is done -> {job.folder}", flush=True)
        return {}
    if not slurm.has("sbatch"):
        remedy = "submit on a login node of the cluster; --dry-run prints the jobs anywhere"
        raise InputError("", "sbatch", "is not there", remedy)
    scripts = {stage.name: stage.script(job.place, job.template) for stage in job.stages}
    refusal = InputError("output", job.folder, "is being submitted by another command", ANOTHER)
    lock = FolderLock(job.place / "submit.lock", refusal)
    with writing(f"output={job.folder}"):
        lock.take()
    try:
        clear_queue(job)
        with writing(f"output={job.folder}"):
            if job.recipe.submit.verb == "run":
                establish(job.folder, job.recipe)
            for stage in job.stages:
                write_whole(job.place / f"{stage.name}.yaml", to_yaml(stage.recipe))
                write_whole(job.place / f"{stage.name}.sbatch", scripts[stage.name])
        return queue(job)
    finally:
        lock.release()


def clear_queue(job: SubmitJob) -> None:
    """Cancel what is left of an earlier submission, where the recipe says so. Raises InputError where it does not."""
    file = job.place / JOBS
    before: dict[str, str] = _read(file)
    if not before:
        return
    if job.recipe.submit.force:
        if slurm.has("scancel") and (said := slurm.cancel(before.values())):
            print(f"submit: WARNING: scancel {' '.join(before.values())}: {said}", flush=True)
        return
    states = slurm.queued([*before.values()])
    remedy = "wait for them, or set submit.force=true, which cancels them and submits anew"
    if states is None:
        rule = f"has jobs of which squeue does not say whether they have ended: {', '.join(before.values())}"
        raise InputError("output", job.folder, rule, remedy)
    if left := [f"{number} ({name}, {states[number]})" for name, number in before.items() if number in states]:
        rule = f"has {counted(len(left), 'job')} in the queue: {', '.join(left)}"
        raise InputError("output", job.folder, rule, remedy)


def queue(job: SubmitJob) -> dict[str, str]:
    """Submit every stage. Raises what sbatch refuses, when those that it has taken are cancelled."""
    ids: dict[str, str] = {}
    try:
        for stage in job.stages:
            ids[stage.name] = slurm.submit(stage.sbatch(job.place, ids))
            with writing(f"output={job.folder}"):
                write_whole(job.place / JOBS, json.dumps(ids, indent=2) + "\n")
            array = f", {counted(stage.array, 'task')}" if stage.array else ""
            after = f", after {' and '.join(stage.after)}" if stage.after else ""
            size = f"{stage.size} for {stage.size.time}"
            print(f"submit: {ids[stage.name]}  {stage.name}: {size}{array}{after}", flush=True)
    except BaseException as error:
        told = take_back(ids)
        if not isinstance(error, InputError):
            print(f"submit: {told}", flush=True)
            raise
        remedy = f"{error.remedy}; {told}".removeprefix("; ")
        raise InputError(error.key, error.value, error.rule, remedy) from error
    print(f"submit: {counted(len(ids), 'job')} -> {job.place}", flush=True)
    return ids


def take_back(ids: dict[str, str]) -> str:
    """Cancel the jobs; what has become of them, in words."""
    if not ids:
        return "nothing was submitted"
    words = f"{counted(len(ids), 'job')} submitted before, {' '.join(ids.values())},"
    if said := slurm.cancel(ids.values()):
        return f"{words} could not be cancelled ({said}): cancel them yourself"
    return f"{words} {'were' if len(ids) > 1 else 'was'} cancelled"


def _read(file: Path) -> dict[str, str]:
    """The ids of an earlier submission, by stage. Raises InputError where the file is something else."""
    if not file.is_file():
        return {}
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, str) and each.isdecimal() for each in found.values()):
        raise InputError("output", file, "is not the list of jobs that `submit` wrote", "delete it when none is queued")
    return found
