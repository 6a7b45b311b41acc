"""Verb `bench`: how fast checkpoints prefill and decode, in this project's engine and in others -> `bench.json`."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minitron_mcore import __version__
from minitron_mcore.bench.engines import OURS, Theirs, key_of
from minitron_mcore.bench.figures import PAPERS, PAPERS_LINE, tables, what_is_shown, with_ratios
from minitron_mcore.bench.measure import Seat, measure
from minitron_mcore.bench.ours import Ours
from minitron_mcore.bench.prompts import prompts_of
from minitron_mcore.bench.rows import cpu_name, failures_of, rows_of
from minitron_mcore.files import write_whole
from minitron_mcore.jobs.bench import BenchJob
from minitron_mcore.runtime.parallel import lay_out
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.stages import export
from minitron_mcore.tables import counted


def run(job: BenchJob, runtime: Runtime) -> dict[str, Any]:
    """Measure `job.pairs`, print tables, and write `job.target`; every rank calls. Returns what the file holds."""
    recipe, config = job.recipe, job.recipe.bench
    lay_out(recipe.parallel, recipe.seed, runtime.world_size)
    on_cpu = runtime.device.type == "cpu"
    architectures = {model.name: model.architecture for _, model in job.pairs}
    with _seats(job, runtime) as seats, _threads(job.threads):
        measured = measure(
            seats,
            job.cases,
            lambda seat, case: prompts_of(case, architectures[seat.model].vocab_size, recipe.seed),
            repeats=config.repeats,
            warmup=config.warmup,
            together=config.loaded == "together",
            say=lambda words: runtime.print(f"bench: {words}"),
        )
        rows = rows_of(
            measured,
            seats,
            job.cases,
            architectures,
            device=cpu_name() if on_cpu else torch.cuda.get_device_name(),
            precision=recipe.precision,
            parallel=recipe.parallel,
            data=runtime.world_size // recipe.parallel.replica_ranks,
        )
    results = {
        "rows": (rows := with_ratios(rows, job.first)),
        "failures": failures_of(measured),
        "papers": {"speed_up": PAPERS, "said": PAPERS_LINE},
        "threads": job.threads if on_cpu else None,
        **{name: getattr(config, name) for name in ("repeats", "warmup", "loaded")},
        "seed": recipe.seed,
        "versions": {"minitron_mcore": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if rows:
        threads = f", {counted(job.threads, 'thread')}" if on_cpu else ""
        runtime.print(f"\n{rows[0]['device']}{threads}, {recipe.precision}: {what_is_shown(config.repeats)}\n")
        runtime.print(f"{tables(rows, job.first)}\n\nfor reference, {PAPERS_LINE}")
    if (target := job.target) is not None:
        runtime.on_main(lambda: _write(target, results))
        runtime.print(f"bench: written to {target}")
    return results


def _write(target: Path, results: dict[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(results, indent=1) + "\n")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Of torch's operations on a CPU, within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _seats(job: BenchJob, runtime: Runtime) -> Iterator[list[Seat]]:
    """Every model in every engine; what is made for engines that read other forms is deleted at the end."""
    recipe, config = job.recipe, job.recipe.bench
    batch = max(case.batch_size for case in job.cases)
    length = max(case.prompt_tokens + case.output_tokens for case in job.cases)
    setting = {"precision": recipe.precision, "device": runtime.device.type, "threads": job.threads}
    setting |= {"batch": batch, "length": length}
    seats: list[Seat] = []
    folders: dict[str, Path] = {}
    try:
        for engine, model in job.pairs:
            if engine == OURS:
                assert model.compared.model is not None
                place = model.compared.model.place
                seats.append(Ours(model.name, place, model.architecture, recipe.parallel, recipe.precision, batch))
                continue
            if model.name not in folders and model.needs_folder(engine):
                folders[model.name] = model.folder or export.run(model.made, runtime)
            gguf = model.gguf or job.place / f"{model.name}.gguf"
            forms = folders.get(model.name), gguf, config.converter
            python = config.python.get(key_of(engine))
            seats.append(Theirs(engine, model.name, *forms, python, setting, config.time_limit))
        yield seats
    finally:
        if runtime.is_main:
            shutil.rmtree(job.place, ignore_errors=True)
