"""Verb `estimate`: what a recipe will need and cost, printed, and written as estimate.json. Needs neither ranks nor
torch."""

from __future__ import annotations

import json

from minitron_mcore.data.corpus import make_parent
from minitron_mcore.estimate.record import record
from minitron_mcore.estimate.words import report
from minitron_mcore.files import write_whole, writing
from minitron_mcore.jobs.estimate import EstimateJob


def run(job: EstimateJob, runtime: None) -> None:
    """Print the estimate and write `job.target`; the first process calls."""
    print(report(job.estimate), flush=True)
    if job.target is None:
        return
    key = f"estimate.output={job.target}"
    make_parent(str(job.target), "estimate.output")
    with writing(key):
        write_whole(job.target, json.dumps(record(job.estimate), indent=2) + "\n")
    print(f"\n-> {job.target}", flush=True)
