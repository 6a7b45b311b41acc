"""The training loop: next-token training and distillation alike, to a token budget, resumable.

One iteration: read the global batch, let the teacher run ahead, Megatron's schedule forward and backward, clip,
DistributedOptimizer step, learning-rate step, metrics, now and then validation and a checkpoint.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import torch

from minitron_mcore.checkpoint.folder import read_lineage
from minitron_mcore.checkpoint.store import load_training_state
from minitron_mcore.errors import DivergedError, InputError
from minitron_mcore.evaluation.held_out import mean_loss
from minitron_mcore.model.microbatch import Microbatch
from minitron_mcore.runtime.agree import gathered
from minitron_mcore.runtime.groups import data_group, pipeline_group
from minitron_mcore.runtime.interrupt import EXIT_INTERVAL, name_of, sparing, stopped_code
from minitron_mcore.runtime.pace import Pace, timed
from minitron_mcore.runtime.progress import Bar
from minitron_mcore.runtime.pulse import PULSE
from minitron_mcore.runtime.world import grace_seconds
from minitron_mcore.training.accounting import StepTimers, account, split_line
from minitron_mcore.training.grace import Grace
from minitron_mcore.training.job import Job, Progress
from minitron_mcore.training.local_checkpoints import LocalCheckpoints
from minitron_mcore.training.metrics import MetricsLog
from minitron_mcore.training.resuming import find_whole
from minitron_mcore.training.saving import Saver
from minitron_mcore.training.signals import StopRequest
from minitron_mcore.training.spikes import Spikes, in_words
from minitron_mcore.training.start_check import check_teacher
from minitron_mcore.training.step import Trained, not_finite, set_schedule, train_step
from minitron_mcore.training.stragglers import slowest

NOTICED = 0.2  # seconds: what one rank takes longer for a tiny step is the machine's own noise


def fit(job: Job) -> Progress:
    """Train up to `job.ends_at`, from the newest whole checkpoint in the folder if there is one. Every rank calls.

    A training that stops there on its way to `job.iterations` has validated and saved, and going on from there gives
    the same bits as never to have stopped.

    A signal to any rank, `exit_interval` and `exit_duration_in_mins` save a checkpoint at the end of the iteration and
    raise SystemExit (`stopped_code`). In the last iteration the run ends as usual: `runtime.stop_signal` then tells the
    caller of a signal or of a time that is up.
    """
    runtime = job.runtime
    trained = Trained.of(job.chunks, job.train, job.timetable)
    local = LocalCheckpoints.of(job, trained)
    progress, newest = resumed(job, trained, local)
    progress.data_order = job.data.order
    if progress.iteration >= job.ends_at:
        if local is not None:
            local.forget()
        return progress
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    about: dict[str, Any] = {"name": job.name, "recipe": job.recipe, "stage": job.stage, "documents": job.documents}
    metrics = MetricsLog(job.folder, job.log, job.iterations, **about)
    minutes = job.train.exit_duration_in_mins
    stop = StopRequest(math.inf if minutes is None else runtime.started + 60 * minutes)
    # The newest checkpoint, if it is to make room for the next: also the one of an earlier stop.
    interim = newest if job.until is not None and newest else None
    saver = Saver(job, trained, interim, newest=newest, local=local)
    try:
        # In a log the lines of the training itself have rate and time left.
        shown = runtime.progress(
            job.ends_at, "iterations", f"training {job.name}", done=progress.iteration, lines=False
        )
        with stop.outliving_the_reader(), sparing(lambda: saver.is_saving), shown as bar, PULSE.training():
            # Asked once more: a signal may come while the last checkpoint is saved.
            runtime.stop_signal = _iterate(job, progress, trained, metrics, stop, bar, saver) or stop.on_any_rank()
            if runtime.stop_signal and progress.iteration < job.ends_at:
                saved = f"{name_of(runtime.stop_signal)}: saved {job.folder} at iteration {progress.iteration}"
                runtime.print(f"{saved} of {job.iterations}; the same command goes on")
        saver.close()
        if local is not None:
            local.forget()  # the newest persistent one has all
    except BaseException as error:
        saver.leave(in_order=isinstance(error, Exception))
        raise
    finally:
        metrics.close(finished=progress.iteration == job.ends_at)
        stop.restore()
    if runtime.stop_signal and progress.iteration < job.ends_at:
        runtime.barrier()  # a launcher ends the ranks that are left once one has gone
        raise SystemExit(stopped_code(runtime.stop_signal))
    return progress


def _iterate(
    job: Job,
    progress: Progress,
    trained: Trained,
    metrics: MetricsLog,
    stop: StopRequest,
    bar: Bar,
    saver: Saver,
) -> int:
    """From `progress`, which is updated, to `job.ends_at`, or to the one in which a signal or a limit asked to stop.

    Returns that reason, or 0; the same on every rank."""
    train, runtime = job.train, job.runtime
    grace = grace_of(job, progress)
    PULSE.begin(progress.iteration + 1, steady=False)
    steps = job.data.read_train(job.timetable, progress.iteration)
    first = next(steps)
    check_teacher(job, first[1])
    runtime.on_main(lambda: metrics.open(progress.iteration))
    spikes, hosts = spikes_so_far(job, metrics), runtime.hosts()
    timers = StepTimers(job.log.timing_log_level)
    pace = Pace(progress.consumed_tokens)  # validation and saving count too
    timers.attach(trained.chunks, trained.optimizer, job.objective)
    timers.start()
    end = job.timetable.at(job.ends_at).tokens_before
    most_tokens = max(start.shape.tokens for start in job.timetable.starts)

    def tell() -> None:
        stop.ask(saver.state, round(1000 * timers.last))

    for step, batch in timers.batches(itertools.chain([first], steps)):
        row = train_step(trained, job.objective, step.shape, batch, timers.timers, tell)
        if job.teaching is not None:
            with timed(timers.timers, "optimizer", 0):
                row |= job.teaching.step(step.shape.tokens)
        timers.add({} if not_finite(row) else row, step.shape)
        row = count_skipped(job, progress, row, batch, metrics)
        progress.advance(step)
        bar.reach(progress.iteration)
        if job.objective.states is not None:
            progress.hidden_states_alpha = job.objective.states.alpha
        last = progress.iteration == job.ends_at
        row = {"consumed samples": progress.consumed_samples, **row}
        shown = times = facts = None
        if last or progress.iteration % job.log.interval == 0:
            spent = timers.report()
            costs, times, own = account(job, spent)
            times |= told_of_stragglers(job, progress.iteration, own, hosts)
            facts = {"times by rank (ms)": [round(1000 * each, 3) for each in own]}
            tokens = progress.consumed_tokens  # batch sizes may change, so iterations would not tell
            left = pace.left(tokens, end)
            shown = {**row, **costs, **spent.means, "tokens": tokens, "time left": left}
            row |= {**costs, **times}
        if leaps := spikes.found(row):
            metrics.event(progress.iteration, "spike", leaps, in_words(progress.iteration, leaps))
        metrics.write(progress.iteration, row, shown=shown, facts=facts)
        if times is not None and (job.log.console == "full" or job.log.timing_log_level):
            runtime.print(split_line(times))
        if job.data.read_valid and (last or _is_due(progress.iteration, train.eval_interval)):
            began = time.monotonic()
            with PULSE.quiet("validation"):
                progress.metrics = validate(trained.chunks, job)
            runtime.warn(grace.validation(time.monotonic() - began))
            metrics.write(progress.iteration, progress.metrics, shown=progress.metrics, kind="validation")
            tell()  # once more, since that took long
        asked_to_stop, writing, longest = stop.answer()
        if not last and not asked_to_stop and _is_due(progress.iteration, train.exit_interval or 0):
            asked_to_stop = EXIT_INTERVAL
        runtime.warn(grace.step(longest / 1000, most_tokens / step.shape.tokens))
        with PULSE.quiet("checkpoint"):
            saver.attend(writing)
            saver.save_local(progress, ends=bool(last or asked_to_stop))
            if last or asked_to_stop or any(_is_due(progress.iteration, each) for each in job.save_intervals):
                saver.save(progress, at_once=bool(last or asked_to_stop))
        if last or asked_to_stop:
            return asked_to_stop
        runtime.warn(grace.save(saver.seconds))
        PULSE.begin(progress.iteration + 1, steady=True)
        timers.start()
    raise AssertionError("the steps ended before the last iteration")


def resumed(job: Job, trained: Trained, local: LocalCheckpoints | None) -> tuple[Progress, int]:
    """(where the run goes on, its newest whole checkpoint on the persistent path, 0 for none), with the weights and the
    optimizer's state of there: of that checkpoint, or of a newer local one. Every rank calls."""
    runtime, teaching = job.runtime, job.teaching
    newest = find_whole([job.folder, *([teaching.folder] if teaching is not None else [])], runtime)
    if local is not None and (progress := local.resume(newest or 0)) is not None:
        place = f"the local checkpoint of {job.folder}"
    elif newest is not None:
        progress, place = Progress(**load_training_state(job.folder, newest, *trained)), str(job.folder)
    else:
        return Progress(), 0
    is_local = progress.iteration != newest
    check_past(progress, job)
    warn_of_other_data(progress, job)
    set_schedule(trained.scheduler, progress.consumed_tokens)
    if job.objective.states is not None:
        job.objective.states.resume(progress.hidden_states_alpha)
    if teaching is not None and is_local:
        set_schedule(teaching.trained.scheduler, progress.consumed_tokens)
    elif teaching is not None:
        teaching.resume(progress.iteration, progress.consumed_tokens)
    runtime.print(f"resumed {place} at iteration {progress.iteration} of {job.iterations}")
    if not is_local:
        runtime.on_main(lambda: describe_newest(job, progress))
    return progress, newest or 0


def grace_of(job: Job, progress: Progress) -> Grace:
    given = job.recipe.get("cluster", {}).get("grace_seconds")
    return Grace(grace_seconds() if given is None else given, given=given is not None, resumes=progress.iteration > 0)


def spikes_so_far(job: Job, metrics: MetricsLog) -> Spikes:
    spikes = Spikes(job.log.spike_deviations)
    if job.runtime.is_main:
        spikes.read(metrics.file)
    return spikes


def told_of_stragglers(job: Job, iteration: int, own: list[float], hosts: list[str]) -> dict[str, float]:
    """What is logged of the ranks' `own` seconds an iteration; where one is far slower than others, a line names it.
    Every rank calls."""
    found = slowest(own, pipeline_group().size())
    if found is None:
        return {}
    limit = job.log.straggler_ratio
    if limit and found.ratio >= limit and found.seconds >= NOTICED:
        job.runtime.print(found.in_words(iteration, hosts[found.rank]))
    return {
        "slowest rank": found.rank,
        "slowest rank time (ms)": 1000 * found.seconds,
        "slowest rank ratio": found.ratio,
    }


def describe_newest(job: Job, progress: Progress) -> None:
    """Write what lies beside the weights, if a run was killed after saving the weights and before writing this, or if
    what it tells of was found to be damaged."""
    if read_lineage(job.folder).get("tokens") != progress.consumed_tokens:
        job.describe(progress)


def count_skipped(
    job: Job, progress: Progress, row: dict[str, float], batch: list[Microbatch], metrics: MetricsLog
) -> dict[str, float]:
    """What to log of `row`, a step just done: its finite values, and how many steps were skipped so far.

    A skipped step is logged as an event, with the numbers of its samples. Every rank calls, before `progress.advance`.
    Raises DivergedError at the `max_skipped_iterations`-th skipped step in a row.
    """
    bad = not_finite(row)
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if bad else 0
    if bad:
        progress.skipped_iterations += 1
        progress.nan_iterations += any(not name.endswith("grad-norm") for name in bad)
        iteration, limit = progress.iteration + 1, job.train.max_skipped_iterations
        samples = global_samples(batch)
        where = f"samples {in_ranges(samples)}" if samples else f"samples from {progress.consumed_samples} on"
        reason = ", ".join(f"{name} is {row[name]}" for name in bad)
        facts = {"reason": {name: str(row[name]) for name in bad}, "samples": samples}
        so_far = f"{progress.skipped_in_a_row} in a row, of {limit} at most"
        line = f" iteration {iteration:>8}/{job.iterations:>8} | skipped: {reason} | {where} | {so_far} |"
        metrics.event(iteration, "skipped", facts, line)
        if progress.skipped_in_a_row >= limit:
            raise DivergedError(
                f"iteration {iteration}, {where}: {reason}; {progress.skipped_in_a_row} iterations in a row were "
                f"skipped, so max_skipped_iterations={limit} ends the run; the newest checkpoint is from before them"
            )
    return {
        **{name: value for name, value in row.items() if name not in bad},
        "number of skipped iterations": progress.skipped_iterations,
        "number of nan iterations": progress.nan_iterations,
    }


def global_samples(batch: list[Microbatch]) -> list[int]:
    """Numbers of the samples in the global batch, in order; empty if the data have none. Every rank calls."""
    mine = [number for part in batch if part.samples is not None for number in part.samples.tolist()]
    return sorted(number for rank in gathered(mine, data_group()) for number in rank)


def in_ranges(numbers: list[int]) -> str:
    """[3, 4, 5, 9] -> "3-5, 9"."""
    following = itertools.groupby(enumerate(numbers), lambda each: each[1] - each[0])
    runs = [[number for _, number in run] for _, run in following]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def validate(chunks: list[torch.nn.Module], job: Job) -> dict[str, float]:
    """Held-out losses over `eval_iters` global batches of the blend, and of each of its sources. Every rank calls."""
    found: dict[str, float] = {}
    for name, read in job.data.read_valid.items():
        means = mean_loss(chunks, read(0, job.train.eval_iters), job.objective)
        found |= {f"{key} validation {name}".rstrip(): value for key, value in means.items()}
    return found


def check_past(progress: Progress, job: Job) -> None:
    """Raise InputError if the checkpoint has seen other numbers of tokens than the timetable has."""
    expected = job.timetable.at(progress.iteration).tokens_before if progress.iteration <= job.iterations else None
    if progress.consumed_tokens != expected:
        seen = f"has seen {progress.consumed_tokens} tokens at iteration {progress.iteration}"
        rule = f"{seen}, which does not fit {job.timetable}"
        raise InputError("", job.folder, rule, "keep batch sizes and sequence lengths of what is already done")


def warn_of_other_data(progress: Progress, job: Job) -> None:
    """Print a warning if what is read from here on is not what the run would have read."""
    if any(job.data.order.get(length, order) != order for length, order in progress.data_order.items()):
        job.runtime.print(
            f"WARNING: {job.folder} has read other samples, or in another order, than data.train gives now: its files "
            "have changed, or the text is read more than once and another budget reshuffles it; some samples are "
            "repeated before others are read at all"
        )


def _is_due(iteration: int, interval: int) -> bool:
    return interval > 0 and iteration % interval == 0
