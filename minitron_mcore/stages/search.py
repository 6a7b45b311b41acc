"""Verb `search`: the candidates of a grid, as a table, JSON and CSV; then, unless search.train=false, their ranking.

output/candidates.json     the grid's teacher and budgets, and every candidate with what it costs
output/candidates.csv      the candidates alone
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from minitron_mcore.files import write_whole, writing
from minitron_mcore.jobs.search import SearchJob
from minitron_mcore.search.candidates import table, to_csv

if TYPE_CHECKING:
    from minitron_mcore.runtime.start import Runtime


def run(job: SearchJob, runtime: Runtime | None) -> list[dict[str, Any]]:
    """List the candidates and rank them; every rank calls, and gets their results, the best one first.

    Where they are only listed, one process calls, and gets their rows.
    """
    if job.trials is None or runtime is None:
        return listed(job)
    runtime.on_main(partial(listed, job))
    from minitron_mcore.stages import trials  # a listing does without torch

    return trials.run(job.trials, runtime)


def listed(job: SearchJob) -> list[dict[str, Any]]:
    """The candidates' rows, printed and written. One process calls."""
    budgets = [*job.recipe.search.budget.given()]
    print(f"search: {job.where}: {job.space.summary}")
    for reason, count in job.space.dropped.items():
        print(f"search: {count:,} left out: {reason}")
    print(f"\n{table(job.candidates, budgets)}\n")
    rows = [each.row for each in job.candidates]
    with writing(f"output={job.target}"):
        job.target.mkdir(parents=True, exist_ok=True)
        write_whole(job.target / "candidates.csv", to_csv(rows))
        write_whole(job.target / "candidates.json", json.dumps(described(job, rows), indent=2) + "\n")
    print(f"search: -> {job.target / 'candidates.json'}, candidates.csv", flush=True)
    return rows


def described(job: SearchJob, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What candidates.json holds."""
    space, search = job.space, job.recipe.search
    return {
        "teacher": job.teacher.to_dict(),
        "budgets": {"tolerance": search.budget.tolerance, **search.budget.given()},
        "combinations": space.combinations,
        "shapes": space.shapes,
        "left_out": space.dropped,
        "candidates": rows,
    }
