"""Verb `inspect`: what a folder or file is, and whether it is whole, as a table or as JSON."""

from __future__ import annotations

import json

from minitron_mcore.errors import InputError
from minitron_mcore.jobs.inspect import InspectJob
from minitron_mcore.report.what_it_is import describe, table, verify_weights
from minitron_mcore.runtime.progress import SILENT
from minitron_mcore.runtime.start import Runtime
from minitron_mcore.tables import counted


def run(job: InspectJob, runtime: Runtime) -> None:
    """Print what `job.path` is; the first rank looks, and every rank raises InputError if it is not recognised."""
    recipe, path = job.recipe, job.path

    def show() -> None:
        found = describe(path)
        # JSON stands alone.
        faults = verify_weights(found, path, SILENT if recipe.json else runtime.progress) if recipe.verify else []
        runtime.print(json.dumps(found, indent=2, default=str) if recipe.json else table(found))
        if faults:
            rule = f"is damaged, {counted(len(faults), 'fault')}: {faults[0]}"
            raise InputError("", path, rule)

    runtime.on_main(show)
