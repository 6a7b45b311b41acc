"""Verb `init`: a recipe of the project, and what starts it, copied into the user's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from minitron_mcore.files import whole_file, writing
from minitron_mcore.jobs.init import InitJob
from minitron_mcore.tables import counted, table


def run(job: InitJob, runtime: None) -> list[Path]:
    """Copy what is not there yet, executable where it was, and return all files; without a name, list the recipes."""
    if not job.files:
        print(table(job.recipes, ("recipe", "what it is"), left={0, 1}))
        print("minitron init NAME copies one of them to configs/, and the scripts that start it to launch/", flush=True)
        return []
    for source, target in job.files:
        with writing(f"output={job.recipe.output or '.'}"):
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(target) as partial:
                    shutil.copy(source, partial)
    first = job.files[0][1]
    print(f"init: {first}, and {counted(len(job.files) - 1, 'file')} that go with it", flush=True)
    return [target for _, target in job.files]
