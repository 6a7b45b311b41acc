"""`minitron VERB --dry-run`: what a job would read and make, how it lies over the ranks, what a rank needs. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from minitron_mcore.estimate.forecast import bytes_text, forecast_words, stage_parts
from minitron_mcore.jobs.align import AlignJob
from minitron_mcore.jobs.batch import SubmitJob
from minitron_mcore.jobs.job import Job, Model
from minitron_mcore.jobs.reproduce import ReproduceJob
from minitron_mcore.jobs.run import RunJob
from minitron_mcore.jobs.search import SearchJob
from minitron_mcore.jobs.train import TrainingJob
from minitron_mcore.recipe import Recipe
from minitron_mcore.runtime.config import ClusterConfig
from minitron_mcore.runtime.world import Memory, World
from minitron_mcore.tables import counted

ENOUGH = 1 << 62  # bytes of a memory whose size is not given


def planned_world(cluster: ClusterConfig, started: World) -> World:
    """The GPUs that the recipe's `cluster` describes, as many as were started where it does not say how many; the ranks
    that were started where it describes none."""
    if (cluster.gpus, cluster.device, cluster.gpu_memory) == (None, None, None):
        return started
    gpus = cluster.gpus or started.size
    device, host = cluster.gpu_memory or ENOUGH, cluster.host_memory or ENOUGH
    memory = Memory(device, device, host, host) if cluster.gpu_memory or cluster.host_memory else None
    local = min(gpus, cluster.gpus_per_node)
    return World(rank=started.rank, size=gpus, local_size=local, device="cuda", memory=memory)


def dry_run(verb: str, job: Job, world: World) -> str:
    """What the job would do, in words."""
    if isinstance(job, SubmitJob):
        return "\n".join([*_submit_lines(job), "dry run: nothing was written"])
    lines = [f"minitron {verb} on {counted(world.size, 'rank')}{layout_of(job.recipe, world)}"]
    if isinstance(job, ReproduceJob):
        for run in job.shared:
            lines += _step_lines(run, "", world)
        for number, arm in enumerate(job.arms, start=1):
            words = f"{number}/{len(job.arms)} {arm.name}, seed {arm.seed}: "
            # With the next seeds the same is done as with the first.
            steps = _step_lines(arm.run, words, world)
            lines += steps if arm.seed == job.arms[0].seed else (line for line in steps if line.startswith("["))
        lines.append(f"makes  {job.target}: differences of the arms, and the verdict")
    elif isinstance(job, RunJob):
        lines += _step_lines(job, "", world)
        lines += [f"WARNING: {note}" for note in job.notes]
    else:
        lines += _lines(job, world)
    return "\n".join([*lines, "dry run: nothing was written"])


def _step_lines(job: RunJob, place: str, world: World) -> Iterator[str]:
    for number, (step, each) in enumerate(job.steps, start=1):
        yield f"[{place}{number}/{len(job.steps)}] {step.title}{'' if each else ': done before'}"
        yield from (f"  {line}" for line in (_lines(each, world) if each else ()))


def _submit_lines(job: SubmitJob) -> Iterator[str]:
    """Every job with what it would do, and the script that SLURM would get; <STAGE> is the id of another one."""
    yield f"minitron submit: {counted(len(job.stages), 'job')} by {job.template.place}"
    yield from (f"{title}: done before" for title in job.skipped)
    for number, stage in enumerate(job.stages, start=1):
        array = f", an array of {counted(stage.array, 'task')}" if stage.array else ""
        after = f", after {' and '.join(stage.after)}" if stage.after else ""
        yield f"[{number}/{len(job.stages)}] {stage.title}: {stage.size} for {stage.size.time}{array}{after}"
        if stage.job and stage.job is not (job.stages[number - 2].job if number > 1 else None):
            yield from (f"  {line}" for line in _lines(stage.job, stage.size.world))
        words = stage.sbatch(job.place, {name: f"<{name}>" for name in stage.after})
        yield f"  {shlex.join(words)}"
        yield from (f"  | {line}" for line in stage.script(job.place, job.template).splitlines())
    yield from (f"WARNING: {note}" for note in job.notes)


def layout_of(recipe: Recipe, world: World) -> str:
    """The layout in words, with the data-parallel size that is left of the ranks; "" where nothing is sharded."""
    sizes = {name: getattr(recipe.parallel, name) for name in ("tensor", "pipeline", "virtual_pipeline", "context")}
    sizes["data"] = world.size // recipe.parallel.replica_ranks
    words = [f"{name} {size}" for name, size in sizes.items() if size and size > 1]
    return f": {' x '.join(words)}" if words else ""


def _lines(job: Job, world: World) -> Iterator[str]:
    for word, items in (("reads", job.reads), ("makes", job.makes)):
        for item in items:
            if isinstance(item, Model):
                state = item if word == "reads" else f"checkpoint, {item.architecture.num_parameters:,} parameters"
                yield f"{word}  {item.key}={item.folder}: {state}"
            else:
                yield f"{word}  {item.key}={item.path}: {item.what}"
    if isinstance(job, TrainingJob):
        yield from _training_lines(job, world)
    if isinstance(job, AlignJob):
        for this, training in zip(job.rounds, job.trainings, strict=True):
            about = "" if this.config.tokens else "; about, until the samples are prepared"
            yield f"{this.name or 'align'}: {this.config.method}{about}"
            yield from _training_lines(training, world)
    if isinstance(job, SearchJob) and job.trials:
        trials, (_, tokens) = job.trials, job.trials.stops[-1]
        on = f", {trials.side_by_side} at a time on {counted(trials.world.size, 'rank')} each" if world.size > 1 else ""
        count = counted(len(trials.trials), "candidate")
        yield f"tries {count} for {tokens:,} tokens{on}; the one that needs most memory:"
        yield from _training_lines(trials.largest, trials.world, tokens)
    for note in job.notes:
        yield f"WARNING: {note}"


def _training_lines(job: TrainingJob, world: World, most: int | None = None) -> Iterator[str]:
    """most: the tokens after which it stops, whatever its timetable."""
    part = "" if most is None else f"the first {most:,} tokens of "
    yield f"{'goes on' if job.resumes else 'trains'} {part}{job.timetable}"
    yield from forecast_words(job.forecast, world.memory)
    setting, count = job.forecast.setting, job.recipe.parallel.pipeline
    # The ranks of one pipeline stage need the same.
    for stage in range(count if count > 1 else 0):
        needed = bytes_text(sum(stage_parts(setting, stage).values()))
        yield f"memory of a rank of pipeline stage {stage}: {needed}"
