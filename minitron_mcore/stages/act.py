"""A resolved job carried out, by the stage of its verb. Pure."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_mcore.data.opened import written_over
from minitron_mcore.jobs.job import Job, module_of
from minitron_mcore.runtime.libraries import imported, write_to
from minitron_mcore.runtime.progress import chosen
from minitron_mcore.runtime.pulse import PULSE

if TYPE_CHECKING:
    from minitron_mcore.runtime.start import Runtime


def act(verb: str, job: Job, runtime: Runtime | None) -> Any:
    """Say what `job` warns of, and do it; every rank calls.

    runtime: None for a job that needs no ranks, which the first process alone carries out.
    """
    style, output = chosen(job.recipe.log.progress), job.recipe.output or getattr(job, "folder", None)
    write_to(Path(output) if output else None)
    if runtime is not None:
        runtime.progress_style = style
    for note in job.notes:
        words = f"{verb}: WARNING: {note}"
        print(words, flush=True) if runtime is None else runtime.print(words)
    stage = imported(f"minitron_mcore.stages.{module_of(verb)}")
    with PULSE.within(verb), nullcontext() if runtime is None else runtime.watched(job.recipe.watch):
        result = stage.run(job, runtime)
    if runtime is not None:
        runtime.warn(written_over())
    return result
