"""How long a resolved job takes on a described machine, where it is a training, by what `estimate` knows. Pure."""

from __future__ import annotations

from minitron_mcore.checkpoint.folder import latest_iteration
from minitron_mcore.errors import InputError
from minitron_mcore.estimate.cost import cost_of
from minitron_mcore.estimate.forecast import settings_of
from minitron_mcore.jobs.job import Job
from minitron_mcore.jobs.search import SearchJob
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.runtime.devices import Machine
from minitron_mcore.runtime.world import World


def seconds_for(job: Job, world: World, machine: Machine, *, stop: int = 1, share: int = 1) -> float | None:
    """Of what is left of a training, or of `share` candidates from one stop of a search to the stop with this number;
    None where nothing is known of it."""
    if isinstance(job, SearchJob) and job.trials:
        trials, whole = job.trials, _whole(job.trials.largest, job.trials.world, machine)
        before, after = (0, *(iteration for iteration, _ in trials.stops))[stop - 1 : stop + 1]
        rounds = -(-share // trials.side_by_side)
        return None if whole is None else rounds * whole * (after - before) / trials.largest.timetable.iterations
    if not isinstance(job, TrainingJob):
        return None
    done = min((latest_iteration(job.folder) or 0) / job.timetable.iterations, 1.0)
    whole = _whole(job, world, machine)
    return None if whole is None else whole * (1 - done)


def _whole(job: TrainingJob, world: World, machine: Machine) -> float | None:
    if job.chats is not None or (machine.peak_flops is None and machine.peak_flops_fp8 is None):
        return None
    teacher = job.teaching.model.architecture if job.teaching.model else None
    settings = settings_of(job.recipe, job.section, job.architecture, job.timetable, world, teacher)
    try:
        return cost_of(job.timetable, settings, machine).seconds
    except InputError:  # a figure of the machine is missing
        return None
