"""The folder of a `run`: made at its beginning, shown on a page at its end. One process calls."""

from __future__ import annotations

from pathlib import Path

from minitron_mcore.files import as_yaml, first_line, write_whole
from minitron_mcore.jobs.continuation import SOURCES, sources
from minitron_mcore.jobs.report import PAGE, ReportJob
from minitron_mcore.jobs.run import RECIPE, RunJob
from minitron_mcore.recipe import Recipe, to_yaml, with_keys
from minitron_mcore.report.journal import note_start
from minitron_mcore.stages import report


def begin(job: RunJob) -> None:
    """Make the run's folder, with the recipe in it, and note the start."""
    if not (job.recipe.run.only and (job.folder / RECIPE).is_file()):  # other steps' jobs may be reading it
        establish(job.folder, job.recipe)
    note_start(job.folder, job.world.size, job.world.device)


def establish(folder: Path, recipe: Recipe) -> None:
    """Make the folder of a run, with the recipe in it, and what its files hold."""
    (folder / "done").mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECIPE, to_yaml(with_keys(recipe, {"run.only": None})))
    write_whole(folder / SOURCES, as_yaml(sources(recipe)))


def tell(job: RunJob) -> None:
    """Write the page of the run, and say where. What goes wrong with it is told, and fails nothing."""
    steps = tuple((step.mark(job.folder).stem, step.title) for step, _ in job.steps)
    target = Path(job.recipe.report.output or job.folder / PAGE)
    try:
        report.write(ReportJob(job.recipe, folder=job.folder, target=target, steps=steps))
    except Exception as error:
        print(f"WARNING: no report was written: {first_line(error)}", flush=True)
    else:
        print(f"report: {target}", flush=True)
